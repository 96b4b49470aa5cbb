"""`sampling: reference` against the published transforms, written out here step by step."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssync_pl.data import ShardDataModule
from ssync_pl.data.shards import ShardWriter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _frames(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _normalise(clip: torch.Tensor) -> torch.Tensor:
    return (clip - torch.tensor(MEAN)[:, None, None, None]) / torch.tensor(STD)[:, None, None, None]


def _to_cfhw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float().permute(3, 0, 1, 2) / 255.0


def _short_side(clip: torch.Tensor, size: int, **options: str) -> torch.Tensor:
    height, width = clip.shape[-2:]
    if width < height:
        return F.interpolate(clip, size=(math.floor(height / width * size), size), **options)
    return F.interpolate(clip, size=(size, math.floor(width / height * size)), **options)


def _central(clip: torch.Tensor) -> torch.Tensor:
    height, width = clip.shape[-2:]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return clip[..., top : top + side, left : left + side]


@pytest.fixture
def movi(tmp_path):
    """Shards as published pipelines have them: decimal keys, uncompressed arrays, ids."""
    videos = [_frames(seed, (12, 20, 20, 3)) for seed in range(3)]
    masks = [np.random.default_rng(seed).integers(0, 4, (12, 20, 20, 1)).astype(np.uint8) for seed in range(3)]
    with ShardWriter(tmp_path, "movi_c-train", 2) as writer:
        for number, (video, mask) in enumerate(zip(videos, masks, strict=True)):
            writer.write(str(number), {"video.npy": video, "segmentations.npy": mask})
    return str(tmp_path / "movi_c-train-{000000..000001}.tar"), videos, masks


def _bicubic(array: np.ndarray, size: int) -> torch.Tensor:
    return _normalise(F.interpolate(_to_cfhw(array), size=size, mode="bicubic").clamp(0, 1))


def _opened(stage: str, size: int, **options):
    data = ShardDataModule(image_size=size, sampling="reference", num_workers=0, **options)
    data.setup(stage)
    return data, data.train_dataloader() if stage == "fit" else data.val_dataloader()


@pytest.mark.parametrize("size", [9, 33])
def test_movi(movi, size):
    pattern, videos, masks = movi
    data, loader = _opened("fit", size, train=pattern, batch_size=3)
    seen = set()
    for raw in (raw for _ in range(6) for raw in loader):
        batch = data.on_after_batch_transfer(raw, 0)
        for video, key, flip, frames in zip(batch["video"], batch["__key__"], raw["flip"], raw["video"], strict=True):
            whole = videos[int(key)]
            (start,) = [t for t in range(9) if np.array_equal(whole[t : t + 4], frames.numpy())]
            clip = _bicubic(whole[start : start + 4], size)
            clip = clip.flip(-1) if flip else clip
            torch.testing.assert_close(video, clip.permute(1, 0, 2, 3), rtol=0, atol=2e-6)
            seen |= {start, f"flip {bool(flip)}"}
    assert seen == {0, 4, 8, "flip False", "flip True"}
    data, loader = _opened("validate", size, validation=pattern, batch_size=3, max_objects=10)
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    for video, truth, number in zip(batch["video"], batch["segmentations"], range(3), strict=True):
        torch.testing.assert_close(video, _bicubic(videos[number], size).permute(1, 0, 2, 3), rtol=0, atol=2e-6)
        hot = F.one_hot(torch.from_numpy(masks[number])[..., 0].long(), 11).permute(0, 3, 1, 2)
        assert torch.equal(truth, F.interpolate(hot.to(torch.uint8), size=size, mode="nearest-exact").bool())


@pytest.mark.parametrize("shape", [(8, 18, 31), (8, 31, 18), (8, 15, 15)])
def test_ytvis(tmp_path, shape):
    size = 24
    video = _frames(0, (*shape, 3))
    masks = (np.random.default_rng(1).random((*shape, 3)) < 0.4).astype(np.uint8) * 7
    with ShardWriter(tmp_path, "ytvis-train") as writer:
        writer.write("0", {"video.npy": video, "segmentations.npy": masks})
    pattern = str(tmp_path / "ytvis-train-*.tar")
    options = {"has_background": False, "batch_size": 1}
    data, loader = _opened("fit", size, train=pattern, crop="random", **options)
    for _ in range(8):
        raw = next(iter(loader))
        got = data.on_after_batch_transfer(raw, 0)["video"][0]
        clip = _to_cfhw(raw["video"][0].numpy())
        clip = _normalise(_short_side(clip, size, mode="bicubic").clamp(0, 1))
        top, left = raw["crop"][0].tolist()
        assert 0 <= top <= clip.shape[-2] - size
        assert 0 <= left <= clip.shape[-1] - size
        clip = clip[..., top : top + size, left : left + size]
        clip = clip.flip(-1) if raw["flip"][0] else clip
        torch.testing.assert_close(got, clip.permute(1, 0, 2, 3), rtol=0, atol=2e-6)

    options |= {"max_objects": 25, "mask_format": "channels"}
    data, loader = _opened("validate", size, validation=pattern, crop="center", **options)
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    clip = _normalise(F.interpolate(_central(_to_cfhw(video)), size=size, mode="bicubic").clamp(0, 1))
    torch.testing.assert_close(batch["video"][0], clip.permute(1, 0, 2, 3), rtol=0, atol=2e-6)
    truth = _central(torch.from_numpy((masks != 0).astype(np.uint8)).permute(0, 3, 1, 2))
    truth = F.interpolate(truth, size=size, mode="nearest-exact").bool()
    assert torch.equal(batch["segmentations"][0, :, :3], truth)
    assert batch["segmentations"].shape[2] == 25
    assert not batch["segmentations"][0, :, 3:].any()
