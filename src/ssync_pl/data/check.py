"""Looking through shard sets: counts, damage, duplicates, and leaks between training and validation."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.decode import ALLOWED_EXTENSIONS, member_extension
from ssync_pl.data.index import FolderIndex, ShardEntry, read_index, scan_shard, write_index
from ssync_pl.data.patterns import expand_braces, expand_shards, is_compressed, is_remote, masked_url, shard_name
from ssync_pl.data.remote import fetch_index, stream_shard
from ssync_pl.data.samples import Members, SampleRules, count_objects, eval_sample
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import MissingShardError, ShardError, require, require_shard

_ENOUGH_FOR_PROCESSES = 256 << 20  # bytes; below, starting processes takes longer than reading
_KINDS = {
    "missing": "missing shards",
    "shard": "damaged shards",
    "member": "damaged or refused members",
    "sample": "samples that loaders refuse",
    "key": "duplicate keys",
    "content": "duplicate videos",
    "index": "index.json that does not fit",
}
Spread = tuple[int, float, int]
"""Least, median and most."""


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
    members: dict[str, int]
    frames: int | None = None
    size: tuple[int, int] | None = None  # height, width
    channels: int = 0  # of the masks
    objects: int | None = None  # distinct ids, or channels that are not empty
    digest: str | None = None  # of the decoded frames


@dataclass
class _Shard:
    """What one shard holds, and what is wrong with it."""

    path: str
    samples: list[_Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    entry: ShardEntry | None = None

    @property
    def bytes(self) -> int:
        """Size of the file; of a remote one, of what was read."""
        if not is_remote(self.path) and os.path.exists(self.path):
            return os.path.getsize(self.path)
        return sum(sum(sample.members.values()) for sample in self.samples)

    def add(self, kind: str, key: str | None, message: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(kind, masked_url(self.path), key, message))


def check_shards(
    paths: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    deep: bool = True,
    max_objects: int | None = None,
    num_workers: int | None = None,
    rebuild_index: bool = False,
    progress: bool = False,
) -> CheckReport:
    """Reads shards through, with the readers of training, and reports what they hold and what is wrong with them.

    Damage never stops the check: each problem becomes an entry of the report. Shards are read as they lie on disk, not
    through the index, which is compared with them. The same shards give the same report at any `num_workers`.

    Args:
        paths: Shards (paths or URLs), or several sets of them by name. Keys must be unique in a set, videos in all.
        deep: Decode every member and compare the videos' contents, rather than list the members only.
        max_objects: Most objects a video may have, counted as loaders do: the largest id, or the number of channels.
        num_workers: Processes; 0 reads in this one. `None` takes one per core where there is enough to read.
        rebuild_index: Write the index of the local folders anew instead of comparing it.
        progress: Show a progress bar.

    Raises:
        ConfigError: A setting is out of range, or no shard is named.
        ShardError: The index cannot be written, or a worker process was killed.
    """
    require(max_objects is None or max_objects >= 1, "argument `max_objects` to be at least 1", max_objects)
    require(num_workers is None or num_workers >= 0, "argument `num_workers` to be at least 0", num_workers)
    named = bool(paths) and not isinstance(paths, str)
    require(named, "argument `paths` to be a list of at least one shard", repr(paths))
    given = paths if isinstance(paths, Mapping) else {_prefix(str(paths[0])): [str(path) for path in paths]}
    sets, problems = _drop_repeated(given)
    jobs = [(shard, deep, max_objects) for shards in sets.values() for shard in shards]
    found = {facts.path: facts for facts in _inspect_all(jobs, num_workers, progress)}
    by_set = {name: [found[shard] for shard in shards] for name, shards in sets.items()}
    problems += [problem for facts in found.values() for problem in facts.problems]
    problems += _duplicates(by_set)
    notes: list[str] = []
    if rebuild_index:
        local = [facts for facts in found.values() if not is_remote(facts.path) and not is_compressed(facts.path)]
        _rebuild_indices(local, notes)
    problems += _compare_indices(list(found.values()), notes)
    for name, shards in by_set.items():
        read = Counter(member for facts in shards for sample in facts.samples for member in sample.members)
        unread = [f"{m} ({n})" for m, n in sorted(read.items()) if member_extension(m) not in ALLOWED_EXTENSIONS]
        notes += [f"{name}: members that are never read: {', '.join(unread)}"] if unread else []
    return CheckReport(tuple(_summary(*item) for item in by_set.items()), tuple(problems), tuple(notes), deep)


def group_shards(patterns: Sequence[str]) -> tuple[dict[str, list[str]], list[Problem]]:
    """Sorts what a user names into sets, so that training and validation of one folder are told apart.

    Shards of one folder, or of one pattern, whose names differ only in their last number are one set. Returns shards by
    name of the set, and one problem for each missing shard of a pattern of which others exist; a pattern that is
    malformed or names nothing that exists is a `ConfigError`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    problems: list[Problem] = []
    for pattern in patterns:
        shards: list[str] = []
        errors: list[MissingShardError] = []
        for item in expand_braces(pattern, "patterns"):
            try:
                shards += expand_shards(item, "patterns")
            except MissingShardError as error:
                errors.append(error)
                message = f"Expected the shard to exist, because {pattern!r} names it. Copy it, or correct the range."
                problems.append(Problem("missing", item, None, message))
        if errors and not shards:
            raise errors[0]
        literal = shards in ([pattern], [os.path.expanduser(pattern)])  # as a shell expands `*`
        for shard in shards:
            groups.setdefault((os.path.dirname(shard) if literal else pattern, _prefix(shard)), []).append(shard)
    prefixes = Counter(prefix for _, prefix in groups)
    names = {place: place[1] if prefixes[place[1]] == 1 else f"{place[1]} ({masked_url(place[0])})" for place in groups}
    return {names[place]: shards for place, shards in groups.items()}, problems


def _prefix(shard: str) -> str:
    stem = re.sub(r"\.(tar|tgz|tar\.\w+)$", "", shard_name(shard))
    return re.sub(r"[-_.]?\d+$", "", stem) or os.path.basename(os.path.dirname(shard)) or stem


def _drop_repeated(sets: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[str]], list[Problem]]:
    seen: dict[str, str] = {}
    kept: dict[str, list[str]] = {name: [] for name in sets}
    problems = []
    for name, shard in ((name, shard) for name, shards in sets.items() for shard in shards):
        before = seen.setdefault(shard if is_remote(shard) else os.path.realpath(shard), name)
        if before != name or shard in kept[name]:
            message = f"Expected each shard once, but it is in {before!r} and in {name!r}. Name it once."
            problems.append(Problem("content", masked_url(shard), None, message))
        else:
            kept[name].append(shard)
    return kept, problems


def _inspect_all(jobs: list[tuple[str, bool, int | None]], workers: int | None, progress: bool) -> list[_Shard]:
    from tqdm import tqdm

    if workers is None:
        size = sum(os.path.getsize(shard) for shard, *_ in jobs if os.path.exists(shard))
        enough = size >= _ENOUGH_FOR_PROCESSES or any(is_remote(shard) for shard, *_ in jobs)
        workers = (os.cpu_count() or 1) if enough else 0
    with contextlib.ExitStack() as stack:
        run: Any = map
        if min(workers, len(jobs)) > 1:
            context = multiprocessing.get_context("spawn")  # forked processes can hang on the parent's threads
            run = stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)).map
        try:
            bar = tqdm(run(_inspect, jobs), "checking", len(jobs), unit="shard", leave=False, disable=not progress)
            return list(bar)
        except BrokenProcessPool as error:
            advice = "Most often memory ran out: use fewer with `--workers`."
            raise ShardError(
                f"Expected {workers} processes to read the shards, but one was killed. {advice}"
            ) from error


def _inspect(job: tuple[str, bool, int | None]) -> _Shard:
    """Looks through one shard; of a damaged one, what lies before the damage."""
    path, deep, max_objects = job
    facts = _Shard(path)
    if not is_remote(path) and not is_compressed(path):
        try:
            facts.entry = scan_shard(path)
        except (OSError, ShardError) as error:
            facts.add("shard", None, str(error))
    try:
        for key, members in _members(facts):
            sizes = dict(sorted(members.sizes.items()))
            facts.samples.append(_decode(key, members, sizes, max_objects, facts) if deep else _Sample(key, sizes))
    except (OSError, MemoryError, ShardError) as error:
        if not any(problem.kind == "shard" for problem in facts.problems):
            facts.add("shard", None, str(error))
    for name in facts.entry.ignored if facts.entry else ():
        facts.add("member", None, f"Expected plain files with UTF-8 names, but got {name}. Pack the shard again.")
    if not facts.samples and not facts.problems:
        facts.add("shard", None, "Expected at least one sample, but got none. Name members `<key>.video.npy`.")
    return facts


def _members(facts: _Shard) -> Iterator[tuple[str, Members]]:
    if facts.entry is None:
        yield from stream_shard(facts.path, fields=None)
        return
    with contextlib.closing(ShardReader()) as reader:
        for sample in facts.entry.samples:
            yield sample.key, reader.sample(facts.path, facts.entry, sample)


def _decode(key: str, members: Members, sizes: dict[str, int], max_objects: int | None, facts: _Shard) -> _Sample:
    """Decodes every member, then reads the sample as evaluation does."""
    before = len(facts.problems)
    for name in sizes:
        try:
            if member_extension(name) == "mp4":
                _require_whole_mp4(members.read(name), members.name(name))
            members.decode(name)
        except (ShardError, MemoryError) as error:
            # Other extensions are never read and harm nobody, unless they can execute code.
            if member_extension(name) in ALLOWED_EXTENSIONS or "can execute code" in str(error):
                facts.add("member", key, str(error) or f"Expected `{name}` to fit in memory, but it does not.")
    if len(facts.problems) > before:
        return _Sample(key, sizes)
    try:
        masked = any(name.split(".")[0] == "segmentations" for name in sizes)
        channels = count_objects(members, "channels") if masked else 0
        rules = SampleRules(masks=masked, mask_format="channels" if channels > 1 else "ids", max_objects=max_objects)
        sample = eval_sample(members, rules)
    except ShardError as error:
        facts.add("sample", key, str(error))
        return _Sample(key, sizes)
    video, objects = sample["video"].numpy(), None
    if masked:
        masks = sample["segmentations"].numpy()
        objects = int(masks.any(axis=(0, 1, 2)).sum() if channels > 1 else (np.unique(masks) > 0).sum())
    # Of the frames rather than the stored bytes, so that `.npy` and `.npy.gz` of one video are told to be the same.
    digest = hashlib.blake2b(repr(video.shape).encode() + video.tobytes(), digest_size=16).hexdigest()
    return _Sample(key, sizes, len(video), video.shape[1:3], channels, objects, digest)


def _require_whole_mp4(data: Any, place: str) -> None:
    # Decoders forgive a lost end; the boxes of the format (ISO 14496-12) say how long the file was.
    end = 0
    while end + 8 <= len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        size = int.from_bytes(data[end + 8 : end + 16], "big") if size == 1 else size
        end = end + max(size, 8) if size else len(data)  # 0: up to the end
    require_shard(
        end == len(data), f"{place} to be a whole mp4 file of {end} bytes", len(data), advice="Copy it again."
    )


def _duplicates(by_set: Mapping[str, Sequence[_Shard]]) -> Iterator[Problem]:
    """Finds keys that come twice in a set, and videos that come twice anywhere."""
    videos: dict[str, tuple[str, str, str]] = {}
    for name, shards in by_set.items():
        keys: dict[str, str] = {}
        for facts in shards:
            shown = masked_url(facts.path)
            for key, count in Counter(sample.key for sample in facts.samples).items():
                before = keys.setdefault(key, shown)
                if before != shown or count > 1:
                    what = f"it is in {before} too" if before != shown else f"it comes {count} times in this shard"
                    yield Problem("key", shown, key, f"Expected each key once in a set, but {what}. Rename one.")
            for sample in facts.samples:
                here = (name, shown, sample.key)
                first = here if sample.digest is None else videos.setdefault(sample.digest, here)
                if first != here:
                    leak = f", which is of another set ({first[0]}, here {name}): scores on one leak from the other"
                    message = f"Expected each video once, but its frames are those of {first[1]}, key {first[2]}"
                    message += f"{leak if first[0] != name else ''}. Leave one out."
                    yield Problem("content", shown, sample.key, message)


def _compare_indices(shards: Sequence[_Shard], notes: list[str]) -> Iterator[Problem]:
    """Finds shards that are not what the index beside them says."""
    for folder in dict.fromkeys(os.path.dirname(facts.path) for facts in shards):
        here = [facts for facts in shards if os.path.dirname(facts.path) == folder]
        remote = is_remote(here[0].path)
        try:
            index = None if remote else read_index(folder)
            entries = (
                fetch_index([facts.path for facts in here]) if remote else (index or FolderIndex()).shards.values()
            )
        except ShardError as error:
            yield Problem("index", masked_url(here[0].path), None, str(error))
            continue
        if not entries:
            what = "only one process can read them" if remote else "it is written when they are first used"
            if not remote and Path(folder, "index.json").exists():
                what = "the one that is there is another program's and left as it is"
            notes.append(f"{masked_url(folder)}: no index.json of ours beside the shards; {what}.")
        known = {entry.name: entry for entry in entries or ()}
        for facts in here:
            entry = known.get(shard_name(facts.path))
            if entry is None or facts.problems:
                continue
            said = [(one.key, {m: size for m, (_, size) in one.members.items()}) for one in entry.samples]
            read = [(sample.key, sample.members) for sample in facts.samples]
            if said != read or facts.entry not in (entry, None):
                message = "Expected the samples and the size that the index names, but the shard has others."
                advice = "Copy both again, or run `ssync-pl data check --rebuild-index`."
                yield Problem("index", masked_url(facts.path), None, f"{message} {advice}")


def _rebuild_indices(shards: Sequence[_Shard], notes: list[str]) -> None:
    for folder in dict.fromkeys(Path(facts.path).parent for facts in shards):
        index = read_index(folder) or FolderIndex()
        read = {Path(facts.path).name: facts.entry for facts in shards if Path(facts.path).parent == folder}
        known = {name: entry for name, entry in index.shards.items() if (folder / name).exists()}
        try:
            written = write_index(folder, filter(None, (known | read).values()), index.recipe)
        except OSError as error:
            raise ShardError(f"Expected to write the index of {folder}, but writing failed ({error}).") from error
        notes.append(f"{written or folder}: {'written anew.' if written else 'no name for an index is free.'}")


def _summary(name: str, shards: Sequence[_Shard]) -> SetSummary:
    samples = [sample for facts in shards for sample in facts.samples]
    frames = [sample.frames for sample in samples if sample.frames is not None]
    sizes = Counter("{}x{}".format(*sample.size) for sample in samples if sample.size is not None)
    masked = [sample for sample in samples if sample.channels]
    channels = max((sample.channels for sample in masked), default=0) > 1
    return SetSummary(
        name=name,
        shards=len(shards),
        videos=len(samples),
        frames=sum(frames),
        bytes=sum(facts.bytes for facts in shards),
        frame_sizes=dict(sizes.most_common()),
        frames_a_video=_spread(frames),
        objects_a_video=_spread([sample.objects for sample in masked if sample.objects is not None]),
        mask_format=("channels" if channels else "ids") if masked else None,
        members=dict(sorted(Counter(member for sample in samples for member in sample.members).items())),
        without_masks=sum(not any(m.startswith("segmentations.") for m in sample.members) for sample in samples),
    )


def _spread(values: list[int]) -> Spread | None:
    return (min(values), float(statistics.median(values)), max(values)) if values else None


def render_report(report: CheckReport, *, most: int = 20) -> str:
    """Lays a report out as text, with at most `most` problems of each kind; the last line is the verdict."""
    lines: list[str] = []
    for item in report.sets:
        sizes = ", ".join(
            f"{size} ({n})" if len(item.frame_sizes) > 1 else size for size, n in item.frame_sizes.items()
        )
        without = f"; {item.without_masks} without" if item.without_masks else ""
        masks = f"{item.mask_format}, objects per video: {_range(item.objects_a_video)}{without}"
        lines += [
            item.name,
            f"  shards   {item.shards} ({item.bytes / (1 << 20):.1f} MiB)",
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
    count = sum(item.videos for item in report.sets)
    verdict = "clean" if report.clean else f"{_many(len(report.problems), 'problem')} found"
    lines.append(f"{verdict}: {_many(len(report.sets), 'set')}, {_many(count, 'video')}, {read}")
    return "\n".join(lines)


def _range(values: Spread | None) -> str:
    if values is None:
        return "not counted"
    least, median, most = values
    return str(least) if least == most else f"{least} to {most}, median {median:g}"


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
