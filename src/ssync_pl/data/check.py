"""Looks through shard sets: counts, damage, duplicates, and leaks between training and validation."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssync_pl.data.decode import ALLOWED_EXTENSIONS, EXECUTABLE_EXTENSIONS, member_extension
from ssync_pl.data.index import scan_shard
from ssync_pl.data.patterns import expand_shards, is_compressed, is_remote, masked_url, shard_name
from ssync_pl.data.processes import cpu_count, mapper
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.samples import Members, read_whole
from ssync_pl.data.shards import read_shard
from ssync_pl.errors import ShardError, printable, require

_ENOUGH_FOR_PROCESSES = 256 << 20  # bytes; below, starting processes takes longer than reading
_KINDS = {"shard": "damaged shards", "sample": "damaged or refused samples"}
_KINDS |= {"key": "duplicate keys", "content": "duplicate videos"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `kind` is a key of the report's sections, `key` None when a whole shard is meant."""

    kind: str
    shard: str
    key: str | None
    message: str


@dataclass(frozen=True)
class CheckReport:
    """What a check found: facts of each set by their names, and all that is wrong."""

    sets: tuple[dict[str, Any], ...]
    problems: tuple[Problem, ...]

    @property
    def clean(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


@dataclass(frozen=True)
class _Sample:
    """What one sample holds; None where it cannot be read."""

    shard: str
    key: str
    members: dict[str, int]  # sizes
    shape: tuple[int, ...] | None = None  # of the video, (F, h, w, 3)
    mask_format: str | None = None
    objects: int | None = None  # distinct ids, or channels that are not empty
    digest: str | None = None  # of the decoded frames


def group_shards(patterns: Sequence[str]) -> dict[str, list[str]]:
    """Sorts what a user names into sets: shards of a folder with names that differ only in the last number are one."""
    groups: dict[str, list[str]] = {}
    for shard in (shard for pattern in patterns for shard in expand_shards(pattern, "patterns")):
        stem = re.sub(r"[-_.]?\d*\.(tar|tgz|tar\.\w+)$", "", shard_name(shard))
        groups.setdefault(os.path.join(masked_url(os.path.dirname(shard)), stem), []).append(shard)
    return groups


def check_shards(sets: Mapping[str, Sequence[str]], *, num_workers: int | None = None) -> CheckReport:
    """Decodes every member with the readers of training, past damage and past the index, and reports what is wrong.

    Reports do not depend on `num_workers`: 0 reads in this process, None takes a process per core where it pays.
    """
    from tqdm import tqdm

    require(num_workers is None or num_workers >= 0, "argument `num_workers` to be at least 0", num_workers)
    paths = list(dict.fromkeys(shard for shards in sets.values() for shard in shards))
    require(bool(paths), "argument `sets` to name at least one shard", sets)
    if num_workers is None:
        size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
        num_workers = cpu_count() if size >= _ENOUGH_FOR_PROCESSES or any(map(is_remote, paths)) else 0
    with mapper(min(num_workers, len(paths))) as apply:
        # disable=None shows the bar on terminals only
        bar = tqdm(apply(_inspect, paths), "checking", len(paths), unit="shard", leave=False, disable=None)
        found = dict(zip(paths, bar, strict=True))
    problems = [problem for _, problems in found.values() for problem in problems]
    by_set = {name: [one for path in dict.fromkeys(shards) for one in found[path][0]] for name, shards in sets.items()}
    facts = tuple(_facts(name, len(set(sets[name])), samples) for name, samples in by_set.items())
    return CheckReport(facts, (*problems, *_duplicates(by_set)))


def _inspect(path: str) -> tuple[list[_Sample], list[Problem]]:
    """Looks through one shard, in place what training reads in place; of a damaged one, what lies before the damage."""
    shown, entry, failure = masked_url(path), None, ""
    samples: list[_Sample] = []
    problems: list[Problem] = []
    try:
        entry = None if is_remote(path) or is_compressed(path) else scan_shard(path)
    except (OSError, ShardError) as error:
        failure = str(error)
    for name in entry.ignored if entry else ():
        message = f"Expected plain files with UTF-8 names, but got {name}. Pack the shard again."
        problems.append(Problem("sample", shown, None, message))
    try:
        for key, members in read_shard(path, entry) if entry else stream_shard(path, fields=None):
            try:
                samples.append(_decode(shown, key, members))
            except (ShardError, MemoryError) as error:
                samples.append(_Sample(shown, key, dict(members.sizes)))
                message = str(error) or f"Expected {members.where} to fit in memory, but it does not."
                problems.append(Problem("sample", shown, key, message))
    except (OSError, MemoryError, ShardError) as error:
        failure = str(error)
    if not samples and not problems:
        failure = failure or "Expected at least one sample, but got none. Name members `<key>.video.npy`."
    return samples, [*problems, *([Problem("shard", shown, None, failure)] if failure else [])]


def _decode(shard: str, key: str, members: Members) -> _Sample:
    """Decodes every member that can be read or can do harm, then reads the sample as evaluation does."""
    for name in members.sizes:
        if member_extension(name) in (*ALLOWED_EXTENSIONS, *EXECUTABLE_EXTENSIONS):
            members.decode(name)
    video, masks = read_whole(members)
    stored = None if masks is None else "channels" if masks.dtype == bool else "ids"
    objects = None
    if masks is not None:
        objects = int((masks.any(axis=(0, 1, 2)) if stored == "channels" else np.unique(masks) > 0).sum())
    # Of the frames rather than the stored bytes, so that `.npy` and `.npy.gz` of one video are told to be the same.
    digest = hashlib.blake2b(repr(video.shape).encode() + video.tobytes(), digest_size=16).hexdigest()
    return _Sample(shard, key, dict(members.sizes), video.shape, stored, objects, digest)


def _duplicates(by_set: Mapping[str, Sequence[_Sample]]) -> Iterator[Problem]:
    """Finds keys that come twice in a set, and videos that come twice anywhere."""
    videos: dict[str, tuple[str, _Sample]] = {}
    for name, samples in by_set.items():
        keys: dict[str, str] = {}
        for sample in samples:
            if sample.key in keys:
                message = f"Expected each key once in a set, but it is in {keys[sample.key]} too. Rename one."
                yield Problem("key", sample.shard, sample.key, message)
            keys.setdefault(sample.key, sample.shard)
            place = (name, sample)
            other, first = videos.setdefault(sample.digest, place) if sample.digest else place
            if (other, first) != place:
                leak = f", which is of another set ({other}, here {name}): scores on one leak from the other"
                message = f"Expected each video once, but its frames are those of {first.shard}, key {first.key}"
                message += f"{leak if other != name else ''}. Leave one out."
                yield Problem("content", sample.shard, sample.key, message)


def _facts(name: str, shards: int, samples: Sequence[_Sample]) -> dict[str, Any]:
    """Counts what a set holds: damaged shards too, videos whose members could be listed, frames that could be read."""
    shapes = [sample.shape for sample in samples if sample.shape is not None]
    objects = [sample.objects for sample in samples if sample.objects is not None]
    frames = [shape[0] for shape in shapes]
    return {
        "name": name,
        "shards": shards,
        "bytes": sum(sum(sample.members.values()) for sample in samples),
        "videos": len(samples),
        "frames": sum(frames),
        "frames_per_video": [min(frames), max(frames)] if frames else None,
        "frame_sizes": dict(Counter(f"{height}x{width}" for _, height, width, _ in shapes).most_common()),
        "mask_format": min({sample.mask_format for sample in samples if sample.mask_format}, default=None),
        "objects_per_video": [min(objects), max(objects)] if objects else None,
        "members": dict(sorted(Counter(member for sample in samples for member in sample.members).items())),
    }


def render_report(report: CheckReport) -> str:
    """Lays a report out as text; the last line is the verdict."""
    lines: list[str] = []
    for facts in report.sets:
        shown = {title: _listed(value) for title, value in facts.items() if title != "name"}
        lines += [facts["name"], *(f"  {title:<18} {text}" for title, text in shown.items() if text)]
    for kind, title in _KINDS.items():
        found = [problem for problem in report.problems if problem.kind == kind]
        lines += [f"{title} ({len(found)})"] if found else []
        lines += [f"  {p.shard if p.key is None else f'{p.shard}, key {p.key}'}: {p.message}" for p in found]
    verdict = "clean" if report.clean else f"problems: {len(report.problems)}"
    lines.append(f"{verdict} (videos read: {sum(facts['videos'] for facts in report.sets)})")
    return "\n".join(map(printable, lines))


def _listed(value: Any) -> str:
    """Lays out a number, a range, or counts by name; nothing for what was not counted."""
    if isinstance(value, dict):
        return ", ".join(f"{name} ({count})" for name, count in value.items())
    return " to ".join(map(str, dict.fromkeys(value))) if isinstance(value, list) else str(value or "")
