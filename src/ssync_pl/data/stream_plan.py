"""Who streams what, and in which order: pure functions of (seed, pass, rank, lane), so that nothing hangs on workers.

A pass is a row of clips: shards in their order, the clips of a shard in the order of the file. Each rank has one
contiguous part of the row, cut again into *lanes* of whole batches. Batch k of the rank comes from lane k mod lanes,
and a loader takes batch k from worker k mod workers: the batches are the same for every number of workers, and where
that number divides the lanes, every lane is read by one worker only.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssync_pl.data.sampling import permutation, shares_by_weight
from ssync_pl.errors import ConfigError

__all__ = [
    "Take",
    "batch_order",
    "lane_bounds",
    "mixed_order",
    "mixed_shard_plan",
    "plain_shard_plan",
    "worker_batches",
]


class Take(NamedTuple):
    """A part of a shard in the row of a pass.

    Attributes:
        shard: Number of the shard.
        visit: How often its set was gone through before; each visit draws its clips anew.
        clips: Clips taken.
        first: The first of them.

    Example:
        >>> Take(0, 0, 4).first
        0
    """

    shard: int
    visit: int
    clips: int
    first: int = 0


def batch_order(num_batches: int, lanes: int) -> np.ndarray:
    """Say where each batch of a rank comes from.

    Args:
        num_batches: Batches of the rank in the pass.
        lanes: Number of lanes.

    Returns:
        Lane and number in the lane (num_batches, 2) int64 of batch 0, 1, …: the lanes take turns.

    Example:
        >>> batch_order(5, 2).tolist()
        [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2]]
    """
    _at_least_one("lanes", lanes)
    numbers = np.arange(num_batches, dtype=np.int64)
    return np.stack([numbers % lanes, numbers // lanes], axis=1)


def lane_bounds(first: int, end: int, batch_size: int, lanes: int) -> list[tuple[int, int]]:
    """Cut a rank's part of the row into lanes of whole batches.

    Lanes differ by one batch at most, the longer ones first, as `batch_order` needs it. A short batch (evaluation) is
    the last one of the rank, which closes its lane.

    Args:
        first: First position of the rank.
        end: End of the rank's positions.
        batch_size: Clips a batch.
        lanes: Number of lanes.

    Returns:
        First position and end of each lane.

    Example:
        >>> lane_bounds(0, 9, batch_size=2, lanes=2), lane_bounds(10, 13, batch_size=2, lanes=3)
        ([(0, 5), (5, 9)], [(10, 12), (12, 13), (13, 13)])
    """
    _at_least_one("batch_size", batch_size)
    _at_least_one("lanes", lanes)
    batches = -(-(end - first) // batch_size)
    missing = batches * batch_size - (end - first)
    bounds: list[tuple[int, int]] = []
    for lane in range(lanes):
        length = (batches // lanes + (lane < batches % lanes)) * batch_size
        if batches and lane == (batches - 1) % lanes:
            length -= missing
        bounds.append((first, first + length))
        first += length
    return bounds


def worker_batches(num_batches: int, worker: int, workers: int, start: int = 0) -> range:
    """Return the batches that one worker makes: a `DataLoader` asks its workers in turn, worker 0 first.

    Args:
        num_batches: Batches of the rank in the pass.
        worker: Number of the worker.
        workers: Number of workers; 0 counts as 1.
        start: First batch that is asked for.

    Returns:
        Numbers of the batches.

    Example:
        >>> list(worker_batches(10, worker=1, workers=3, start=2))
        [3, 6, 9]
    """
    return range(start + worker, num_batches, max(workers, 1))


def mixed_order(count: int, buffer: int, seed_text: str) -> np.ndarray:
    """Return the order in which a shuffle buffer lets go of what is read in order, without any data.

    The buffer is filled; then each clip that is read takes the place of a random one, which leaves; the rest leaves
    in random order at the end. No clip leaves more than `buffer` places before it was read.

    Args:
        count: Number of clips.
        buffer: Clips held back; 0 and 1 do not mix.
        seed_text: What the choices hang on.

    Returns:
        Permutation (count,) int64: which clip leaves at each place.

    Example:
        >>> order = mixed_order(100, 8, "seed/pass/rank/lane")
        >>> sorted(order.tolist()) == list(range(100)), int((order - np.arange(100)).max())
        (True, 8)
    """
    if buffer <= 1:
        return np.arange(count, dtype=np.int64)
    # `random()` of a seeded generator stays the same from one Python to the next; `shuffle` need not.
    draw = random.Random(seed_text).random
    held = list(range(min(buffer, count)))
    order = []
    for position in range(len(held), count):
        place = int(draw() * (len(held) + 1))
        if place < len(held):
            order.append(held[place])
            held[place] = position
        else:
            order.append(position)
    while held:
        place = int(draw() * len(held))
        held[place], held[-1] = held[-1], held[place]
        order.append(held.pop())
    return np.array(order, dtype=np.int64)


def plain_shard_plan(clips: Sequence[int], seed: int | None, epoch: int, *, rotate: bool = False) -> list[Take]:
    """Plan a pass over every shard once.

    Args:
        clips: Clips of each shard.
        seed: Seed of the order of the shards; `None` keeps it (evaluation).
        epoch: Number of the pass.
        rotate: Begin the row at another clip in each pass. Where ranks and batches leave a rest at its end, that rest
            is then another one each time, even of a single shard.

    Returns:
        One `Take` a shard; the first shard in two parts when rotated.

    Example:
        >>> [tuple(take) for take in plain_shard_plan([3, 2], None, 0)]
        [(0, 0, 3, 0), (1, 0, 2, 0)]
        >>> sum(take.clips for take in plain_shard_plan([3, 2], 0, 7, rotate=True))
        5
    """
    order = range(len(clips)) if seed is None else permutation(len(clips), seed, epoch).tolist()
    row = [Take(number, 0, clips[number]) for number in order]
    if not rotate or not sum(clips):
        return row
    shift = int.from_bytes(_hash(f"{seed}/{epoch}/rotation")[:8], "little") % sum(clips)
    return _cut(row, shift, sum(clips)) + _cut(row, 0, shift)


def mixed_shard_plan(sets: Sequence[Sequence[int]], weights: Sequence[float], seed: int, epoch: int) -> list[Take]:
    """Plan a pass over several sets, each with its share by weight; as many clips as all sets together have.

    Each set has an endless row of visits, its shards in another order each time, and every pass takes up the row where
    the one before stopped: a set with a small share is gone through over several passes, one with a large share several
    times a pass. Shards of the sets take turns, so that all shares run out together.

    Args:
        sets: For each set the clips of its shards. Shards are numbered through all sets.
        weights: A weight for each set.
        seed: Seed of the run.
        epoch: Number of the pass.

    Returns:
        The pass; shards may be taken in part.

    Raises:
        ConfigError: A weight is not positive, or a set with a share has no clips.

    Example:
        >>> [tuple(take)[:3] for take in mixed_shard_plan([[4], [2]], [1.0, 1.0], seed=0, epoch=0)]
        [(1, 0, 2), (0, 0, 3), (1, 1, 1)]
    """
    if len(sets) != len(weights):
        raise ConfigError(f"Expected one weight for each of {len(sets)} sets, but got {len(weights)}.")
    rows: list[tuple[float, int, Take]] = []
    first = 0
    for number, (clips, share) in enumerate(zip(sets, shares_by_weight(sum(map(sum, sets)), weights), strict=True)):
        total = sum(clips)
        if share and not total:
            raise ConfigError(f"Expected each mixed set to hold clips, but set {number} holds none. Leave it out.")
        begin, done = epoch * share, 0
        for visit in range(begin // max(total, 1), -(-(begin + share) // max(total, 1))):
            keys = [_hash(f"{seed}/{number}/{visit}/{shard}") for shard in range(len(clips))]
            order = sorted(range(len(clips)), key=keys.__getitem__)
            row = [Take(first + shard, visit, clips[shard]) for shard in order]
            for take in _cut(row, max(begin - visit * total, 0), min(begin + share - visit * total, total)):
                rows.append(((done + take.clips / 2) / share, number, take))
                done += take.clips
        first += len(clips)
    return [take for _, _, take in sorted(rows)]


def _cut(row: Sequence[Take], begin: int, end: int) -> list[Take]:
    parts, position = [], 0
    for take in row:
        low, high = max(begin - position, 0), min(end - position, take.clips)
        if low < high:
            parts.append(take._replace(clips=high - low, first=take.first + low))
        position += take.clips
    return parts


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"Expected argument `{name}` to be at least 1, but got {value}.")
