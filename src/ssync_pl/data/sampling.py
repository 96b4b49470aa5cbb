"""Who reads what, and when: partitions over ranks and workers, and every random choice of the loaders.

Nothing here asks the environment or a process group for the rank, and nothing depends on the state of a random
generator: each choice is a function of (seed, pass, key), so it is the same in every worker, under every start method
and after every resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data.distributed import DistributedSampler

from ssync_pl.errors import ConfigError

__all__ = [
    "ClipDraw",
    "EvalSampler",
    "TrainSampler",
    "contiguous_share",
    "draw_clip",
    "eval_share",
    "mixed_pass",
    "permutation",
    "shares_by_weight",
    "train_share",
]


class ClipDraw(NamedTuple):
    """The random choices for one clip.

    Attributes:
        start: First frame of the clip.
        flip: Whether the clip is mirrored left to right.
        top: Position of the crop from above, in [0, 1).
        left: Position of the crop from the left, in [0, 1).

    Example:
        >>> ClipDraw(3, True, 0.5, 0.25).start
        3
    """

    start: int
    flip: bool
    top: float
    left: float


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle `range(count)` for one pass over the data.

    The order sorts a hash of (seed, pass, number), so it does not change with the version of NumPy.

    Args:
        count: Number of items.
        seed: Seed of the run.
        epoch: Number of the pass, from 0.

    Returns:
        Permutation (count,) int64.

    Example:
        >>> sorted(permutation(5, seed=0, epoch=3).tolist())
        [0, 1, 2, 3, 4]
    """
    start = np.frombuffer(_digest(seed, epoch, "permutation")[:8], dtype="<u8").astype(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64 works modulo 2**64
        state = start + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int64)


def train_share(count: int, seed: int, epoch: int, rank: int, world: int) -> np.ndarray:
    """Return one rank's items of a shuffled pass; ranks are disjoint and equally long.

    Args:
        count: Number of items.
        seed: Seed of the run.
        epoch: Number of the pass, from 0.
        rank: This process.
        world: Number of processes.

    Returns:
        Items (count // world,) int64; the last `count % world` of the shuffled order belong to nobody in this pass.

    Example:
        >>> a, b = (train_share(7, seed=0, epoch=0, rank=rank, world=2) for rank in (0, 1))
        >>> len(a), len(b), set(a) & set(b)
        (3, 3, set())
    """
    _check_rank(rank, world)
    return permutation(count, seed, epoch)[: count - count % world][rank::world]


def shares_by_weight(total: int, weights: Sequence[float]) -> list[int]:
    """Divide a number of clips by weights, the remainder to the largest fractions.

    Args:
        total: Number of clips.
        weights: Positive weights, in any unit.

    Returns:
        Clips of each set; they sum to `total`.

    Raises:
        ConfigError: A weight is not positive and finite.

    Example:
        >>> shares_by_weight(10, [2.0, 1.0])
        [7, 3]
    """
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"Expected the weights of mixed sets to be positive numbers, but got {list(weights)}.")
    exact = np.array([total * weight / sum(weights) for weight in weights])
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return [int(share) for share in shares]


def mixed_pass(clips: int, mix: Sequence[tuple[np.ndarray, float]], seed: int, epoch: int) -> np.ndarray:
    """Return one shuffled pass over several sets, each with its share by weight.

    A pass is as long as all sets together. Each set runs through its own endless row of shuffled visits: a set with a
    small weight goes on in the next pass where it stopped, one with a large weight comes several times.

    Args:
        clips: Clips of all sets together.
        mix: For each set its clips (numbers in [0, `clips`)) and its weight.
        seed: Seed of the run.
        epoch: Number of the pass, from 0.

    Returns:
        `visit * clips + clip` (clips,) int64.

    Example:
        >>> sets = [(np.arange(4), 3.0), (np.arange(4, 8), 1.0)]
        >>> first, second = (mixed_pass(8, sets, seed=0, epoch=epoch) % 8 for epoch in (0, 1))
        >>> (first < 4).sum().item(), sorted({*first.tolist(), *second.tolist()})
        (6, [0, 1, 2, 3, 4, 5, 6, 7])
    """
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


def eval_share(count: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one rank's items for evaluation: each item once over all ranks, padded to equal length.

    Args:
        count: Number of items.
        rank: This process.
        world: Number of processes.

    Returns:
        Items (⌈count / world⌉,) int64, and whether each is real (bool) or a repeat that must not be counted.

    Example:
        >>> eval_share(5, rank=1, world=2)
        (array([1, 3, 0]), array([ True,  True, False]))
    """
    _check_rank(rank, world)
    positions = np.arange(rank, -(-count // world) * world, world, dtype=np.int64)
    return positions % max(count, 1), positions < count


def contiguous_share(count: int, rank: int, world: int, *, pad: bool) -> tuple[int, int]:
    """Return one rank's range of an ordered stream, so that it opens as few shards as possible.

    Args:
        count: Number of items in the stream.
        rank: This process.
        world: Number of processes.
        pad: Round the length up (evaluation; positions from `count` on are padding) instead of down (training).

    Returns:
        First position and end; equally long on every rank.

    Example:
        >>> contiguous_share(7, 1, 2, pad=False), contiguous_share(7, 1, 2, pad=True)
        ((3, 6), (4, 8))
    """
    _check_rank(rank, world)
    length = -(-count // world) if pad else count // world
    return rank * length, (rank + 1) * length


def draw_clip(
    key: str, clip: int, seed: int, epoch: int, starts: int, flip_probability: float, step: int = 1
) -> ClipDraw:
    """Draw a clip's start, flip and crop position from a hash of (seed, pass, key, clip).

    Args:
        key: Name of the video, with its shard.
        clip: Number of the clip of this video in this pass.
        seed: Seed of the run.
        epoch: Number of the pass.
        starts: Number of possible first frames, at least 1.
        flip_probability: Probability of a flip, in [0, 1].
        step: Distance between possible first frames.

    Returns:
        The choices.

    Example:
        >>> draw_clip("train-000000.tar/7", 0, 0, 0, 9, 0.5) == draw_clip("train-000000.tar/7", 0, 0, 0, 9, 0.5)
        True
    """
    words = np.frombuffer(_digest(seed, epoch, f"{clip}/{key}"), dtype="<u8")
    fractions = [int(word >> np.uint64(11)) / (1 << 53) for word in words]
    return ClipDraw(int(words[0]) % starts * step, fractions[1] < flip_probability, fractions[2], fractions[3])


class TrainSampler(DistributedSampler[int]):
    """Yield this rank's shuffled clips; the pass travels inside the index.

    Index `visit * clips + clip` tells the data set which visit of the clip it is, so persistent workers need no other
    message; without weights every clip is visited once a pass. It is a `DistributedSampler` because that is what
    Lightning leaves alone under `use_distributed_sampler=True`; it never asks a process group.

    Args:
        clips: Clips a pass over the whole data set.
        seed: Seed of the run.
        rank: This process.
        world: Number of processes.
        mix: Sets to mix, or `None` for one set; see `mixed_pass`.

    Example:
        >>> sampler = TrainSampler(4, seed=0, rank=0, world=1)
        >>> sampler.set_epoch(2)
        >>> sorted(sampler)
        [8, 9, 10, 11]
        >>> whole = list(sampler)
        >>> sampler.set_start(3)
        >>> list(sampler) == whole[3:]
        True
    """

    def __init__(
        self, clips: int, seed: int = 0, rank: int = 0, world: int = 1, mix: Sequence[tuple[np.ndarray, float]] = ()
    ) -> None:
        _check_rank(rank, world)
        super().__init__(range(clips), num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.clips = clips
        self.mix = list(mix)
        self.start = 0

    def set_start(self, items: int) -> None:
        """Leave out the first items of the passes to come, which a resumed run has had already.

        Args:
            items: Number of this rank's items to leave out.
        """
        self.start = items

    def __iter__(self) -> Iterator[int]:
        if self.mix:
            order = mixed_pass(self.clips, self.mix, self.seed, self.epoch)
            share = order[: len(order) - len(order) % self.num_replicas][self.rank :: self.num_replicas]
        else:
            share = train_share(self.clips, self.seed, self.epoch, self.rank, self.num_replicas)
            share = share + self.epoch * self.clips
        return iter(share[self.start :].tolist())

    def __len__(self) -> int:
        return self.clips // self.num_replicas


class EvalSampler(DistributedSampler[int]):
    """Yield this rank's videos for evaluation; indices from `videos` on are repeats that only pad.

    Args:
        videos: Videos of the data set.
        rank: This process.
        world: Number of processes.

    Example:
        >>> list(EvalSampler(5, rank=1, world=2))
        [1, 3, 5]
    """

    def __init__(self, videos: int, rank: int = 0, world: int = 1) -> None:
        _check_rank(rank, world)
        super().__init__(range(videos), num_replicas=world, rank=rank, shuffle=False, drop_last=False)  # type: ignore[arg-type]
        self.videos = videos

    def __iter__(self) -> Iterator[int]:
        items, real = eval_share(self.videos, self.rank, self.num_replicas)
        return iter(np.where(real, items, items + self.videos).tolist())

    def __len__(self) -> int:
        return -(-self.videos // self.num_replicas)


def _digest(seed: int, epoch: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{text}".encode(), digest_size=32).digest()


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ConfigError(f"Expected argument `rank` to be in [0, {world}), but got {rank}.")
