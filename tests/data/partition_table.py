"""Checks that ranks and workers share a data set exactly; a module, so that started workers can import what is here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ssync_pl.data.dataset import BAD_SAMPLES
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.shards import ShardWriter
from ssync_pl.data.stream import ShardStream

WORLDS = (1, 2, 3, 8)
WORKERS = (0, 1, 2, 4)
SHARDS = (1, 2, 5, 30)
BATCH = 2
# 48 can be shared among all worlds in whole batches of two; 37 among none but one
VIDEOS = {True: 48, False: 37}

Batch = list[tuple[str, bool]]
Build = Callable[[int, int, int, "str | None"], Iterable[Any]]
"""Builds the loader of (rank, world, workers, start method); its batches go through `named`."""


def named(samples: Any) -> Batch:
    """Key and reality of each sample of a batch, collated or not."""
    if isinstance(samples, dict):
        count = len(samples["__key__"])
        real = samples["batch_padding_mask"].tolist() if "batch_padding_mask" in samples else [True] * count
        return list(zip(samples["__key__"], real, strict=True))
    return [(sample["__key__"], bool(sample["real"])) for sample in samples]


def keep(samples: Any) -> Any:
    """Collation that does nothing."""
    return [{name: sample[name] for name in ("__key__", "real")} for sample in samples]


def write_videos(folder: Path, videos: int, shards: int) -> list[str]:
    """Write tiny videos whose keys count up, spread over some shards as evenly as they go."""
    cuts = np.linspace(0, videos, shards + 1).round().astype(int)
    paths = []
    for number in range(shards):
        first, end = cuts[number : number + 2]
        with ShardWriter(folder, f"s{number:02d}", max(int(end - first), 1)) as writer:
            for key in range(first, end):
                writer.write(str(key), {"video.npy": np.full((3, 2, 2, 3), key, np.uint8)})
        paths.append(str(folder / f"s{number:02d}-000000.tar"))
    return paths


def entries_of(paths: list[str]) -> list[ShardEntry]:
    return load_shards(paths)


def check_partition(
    build: Build, training: bool, world: int, workers: int, start_method: str | None = None, videos: int | None = None
) -> list[list[Batch]]:
    """Run all ranks through one pass and check that they share the videos exactly.

    Returns:
        Batches of each rank, for comparisons between numbers of workers.
    """
    videos = VIDEOS[training] if videos is None else videos
    loaders = [build(rank, world, workers, start_method) for rank in range(world)]
    ranks = [[named(batch) for batch in loader] for loader in loaders]
    lengths = [sum(len(batch) for batch in rank) for rank in ranks]
    assert len(set(lengths)) == 1, lengths
    assert all(len(batch) == BATCH for rank in ranks for batch in rank[:-1])
    keys = [key for rank in ranks for batch in rank for key, real in batch if real]
    assert len(set(keys)) == len(keys), "a video came twice"
    if training:
        assert lengths[0] == videos // world // BATCH * BATCH
        assert len(keys) == lengths[0] * world
        if videos % (world * BATCH) == 0:
            assert sorted(keys, key=int) == [str(number) for number in range(videos)]
    else:
        assert lengths[0] == -(-videos // world)
        assert sorted(keys, key=int) == [str(number) for number in range(videos)]
    return ranks


def make_stream(paths: list[str], training: bool, rank: int = 0, world: int = 1, **options: Any) -> ShardStream:
    rules = SampleRules(clip_length=2) if training else SampleRules()
    options.setdefault("lanes", 4)
    options.setdefault("shuffle_buffer", 5)
    return ShardStream(paths, entries_of(paths), rules, BATCH, rank, world, **options)


def stream_loader(paths: list[str], training: bool) -> Build:
    """Real loaders over a stream."""

    def build(rank: int, world: int, workers: int, start_method: str | None) -> Iterable[Any]:
        stream = make_stream(paths, training, rank, world)
        context = start_method if workers else None
        return DataLoader(
            stream, BATCH, num_workers=workers, collate_fn=keep, drop_last=training, multiprocessing_context=context
        )

    return build


def simulated_loader(paths: list[str], training: bool) -> Build:
    """The same without processes: what each worker emits, put together as a loader does."""

    def build(rank: int, world: int, workers: int, start_method: str | None) -> Iterable[Any]:
        return simulate(make_stream(paths, training, rank, world), workers)

    return build


def simulate(stream: ShardStream, workers: int) -> Iterator[list[dict[str, Any]]]:
    """Take batches from the workers of a stream in turns; those that have ended are left out."""
    sources = [stream.emit(worker, max(workers, 1)) for worker in range(max(workers, 1))]
    turn = 0
    while sources:
        batch = [sample for _, sample in zip(range(stream.batch_size), sources[turn % len(sources)], strict=False)]
        if batch:
            yield batch
            turn += 1
        else:
            del sources[turn % len(sources)]
            turn %= max(len(sources), 1)


def facts(batches: Iterable[Any]) -> list[Any]:
    """All that a loader would hand on, in a form that compares."""
    return [
        [
            (s["__key__"], bool(s["real"]), s["video"].tolist(), bool(s.get("flip", False)), s[BAD_SAMPLES])
            for s in batch
        ]
        for batch in batches
    ]
