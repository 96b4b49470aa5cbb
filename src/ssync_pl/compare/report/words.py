"""What was compared and what came out, in sentences."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from ssync_pl.compare.report.records import Comparison, Group
from ssync_pl.compare.report.scores import MAIN, in_words
from ssync_pl.compare.report.tables import judge

__all__ = ["SHORT", "facts", "group_sentences", "headline", "join", "typed_command"]

SHORT = 3
"""Sentences that the headline quotes; where there are more it counts."""


def join(words: Sequence[object]) -> str:
    """Put words into one phrase.

    Args:
        words: What to list.

    Returns:
        The phrase.

    Example:
        >>> join(["a", "b", "c"])
        'a, b and c'
    """
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def headline(comparison: Comparison) -> str:
    """The paragraph at the top: what was compared, and what came out.

    Args:
        comparison: All runs.

    Returns:
        Plain sentences.
    """
    done, lost = len(comparison.runs), len(comparison.missing)
    others = [f"“{name}”" for name in comparison.descriptions if name != comparison.baseline]
    named = join(others) if len(others) <= 4 else f"{len(others)} of them"
    against = f"{named} against “{comparison.baseline}”"
    sets = list(dict.fromkeys(group.set for group in comparison.groups if group.set != "default"))
    slots = sorted({group.slots for group in comparison.groups})
    seeds = len(comparison.seeds)
    text = f"This report compares the same training in {len(comparison.descriptions)} variants: {against}"
    if not others:
        text = f"This report shows one variant of a training, “{comparison.baseline}”"
    text += f", on {'the set' if len(sets) == 1 else 'the sets'} {join(sets)}" if sets else ""
    text += f", with {join(slots)} slots" if slots else ""
    text += f", {seeds} seed{'' if seeds == 1 else 's'} each. " if seeds else ". "
    if not done:
        return text + "No run has finished yet."
    text += f"{done} of {done + lost} runs finished. " if lost else f"All {done} runs finished. "
    alone = len(comparison.groups) == 1
    sentences = [
        sentence if alone else f"{group.title}: {sentence}"
        for group in comparison.groups
        for sentence in group_sentences(group)
    ]
    if not sentences:
        return text + "There is nothing to compare it with."
    if len(sentences) <= SHORT:
        text += " ".join(sentences)
    else:
        text += _counts(comparison)
    return f"{text} {_caution(comparison)}".strip()


def group_sentences(group: Group) -> list[str]:
    """One sentence a variant: what differs from the baseline, and what does not clearly.

    Args:
        group: Runs of one data set and slot count.

    Returns:
        The sentences, without those of variants that share no seed with the baseline.
    """
    found = []
    for name in group.variants:
        if name == group.baseline:
            continue
        clear, unclear, alone = [], [], []
        for score in MAIN:
            difference = group.difference(name, score.key)
            if difference is None:
                continue
            text = f"{score.label} {in_words(difference, signed=True)}"
            judged = judge(difference, score.better)
            if difference.half_width is None:
                alone.append(text)
            elif judged:
                clear.append(f"{text} ({judged})")
            else:
                unclear.append(text)
        if not (clear or unclear or alone):
            continue
        parts = []
        if clear:
            parts.append(f"clear of zero: {join(clear)}")
        if unclear:
            parts.append(f"within noise: {join(unclear)}")
        if alone:
            parts.append(f"one seed, so no verdict: {join(alone)}")
        found.append(f"“{name}” minus “{group.baseline}”: {'; '.join(parts)}.")
    return found


def _judged(comparison: Comparison, name: str) -> list[str]:
    differences = [(group.difference(name, score.key), score.better) for group in comparison.groups for score in MAIN]
    return [judge(d, better) or "unclear" for d, better in differences if d is not None and d.half_width is not None]


def _counts(comparison: Comparison) -> str:
    parts, quiet = [], []
    for name in comparison.descriptions:
        found = _judged(comparison, name)
        better, worse = found.count("better"), found.count("worse")
        if better or worse:
            parts.append(f"“{name}” is better in {better} and worse in {worse} of {len(found)}")
        elif found:
            quiet.append(f"“{name}”")
    if quiet:
        is_are = "is" if len(quiet) == 1 else "are"
        parts.append(f"{join(quiet)} {is_are} within noise in all")
    if not parts:
        return ""
    place = "the set" if len(comparison.groups) == 1 else "each set and slot count"
    return f"Counted over {join([score.label for score in MAIN])} of {place}: {'; '.join(parts)}."


def _caution(comparison: Comparison) -> str:
    tested = sum(len(_judged(comparison, name)) for name in comparison.descriptions)
    if tested == 0:
        return "With one seed there is no interval and no verdict: another seed may turn every sign."
    fewest = min(len(group.of(name)) for group in comparison.groups for name in group.variants)
    text = "Intervals are 95 % t intervals of paired differences over seeds."
    if tested >= 10:
        text += f" Of {tested} differences about {round(tested / 20) or 1} would be clear of zero by chance."
    if fewest < 5:
        text += " With fewer than five seeds they are wide, and say little where they hold zero."
    return text


def typed_command(comparison: Comparison) -> str:
    """The command that makes the comparison again.

    Args:
        comparison: All runs.

    Returns:
        One line; nothing without `matrix.json`.
    """
    matrix = comparison.matrix
    if not matrix.get("config_files") or not matrix.get("variants"):
        return ""
    words = ["ssync-pl", "compare"]
    for path in matrix["config_files"]:
        words += ["--config", str(path)]
    words += ["--variants", ",".join(str(one.get("name")) for one in matrix["variants"])]
    seeds = [str(seed) for seed in matrix.get("seeds", [])]
    words += ["--seeds", ",".join(seeds) + ("," if len(seeds) == 1 else "")]
    words += ["--slots", ",".join(map(str, matrix.get("slots", [])))]
    if matrix.get("sets") not in (None, [], ["default"]):
        words += ["--sets", ",".join(map(str, matrix["sets"]))]
    if matrix.get("baseline", "without") != "without":
        words += ["--baseline", str(matrix["baseline"])]
    if matrix.get("steps") is not None:
        words += ["--steps", str(matrix["steps"])]
    words += ["--out", str(comparison.folder)]
    extra = [str(word) for word in matrix.get("extra") or []]
    return shlex.join([*words, *(["--", *extra] if extra else [])])


def facts(comparison: Comparison) -> dict[str, str]:
    """What the runs were made with.

    Args:
        comparison: All runs.

    Returns:
        Names to plain text, without those that no run tells.
    """
    runs = comparison.runs

    def known(name: str) -> list[str]:
        return sorted({run.row[name] for run in runs if run.row.get(name)})

    dates = known("date")
    wall = [run.values["wall_seconds"] for run in runs if "wall_seconds" in run.values]
    # What several runs have in common was trained once, and is in the time of each.
    shared = sum(run.values["wall_seconds"] * _shared(run.values) for run in runs if "wall_seconds" in run.values)
    steps = sorted({round(run.values["step"]) for run in runs if "step" in run.values})
    found = {
        "seeds": ", ".join(map(str, comparison.seeds)),
        "training steps": ", ".join(map(str, steps)),
        "wall time": _wall(wall, shared),
        "machine": "; ".join(known("device")),
        "torch": ", ".join(known("torch")),
        "ssync_pl": str(comparison.matrix.get("version", "")),
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "",
    }
    return {name: text for name, text in found.items() if text}


def _shared(values: Mapping[str, float]) -> float:
    return values.get("shared_steps", 0.0) / max(values.get("step", 1.0), 1.0)


def _wall(seconds: Sequence[float], shared: float) -> str:
    if not seconds:
        return ""
    least, most = f"{min(seconds):.0f}", f"{max(seconds):.0f}"
    each = f"{least} s a run" if least == most else f"{least} to {most} s a run"
    return f"{(sum(seconds) - shared) / 60:.1f} min in all, {each}"
