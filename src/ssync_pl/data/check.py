"""Looks through shard sets: counts, damage, duplicates, and leaks between training and validation."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ssync_pl.data.decode import ALLOWED_EXTENSIONS, EXECUTABLE_EXTENSIONS, member_extension
from ssync_pl.data.index import FolderIndex, ShardEntry, read_index, scan_shard
from ssync_pl.data.patterns import expand_braces, expand_shards, is_compressed, is_remote, masked_url, shard_name
from ssync_pl.data.processes import cpu_count, mapper
from ssync_pl.data.remote import fetch_index, stream_shard
from ssync_pl.data.samples import Members, SampleRules, count_objects, eval_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import MissingShardError, ShardError, require, require_shard

_ENOUGH_FOR_PROCESSES = 256 << 20  # bytes; below, starting processes takes longer than reading
_KINDS = {
    "missing": "missing shards",
    "shard": "damaged shards",
    "sample": "damaged or refused samples",
    "key": "duplicate keys",
    "content": "duplicate videos",
    "index": "index.json that does not fit",
}
Spread = tuple[int, float, int]  # least, median and most


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; `kind` is a key of the report's sections, `key` None when a whole shard is meant."""

    kind: str
    shard: str
    key: str | None
    message: str


@dataclass(frozen=True)
class SetSummary:
    """Facts of one set of shards; spreads are `None` when they were not counted."""

    name: str  # what its shards' names have in common
    shards: int = 0  # damaged ones included
    videos: int = 0  # samples whose members could be listed
    frames: int = 0  # of all videos that could be read
    bytes: int = 0  # of all shards; remote: of the members
    frame_sizes: dict[str, int] = field(default_factory=dict)  # "128x128" (height x width) → number of videos
    frames_a_video: Spread | None = None
    objects_a_video: Spread | None = None
    mask_format: str | None = None  # `ids`, `channels`, or `None` without masks
    members: dict[str, int] = field(default_factory=dict)  # name → number of samples that have it
    without_masks: int = 0


@dataclass(frozen=True)
class CheckReport:
    """What a check found: one summary per set, all that is wrong, and what is worth knowing but not wrong."""

    sets: tuple[SetSummary, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    deep: bool

    @property
    def clean(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {"clean": self.clean, **asdict(self)}


@dataclass(frozen=True)
class _Sample:
    """What one sample holds; what needs decoding is None where it was not decoded or cannot be."""

    key: str
    members: dict[str, int]  # sizes
    frames: int | None = None
    size: tuple[int, int] | None = None  # height, width
    mask_format: str | None = None
    objects: int | None = None  # distinct ids, or channels that are not empty
    digest: str | None = None  # of the decoded frames


@dataclass
class _Shard:
    """What one shard holds, and what is wrong with it."""

    path: str
    samples: list[_Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    entry: ShardEntry | None = None  # of a plain local shard, as it is on disk

    def add(self, kind: str, key: str | None, message: str) -> None:
        self.problems.append(Problem(kind, masked_url(self.path), key, message))


def check_shards(
    sets: Mapping[str, Sequence[str]], *, deep: bool = True, num_workers: int | None = None, progress: bool = False
) -> CheckReport:
    """Reads shards through, with the readers of training, and reports what they hold and what is wrong with them.

    Damage never stops the check: each problem becomes an entry of the report. Shards are read as they lie on disk, not
    through the index, which is compared with them. The same shards give the same report at any `num_workers`.

    Args:
        sets: Shards (paths or URLs) of each set, by its name. Keys must be unique in a set, videos in all.
        deep: Decode every member and compare the videos' contents, rather than list the members only.
        num_workers: Processes; 0 reads in this one. `None` takes one per core where there is enough to read.
        progress: Show a progress bar.

    Raises:
        ConfigError: A setting is out of range, or no shard is named.
        ShardError: A worker process was killed.
    """
    from tqdm import tqdm

    require(num_workers is None or num_workers >= 0, "argument `num_workers` to be at least 0", num_workers)
    paths = list(dict.fromkeys(shard for shards in sets.values() for shard in shards))
    require(bool(paths), "argument `sets` to name at least one shard", sets)
    if num_workers is None:
        size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
        num_workers = cpu_count() if size >= _ENOUGH_FOR_PROCESSES or any(map(is_remote, paths)) else 0
    try:
        with mapper(min(num_workers, len(paths))) as apply:
            inspected = apply(partial(_inspect, deep), paths)
            bar = tqdm(inspected, "checking", len(paths), unit="shard", leave=False, disable=not progress)
            found = dict(zip(paths, bar, strict=True))
    except BrokenProcessPool as error:
        advice = "Most often memory ran out: use fewer with `--workers`."
        raise ShardError(f"Expected {num_workers} processes to read shards, but one was killed. {advice}") from error
    by_set = {name: [found[shard] for shard in dict.fromkeys(shards)] for name, shards in sets.items()}
    notes: list[str] = []
    problems = [problem for shard in found.values() for problem in shard.problems]
    problems += [*_duplicates(by_set), *_compare_indices(list(found.values()), notes)]
    for name, shards in by_set.items():
        held = Counter(member for shard in shards for sample in shard.samples for member in sample.members)
        unread = [f"{m} ({n})" for m, n in sorted(held.items()) if member_extension(m) not in ALLOWED_EXTENSIONS]
        notes += [f"{name}: members that are never read: {', '.join(unread)}"] if unread else []
    return CheckReport(tuple(_summary(*item) for item in by_set.items()), tuple(problems), tuple(notes), deep)


def group_shards(patterns: Sequence[str]) -> tuple[dict[str, list[str]], list[Problem]]:
    """Sorts what a user names into sets, so that training and validation of one folder are told apart.

    Shards of one folder whose names differ only in their last number are one set. Returns shards by name of the set,
    and one problem for each missing shard of a pattern of which others exist; a pattern that is malformed or names
    nothing that exists is a `ConfigError`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    problems: list[Problem] = []
    for pattern in patterns:
        shards: list[str] = []
        missing: list[MissingShardError] = []
        for item in expand_braces(pattern, "patterns"):
            try:
                shards += expand_shards(item, "patterns")
            except MissingShardError as error:
                missing.append(error)
                message = f"Expected the shard to exist, because {pattern!r} names it. Copy it, or correct the range."
                problems.append(Problem("missing", item, None, message))
        if missing and not shards:
            raise missing[0]
        for shard in shards:
            stem = re.sub(r"[-_.]?\d*\.(tar|tgz|tar\.\w+)$", "", shard_name(shard))
            groups.setdefault((os.path.dirname(shard), stem), []).append(shard)
    stems = Counter(stem for _, stem in groups)
    names = {
        (folder, stem): stem if stem and stems[stem] == 1 else f"{stem} ({masked_url(folder)})".lstrip()
        for folder, stem in groups
    }
    return {names[place]: shards for place, shards in groups.items()}, problems


def _inspect(deep: bool, path: str) -> _Shard:
    """Looks through one shard; of a damaged one, what lies before the damage."""
    shard = _Shard(path)
    try:
        if not is_remote(path) and not is_compressed(path):
            shard.entry = scan_shard(path)
    except (OSError, ShardError) as error:
        shard.add("shard", None, str(error))
    try:
        for key, members in _members(shard, None if deep else ()):
            shard.samples.append(_decode(key, members, shard) if deep else _Sample(key, dict(members.sizes)))
    except (OSError, MemoryError, ShardError) as error:
        if not any(problem.kind == "shard" for problem in shard.problems):
            shard.add("shard", None, str(error))
    for name in shard.entry.ignored if shard.entry else ():
        shard.add("sample", None, f"Expected plain files with UTF-8 names, but got {name}. Pack the shard again.")
    if not shard.samples and not shard.problems:
        shard.add("shard", None, "Expected at least one sample, but got none. Name members `<key>.video.npy`.")
    return shard


def _members(shard: _Shard, fields: Collection[str] | None) -> Iterator[tuple[str, Members]]:
    """Reads in place what training reads in place, and streams the rest, and what lies before damage."""
    if shard.entry is None:
        yield from stream_shard(shard.path, fields=fields)
        return
    with contextlib.closing(ShardReader()) as reader:
        for sample in shard.entry.samples:
            yield sample.key, reader.sample(shard.path, shard.entry, sample)


def _decode(key: str, members: Members, shard: _Shard) -> _Sample:
    """Decodes every member that can be read or can do harm, then reads the sample as evaluation does."""
    sizes = dict(members.sizes)
    try:
        for name in sizes:
            if member_extension(name) == "mp4":
                _require_whole_mp4(members.read(name), members.name(name))
            if member_extension(name) in (*ALLOWED_EXTENSIONS, *EXECUTABLE_EXTENSIONS):
                members.decode(name)
        masked = any(name.split(".")[0] == "segmentations" for name in sizes)
        stored: Any = None if not masked else "channels" if count_objects(members, "channels") > 1 else "ids"
        sample = eval_sample(members, SampleRules(masks=masked, mask_format=stored or "ids"))
    except (ShardError, MemoryError) as error:
        shard.add("sample", key, str(error) or f"Expected {members.where} to fit in memory, but it does not.")
        return _Sample(key, sizes)
    video, objects = sample["video"].numpy(), None
    if masked:
        masks = sample["segmentations"].numpy()
        objects = int((masks.any(axis=(0, 1, 2)) if stored == "channels" else np.unique(masks) > 0).sum())
    # Of the frames rather than the stored bytes, so that `.npy` and `.npy.gz` of one video are told to be the same.
    digest = hashlib.blake2b(repr(video.shape).encode() + video.tobytes(), digest_size=16).hexdigest()
    return _Sample(key, sizes, len(video), video.shape[1:3], stored, objects, digest)


def _require_whole_mp4(data: Any, place: str) -> None:
    # Decoders forgive a lost end; the boxes of the format (ISO 14496-12) say how long the file was.
    end = 0
    while end + 8 <= len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        size = int.from_bytes(data[end + 8 : end + 16], "big") if size == 1 else size
        end = end + max(size, 8) if size else len(data)  # 0: up to the end
    expected = f"{place} to be a whole mp4 file of {end} bytes"
    require_shard(end == len(data), expected, len(data), advice="Copy it again.")


def _duplicates(by_set: Mapping[str, Sequence[_Shard]]) -> Iterator[Problem]:
    """Finds keys that come twice in a set, and videos that come twice anywhere."""
    videos: dict[str, tuple[str, str, str]] = {}
    for name, shards in by_set.items():
        keys: dict[str, str] = {}
        for shown, sample in ((masked_url(shard.path), sample) for shard in shards for sample in shard.samples):
            if sample.key in keys:
                message = f"Expected each key once in a set, but it is in {keys[sample.key]} too. Rename one."
                yield Problem("key", shown, sample.key, message)
            keys.setdefault(sample.key, shown)
            if sample.digest is None:
                continue
            first = videos.setdefault(sample.digest, (name, shown, sample.key))
            if first != (name, shown, sample.key):
                leak = f", which is of another set ({first[0]}, here {name}): scores on one leak from the other"
                message = f"Expected each video once, but its frames are those of {first[1]}, key {first[2]}"
                message += f"{leak if first[0] != name else ''}. Leave one out."
                yield Problem("content", shown, sample.key, message)


def _compare_indices(shards: Sequence[_Shard], notes: list[str]) -> Iterator[Problem]:
    """Finds shards that are not what the index beside them says."""
    for folder in dict.fromkeys(os.path.dirname(shard.path) for shard in shards):
        here = [shard for shard in shards if os.path.dirname(shard.path) == folder]
        remote = is_remote(here[0].path)
        try:
            local = [] if remote else list((read_index(folder) or FolderIndex()).shards.values())
            entries = fetch_index([shard.path for shard in here]) if remote else local
        except ShardError as error:
            yield Problem("index", masked_url(here[0].path), None, str(error))
            continue
        if not entries:
            what = "only one process can read them" if remote else "it is written when they are first used"
            notes.append(f"{masked_url(folder)}: no index.json of ours beside the shards; {what}.")
        known = {entry.name: entry for entry in entries or ()}
        for shard in here:
            entry = known.get(shard_name(shard.path))
            if entry is None or shard.problems:
                continue
            said = [(one.key, {name: size for name, (_, size) in one.members.items()}) for one in entry.samples]
            read = [(sample.key, sample.members) for sample in shard.samples]
            if said != read or shard.entry not in (entry, None):
                message = "Expected the samples and the size that the index names, but the shard has others."
                advice = "Copy both again, or delete the index: it is built again."
                yield Problem("index", masked_url(shard.path), None, f"{message} {advice}")


def _summary(name: str, shards: Sequence[_Shard]) -> SetSummary:
    samples = [sample for shard in shards for sample in shard.samples]
    frames = [sample.frames for sample in samples if sample.frames is not None]
    sizes = Counter("{}x{}".format(*sample.size) for sample in samples if sample.size is not None)
    formats = {sample.mask_format for sample in samples if sample.mask_format is not None}
    on_disk = {shard.path: os.path.getsize(shard.path) for shard in shards if os.path.isfile(shard.path)}
    return SetSummary(
        name=name,
        shards=len(shards),
        videos=len(samples),
        frames=sum(frames),
        bytes=sum(on_disk.get(shard.path) or sum(sum(s.members.values()) for s in shard.samples) for shard in shards),
        frame_sizes=dict(sizes.most_common()),
        frames_a_video=_spread(frames),
        objects_a_video=_spread([sample.objects for sample in samples if sample.objects is not None]),
        mask_format=min(formats, default=None),
        members=dict(sorted(Counter(member for sample in samples for member in sample.members).items())),
        without_masks=sum(not any(m.startswith("segmentations.") for m in sample.members) for sample in samples),
    )


def _spread(values: list[int]) -> Spread | None:
    return (min(values), float(statistics.median(values)), max(values)) if values else None


def render_report(report: CheckReport, *, most: int = 20) -> str:
    """Lays a report out as text, with at most `most` problems of each kind; the last line is the verdict."""
    lines: list[str] = []
    for item in report.sets:
        sizes = ", ".join(f"{size} ({n})" for size, n in item.frame_sizes.items())
        without = f"; {item.without_masks} without" if item.without_masks else ""
        masks = f"{item.mask_format}, objects per video: {_range(item.objects_a_video)}{without}"
        lines += [
            item.name,
            f"  shards   {item.shards} ({item.bytes / 2**20:.1f} MiB)",
            f"  videos   {item.videos}",
        ]
        if item.frames_a_video is not None:
            lines += [f"  frames   {item.frames} ({_range(item.frames_a_video)} per video)", f"  size     {sizes}"]
        lines.append(f"  masks    {masks if item.mask_format else 'none'}")
        lines.append(f"  members  {', '.join(f'{m} ({n})' for m, n in item.members.items())}")
    for kind, title in _KINDS.items():
        found = [problem for problem in report.problems if problem.kind == kind]
        lines += [f"{title} ({len(found)})"] if found else []
        lines += [f"  {p.shard if p.key is None else f'{p.shard}, key {p.key}'}: {p.message}" for p in found[:most]]
        lines += [f"  … and {len(found) - most} more; --json lists all"] if len(found) > most else []
    lines += [f"note: {note}" for note in report.notes]
    read = "every member decoded" if report.deep else "members listed only (--quick)"
    counts = {"set": len(report.sets), "video": sum(item.videos for item in report.sets)}
    looked = ", ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items())
    wrong = len(report.problems)
    verdict = "clean" if report.clean else f"{wrong} problem{'s' * (wrong != 1)} found"
    return "\n".join([*lines, f"{verdict}: {looked}, {read}"])


def _range(values: Spread | None) -> str:
    if values is None:
        return "not counted"
    least, median, most = values
    return str(least) if least == most else f"{least} to {most}, median {median:g}"
