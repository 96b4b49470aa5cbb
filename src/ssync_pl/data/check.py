"""Looking through shard sets: counts, damage, duplicates, and leaks between training and validation."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ssync_pl.data.check_compare import compare_shards
from ssync_pl.data.check_members import SampleFacts, ShardFacts, ShardJob, inspect_shard
from ssync_pl.data.check_report import CheckReport, Problem, SetSummary, render_report
from ssync_pl.data.patterns import expand_braces, expand_shards, is_remote, masked_url, shard_name
from ssync_pl.errors import ConfigError, MissingShardError, ShardError

__all__ = ["CheckReport", "Problem", "SetSummary", "check_shards", "group_shards", "render_report"]

_ENOUGH_FOR_PROCESSES = 256 << 20  # bytes; below, starting processes takes longer than reading


def check_shards(
    paths: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    deep: bool = True,
    max_objects: int | None = None,
    num_workers: int | None = None,
    rebuild_index: bool = False,
    progress: bool = False,
) -> CheckReport:
    """Read shards through and report what they hold and what is wrong with them.

    Damage never stops the check: each problem becomes an entry of the report. Shards are read as they lie on disk, not
    through `index.json`, which is compared with them. The same shards give the same report at any `num_workers`.

    Args:
        paths: Shards (paths or URLs), or several sets of them by name. Keys must be unique in a set, videos in all.
        deep: Decode every member and compare the videos' contents, rather than read headers only.
        max_objects: Most objects a video may have, counted as loaders do: the largest id, or the number of channels.
        num_workers: Processes; 0 reads in this one. `None` takes one a core where there is enough to read.
        rebuild_index: Write the `index.json` of the local folders anew instead of comparing it.
        progress: Show a progress bar.

    Returns:
        The report.

    Raises:
        ConfigError: A setting is out of range, or no shard is named.
        ShardError: `index.json` cannot be written, or a worker process was killed.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from ssync_pl.data.shards import ShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, "train") as writer:
        ...         for key in ("0", "1"):
        ...             writer.write(key, {"video.npy": np.zeros((4, 8, 8, 3), np.uint8)})
        ...     report = check_shards([f"{folder}/train-000000.tar"])
        >>> report.sets[0].frames, [problem.kind for problem in report.problems]
        (8, ['content'])
    """
    for name, value, least in (("max_objects", max_objects, 1), ("num_workers", num_workers, 0)):
        if value is not None and value < least:
            raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
    sets = {name: list(shards) for name, shards in paths.items()} if isinstance(paths, Mapping) else _one_set(paths)
    problems: list[Problem] = []
    _drop_repeated(sets, problems)
    jobs = [ShardJob(shard, deep, max_objects) for shards in sets.values() for shard in shards]
    if not jobs:
        raise ConfigError("Expected argument `paths` to name at least one shard, but got none.")
    found = {facts.shard: facts for facts in _inspect_all(jobs, num_workers, progress)}
    for facts in found.values():
        problems.extend(facts.problems)
    by_set = {name: [found[shard] for shard in shards] for name, shards in sets.items()}
    more, notes = compare_shards(by_set, rebuild_index=rebuild_index)
    summaries = tuple(_summary(name, shards) for name, shards in by_set.items())
    return CheckReport(summaries, (*problems, *more), tuple(notes), deep)


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

    Example:
        >>> sets, missing = group_shards(["https://host/{train,val}-{000000..000001}.tar"])
        >>> {name: len(shards) for name, shards in sets.items()}, missing
        ({'train': 2, 'val': 2}, [])
    """
    groups: dict[tuple[str, str], list[str]] = {}
    problems: list[Problem] = []
    for pattern in patterns:
        shards, missing = _expand(pattern)
        problems.extend(missing)
        literal = shards == [pattern] or shards == [os.path.expanduser(pattern)]
        for shard in shards:
            source = os.path.dirname(shard) if literal else pattern
            groups.setdefault((source, _prefix(shard)), []).append(shard)
    prefixes = Counter(prefix for _, prefix in groups)
    return {
        (prefix if prefixes[prefix] == 1 else f"{prefix} ({masked_url(source)})"): shards
        for (source, prefix), shards in groups.items()
    }, problems


def _expand(pattern: str) -> tuple[list[str], list[Problem]]:
    shards: list[str] = []
    missing: list[MissingShardError] = []
    for item in expand_braces(pattern, "patterns"):
        try:
            shards.extend(expand_shards(item, "patterns"))
        except MissingShardError as error:
            missing.append(error)
            shards.append(item)
    if missing and len(missing) == len(shards):
        raise missing[0]
    gone = {shard for shard in shards if not is_remote(shard) and not os.path.exists(shard)}
    message = f"Expected the shard to exist, because {pattern!r} names it. Copy it, or correct the range of numbers."
    problems = [Problem("missing", shard, None, message) for shard in shards if shard in gone]
    return [shard for shard in shards if shard not in gone], problems


def _prefix(shard: str) -> str:
    stem = re.sub(r"\.(tar|tgz|tar\.\w+)$", "", shard_name(shard))
    return re.sub(r"[-_.]?\d+$", "", stem) or os.path.basename(os.path.dirname(shard)) or stem


def _one_set(paths: Sequence[str]) -> dict[str, list[str]]:
    if isinstance(paths, str):
        raise ConfigError(f"Expected argument `paths` to be a list of shards, but got {paths!r}. Put it in a list.")
    prefixes = sorted({_prefix(str(path)) for path in paths})
    return {", ".join(prefixes[:3]) or "shards": [str(path) for path in paths]}


def _drop_repeated(sets: dict[str, list[str]], problems: list[Problem]) -> None:
    seen: dict[str, str] = {}
    for name, shards in sets.items():
        kept = []
        for shard in shards:
            place = shard if is_remote(shard) else os.path.realpath(shard)
            if place in seen:
                message = f"Expected each shard once, but it is in {seen[place]!r} and in {name!r}. Name it once."
                problems.append(Problem("content", masked_url(shard), None, message))
            else:
                seen[place] = name
                kept.append(shard)
        sets[name] = kept


def _inspect_all(jobs: list[ShardJob], num_workers: int | None, progress: bool) -> list[ShardFacts]:
    from tqdm import tqdm

    if num_workers is None:
        local = [job.shard for job in jobs if not is_remote(job.shard)]
        size = sum(os.path.getsize(shard) for shard in local if os.path.exists(shard))
        enough = size >= _ENOUGH_FOR_PROCESSES or len(local) < len(jobs)
        num_workers = (os.cpu_count() or 1) if enough else 0
    workers = min(num_workers, len(jobs))
    return list(tqdm(_run(jobs, workers), "checking", len(jobs), unit="shard", leave=False, disable=not progress))


def _run(jobs: list[ShardJob], workers: int) -> Iterator[ShardFacts]:
    if workers <= 1:
        yield from map(inspect_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")  # forked processes can hang on the parent's threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(inspect_shard, jobs)
        except BrokenProcessPool as error:
            raise ShardError(
                f"Expected {workers} processes to read the shards, but one was killed, most often because memory ran "
                "out. Use fewer with `--workers`."
            ) from error


def _summary(name: str, shards: Sequence[ShardFacts]) -> SetSummary:
    samples = [sample for facts in shards for sample in facts.samples]
    shapes = [sample.shape for sample in samples if sample.shape is not None]
    masked = [sample for sample in samples if sample.mask_channels]
    channels = max((sample.mask_channels for sample in masked), default=0) > 1
    return SetSummary(
        name=name,
        shards=len(shards),
        videos=len(samples),
        frames=sum(shape[0] for shape in shapes),
        bytes=sum(facts.size for facts in shards),
        frame_sizes=_ordered(Counter(f"{shape[1]}x{shape[2]}" for shape in shapes)),
        frames_a_video=_spread([shape[0] for shape in shapes]),
        objects_a_video=_spread([n for sample in masked for n in _objects(sample, channels)]),
        mask_format=("channels" if channels else "ids") if masked else None,
        members=_ordered(Counter(member for sample in samples for member in sample.members)),
        without_masks=sum(not any(m.startswith("segmentations.") for m in sample.members) for sample in samples),
    )


def _objects(sample: SampleFacts, channels: bool) -> list[int]:
    if channels:
        return [sample.mask_channels if sample.filled is None else sample.filled]
    return [] if sample.ids is None else [sample.ids[0]]


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _spread(values: list[int]) -> tuple[int, float, int] | None:
    return (min(values), float(statistics.median(values)), max(values)) if values else None
