"""Small shard folders whose pixels name their video and frame, and what stands in for a trainer."""

import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.shards import ShardWriter

sys.path.insert(0, str(Path(__file__).parent))

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "clip_length": 2, "batch_size": 2, "num_workers": 0}


def _numbered_video(number: int, frames: int = 6, size: tuple[int, int] = (8, 8), objects: int = 2) -> dict:
    """Channel 0 names the video, channel 1 the frame; the masks show `objects` columns from the left."""
    video = np.zeros((frames, *size, 3), np.uint8)
    video[..., 0] = number
    video[..., 1] = np.arange(frames)[:, None, None]
    video[..., 2] = np.arange(size[1])
    masks = np.zeros((frames, *size, 1), np.uint8)
    for ident in range(1, objects + 1):
        masks[:, :, ident - 1] = ident
    return {"video.npy": video, "segmentations.npy.gz": masks}


@pytest.fixture
def numbered_video() -> Callable[..., dict[str, np.ndarray]]:
    return _numbered_video


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., str]:
    """Write `count` numbered videos into shards and return their pattern."""

    def make(prefix="train", count=7, per_shard=3, folder="shards", **options):
        with ShardWriter(tmp_path / folder, prefix, per_shard) as writer:
            for number in range(count):
                writer.write(str(number), _numbered_video(number, **options))
        return str(tmp_path / folder / f"{prefix}-*.tar")

    return make


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar of raw members, as a stranger would."""

    def write(members: dict[str, bytes], name: str = "train-000000.tar") -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def npy_bytes() -> Callable[[np.ndarray], bytes]:
    def encode(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    return encode


@pytest.fixture
def opened() -> Callable[..., ShardDataModule]:
    """Return a data module as a trainer of this rank and epoch sets it up."""

    def open_module(train=None, rank: int = 0, world: int = 1, epoch: int = 0, stage: str = "fit", **options: Any):
        data = ShardDataModule(train, **{**PLAIN, **options})
        progress = SimpleNamespace(current=SimpleNamespace(processed=10**9))
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank,
            world_size=world,
            current_epoch=epoch,
            num_training_batches=float("inf"),
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            state=SimpleNamespace(fn=stage),
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        )
        data.setup(stage)
        return data

    return open_module


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Serve `tmp_path` over HTTP and return the address."""
    from flaky_server import FlakyServer

    server = FlakyServer(tmp_path)
    yield server.url
    server.close()
