"""Random access to the members of local shards through memory maps."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import OrderedDict
from typing import Any

from ssync_pl.data.index import SampleEntry, ShardEntry, header_fits
from ssync_pl.errors import ShardError

__all__ = ["ShardReader"]

_BLOCK = 512


class ShardReader:
    """Open shards when they are first read, keep some of them mapped, and hand out members without a copy.

    A reader pickles without its maps, so each worker process opens its own, under any start method. A forked process
    may go on with the maps it inherited: they have no shared file position.

    Args:
        max_open: Shards kept open at a time; the one unused for longest is closed.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from ssync_pl.data.index import scan_shard
        >>> from ssync_pl.data.shards import ShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, "train") as writer:
        ...         writer.write("7", {"info.json": {"fps": 12}})
        ...     path = f"{folder}/train-000000.tar"
        ...     shard = scan_shard(path)
        ...     with contextlib.closing(ShardReader()) as reader:
        ...         print(bytes(reader.member(path, shard, shard.samples[0], "info.json")))
        b'{"fps": 12}'
    """

    def __init__(self, max_open: int = 64) -> None:
        self.max_open = max_open
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()

    def member(self, path: str, shard: ShardEntry, sample: SampleEntry, member: str) -> memoryview:
        """Return the bytes of one member as a view; copy what is to be kept.

        Args:
            path: The shard.
            shard: Its entry in the index.
            sample: The sample's entry.
            member: Member name without the key.

        Returns:
            A view on the memory map.

        Raises:
            ShardError: The shard does not fit its index entry any more.
        """
        offset, size = sample.members[member]
        view = memoryview(self._map(path, shard))
        if not header_fits(view[offset - _BLOCK : offset], f"{sample.key}.{member}", size):
            raise ShardError(
                f"Expected member `{member}` of {path}, key {sample.key} at byte {offset} as `index.json` says, but "
                "something else lies there. The shard was replaced: delete `index.json`, it is built again."
            )
        return view[offset : offset + size]

    def close(self) -> None:
        """Close all maps; the next read opens them again."""
        while self._maps:
            self._drop()

    def __getstate__(self) -> dict[str, Any]:
        return {"max_open": self.max_open, "_maps": OrderedDict()}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # a failing finaliser would only print noise at exit
            self.close()

    def _map(self, path: str, shard: ShardEntry) -> mmap.mmap:
        found = self._maps.get(path)
        if found is not None:
            self._maps.move_to_end(path)
            return found
        while len(self._maps) >= self.max_open:
            self._drop()
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != shard.size:
                raise ShardError(
                    f"Expected {path} to have {shard.size} bytes as `index.json` says, but it has {size}. The shard "
                    "was replaced or is still being copied: wait, or delete `index.json`, it is built again."
                )
            opened = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[path] = opened
        return opened

    def _drop(self) -> None:
        _, oldest = self._maps.popitem(last=False)
        # A view that is still alive (a traceback holds it) keeps the map open until it goes.
        with contextlib.suppress(BufferError):
            oldest.close()
