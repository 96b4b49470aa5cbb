"""Style sheet of the report: one column; wide things scroll in their frame; light or dark as the system."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #5b6570; --line: #d5d9de; --soft: #f4f6f8;
  --good: #0b6b3a; --bad: #b3261e; --link: #0a5ea8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #171b21; --ink: #e4e7eb; --faint: #a3adb8; --line: #3a414b; --soft: #20262e;
    --good: #6ad39a; --bad: #ff9a8f; --link: #7cc0ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main, header, footer { max-width: 74rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.5rem; }
footer { padding-bottom: 3rem; color: var(--faint); font-size: .9rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .25rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, ul, dl, .lead { max-width: 48rem; }
p { margin: .4rem 0; }
.lead { font-size: 1.08rem; }
.note, figcaption { color: var(--faint); font-size: .9rem; }
figcaption { max-width: 48rem; margin: .25rem 0 .5rem; }
figure { margin: 0; }
a { color: var(--link); }
nav ul { padding: 0; margin: .75rem 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; }
ul.verdicts { padding-left: 1.2rem; }
.scroll { position: relative; overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px;
  scrollbar-width: thin; margin: .4rem 0 .8rem; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.hint { position: sticky; left: 0; width: fit-content; margin: 0; padding: 0 .6rem; font-size: .8rem;
  color: var(--faint); visibility: hidden; height: 0; }
@media (max-width: 62rem) { .hint { visibility: visible; height: 1.5rem; } }
@supports (animation-timeline: scroll()) {
  .hint { visibility: hidden; height: 0; animation: hint linear; animation-timeline: scroll(nearest inline); }
  @keyframes hint { from, to { visibility: visible; height: 1.5rem; } } }
.scroll img { display: block; max-width: none; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption, .caption { text-align: left; }
table.numbers { min-width: 100%; }
caption { padding: .5rem .6rem; color: var(--faint); font-size: .85rem; }
caption span { position: sticky; left: .6rem; display: inline-block; max-width: min(44rem, calc(100vw - 4.5rem)); }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; }
th[scope=row] { text-align: left; white-space: normal; min-width: 6.5rem; max-width: 11rem; position: sticky; left: 0;
  background: var(--paper); font-weight: 600; }
thead td { position: sticky; left: 0; background: var(--paper); }
th small, td small { display: block; font-weight: 400; font-size: .82em; color: var(--faint); }
td small.better, td small.worse, td small.more, td small.less { font-size: .86em; }
td small b { font-weight: 700; }
.better { color: var(--good) !important; } .worse { color: var(--bad) !important; }
.more, .less { color: var(--ink) !important; }
tr.reference th, tr.reference td { background: var(--soft); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
table.videos { font-size: .82rem; }
table.videos th, table.videos td { padding: .2rem; text-align: center; border: 0; }
table.videos thead th { white-space: normal; max-width: 22rem; }
table.videos thead th[colspan] { border-bottom: 1px solid var(--line); }
table.videos .frame { position: sticky; left: 0; background: var(--paper); }
table.videos .first { border-left: 1px solid var(--line); padding-left: .45rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .4em;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.key { white-space: nowrap; }
details { margin: .6rem 0; } summary { cursor: pointer; padding: .25rem 0; }
pre { white-space: pre-wrap; background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .8rem; margin: .4rem 0; font-size: .85rem; line-height: 1.4; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; }
@media (max-width: 40rem) { h1 { font-size: 1.4rem; } main, footer,
  header { padding-left: .9rem; padding-right: .9rem; }
  th[scope=row] { max-width: 7.5rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
@media print { body { font-size: 10pt; } nav, .hint { display: none; } .scroll { overflow: visible; border: 0; }
  h2, h3, h4 { break-after: avoid; } figure, tr { break-inside: avoid; } .scroll img { max-width: 100%; height: auto; }
  table.numbers { font-size: 7pt; } th, td { padding: .2rem .25rem; white-space: normal; }
  th[scope=row], thead td, table.videos .frame { position: static; min-width: 0; }
  caption span { position: static; max-width: none; }
  table.videos { width: 100%; table-layout: fixed; } table.videos img { width: 100%; }
  details::details-content { content-visibility: visible; height: auto; } }
"""
"""CSS without anything to load."""
