"""The tables of quality in README.md and benchmarks/README.md, out of the committed results.

``python benchmarks/tables.py`` writes each one between ``<!-- table: NAME -->`` and ``<!-- /table -->``; ``--check``
only says which are out of date, by the exit status too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from ssync_pl.compare.results import read_results
from ssync_pl.compare.tables import Estimate, estimate, paired_difference
from ssync_pl.data.files import write_bytes
from ssync_pl.metrics.table import METRICS, metric_names

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "settings.md")
HEADLINE = metric_names("segmentation", "headline")
MAIN = (*HEADLINE, "boundary_f")
HOSTS = (
    ("quality_main", "SlotContrast, `c` from above, 11 slots"),
    ("quality_videosaur", "VideoSAUR, `c` from above, 11 slots"),
    ("quality_cluttered", "SlotContrast, clutter, 11 slots"),
    ("quality_solv", "SOLV, `c` from above, 7 slots"),
)
# Where the mode `auto` was compared with others: results, their slot count, and what they are.
MODES = (
    ("quality_quickstart_slots", 7, "quickstart, 7 slots"),
    ("quality_quickstart", 9, "quickstart, 9 slots"),
    ("quality_quickstart_slots", 11, "quickstart, 11 slots"),
    ("quality_quickstart_slots", 15, "quickstart, 15 slots"),
    ("quality_videosaur_auto", 11, "VideoSAUR example, 11 slots"),
    ("quality_solv_auto", 7, "SOLV example, 7 slots"),
    ("quality_savi_auto", 8, "SAVi example, 8 slots"),
    ("quality_crowded_auto", 11, "crowds of 15 to 23, 11 slots"),
    ("real_davis", 7, "DAVIS, 7 slots"),
    ("real_highway", 7, "highway, 7 slots"),
)
ARMS = {
    "auto": "`auto`",
    "auto-any-agreement": "… `least_agreement` 0",
    "share-0.2": "… `gradient_share` 0.2",
    "auto-threshold-0.7": "… `merge_threshold` 0.7",
    "published": "`published`",
    "with": "settings chosen for the host",
    "soft-iou": "… merging by Soft-IoU",
    "srl": "dense alignment (SRL)",
}
# Real video: scores of each source, of slot attention's map and the decoder's.
REAL = {"davis": ("video_mbo", "video_ari"), "highway": ("video_fg_ari", "video_mbo", "video_ari")}
REAL_MAPS = {"encoder_": "slot attention", "": "decoder"}

BASELINES = (
    ("fixed grid", "grid"),
    ("k-means on RGB", "kmeans_rgb"),
    ("k-means on the same features and places", "kmeans_features"),
)


def values(rows: pd.DataFrame, key: str, variant: str, slots: int | None = None) -> dict[int, float]:
    """Values of a column by seed, of one variant and slot count."""
    chosen = rows[(rows["variant"] == variant) & (True if slots is None else rows["slots"] == slots)]
    return chosen.set_index("seed")[key].to_dict()


def write(found: Estimate | None, key: str, signed: bool = False) -> str:
    """An estimate as a cell; differences clear of zero are bold."""
    if found is None:
        return "–"
    text = found.text(METRICS[key].digits, signed=signed)
    clear = signed and found.half_width is not None and abs(found.mean) > found.half_width
    return f"**{text}**" if clear else text


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join([line(head), line(["---"] * len(head)).replace(" ", ""), *(line(row) for row in body)])


def main_table() -> str:
    """The main host: both variants, their paired difference, and what needs no learning."""
    rows = read_results(RESULTS / "quality_main.csv")
    keys = (*MAIN, "slots_per_object")
    body = []
    for name, variant in (("SlotContrast with SSync", "with"), ("SlotContrast without", "without")):
        found = [estimate(list(values(rows, key, variant).values())) for key in keys]
        body.append([name, *(write(one, key) for one, key in zip(found, keys, strict=True))])
    pairs = [paired_difference(values(rows, key, "with"), values(rows, key, "without")) for key in keys]
    body.append(["paired difference", *(write(one, key, True) for one, key in zip(pairs, keys, strict=True))])
    for name, prefix in (("fixed grid of 11 cells", "grid"), ("k-means on RGB, 11 clusters", "kmeans_rgb")):
        cells = [f"{rows[f'{prefix}_{key}'][0]:.3f}" for key in HEADLINE]
        body.append([name, *cells, "–", "–"])
    cells = [f"{mean:.3f}" for mean in _feature_kmeans(rows["slots"][0])]
    body.append(["k-means on the same features and places", *cells, "–", "–"])
    return grid([f"{rows['slots'][0]} slots", *(METRICS[key].title for key in keys)], body)


def quickstart_table() -> str:
    """The first command's host: the decoder's map, slot attention's, and both with redundant slots merged."""
    rows = read_results(RESULTS / "quality_quickstart.csv")
    body = []
    for prefix, words in (("", "decoder"), ("encoder_", "slot attention"), ("merged_", "decoder, merged")):
        keys = [prefix + key for key in HEADLINE]
        arms = [[values(rows, key, variant) for key in keys] for variant in ("without", "with")]
        for name, found in zip(("without SSync", "with SSync"), arms, strict=True):
            cells = (write(estimate(list(one.values())), key) for one, key in zip(found, HEADLINE, strict=True))
            body.append([f"{words}, {name}", *cells])
        pairs = [paired_difference(one, other) for other, one in zip(*arms, strict=True)]
        cells = (write(pair, key, True) for pair, key in zip(pairs, HEADLINE, strict=True))
        body.append(["paired difference", *cells])
    for name, prefix in BASELINES:
        body.append([name, *(f"{rows[f'{prefix}_{key}'][0]:.3f}" for key in HEADLINE)])
    return grid([f"{rows['slots'][0]} slots", *(METRICS[key].title for key in HEADLINE)], body)


def quickstart_slots_table() -> str:
    """The first command's host with other slot counts: each map without SSync, and what SSync changes."""
    rows = read_results(RESULTS / "quality_quickstart_slots.csv")
    maps = {"": "decoder", "merged_": "… merged", "encoder_": "slot attention", "merged_encoder_": "… merged"}
    body = []
    for count in sorted(set(rows["slots"])):
        for prefix, words in maps.items():
            cells = []
            for key in HEADLINE:
                theirs, ours = (values(rows, prefix + key, variant, count) for variant in ("without", "with"))
                found = write(estimate(list(theirs.values())), key), write(paired_difference(ours, theirs), key, True)
                cells.append(", ".join(found))
            body.append(["" if prefix else f"{count} ({len(ours)} seeds)", words, *cells])
    titles = (f"{METRICS[key].title}, with − without" for key in HEADLINE)
    return grid(["slots", "map", *titles], body) + "\n\n" + _falls(rows)


def _feature_kmeans(clusters: int) -> list[float]:
    """Scores of the clustering whose weight of place has the best FG-ARI; means over its starts."""
    rows = pd.read_csv(RESULTS / "feature_kmeans.csv")
    means = rows[rows["clusters"] == clusters].groupby("position_weight")[list(HEADLINE)].mean()
    return means.loc[means[HEADLINE[0]].idxmax()].tolist()


def slots_table() -> str:
    """Slot counts, and what FG-ARI falls by when there are more of them."""
    rows = read_results(RESULTS / "quality_slots.csv")
    body = []
    for count in sorted(set(rows["slots"])):
        seeds = len(values(rows, MAIN[0], "with", count))
        without = estimate(list(values(rows, MAIN[0], "without", count).values()))
        arms = [(key, values(rows, key, "with", count), values(rows, key, "without", count)) for key in MAIN]
        cells = [write(paired_difference(ours, theirs), key, True) for key, ours, theirs in arms]
        body.append([str(count), str(seeds), write(without, MAIN[0]), *cells])
    head = ["slots", "seeds", "FG-ARI without", *(f"{METRICS[key].title}, with − without" for key in MAIN)]
    return grid(head, body) + "\n\n" + _falls(rows)


def _falls(rows: pd.DataFrame) -> str:
    lines = []
    key, arms = MAIN[0], {"without": "without SSync", "with": "with SSync", "auto": "with `auto`"}
    for few, many in ((11, 15), (7, 15)):
        said = []
        for variant in (arm for arm in arms if values(rows, key, arm, few)):
            fall = paired_difference(values(rows, key, variant, few), values(rows, key, variant, many))
            said.append(f"{write(fall, key)} {arms[variant]}")
        lines.append(f"From {few} to {many} slots video FG-ARI falls by {' and by '.join(said)}.")
    return "\n".join(lines)


def ablation_table() -> str:
    """All variants against the run without SSync."""
    rows = read_results(RESULTS / "quality_ablation.csv")
    keys = (*MAIN, "slots_per_object", "unused_slots")
    baseline = "without"
    body = []
    for variant in dict.fromkeys(rows["variant"]):
        seeds = len(values(rows, MAIN[0], variant))
        if variant == baseline:
            found = [write(estimate(list(values(rows, key, variant).values())), key) for key in keys]
        else:
            found = [
                write(paired_difference(values(rows, key, variant), values(rows, key, baseline)), key, True)
                for key in keys
            ]
        body.append([f"`{variant}`", str(seeds), *found])
    return grid(["variant", "seeds", *(METRICS[key].title for key in keys)], body)


def hosts_table() -> str:
    """Every host that was run: with minus without."""
    body = []
    for name, words in HOSTS:
        rows = read_results(RESULTS / f"{name}.csv")
        for variant in dict.fromkeys(rows["variant"]):
            if variant == "without":
                continue
            arms = [(key, values(rows, key, variant), values(rows, key, "without")) for key in MAIN]
            cells = [write(paired_difference(ours, theirs), key, True) for key, ours, theirs in arms]
            without = estimate(list(arms[0][2].values()))
            said = words if variant == "with" else f"{words}, `{variant}`"
            body.append([f"[{said}](results/{name}.csv)", str(len(arms[0][1])), write(without, MAIN[0]), *cells])
    return grid(["host", "seeds", "FG-ARI without", *(f"{METRICS[key].title}, with − without" for key in MAIN)], body)


def modes_table() -> str:
    """Every way to add SSync, and its rival, on every host: differences to the run without."""
    columns = [(of, key) for of in ("", "encoder_") for key in HEADLINE]
    body = []
    for name, slots, words in MODES:
        rows = read_results(RESULTS / f"{name}.csv")
        first = words
        for variant, said in ARMS.items():
            arms = [(key, *(values(rows, of + key, arm, slots) for arm in (variant, "without"))) for of, key in columns]
            if not arms[0][1]:
                continue
            # Where all that is annotated is one object, FG-ARI is 0.
            cells = [write(paired_difference(a, b), k, True) if max(b.values()) > 1e-3 else "–" for k, a, b in arms]
            body.append([first, said, str(len(arms[0][1])), *cells])
            first = ""
    titles = [f"{METRICS[key].title.removeprefix('video ')}, {REAL_MAPS[of]}" for of, key in columns]
    return grid(["host", "with", "seeds", *titles], body)


def exploration_table() -> str:
    """What was tried before settings were chosen: means over the runs that there are, one to three each."""
    rows = read_results(RESULTS / "quality_exploration.csv")
    counts = sorted(set(rows["slots"]))
    body = []
    for variant in sorted(set(rows["variant"]), key=lambda name: (name != "without", name)):
        cells = []
        for count in counts:
            chosen = rows.loc[(rows["slots"] == count) & (rows["variant"] == variant), list(HEADLINE)]
            means = " · ".join(f"{mean:.3f}" for mean in chosen.mean())
            cells.append(f"{means} ({len(chosen)})" if len(chosen) else "")
        body.append([variant, *cells])
    return grid(["variant", *(f"{count} slots" for count in counts)], body)


def real_table(source: str, folder: Path = RESULTS) -> str:
    """Real video: the run without SSync, differences to it, and what needs no learning."""
    rows, known = read_results(folder / f"real_{source}.csv"), pd.read_csv(folder / f"real_{source}_references.csv")
    keys = [(key, f"{of}{key}", said) for key in REAL[source] for of, said in REAL_MAPS.items()]
    keys.append(("video_mbo", "merged_encoder_video_mbo", "slot attention, merged"))
    keys.append(("used_slots", "used_slots", "decoder"))
    body = []
    for variant in dict.fromkeys(rows["variant"]):
        arms = [(key, values(rows, column, variant), values(rows, column, "without")) for key, column, _ in keys]
        if variant == "without":
            cells = [write(estimate(list(ours.values())), key) for key, ours, _ in arms]
        else:
            cells = [write(paired_difference(ours, theirs), key, True) for key, ours, theirs in arms]
        body.append([f"`{variant}`", str(len(arms[0][1])), *cells])
    for _, one in known.iterrows():
        cells = [f"{one[key]:.3f}" if of in REAL_MAPS.values() and key != "used_slots" else "–" for key, _, of in keys]
        body.append([f"{one['partition']}, {one['parts']} parts", "–", *cells])
    return grid(["variant", "seeds", *(f"{METRICS[key].title}, {said}" for key, _, said in keys)], body)


def teachers_table(folder: Path = RESULTS) -> str:
    """Real video: where SSync lets each map teach, and which map is right there."""
    body = []
    for source in REAL:
        rows = pd.read_csv(folder / f"real_{source}_teachers.csv")
        for (variant, region), some in rows.groupby(["variant", "region"], sort=False):
            if variant in ("without", "boundary-only"):
                shares = some.drop(columns=["variant", "region", "seed"]).mean()
                body.append([source, f"`{variant}`", region, *(f"{100 * share:.1f} %" for share in shares)])
    head = ["video", "variant", "region", "of all patches", "teacher right", "pupil right"]
    return grid([*head, "only the teacher", "only the pupil"], body)


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart_table,
    "quickstart_slots": quickstart_slots_table,
    **{f"real_{source}": partial(real_table, source) for source in REAL},
    "real_teachers": teachers_table,
    "modes": modes_table,
    "main": main_table,
    "slots": slots_table,
    "ablation": ablation_table,
    "hosts": hosts_table,
    "exploration": exploration_table,
}


def filled(text: str) -> str:
    """A page with its tables written anew."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match.group(1)} -->\n{TABLES[match.group(1)]()}\n<!-- /table -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- /table -->", replace, text, flags=re.DOTALL)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table is out of date")
    options = parser.parse_args(args)
    stale = False
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if before != after:
            stale = True
            sys.stdout.write(f"{page.relative_to(ROOT)}: {'out of date' if options.check else 'written'}\n")
            if not options.check:
                write_bytes(page, after.encode())
    return int(stale and options.check)


if __name__ == "__main__":
    sys.exit(main())
