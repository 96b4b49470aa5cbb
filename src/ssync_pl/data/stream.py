"""Streaming data set over remote shards (http, https, gs, …), read through webdataset, decoded by our allow-list."""

from __future__ import annotations

import contextlib
import posixpath
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlparse, urlunparse

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ssync_pl.data.dataset import BAD_SAMPLES
from ssync_pl.data.index import INDEX_NAME, ShardEntry, parse_index, split_member_name
from ssync_pl.data.patterns import shard_name
from ssync_pl.data.samples import SampleRules, eval_sample, train_sample
from ssync_pl.data.sampling import contiguous_share, permutation, worker_share
from ssync_pl.errors import ShardError

__all__ = ["PassLoader", "ShardStream", "fetch_index", "stream_shard"]

_Request = tuple[str, str, dict[str, bytes], int, bool]
_WANTED = ("video", "image", "segmentations")


class ShardStream(IterableDataset[dict[str, Any]]):
    """Clips or videos of remote shards, read from start to end, each by the rank and worker that it belongs to.

    With index entries the split is exact: each rank reads one contiguous part of the pass, in whole batches a worker,
    and every rank emits equally many samples. Without them the length is unknown; then only one process may read.

    Args:
        urls: The shards.
        shards: Their index entries, in the same order, or `None` when the server has no `index.json`.
        rules: How samples are cut.
        batch_size: Samples a batch: workers get whole batches.
        rank: This process.
        world: Number of processes.
        clips_per_video: Clips of each video a pass, in training.
        skip_bad: Put the next good sample in place of one that cannot be read, instead of raising.
        shuffle_buffer: Clips held back to be mixed, a worker, in training. The order of the shards is shuffled as well.

    Raises:
        ShardError: There are several processes but no index.

    Example:
        >>> entry = parse_index('{"format": "ssync_pl.shards", "version": 1, "recipe": {}, "shards": []}')
        >>> len(ShardStream([], list(entry.shards.values()), SampleRules(clip_length=2), batch_size=2))
        0
    """

    def __init__(
        self,
        urls: Sequence[str],
        shards: Sequence[ShardEntry] | None,
        rules: SampleRules,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        clips_per_video: int = 1,
        skip_bad: bool = False,
        shuffle_buffer: int = 64,
    ) -> None:
        if shards is None and world > 1:
            raise ShardError(
                f"Expected `{INDEX_NAME}` beside the remote shards ({urls[0]}, …) to share them among {world} "
                "processes, but there is none. Put the one that ShardWriter wrote there, or download the shards."
            )
        self.urls = list(urls)
        self.shards = None if shards is None else list(shards)
        self.rules = rules
        self.batch_size = batch_size
        self.rank, self.world = rank, world
        self.clips_per_video = clips_per_video if rules.training else 1
        self.skip_bad = skip_bad
        self.shuffle_buffer = shuffle_buffer if rules.training else 0
        # Shared memory, so that workers that outlive a pass see the number of the next one.
        self._pass = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_pass(self, epoch: int) -> None:
        """Set the number of the next pass, for the workers that run and those to come.

        Args:
            epoch: Number of the pass, from 0.
        """
        self._pass.fill_(epoch)

    def __len__(self) -> int:
        if self.shards is None:
            raise TypeError(
                f"The length of remote shards is unknown without `{INDEX_NAME}`. Put it beside the shards, or set "
                "`max_steps` and `limit_train_batches`."
            )
        first, end = self._share(sum(len(shard.samples) for shard in self.shards) * self.clips_per_video)
        return end - first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._pass.item())
        samples = self._substitute(self._requests(epoch, worker, workers), epoch)
        if self.shuffle_buffer > 1:
            samples = _mix(samples, self.shuffle_buffer, f"{self.rules.seed}/{epoch}/{self.rank}/{worker}")
        return samples

    def _share(self, count: int) -> tuple[int, int]:
        first, end = contiguous_share(count, self.rank, self.world, pad=not self.rules.training)
        return (first, end - (end - first) % self.batch_size) if self.rules.training else (first, end)

    def _requests(self, epoch: int, worker: int, workers: int) -> Iterator[_Request]:
        # Yields (url, key, members, clip, real) for all that this worker has to emit.
        training, repeats = self.rules.training, self.clips_per_video
        order = permutation(len(self.urls), self.rules.seed, epoch).tolist() if training else range(len(self.urls))
        if self.shards is None:
            for number in list(order)[worker::workers]:
                for key, members in stream_shard(self.urls[number]):
                    for clip in range(repeats):
                        yield self.urls[number], key, members, clip, True
            return
        count = sum(len(shard.samples) for shard in self.shards) * repeats
        first, end = worker_share(*self._share(count), worker, workers, self.batch_size)
        # Padding repeats the last video; a worker with nothing but padding reads that one video.
        padding = max(end - max(first, count), 0)
        begin, stop = min(first, count - 1) if padding else first, min(end, count)
        position = 0
        for number in order:
            shard = self.shards[number]
            span = len(shard.samples) * repeats
            if max(begin, position) < min(stop, position + span):
                for place, (key, members) in enumerate(_checked(self.urls[number], shard)):
                    start = position + place * repeats
                    for slot in range(max(begin, start), min(stop, start + repeats)):
                        if slot >= first:
                            yield self.urls[number], key, members, slot % repeats, True
                        for _ in range(padding if slot == count - 1 else 0):
                            yield self.urls[number], key, members, slot % repeats, False
                    if start + repeats >= stop:
                        break
            position += span

    def _substitute(self, requests: Iterator[_Request], epoch: int) -> Iterator[dict[str, Any]]:
        owed = 0
        bad: list[tuple[str, str]] = []
        last: dict[str, Any] | None = None
        for url, key, members, clip, real in requests:
            where = f"{url}, key {key}"
            try:
                last = self._build(url, key, members, where, epoch, clip)
            except ShardError as error:
                if not self.skip_bad:
                    raise
                bad.append((where, str(error)))
                owed += 1
                continue
            yield {**last, "real": real, BAD_SAMPLES: bad}
            bad = []
            for _ in range(owed):
                yield {**last, "real": False, BAD_SAMPLES: []}
            owed = 0
        if owed and last is None:
            raise ShardError(f"Expected at least one readable sample, but all {owed} failed; the last: {bad[-1][1]}")
        for number in range(owed if last is not None else 0):
            yield {**(last or {}), "real": False, BAD_SAMPLES: bad if number == 0 else []}

    def _build(
        self, url: str, key: str, members: dict[str, bytes], where: str, epoch: int, clip: int
    ) -> dict[str, Any]:
        if self.rules.training:
            name = f"{shard_name(url)}/{key}"
            built = train_sample(members, members.__getitem__, name, where, self.rules, epoch, clip)
        else:
            built = eval_sample(members, members.__getitem__, where, self.rules)
        return {**built, "__key__": key}


class PassLoader(DataLoader[dict[str, Any]]):
    """A loader that tells its `ShardStream` the number of the pass whenever a pass starts.

    Lightning calls `set_epoch` on samplers only, and an iterable data set has none of its own.

    Args:
        dataset: The stream.
        current_pass: Returns the number of the pass, for example the trainer's current epoch.
        **options: Options of `torch.utils.data.DataLoader`.

    Example:
        >>> stream = ShardStream([], [], SampleRules(clip_length=2), batch_size=2)
        >>> list(PassLoader(stream, lambda: 3)), stream._pass.item()
        ([], 3)
    """

    def __init__(self, dataset: ShardStream, current_pass: Callable[[], int], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.current_pass = current_pass

    def __iter__(self) -> Any:
        if isinstance(self.dataset, ShardStream):
            self.dataset.set_pass(self.current_pass())
        return super().__iter__()


def stream_shard(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read a remote shard from its start, undecoded.

    Args:
        url: The shard.

    Yields:
        Key and members (name → bytes) of each sample; only members that hold video or masks.

    Raises:
        ShardError: The shard cannot be opened, or the connection or the tar ends early.

    Example:
        >>> next(stream_shard("nothing://host/a.tar"))
        Traceback (most recent call last):
        ssync_pl.errors.ShardError: Expected to read nothing://host/a.tar to its end, but reading failed ...
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    stream = None
    try:
        stream = gopen(url)
        files = ({**item, "__url__": url} for item in tar_file_iterator(stream, select_files=_is_wanted))
        for sample in group_by_keys(files, keys=lambda name: split_member_name(name) or (None, None)):
            yield sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")}
        # Only a download that is read to its end says whether it was whole.
        while stream.read(1 << 20):
            pass
        stream.close()
    except GeneratorExit:
        raise
    except Exception as error:
        raise ShardError(
            f"Expected to read {url} to its end, but reading failed ({error}). Check the address and the connection; "
            "reading http needs the program curl."
        ) from error
    finally:
        with contextlib.suppress(Exception):  # a reader that stops early breaks the pipe on purpose
            if stream is not None:
                stream.close()


def fetch_index(urls: Sequence[str]) -> list[ShardEntry] | None:
    """Fetch the `index.json` beside remote shards.

    Args:
        urls: The shards; they may lie in several folders.

    Returns:
        One entry a shard, in the order of `urls`, or `None` when an index or an entry is missing.

    Example:
        >>> fetch_index(["nothing://host/a.tar"]) is None
        True
    """
    from webdataset.gopen import gopen

    known: dict[str, dict[str, ShardEntry]] = {}
    entries: list[ShardEntry] = []
    for url in urls:
        parts = urlparse(url)
        folder = urlunparse(parts._replace(path=posixpath.join(posixpath.dirname(parts.path), INDEX_NAME)))
        if folder not in known:
            try:
                with contextlib.closing(gopen(folder)) as stream:
                    known[folder] = parse_index(stream.read()).shards
            except Exception:  # each scheme fails in its own way; without an index the caller decides
                return None
        entry = known[folder].get(shard_name(url))
        if entry is None:
            return None
        entries.append(entry)
    return entries


def _is_wanted(name: str) -> bool:
    parts = split_member_name(name)
    return parts is not None and parts[1].split(".")[0] in _WANTED


def _checked(url: str, shard: ShardEntry) -> Iterator[tuple[str, dict[str, bytes]]]:
    place = -1
    for place, (key, members) in enumerate(stream_shard(url)):
        if place >= len(shard.samples) or key != shard.samples[place].key:
            break
        yield key, members
    else:
        if place + 1 == len(shard.samples):
            return
    raise ShardError(
        f"Expected {url} to hold the {len(shard.samples)} samples that `{INDEX_NAME}` names, but sample {place + 1} "
        "differs. The shard and its index do not belong together: upload both again."
    )


def _mix(samples: Iterator[dict[str, Any]], size: int, seed: str) -> Iterator[dict[str, Any]]:
    generator = random.Random(seed)
    held: list[dict[str, Any]] = []
    for sample in samples:
        held.append(sample)
        if len(held) > size:
            yield held.pop(generator.randrange(len(held)))
    generator.shuffle(held)
    yield from held
