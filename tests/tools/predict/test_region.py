import numpy as np
import pytest
import torch

from ssync_pl.data.samples import SampleRules, crop_offsets
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.tools.predict.windows import OUTSIDE, restore_labels, seen_region


@pytest.mark.parametrize("crop", ["none", "center", "random"])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("source", [(40, 60), (60, 40), (33, 71), (16, 16)])
def test_what_the_model_sees_goes_back_to_its_place(crop, reference, source):
    """The position of each pixel, sent through the transform, comes back as itself."""
    size = (16, 16)
    frames = np.zeros((1, *source, 3), np.uint8)
    frames[..., 0] = np.arange(source[0])[:, None] * 3
    frames[..., 1] = np.arange(source[1]) * 3
    rules = SampleRules(image_size=size, crop=crop, reference=reference)
    offsets = crop_offsets(frames, rules, None, None)
    transform = BatchTransform(size, crop=crop, mean=[0.0] * 3, std=[1.0] * 3, reference=reference)
    seen = transform({"video": torch.from_numpy(frames)[None], "crop": offsets[None]})["video"][0]
    rows, columns = seen_region(source, offsets.tolist(), size, crop, reference)
    back = restore_labels((seen[:, 0] * 255 / 3).round().long(), source, (rows, columns))
    inside = back[0, rows, columns].astype(int)
    step = max(source) / 16 + 1
    assert np.abs(inside - np.arange(source[0])[rows, None]).max() <= step
    outside = np.ones(source, bool)
    outside[rows, columns] = False
    assert (back[0][outside] == OUTSIDE).all()
    assert outside.any() == (crop != "none" and source[0] != source[1])


def test_masks_give_smooth_outlines():
    masks = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]])  # (1, 2, 1, 2)
    labels = restore_labels(masks, (2, 8), (slice(0, 2), slice(0, 8)))
    assert labels.shape == (1, 2, 8)
    assert labels[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
