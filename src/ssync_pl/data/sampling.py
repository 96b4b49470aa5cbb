"""Who reads what, and when: pure arithmetic of partitions over ranks and workers, and of every random choice.

Nothing here asks the environment or a process group for the rank, and nothing depends on the state of a random
generator: each choice is a function of (seed, pass, key), so it is the same in every worker, under every start method
and after every resume. A pass is what Lightning calls an epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssync_pl.errors import ConfigError

__all__ = [
    "ClipDraw",
    "Take",
    "consumer_row",
    "draw_clip",
    "eval_share",
    "mixed_pass",
    "mixed_row",
    "permutation",
    "plain_row",
    "require_rank",
    "shares_by_weight",
    "train_share",
]


class ClipDraw(NamedTuple):
    """The random choices for one clip: first frame, mirrored or not, position of the crop in [0, 1)."""

    start: int
    flip: bool
    top: float
    left: float


class Take(NamedTuple):
    """A part of a shard in the row of a stream.

    Attributes:
        shard: Number of the shard.
        visit: How often its set was gone through before; each visit draws its clips anew.
        clips: Clips taken.
        first: The first of them.
        real: `False` for repeats that only pad.
    """

    shard: int
    visit: int
    clips: int
    first: int = 0
    real: bool = True


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle `range(count)` for one pass over the data."""
    start = np.frombuffer(_digest(seed, epoch, "permutation")[:8], dtype="<u8").astype(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64 works modulo 2**64
        state = start + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int64)


def train_share(order: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Return one rank's items of a shuffled pass; ranks are disjoint and equally long, the rest belongs to nobody."""
    require_rank(rank, world)
    return order[: len(order) - len(order) % world][rank::world]


def eval_share(count: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one rank's items for evaluation: each item once over all ranks, padded to equal length."""
    require_rank(rank, world)
    positions = np.arange(rank, -(-count // world) * world, world, dtype=np.int64)
    return positions % max(count, 1), positions < count


def draw_clip(
    key: str, clip: int, seed: int, epoch: int, starts: int, flip_probability: float, step: int = 1
) -> ClipDraw:
    """Draw a clip's start, flip and crop position from a hash of (seed, pass, key, clip)."""
    words = np.frombuffer(_digest(seed, epoch, f"{clip}/{key}"), dtype="<u8")
    fractions = [int(word >> np.uint64(11)) / (1 << 53) for word in words]
    return ClipDraw(int(words[0]) % starts * step, fractions[1] < flip_probability, fractions[2], fractions[3])


def shares_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a number of clips by weights, the remainder to the largest fractions."""
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"Expected the weights of mixed sets to be positive numbers, but got {list(weights)}.")
    exact = np.array([total * weight / sum(weights) for weight in weights])
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return [int(share) for share in shares]


def mixed_pass(clips: int, mix: Sequence[tuple[np.ndarray, float]], seed: int, epoch: int) -> np.ndarray:
    """Return one shuffled pass over several sets, each with its share by weight."""
    drawn = []
    for number, ((members, _), share) in enumerate(zip(mix, shares_by_weight(clips, [w for _, w in mix]), strict=True)):
        count = len(members)
        position = np.arange(epoch * share, (epoch + 1) * share, dtype=np.int64)
        for visit in range(epoch * share // count, -(-(epoch + 1) * share // count)):
            # each set has an order of its own, or equal sizes would go in step
            order = permutation(count, seed + (number + 1) * 0x9E3779B97F4A7C15, visit)
            drawn.append(visit * clips + members[order[position[position // count == visit] % count]])
    whole = np.concatenate(drawn) if drawn else np.zeros(0, np.int64)
    return whole[permutation(len(whole), seed, epoch)]


def plain_row(clips: Sequence[int], seed: int | None, epoch: int, *, rotate: bool = False) -> list[Take]:
    """Put all clips of a streamed pass in a row, shard after shard."""
    order = range(len(clips)) if seed is None else permutation(len(clips), seed, epoch).tolist()
    row = [Take(number, 0, clips[number]) for number in order]
    if not rotate or not sum(clips):
        return row
    shift = int.from_bytes(_digest(seed or 0, epoch, "rotation")[:8], "little") % sum(clips)
    return _cut(row, shift, sum(clips)) + _cut(row, 0, shift)


def mixed_row(sets: Sequence[Sequence[int]], weights: Sequence[float], seed: int, epoch: int) -> list[Take]:
    """Put the clips of a streamed pass over several sets in a row, each set with its share by weight."""
    rows: list[tuple[float, int, Take]] = []
    first = 0
    for number, (clips, share) in enumerate(zip(sets, shares_by_weight(sum(map(sum, sets)), weights), strict=True)):
        total = max(sum(clips), 1)
        begin, done = epoch * share, 0
        for visit in range(begin // total, -(-(begin + share) // total)):
            order = permutation(len(clips), seed + (number + 1) * 0x9E3779B97F4A7C15, visit).tolist()
            row = [Take(first + shard, visit, clips[shard]) for shard in order]
            for take in _cut(row, max(begin - visit * total, 0), min(begin + share - visit * total, total)):
                rows.append(((done + take.clips / 2) / share, number, take))
                done += take.clips
        first += len(clips)
    return [take for _, _, take in sorted(rows)]


def rank_clips(count: int, world: int, batch_size: int, *, pad: bool) -> int:
    """Count the clips that each rank gets of a row: whole batches in training, padded to equal length in evaluation."""
    return -(-count // world) if pad else count // world // batch_size * batch_size


def consumer_row(
    row: Sequence[Take],
    place: tuple[int, int],
    worker: tuple[int, int],
    batch_size: int,
    *,
    pad: bool,
    start: int = 0,
) -> list[Take]:
    """Cut the part of one worker of one rank out of a row, so that it opens as few shards as possible.

    A rank has a contiguous part of the row, and each of its workers one of that part, in whole batches: a loader asks
    its workers in turn, so they differ by one batch at most, the longer ones first.

    Args:
        row: The pass.
        place: Rank and world size.
        worker: Number of the worker and of all workers.
        batch_size: Clips per batch.
        pad: Fill up to equal length on all ranks by repeats of the last clip (evaluation), instead of leaving out a
            rest (training).
        start: Batches of this rank that a resumed run has had: each worker goes on at the start of the shard that it
            was in, with as many clips as it had left.
    """
    (rank, world), (number, workers) = place, worker
    require_rank(rank, world)
    count = sum(take.clips for take in row)
    share = rank_clips(count, world, batch_size, pad=pad)
    first = rank * (share if pad else count // world)
    batches = -(-share // batch_size)
    before = number * (batches // workers) + min(number, batches % workers)
    mine = batches // workers + (number < batches % workers)
    begin, end = first + before * batch_size, first + min((before + mine) * batch_size, share)
    done = min(start // workers + (number < start % workers), mine) * batch_size
    left = end - begin - min(done, end - begin)
    edges = [begin, *np.cumsum([take.clips for take in row]).tolist()]
    begin = max(edge for edge in edges if begin <= edge <= max(begin + done, begin)) if done else begin
    end = begin + left
    last = row[-1]._replace(clips=1, first=row[-1].first + row[-1].clips - 1, real=False) if row else None
    return _cut([*row, *([last] * max(end - count, 0) if last else [])], begin, end)


def require_rank(rank: int, world: int) -> None:
    """Raise `ConfigError` unless the rank is one of the processes."""
    if not 0 <= rank < world:
        raise ConfigError(f"Expected argument `rank` to be in [0, {world}), but got {rank}.")


def _cut(row: Sequence[Take], begin: int, end: int) -> list[Take]:
    parts, position = [], 0
    for take in row:
        low, high = max(begin - position, 0), min(end - position, take.clips)
        if low < high:
            parts.append(take._replace(clips=high - low, first=take.first + low))
        position += take.clips
    return parts


def _digest(seed: int, epoch: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{text}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
