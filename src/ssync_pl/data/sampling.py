"""Who reads what, and when: pure arithmetic of passes, ranks and workers, and every random choice.

Each choice is a function of (seed, pass, key), so it is the same in every worker, under every start method and after
every resume. A pass is what Lightning calls an epoch. A clip is a number: `visit * clips + repeat * videos + video`,
where `clips` is their number in a pass, and a clip draws anew at each visit.
"""

import hashlib
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


def clips_of_pass(shards: np.ndarray, repeats: int, seed: int, epoch: int, *, by_shard: bool = False) -> np.ndarray:
    """Returns the clips of a training pass in their order; `by_shard` keeps those of a shard together."""
    if not by_shard:
        return permutation(len(shards) * repeats, seed, epoch)
    clips = np.arange(len(shards) * repeats)
    videos = clips % len(shards)
    places = np.argsort(permutation(int(shards[-1]) + 1, seed, epoch))
    row = clips[np.lexsort((videos, places[shards[videos]]))]
    # Begins elsewhere in each pass, so that it is not always the same clips that are left over at its end.
    return np.roll(row, -(int.from_bytes(_digest(seed, epoch, "rotation")[:8], "little") % len(row)))


def rank_part(
    order: np.ndarray, rank: int, world: int, batch_size: int, *, training: bool, together: bool
) -> np.ndarray:
    """Returns one rank's clips of a pass, as many as of each rank; `together` gives it one piece of the order.

    What is left over in training belongs to nobody; in evaluation repeats fill up, `len(order)` above what they repeat.
    """
    require(0 <= rank < world, f"argument `rank` to be in [0, {world})", rank)
    count = len(order)
    size = count // world // batch_size * batch_size if training else -(-count // world)
    places = rank * size + np.arange(size) if together else rank + world * np.arange(size)
    return order[np.minimum(places, count - 1)] + count * (places >= count)


def worker_part(part: np.ndarray, worker: int, workers: int, batch_size: int, start: int = 0) -> np.ndarray:
    """Returns one worker's piece of its rank's part, without the first `start` batches, so that it opens few shards.

    A loader asks its workers in turn, so they differ by one batch at most, the longer ones first.
    """

    def share(batches: int) -> int:
        return batches // workers + (worker < batches % workers)

    batches = -(-len(part) // batch_size)
    begin = worker * (batches // workers) + min(worker, batches % workers)
    return part[(begin + share(start)) * batch_size : (begin + share(batches)) * batch_size]


def _digest(seed: int, epoch: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{text}".encode("utf-8", "surrogatepass"), digest_size=32).digest()
