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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.decode import (
    ALLOWED_EXTENSIONS,
    count_frames,
    decode_video,
    member_extension,
    require_allowed,
)
from ssync_pl.data.index import INDEX_NAMES, ShardEntry, read_index, scan_shard, write_index
from ssync_pl.data.patterns import expand_braces, expand_shards, is_compressed, is_remote, masked_url, shard_name
from ssync_pl.data.remote import fetch_index, stream_shard
from ssync_pl.data.samples import Members, arrange_masks, check_video, find_member
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, MissingShardError, ShardError

__all__ = ["CheckReport", "Problem", "SetSummary", "check_shards", "group_shards", "render_report"]

_ENOUGH_FOR_PROCESSES = 256 << 20  # bytes; below, starting processes takes longer than reading
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
    """One thing that is wrong; `kind` is a key of the report's sections, `key` None when a whole shard is meant."""

    kind: str
    shard: str
    key: str | None
    message: str


@dataclass(frozen=True)
class SetSummary:
    """Facts of one set of shards; spreads are least, median and most per video, `None` when they were not counted."""

    name: str  # what its shards' names have in common
    shards: int = 0  # damaged ones included
    videos: int = 0  # samples whose members could be listed
    frames: int = 0  # of all videos that could be read
    bytes: int = 0  # of all shards; remote: of the members
    frame_sizes: dict[str, int] = field(default_factory=dict)  # "128x128" (height x width) → number of videos
    frames_a_video: tuple[int, float, int] | None = None
    objects_a_video: tuple[int, float, int] | None = None
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
        """Return the report as JSON values: `clean`, `deep`, `sets`, `problems` and `notes`."""
        return {"clean": self.clean, **asdict(self)}


@dataclass(frozen=True)
class _Sample:
    key: str
    members: dict[str, int]
    shape: tuple[int, int, int] | None = None  # (F, h, w)
    channels: int = 0  # of the masks
    objects: tuple[int, int] | None = None  # distinct ids, channels that are not empty; None when not decoded
    digest: str | None = None  # of the decoded frames


@dataclass(frozen=True)
class _Shard:
    path: str
    size: int
    samples: tuple[_Sample, ...]
    problems: tuple[Problem, ...]
    entry: ShardEntry | None = None

    @property
    def shown(self) -> str:
        return masked_url(self.path)


def check_shards(
    paths: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    deep: bool = True,
    max_objects: int | None = None,
    num_workers: int | None = None,
    rebuild_index: bool = False,
    progress: bool = False,
) -> CheckReport:
    """Read shards through, with the readers of training, and report what they hold and what is wrong with them.

    Damage never stops the check: each problem becomes an entry of the report. Shards are read as they lie on disk, not
    through the index, which is compared with them. The same shards give the same report at any `num_workers`.

    Args:
        paths: Shards (paths or URLs), or several sets of them by name. Keys must be unique in a set, videos in all.
        deep: Decode every member and compare the videos' contents, rather than read headers only.
        max_objects: Most objects a video may have, counted as loaders do: the largest id, or the number of channels.
        num_workers: Processes; 0 reads in this one. `None` takes one per core where there is enough to read.
        rebuild_index: Write the index of the local folders anew instead of comparing it.
        progress: Show a progress bar.

    Raises:
        ConfigError: A setting is out of range, or no shard is named.
        ShardError: The index cannot be written, or a worker process was killed.
    """
    for name, value, least in (("max_objects", max_objects, 1), ("num_workers", num_workers, 0)):
        if value is not None and value < least:
            raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
    if isinstance(paths, str) or not paths:
        raise ConfigError(f"Expected argument `paths` to be a list of at least one shard, but got {paths!r}.")
    named = paths if isinstance(paths, Mapping) else {_prefix(str(paths[0])): [str(path) for path in paths]}
    problems: list[Problem] = []
    sets = _drop_repeated(named, problems)
    jobs = [(shard, deep, max_objects) for shards in sets.values() for shard in shards]
    found = {facts.path: facts for facts in _inspect_all(jobs, num_workers, progress)}
    by_set = {name: [found[shard] for shard in shards] for name, shards in sets.items()}
    for facts in found.values():
        problems.extend(facts.problems)
    problems.extend(_repeated(by_set))
    notes: list[str] = []
    _compare_indices([f for f in found.values() if not is_remote(f.path)], rebuild_index, problems, notes)
    for name, shards in by_set.items():
        _compare_remote(name, [f for f in shards if is_remote(f.path)], problems, notes)
        read = Counter(member for facts in shards for sample in facts.samples for member in sample.members)
        unread = [f"{m} ({n})" for m, n in sorted(read.items()) if member_extension(m) not in ALLOWED_EXTENSIONS]
        if unread:
            notes.append(f"{name}: members that are never read: {', '.join(unread)}")
    return CheckReport(tuple(_summary(*item) for item in by_set.items()), tuple(problems), tuple(notes), deep)


def group_shards(patterns: Sequence[str]) -> tuple[dict[str, list[str]], list[Problem]]:
    """Sort what a user names into sets, so that training and validation of one folder are told apart.

    Shards of one pattern whose names differ only in their last number are one set; so are shards of one folder that
    are named one by one, as a shell does with `*`.

    Args:
        patterns: Paths, URLs and patterns.

    Returns:
        Shards by name of the set, and one problem for each missing shard of a pattern of which others exist.

    Raises:
        ConfigError: A pattern is malformed, or nothing that it names exists.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    problems: list[Problem] = []
    for pattern in patterns:
        shards: list[str] = []
        missing: list[MissingShardError] = []
        for item in expand_braces(pattern, "patterns"):
            try:
                shards.extend(expand_shards(item, "patterns"))
            except MissingShardError as error:
                missing.append(error)
                message = f"Expected the shard to exist, because {pattern!r} names it. Copy it, or correct the range."
                problems.append(Problem("missing", item, None, message))
        if missing and not shards:
            raise missing[0]
        literal = shards in ([pattern], [os.path.expanduser(pattern)])
        for shard in shards:
            groups.setdefault((os.path.dirname(shard) if literal else pattern, _prefix(shard)), []).append(shard)
    prefixes = Counter(prefix for _, prefix in groups)
    return {
        (prefix if prefixes[prefix] == 1 else f"{prefix} ({masked_url(source)})"): shards
        for (source, prefix), shards in groups.items()
    }, problems


def _prefix(shard: str) -> str:
    stem = re.sub(r"\.(tar|tgz|tar\.\w+)$", "", shard_name(shard))
    return re.sub(r"[-_.]?\d+$", "", stem) or os.path.basename(os.path.dirname(shard)) or stem


def _drop_repeated(sets: Mapping[str, Sequence[str]], problems: list[Problem]) -> dict[str, list[str]]:
    seen: dict[str, str] = {}
    kept: dict[str, list[str]] = {name: [] for name in sets}
    for name, shards in sets.items():
        for shard in shards:
            place = shard if is_remote(shard) else os.path.realpath(shard)
            if place in seen:
                message = f"Expected each shard once, but it is in {seen[place]!r} and in {name!r}. Name it once."
                problems.append(Problem("content", masked_url(shard), None, message))
            else:
                seen[place] = name
                kept[name].append(shard)
    return kept


def _inspect_all(jobs: list[tuple[str, bool, int | None]], workers: int | None, progress: bool) -> list[_Shard]:
    from tqdm import tqdm

    if workers is None:
        local = [shard for shard, *_ in jobs if os.path.exists(shard)]
        enough = sum(map(os.path.getsize, local)) >= _ENOUGH_FOR_PROCESSES or any(is_remote(s) for s, *_ in jobs)
        workers = (os.cpu_count() or 1) if enough else 0
    with contextlib.ExitStack() as stack:
        run: Any = map
        if min(workers, len(jobs)) > 1:
            context = multiprocessing.get_context("spawn")  # forked processes can hang on the parent's threads
            run = stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)).map
        try:
            return list(
                tqdm(run(_inspect, jobs), "checking", len(jobs), unit="shard", leave=False, disable=not progress)
            )
        except BrokenProcessPool as error:
            raise ShardError(
                f"Expected {workers} processes to read the shards, but one was killed, most often because memory ran "
                "out. Use fewer with `--workers`."
            ) from error


def _inspect(job: tuple[str, bool, int | None]) -> _Shard:
    """Look through one shard; of a damaged one, what lies before the damage."""
    path, deep, max_objects = job
    samples: list[_Sample] = []
    problems: list[Problem] = []
    entry: ShardEntry | None = None
    try:
        if not is_remote(path) and not is_compressed(path):
            try:
                entry = scan_shard(path)
            except ShardError as error:
                problems.append(Problem("shard", path, None, str(error)))
        for key, members in _members(path, entry):
            sample, found = _inspect_sample(key, members, deep, max_objects)
            samples.append(sample)
            problems.extend(Problem(kind, masked_url(path), key, message) for kind, message in found)
        for name in entry.ignored if entry else ():
            message = f"Expected plain files with UTF-8 names only, but {name} is none. Pack the shard again."
            problems.append(Problem("member", path, None, message))
    except (OSError, MemoryError, ShardError) as error:
        if not any(problem.kind == "shard" for problem in problems):
            problems.append(Problem("shard", masked_url(path), None, str(error)))
    if not samples and not problems:
        message = "Expected at least one sample, but got none. Name members `<key>.video.npy`."
        problems.append(Problem("shard", masked_url(path), None, message))
    remote = is_remote(path) or not os.path.exists(path)
    size = sum(sum(sample.members.values()) for sample in samples) if remote else os.path.getsize(path)
    return _Shard(path, size, tuple(samples), tuple(problems), entry)


def _members(path: str, entry: ShardEntry | None) -> Iterator[tuple[str, Members]]:
    if entry is None:
        yield from stream_shard(path)
        return
    with contextlib.closing(ShardReader()) as reader:
        for sample in entry.samples:
            yield sample.key, reader.sample(path, entry, sample)


def _inspect_sample(
    key: str, members: Members, deep: bool, max_objects: int | None
) -> tuple[_Sample, list[tuple[str, str]]]:
    facts = _Sample(key, dict(sorted(members.sizes.items())))
    problems: list[tuple[str, str]] = []
    arrays: dict[str, np.ndarray] = {}
    for name in facts.members:
        try:
            array = _look(name, members, deep)
        except (ShardError, MemoryError) as error:
            refused = "can execute code" in str(error)
            # Other extensions are never read and harm nobody; they are only counted.
            if refused or member_extension(name) in ALLOWED_EXTENSIONS:
                problems.append(("refused" if refused else "member", str(error) or f"`{name}` does not fit in memory."))
            continue
        if isinstance(array, np.ndarray) and array.dtype.kind in "buif":
            arrays[name] = array
        elif isinstance(array, np.ndarray):
            problems.append(("sample", f"Expected {members.name(name)} to hold numbers, but got {array.dtype}."))
    try:
        name = find_member(members.sizes, "video", members.where)
        if name in arrays:
            video = arrays[name][None] if arrays[name].ndim == 3 else arrays[name]
            shape = check_video(video, members.name(name)).shape[:3]
            facts = replace(facts, shape=shape, digest=_digest(video) if deep else None)
        if any(name.split(".")[0] == "segmentations" for name in members.sizes):
            name = find_member(members.sizes, "segmentations", members.where)
            if name in arrays and facts.shape is not None:
                masks = arrange_masks(arrays[name], facts.shape[0], facts.shape[1:], members.name(name))
                facts = replace(facts, channels=masks.shape[-1], objects=_count_objects(masks) if deep else None)
                least, most = int(masks.min(initial=0)), int(masks.max(initial=0))
                count = most if facts.channels == 1 else facts.channels
                if least < 0 or (max_objects is not None and count > max_objects):
                    limit = "" if max_objects is None else f", at most {max_objects} objects (max_objects)"
                    raise ShardError(
                        f"Expected {members.name(name)} to hold ids from 0 on{limit}, but got {count}, least "
                        f"id {least}. Renumber them, or raise the limit."
                    )
    except ShardError as error:
        if not problems:
            problems.append(("sample", str(error)))
    return facts, problems


def _look(name: str, members: Members, deep: bool) -> Any:
    """Decode a member, or give an array of its shape and type that takes no memory; members of no use are not read."""
    extension = require_allowed(name, members.where)
    if extension == "mp4":
        _require_whole_mp4(members.read(name), members.name(name))
    if deep or extension not in ("npy", "npy.gz", "mp4"):
        return members.decode(name)
    if extension == "mp4":
        data, place = members.read(name), members.name(name)
        first = next(decode_video(data, place, [0]))
        return np.broadcast_to(first, (count_frames(data, place), *first.shape))
    header = members.header(name)
    return np.broadcast_to(np.zeros((), header.dtype), header.shape)


def _require_whole_mp4(data: Any, place: str) -> None:
    # Decoders forgive a lost end; the boxes of the format (ISO 14496-12) say how long the file was.
    end = 0
    while end + 8 <= len(data):
        size = int.from_bytes(data[end : end + 4], "big")
        size = int.from_bytes(data[end + 8 : end + 16], "big") if size == 1 else size
        end = end + max(size, 8) if size else len(data)  # 0: up to the end
    if end != len(data):
        raise ShardError(
            f"Expected {place} to be a whole mp4 file of {end} bytes, but it has {len(data)}. Copy it again."
        )


def _count_objects(masks: np.ndarray) -> tuple[int, int]:
    distinct = int((np.unique(masks) > 0).sum()) if masks.shape[-1] == 1 else 0
    return distinct, int((masks != 0).any(axis=(0, 1, 2)).sum())


def _digest(video: np.ndarray) -> str:
    # Of the frames rather than the stored bytes, so that `.npy` and `.npy.gz` of one video are told to be the same.
    state = hashlib.blake2b(repr(video.shape).encode(), digest_size=16)
    for frame in video:
        state.update(np.ascontiguousarray(frame).tobytes())
    return state.hexdigest()


def _repeated(by_set: Mapping[str, Sequence[_Shard]]) -> Iterator[Problem]:
    """Keys that come twice in a set, videos that come twice anywhere, and shards of a set that share their name."""
    videos: dict[str, tuple[str, str, str]] = {}
    for name, shards in by_set.items():
        keys: dict[str, str] = {}
        names: dict[str, str] = {}
        for facts in shards:
            before = names.setdefault(shard_name(facts.path), facts.shown)
            if before != facts.shown:
                message = (
                    f"Expected shards of one set to have names of their own, but {before} has the same. Rename one."
                )
                yield Problem("name", facts.shown, None, message)
            for key, count in Counter(sample.key for sample in facts.samples).items():
                before = keys.setdefault(key, facts.shown)
                if before != facts.shown or count > 1:
                    what = (
                        f"it is in {before} too" if before != facts.shown else f"it comes {count} times in this shard"
                    )
                    message = (
                        f"Expected each key once in a set, its members one behind the other, but {what}. Rename one."
                    )
                    yield Problem("key", facts.shown, key, message)
            for sample in facts.samples:
                if sample.digest is None:
                    continue
                here = (name, facts.shown, sample.key)
                first = videos.setdefault(sample.digest, here)
                if first != here:
                    leak = f", which is of another set ({first[0]}, here {name}): scores on one leak from the other"
                    message = (
                        f"Expected each video once, but its frames are those of {first[1]}, key {first[2]}"
                        f"{leak if first[0] != name else ''}. Leave one out."
                    )
                    yield Problem("content", facts.shown, sample.key, message)


def _compare_indices(shards: Sequence[_Shard], rebuild: bool, problems: list[Problem], notes: list[str]) -> None:
    for folder in dict.fromkeys(Path(facts.path).parent for facts in shards):
        here = [facts for facts in shards if Path(facts.path).parent == folder and not is_compressed(facts.path)]
        index = read_index(folder)
        known = dict(index.shards) if index else {}
        if rebuild:
            for facts in here:
                known.pop(Path(facts.path).name, None)
            known.update({facts.entry.name: facts.entry for facts in here if facts.entry is not None})
            present = [entry for entry in known.values() if (folder / entry.name).exists()]
            try:
                written = write_index(folder, present, index.recipe if index else {})
            except OSError as error:
                raise ShardError(f"Expected to write the index of {folder}, but writing failed ({error}).") from error
            notes.append(f"{written or folder}: {'written anew.' if written else 'no name for an index is free.'}")
        elif index is None:
            for path in (folder / name for name in INDEX_NAMES):
                if path.exists():
                    notes.append(f"{path} is left as it is, and the shards are read without it: it is not our index.")
            notes.append(f"{folder}: no {INDEX_NAMES[0]} of ours; it is written when the shards are first used.")
        else:
            for facts in here:
                before = known.get(Path(facts.path).name)
                if before is not None and facts.entry is not None and before != facts.entry:
                    message = (
                        f"Expected {before.name} as the index says ({len(before.samples)} samples, {before.size} "
                        f"bytes), but it has {len(facts.entry.samples)}, {facts.entry.size}. Run `ssync-pl data check "
                        "--rebuild-index`."
                    )
                    problems.append(Problem("index", str(folder / INDEX_NAMES[0]), None, message))
            gone = sorted(name for name in known if not (folder / name).exists())
            if gone:  # a part of a set, copied with its index, reads well
                path = folder / INDEX_NAMES[0]
                notes.append(f"{path}: names {len(gone)} shards that are not there ({gone[0]}, …).")


def _compare_remote(name: str, shards: Sequence[_Shard], problems: list[Problem], notes: list[str]) -> None:
    if not shards:
        return
    try:
        entries = fetch_index([facts.path for facts in shards])
    except ShardError as error:
        problems.append(Problem("index", shards[0].shown, None, str(error)))
        return
    if entries is None:
        notes.append(f"{name}: no index beside the remote shards; only one process can read them.")
    for facts, entry in zip(shards, entries or (), strict=False):
        said = [(sample.key, {m: size for m, (_, size) in sample.members.items()}) for sample in entry.samples]
        read = [(sample.key, sample.members) for sample in facts.samples]
        if said != read and not any(problem.kind == "shard" for problem in facts.problems):
            message = "Expected the samples that the index names, but the shard differs. Upload both again."
            problems.append(Problem("index", facts.shown, None, message))


def _summary(name: str, shards: Sequence[_Shard]) -> SetSummary:
    samples = [sample for facts in shards for sample in facts.samples]
    shapes = [sample.shape for sample in samples if sample.shape is not None]
    masked = [sample for sample in samples if sample.channels]
    channels = max((sample.channels for sample in masked), default=0) > 1
    if channels:
        objects = [sample.channels if sample.objects is None else sample.objects[1] for sample in masked]
    else:
        objects = [sample.objects[0] for sample in masked if sample.objects is not None]
    return SetSummary(
        name=name,
        shards=len(shards),
        videos=len(samples),
        frames=sum(shape[0] for shape in shapes),
        bytes=sum(facts.size for facts in shards),
        frame_sizes=dict(Counter(f"{shape[1]}x{shape[2]}" for shape in shapes).most_common()),
        frames_a_video=_spread([shape[0] for shape in shapes]),
        objects_a_video=_spread(objects),
        mask_format=("channels" if channels else "ids") if masked else None,
        members=dict(sorted(Counter(member for sample in samples for member in sample.members).items())),
        without_masks=sum(not any(m.startswith("segmentations.") for m in sample.members) for sample in samples),
    )


def _spread(values: list[int]) -> tuple[int, float, int] | None:
    return (min(values), float(statistics.median(values)), max(values)) if values else None


def render_report(report: CheckReport, *, most: int = 20) -> str:
    """Lay a report out as text, with at most `most` problems of each kind; the last line is the verdict."""
    lines: list[str] = []
    for item in report.sets:
        sizes = ", ".join(
            f"{size} ({n})" if len(item.frame_sizes) > 1 else size for size, n in item.frame_sizes.items()
        )
        objects = _range(item.objects_a_video) or "not counted"
        without = f"; {item.without_masks} without" if item.without_masks else ""
        masks = f"{item.mask_format}, objects per video: {objects}{without}" if item.mask_format else "none"
        lines += [
            item.name,
            f"  shards   {item.shards} ({item.bytes / (1 << 20):.1f} MiB)",
            f"  videos   {item.videos}",
        ]
        if item.frames_a_video is not None:
            lines += [f"  frames   {item.frames} ({_range(item.frames_a_video)} per video)", f"  size     {sizes}"]
        lines += [f"  masks    {masks}", f"  members  {', '.join(f'{m} ({n})' for m, n in item.members.items())}"]
    for kind, title in _KINDS.items():
        found = [problem for problem in report.problems if problem.kind == kind]
        if found:
            lines.append(f"{title} ({len(found)})")
            places = ((p.shard if p.key is None else f"{p.shard}, key {p.key}", p.message) for p in found[:most])
            lines.extend(f"  {place}: {message}" for place, message in places)
            if len(found) > most:
                lines.append(f"  … and {len(found) - most} more; --json lists all")
    lines.extend(f"note: {note}" for note in report.notes)
    read = "every member decoded" if report.deep else "headers only (--quick): contents were not compared"
    count = sum(item.videos for item in report.sets)
    verdict = "clean" if report.clean else f"{_many(len(report.problems), 'problem')} found"
    lines.append(f"{verdict}: {_many(len(report.sets), 'set')}, {_many(count, 'video')}, {read}")
    return "\n".join(lines)


def _range(values: tuple[int, float, int] | None) -> str:
    if values is None:
        return ""
    least, median, most = values
    return str(least) if least == most else f"{least} to {most}, median {median:g}"


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
