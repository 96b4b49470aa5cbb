"""What a check of shards found: facts a set, problems, notes, and the text that shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CheckReport", "Problem", "SetSummary", "render_report"]

_KINDS = {
    "missing": "missing shards",
    "shard": "damaged shards",
    "member": "damaged members",
    "refused": "refused members",
    "sample": "samples that loaders refuse",
    "key": "duplicate keys",
    "content": "duplicate videos",
    "name": "shards that share a name",
    "index": "index.json that does not fit",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        kind: `missing`, `shard`, `member`, `refused`, `sample`, `key`, `content`, `name` or `index`.
        shard: Path or URL of the shard, or of the `index.json`.
        key: The sample's key, or `None` when the whole shard is meant.
        message: What was expected, what came and what to do.

    Example:
        >>> Problem("key", "a.tar", "7", "Expected each key once.").key
        '7'
    """

    kind: str
    shard: str
    key: str | None
    message: str


@dataclass(frozen=True)
class SetSummary:
    """Facts of one set of shards.

    Args:
        name: Name of the set: what its shards' names have in common.
        shards: Number of shards, damaged ones included.
        videos: Number of samples whose members could be listed.
        frames: Frames of all videos that could be read.
        bytes: Bytes of all shards (remote: of the members that were read).
        frame_sizes: `"128x128"` (height x width) → number of videos.
        frames_a_video: Least, median and most frames a video; `None` without a readable video.
        objects_a_video: Least, median and most objects a video; `None` when they were not counted.
        mask_format: `ids`, `channels`, or `None` without masks.
        members: Member name → number of samples that have it.
        without_masks: Videos without masks.

    Example:
        >>> SetSummary("train", shards=1, videos=2).videos
        2
    """

    name: str
    shards: int = 0
    videos: int = 0
    frames: int = 0
    bytes: int = 0
    frame_sizes: dict[str, int] = field(default_factory=dict)
    frames_a_video: tuple[int, float, int] | None = None
    objects_a_video: tuple[int, float, int] | None = None
    mask_format: str | None = None
    members: dict[str, int] = field(default_factory=dict)
    without_masks: int = 0


@dataclass(frozen=True)
class CheckReport:
    """Outcome of `ssync_pl.data.check.check_shards`.

    Args:
        sets: One summary a set.
        problems: All that is wrong, in the order of the shards.
        notes: What is worth knowing but not wrong.
        deep: Whether every member was decoded and compared.

    Example:
        >>> CheckReport((), (), (), deep=True).clean
        True
    """

    sets: tuple[SetSummary, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    deep: bool

    @property
    def clean(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values.

        Returns:
            `clean`, `deep`, `sets`, `problems` and `notes`.
        """
        return {"clean": self.clean, **asdict(self)}


def render_report(report: CheckReport, *, most: int = 20) -> str:
    """Lay a report out as text.

    Args:
        report: The report.
        most: Problems that are shown of each kind, at least 1.

    Returns:
        Lines, the last one the verdict.

    Example:
        >>> report = CheckReport((SetSummary("train", 1, 2, 24, 2048, {"8x8": 2}, (12, 12, 12)),), (), (), deep=True)
        >>> print(render_report(report))
        train
          shards   1 (2.0 KiB)
          videos   2
          frames   24 (12 a video)
          size     8x8
          masks    none
        clean: 1 set, 2 videos, every member decoded
    """
    lines: list[str] = []
    for item in report.sets:
        lines.append(item.name)
        lines.extend(f"  {name:<8} {text}" for name, text in _facts(item))
    for kind, title in _KINDS.items():
        found = [problem for problem in report.problems if problem.kind == kind]
        if found:
            lines.append(f"{title} ({len(found)})")
            lines.extend(f"  {_place(problem)}: {problem.message}" for problem in found[:most])
            if len(found) > most:
                lines.append(f"  … and {len(found) - most} more; --json lists all")
    lines.extend(f"note: {note}" for note in report.notes)
    read = "every member decoded" if report.deep else "headers only (--quick): contents were not compared"
    videos = _count(sum(item.videos for item in report.sets), "video")
    verdict = "clean" if report.clean else f"{_count(len(report.problems), 'problem')} found"
    lines.append(f"{verdict}: {_count(len(report.sets), 'set')}, {videos}, {read}")
    return "\n".join(lines)


def _facts(item: SetSummary) -> list[tuple[str, str]]:
    sizes = [f"{size} ({n})" if len(item.frame_sizes) > 1 else size for size, n in item.frame_sizes.items()]
    shown = ", ".join(sizes[:6]) + (f" and {len(sizes) - 6} more" if len(sizes) > 6 else "")
    facts = [("shards", f"{item.shards} ({_bytes(item.bytes)})"), ("videos", str(item.videos))]
    if item.frames_a_video is not None:
        facts += [("frames", f"{item.frames} ({_spread(item.frames_a_video)} a video)"), ("size", shown)]
    if item.mask_format is None:
        facts.append(("masks", "none"))
    else:
        objects = _spread(item.objects_a_video) if item.objects_a_video else "not counted"
        missing = f"; {_count(item.without_masks, 'video')} without" if item.without_masks else ""
        facts.append(("masks", f"{item.mask_format}, objects a video: {objects}{missing}"))
    if item.members:
        facts.append(("members", ", ".join(f"{name} ({n})" for name, n in item.members.items())))
    return facts


def _spread(values: tuple[int, float, int]) -> str:
    least, median, most = values
    return str(least) if least == most else f"{least} to {most}, median {median:g}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _count(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _place(problem: Problem) -> str:
    return problem.shard if problem.key is None else f"{problem.shard}, key {problem.key}"
