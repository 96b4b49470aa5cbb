"""Who reads what, and when: pure arithmetic of passes, partitions over ranks and workers, and every random choice.

Nothing here asks the environment for the rank, and nothing depends on the state of a random generator: each choice is a
function of (seed, pass, key), so it is the same in every worker, under every start method and after every resume. A
pass is what Lightning calls an epoch. A clip is a number: `visit * clips + repeat * videos + video`, where `clips` are
those of a pass, and a clip draws anew at each visit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ssync_pl.errors import require


class ClipDraw(NamedTuple):
    """The random choices for one clip: first frame, mirrored or not, position of the crop in [0, 1)."""

    start: int
    flip: bool
    top: float
    left: float


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffles `range(count)` for one pass over the data."""
    start = np.frombuffer(_digest(seed, epoch, "permutation")[:8], dtype="<u8").astype(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64 works modulo 2**64
        state = start + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int64)


def draw_clip(
    key: str, clip: int, seed: int, epoch: int, starts: int, flip_probability: float, step: int = 1
) -> ClipDraw:
    """Draws a clip's start, flip and crop position from a hash of (seed, pass, key, clip)."""
    words = np.frombuffer(_digest(seed, epoch, f"{clip}/{key}"), dtype="<u8")
    fractions = [int(word >> np.uint64(11)) / (1 << 53) for word in words]
    return ClipDraw(int(words[0]) % starts * step, fractions[1] < flip_probability, fractions[2], fractions[3])


def shares_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """Divides a number of clips by weights, the remainder to the largest fractions."""
    positive = bool(weights) and all(math.isfinite(weight) and weight > 0 for weight in weights)
    require(positive, "the weights of mixed sets to be positive numbers", list(weights))
    exact = np.array([total * weight / sum(weights) for weight in weights])
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return [int(share) for share in shares]


def mixed_rows(
    sizes: Sequence[int], weights: Sequence[float], order: Callable[[int, int], np.ndarray], epoch: int
) -> list[np.ndarray]:
    """Returns the clips that each of several sets gives to a pass: its share by weight, every clip before any again.

    Args:
        sizes: Clips of each set.
        weights: Weight of each set.
        order: Returns the clips of a set, by its number, in the order of a visit.
        epoch: The pass.
    """
    total, rows = sum(sizes), []
    for number, (size, share) in enumerate(zip(sizes, shares_by_weight(total, weights), strict=True)):
        begin, end = epoch * share, (epoch + 1) * share
        visits = range(begin // size, -(-end // size))
        whole = np.concatenate([visit * total + order(number, visit) for visit in visits])
        rows.append(whole[begin - visits.start * size : end - visits.start * size])
    return rows


def interleave(rows: Sequence[np.ndarray], shard_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Merges rows of clips evenly, without splitting what one of them reads from a shard at a time."""
    middles = []
    for row in rows:
        edges = np.array([*_edges(shard_of(row)), len(row)])
        middles.append(np.repeat((edges[:-1] + edges[1:]) / (2 * max(len(row), 1)), np.diff(edges)))
    return np.concatenate(rows)[np.argsort(np.concatenate(middles), kind="stable")]


def rotated(row: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Begins a row elsewhere in each pass, so that it is not always the same clips that are left over at its end."""
    return np.roll(row, -(int.from_bytes(_digest(seed, epoch, "rotation")[:8], "little") % max(len(row), 1)))


def rank_part(
    order: np.ndarray, rank: int, world: int, batch_size: int, *, training: bool, together: bool
) -> np.ndarray:
    """Returns one rank's clips of a pass; ranks are disjoint and have equally many batches.

    In training whole batches are taken and the rest belongs to nobody; in evaluation every clip is taken once, and
    repeats fill up, `len(order)` higher than what they repeat. `together` gives each rank one piece of the order.
    """
    require(0 <= rank < world, f"argument `rank` to be in [0, {world})", rank)
    count = len(order)
    size = count // world // batch_size * batch_size if training else -(-count // world)
    places = rank * size + np.arange(size) if together else rank + world * np.arange(size)
    return order[np.minimum(places, count - 1)] + count * (places >= count)


def worker_part(
    part: np.ndarray, worker: int, workers: int, batch_size: int, shards: np.ndarray, start: int = 0
) -> np.ndarray:
    """Returns one worker's piece of its rank's part, so that it opens as few shards as possible.

    A loader asks its workers in turn, so they differ by one batch at most, the longer ones first. Where a resumed run
    has had `start` batches, each worker goes on at the start of the shard that it was in, with as many clips as it had
    left; `shards` are those of the clips.
    """

    def share(batches: int) -> int:
        return batches // workers + (worker < batches % workers)

    batches = -(-len(part) // batch_size)
    begin = (worker * (batches // workers) + min(worker, batches % workers)) * batch_size
    end = min(begin + share(batches) * batch_size, len(part))
    reached = min(begin + share(start) * batch_size, end)
    back = max((edge for edge in _edges(shards) if begin <= edge <= reached), default=begin) if start else begin
    return part[back : back + end - reached]


def _edges(shards: np.ndarray) -> list[int]:
    """Places where another shard begins, the first included."""
    return [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist()] if len(shards) else []


def _digest(seed: int, epoch: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{text}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
