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

from ssync_pl.data.decode import ALLOWED_EXTENSIONS, decode_video, member_extension, require_allowed
from ssync_pl.data.index import INDEX_NAMES, ShardEntry, read_index, scan_shard, write_index
from ssync_pl.data.patterns import expand_braces, expand_shards, is_compressed, is_remote, masked_url, shard_name
from ssync_pl.data.remote import fetch_index, stream_shard
from ssync_pl.data.samples import Members, arrange_masks, check_video, find_member
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import MissingShardError, ShardError, require, require_shard

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
        """Returns the report as JSON values: `clean`, `deep`, `sets`, `problems` and `notes`."""
        return {"clean": self.clean, **asdict(self)}


@dataclass(frozen=True)
class _Sample:
    key: str
    members: dict[str, int]
    shape: tuple[int, int, int] | None = None  # (F, h, w)
    channels: int = 0  # of the masks
    objects: tuple[int, int] | None = None  # distinct ids, channels that are not empty; None when not decoded
    digest: str | None = None  # of the decoded frames


@dataclass
class _Shard:
    path: str
    samples: list[_Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    entry: ShardEntry | None = None
    size: int = 0

    def add(self, kind: str, key: str | None, message: str) -> None:
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
        deep: Decode every member and compare the videos' contents, rather than read headers only.
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
    found = dict(zip((shard for shard, *_ in jobs), _inspect_all(jobs, num_workers, progress), strict=True))
    by_set = {name: [found[shard] for shard in shards] for name, shards in sets.items()}
    problems += [problem for facts in found.values() for problem in facts.problems]
    problems += _duplicates(by_set)
    notes: list[str] = []
    local = [facts for facts in found.values() if facts.entry is not None]
    for folder in dict.fromkeys(Path(facts.path).parent for facts in local):
        entries = [facts.entry for facts in local if Path(facts.path).parent == folder and facts.entry is not None]
        problems += _compare_index(folder, entries, rebuild_index, notes)
    for name, shards in by_set.items():
        problems += _compare_remote(name, [facts for facts in shards if is_remote(facts.path)], notes)
        read = Counter(member for facts in shards for sample in facts.samples for member in sample.members)
        unread = [f"{m} ({n})" for m, n in sorted(read.items()) if member_extension(m) not in ALLOWED_EXTENSIONS]
        notes += [f"{name}: members that are never read: {', '.join(unread)}"] if unread else []
    return CheckReport(tuple(_summary(*item) for item in by_set.items()), tuple(problems), tuple(notes), deep)


def group_shards(patterns: Sequence[str]) -> tuple[dict[str, list[str]], list[Problem]]:
    """Sorts what a user names into sets, so that training and validation of one folder are told apart.

    Shards of one folder, or of one pattern, whose names differ only in their last number are one set.

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
        size = sum(os.path.getsize(shard) if os.path.exists(shard) else _ENOUGH_FOR_PROCESSES for shard, *_ in jobs)
        workers = (os.cpu_count() or 1) if size >= _ENOUGH_FOR_PROCESSES else 0
    with contextlib.ExitStack() as stack:
        run: Any = map
        if min(workers, len(jobs)) > 1:
            context = multiprocessing.get_context("spawn")  # forked processes can hang on the parent's threads
            run = stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)).map
        bar = {"desc": "checking", "total": len(jobs), "unit": "shard", "leave": False, "disable": not progress}
        try:
            return list(tqdm(run(_inspect, jobs), **bar))
        except BrokenProcessPool as error:
            advice = "Most often memory ran out: use fewer with `--workers`."
            raise ShardError(
                f"Expected {workers} processes to read the shards, but one was killed. {advice}"
            ) from error


def _inspect(job: tuple[str, bool, int | None]) -> _Shard:
    """Looks through one shard; of a damaged one, what lies before the damage."""
    path, deep, max_objects = job
    facts, local = _Shard(path), not is_remote(path) and not is_compressed(path)
    for read in (_scanned, _streamed) if local else (_streamed,):
        try:
            for key, members in read(facts):
                facts.samples.append(_inspect_sample(key, members, deep, max_objects, facts))
            break
        except (OSError, MemoryError, ShardError) as error:  # what can still be read of it is streamed
            if not any(problem.kind == "shard" for problem in facts.problems):
                facts.add("shard", None, str(error))
            if facts.entry is not None:
                break
    for name in facts.entry.ignored if facts.entry else ():
        facts.add("member", None, f"Expected plain files with UTF-8 names, but got {name}. Pack the shard again.")
    if not facts.samples and not facts.problems:
        facts.add("shard", None, "Expected at least one sample, but got none. Name members `<key>.video.npy`.")
    members_size = sum(sum(sample.members.values()) for sample in facts.samples)
    facts.size = os.path.getsize(path) if not is_remote(path) and os.path.exists(path) else members_size
    return facts


def _scanned(facts: _Shard) -> Iterator[tuple[str, Members]]:
    facts.entry = scan_shard(facts.path)
    with contextlib.closing(ShardReader()) as reader:
        for sample in facts.entry.samples:
            yield sample.key, reader.sample(facts.path, facts.entry, sample)


def _streamed(facts: _Shard) -> Iterator[tuple[str, Members]]:
    return stream_shard(facts.path, fields=None)


def _inspect_sample(key: str, members: Members, deep: bool, max_objects: int | None, facts: _Shard) -> _Sample:
    found = _Sample(key, dict(sorted(members.sizes.items())))
    before, arrays = len(facts.problems), {}
    for name in found.members:
        try:
            array = _look(name, members, deep)
        except (ShardError, MemoryError) as error:
            refused = "can execute code" in str(error)
            # Other extensions are never read and harm nobody; they are only counted.
            if refused or member_extension(name) in ALLOWED_EXTENSIONS:
                facts.add("refused" if refused else "member", key, str(error) or f"`{name}` does not fit in memory.")
            continue
        if isinstance(array, np.ndarray) and array.dtype.kind in "buif":
            arrays[name] = array
        elif isinstance(array, np.ndarray):
            facts.add("sample", key, f"Expected {members.name(name)} to hold numbers, but got {array.dtype}.")
    try:
        name = find_member(members.sizes, "video", members.where)
        if name in arrays:
            video = check_video(arrays[name][None] if arrays[name].ndim == 3 else arrays[name], members.name(name))
            found = replace(found, shape=video.shape[:3], digest=_digest(video) if deep else None)
        if found.shape is not None and any(name.split(".")[0] == "segmentations" for name in members.sizes):
            name = find_member(members.sizes, "segmentations", members.where)
            if name in arrays:
                masks = arrange_masks(arrays[name], found.shape[0], found.shape[1:], members.name(name))
                distinct = int((np.unique(masks) > 0).sum()) if deep and masks.shape[-1] == 1 else 0
                counted = (distinct, int((masks != 0).any(axis=(0, 1, 2)).sum())) if deep else None
                found = replace(found, channels=masks.shape[-1], objects=counted)
                least, most = int(masks.min(initial=0)), int(masks.max(initial=0))
                count = most if found.channels == 1 else found.channels
                fits = least >= 0 and (max_objects is None or count <= max_objects)
                limit = "" if max_objects is None else f", at most {max_objects} objects (max_objects)"
                got = f"{count}, least id {least}"
                require_shard(fits, f"{members.name(name)} to hold ids from 0 on{limit}", got, advice="Renumber them.")
    except ShardError as error:
        if len(facts.problems) == before:
            facts.add("sample", key, str(error))
    return found


def _look(name: str, members: Members, deep: bool) -> Any:
    """Decodes a member, or gives an array of its shape and type that takes no memory."""
    extension = require_allowed(name, members.where)
    if extension == "mp4":
        data, place = members.read(name), members.name(name)
        # Decoders forgive a lost end; the boxes of the format (ISO 14496-12) say how long the file was.
        end = 0
        while end + 8 <= len(data):
            size = int.from_bytes(data[end : end + 4], "big")
            size = int.from_bytes(data[end + 8 : end + 16], "big") if size == 1 else size
            end = end + max(size, 8) if size else len(data)  # 0: up to the end
        require_shard(end == len(data), f"{place} to be a whole mp4 file of {end} bytes", len(data))
        if not deep:
            first = next(decode_video(data, place, [0]))
            return np.broadcast_to(first, (members.count_frames(name), *first.shape))
    if not deep and extension in ("npy", "npy.gz"):
        header = members.header(name)
        return np.broadcast_to(np.zeros((), header.dtype), header.shape)
    return members.decode(name)


def _digest(video: np.ndarray) -> str:
    # Of the frames rather than the stored bytes, so that `.npy` and `.npy.gz` of one video are told to be the same.
    state = hashlib.blake2b(repr(video.shape).encode(), digest_size=16)
    for frame in video:
        state.update(np.ascontiguousarray(frame).tobytes())
    return state.hexdigest()


def _duplicates(by_set: Mapping[str, Sequence[_Shard]]) -> Iterator[Problem]:
    """Finds shards of a set that share their name, keys that come twice in a set, and videos that do so anywhere."""
    videos: dict[str, tuple[str, str, str]] = {}
    for name, shards in by_set.items():
        keys: dict[str, str] = {}
        names: dict[str, str] = {}
        for facts in shards:
            shown = masked_url(facts.path)
            before = names.setdefault(shard_name(facts.path), shown)
            if before != shown:
                message = f"Expected shards of one set to have other names, but {before} has the same. Rename one."
                yield Problem("name", shown, None, message)
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
                    leak = leak if first[0] != name else ""
                    message = f"Expected each video once, but its frames are those of {first[1]}, key {first[2]}{leak}."
                    yield Problem("content", shown, sample.key, f"{message} Leave one out.")


def _compare_index(folder: Path, entries: list[ShardEntry], rebuild: bool, notes: list[str]) -> Iterator[Problem]:
    index = read_index(folder)
    known = dict(index.shards) if index else {}
    foreign = [path for path in (folder / name for name in INDEX_NAMES) if index is None and path.exists()]
    if rebuild:
        known |= {entry.name: entry for entry in entries}
        present = [entry for entry in known.values() if (folder / entry.name).exists()]
        try:
            written = write_index(folder, present, index.recipe if index else {})
        except OSError as error:
            raise ShardError(f"Expected to write the index of {folder}, but writing failed ({error}).") from error
        notes.append(f"{written or folder}: {'written anew.' if written else 'no name for an index is free.'}")
        return
    notes += [f"{path} is left as it is, and the shards are read without it: it is not our index." for path in foreign]
    if index is None:
        notes.append(f"{folder}: no {INDEX_NAMES[0]} of ours; it is written when the shards are first used.")
    for entry in entries:
        before = known.get(entry.name, entry)
        if before != entry:
            message = (
                f"Expected {entry.name} as the index says ({len(before.samples)} samples, {before.size} bytes), but it "
                f"has {len(entry.samples)}, {entry.size}. Run `ssync-pl data check --rebuild-index`."
            )
            yield Problem("index", str(folder / INDEX_NAMES[0]), None, message)
    gone = sorted(name for name in known if not (folder / name).exists())
    if gone:  # a part of a set, copied with its index, reads well
        notes.append(f"{folder / INDEX_NAMES[0]}: names {len(gone)} shards that are not there ({gone[0]}, …).")


def _compare_remote(name: str, shards: Sequence[_Shard], notes: list[str]) -> Iterator[Problem]:
    try:
        entries = fetch_index([facts.path for facts in shards])
    except ShardError as error:
        yield Problem("index", masked_url(shards[0].path), None, str(error))
        return
    if entries is None:
        notes.append(f"{name}: no index beside the remote shards; only one process can read them.")
    for facts, entry in zip(shards, entries or (), strict=False):
        said = [(sample.key, {m: size for m, (_, size) in sample.members.items()}) for sample in entry.samples]
        read = [(sample.key, sample.members) for sample in facts.samples]
        if said != read and not any(problem.kind == "shard" for problem in facts.problems):
            message = "Expected the samples that the index names, but the shard differs. Upload both again."
            yield Problem("index", masked_url(facts.path), None, message)


def _summary(name: str, shards: Sequence[_Shard]) -> SetSummary:
    samples = [sample for facts in shards for sample in facts.samples]
    shapes = [sample.shape for sample in samples if sample.shape is not None]
    masked = [sample for sample in samples if sample.channels]
    channels = max((sample.channels for sample in masked), default=0) > 1
    objects = [sample.objects[channels] for sample in masked if sample.objects is not None]
    if channels and not objects:
        objects = [sample.channels for sample in masked]
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
    read = "every member decoded" if report.deep else "headers only (--quick): contents were not compared"
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
