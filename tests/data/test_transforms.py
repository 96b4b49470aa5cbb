import numpy as np
import pytest
import torch

from ssync_pl.data.transforms import BatchTransform, covering_size
from ssync_pl.errors import ShapeError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _by_hand(video, size, mode, offsets, flips, out):
    """The whole transform in float64, one video at a time."""
    result = []
    for one, (top, left), flip in zip(torch.from_numpy(video), offsets, flips, strict=True):
        frames = torch.nn.functional.interpolate(one.permute(0, 3, 1, 2).double() / 255, size, mode=mode).clamp(0, 1)
        frames = frames[:, :, top : top + out[0], left : left + out[1]]
        frames = frames.numpy()[..., ::-1] if flip else frames.numpy()
        result.append((frames - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1)))
    return np.stack(result)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 10)])
def test_resize_crop_flip_and_normalise_by_hand_video_and_masks_alike(mode, shape):
    rng = np.random.default_rng(1)
    video = rng.integers(0, 256, (2, 2, *shape, 3)).astype(np.uint8)
    masks = rng.integers(0, 3, (2, 2, *shape, 1)).astype(np.uint8)
    crop, out = ("random", (12, 12)) if shape == (6, 10) else ("none", (12, 10))
    size = covering_size(shape, out) if crop == "random" else out
    assert size == (12, 2 * shape[1])
    offsets, flips = [(0, 3), (0, 8)] if crop == "random" else [(0, 0)] * 2, [False, True]
    batch = {
        "video": torch.from_numpy(video),
        "segmentations": torch.from_numpy(masks),
        "flip": torch.tensor(flips),
        "crop": torch.tensor(offsets),
        "mask_ids": True,
        "max_objects": 2,
    }
    got = BatchTransform(out, resize_mode=mode, crop=crop)(batch)
    assert got["video"].dtype == torch.float32
    np.testing.assert_allclose(got["video"].numpy(), _by_hand(video, size, mode, offsets, flips, out), atol=2e-5)
    assert got["segmentations"].shape == (2, 2, 3, *out)
    for b in range(2):
        # Twice as many pixels: every source pixel becomes a 2x2 block.
        ids = masks[b, :, :, :, 0].repeat(2, 1).repeat(2, 2)[:, :, offsets[b][1] : offsets[b][1] + out[1]]
        ids = ids[:, :, ::-1] if flips[b] else ids
        for channel in range(3):
            assert np.array_equal(got["segmentations"][b, :, channel].numpy(), ids == channel)


def test_shrinking_averages():
    video = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)
    video[:, :, ::2] = 255  # stripes finer than the target: without anti-aliasing some vanish
    out = BatchTransform((2, 2), resize_mode="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)
    assert (out({"video": video, "crop": torch.zeros(1, 2).long()})["video"] - 0.5).abs().max() < 0.1
    plain = BatchTransform(mean=(0.5,) * 3, std=(0.5,) * 3)({"video": video, "crop": torch.zeros(1, 2).long()})["video"]
    assert torch.equal(plain, (video.permute(0, 1, 4, 2, 3) / 255.0 - 0.5) / 0.5)  # no image_size keeps pixels


def test_mixed_sizes_equal_single_transforms():
    videos = [torch.randint(0, 256, (2, h, w, 3), dtype=torch.uint8) for h, w in ((6, 9), (8, 7))]
    masks = [torch.randint(0, 2, (2, *video.shape[1:3], 2), dtype=torch.uint8) for video in videos]
    rest = {"mask_ids": False, "max_objects": 3}
    transform = BatchTransform((8, 8), crop="center", has_background=False)
    crops = torch.tensor([[0, 2], [0, 0]])
    frame_mask = torch.tensor([[True, True], [True, False]])
    out = transform({"video": videos, "segmentations": masks, "crop": crops, "frame_mask": frame_mask, **rest})
    for b in range(2):
        one = transform({"video": videos[b][None], "segmentations": masks[b][None], "crop": crops[b : b + 1], **rest})
        assert torch.equal(out["video"][b], one["video"][0])
        assert torch.equal(out["segmentations"][b, 0], one["segmentations"][0, 0])
    assert not out["segmentations"][1, 1].any()
    with pytest.raises(ShapeError, match="Set `image_size`"):
        BatchTransform()({"video": videos, "crop": crops})


@pytest.mark.gpu
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    batch = {
        "video": torch.randint(0, 256, (4, 3, 37, 41, 3), dtype=torch.uint8),
        "segmentations": torch.randint(0, 5, (4, 3, 37, 41, 1), dtype=torch.uint8),
        "flip": torch.tensor([True, False, True, False]),
        "crop": torch.tensor([[0, 0], [0, 3], [0, 1], [0, 6]]),
    }
    for mode in ("bilinear", "bicubic"):
        transform = BatchTransform((64, 64), crop="random", resize_mode=mode)
        cpu = transform({**batch, "mask_ids": True, "max_objects": 4})
        cuda = transform({**{k: v.cuda() for k, v in batch.items()}, "mask_ids": True, "max_objects": 4})
        torch.testing.assert_close(cuda["video"].cpu(), cpu["video"], atol=1e-5, rtol=0)
        assert torch.equal(cuda["segmentations"].cpu(), cpu["segmentations"])
