import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_decode import grey, video_bytes

from ssync_pl.data.check import check_shards
from ssync_pl.data.dataset import ShardDataset, ShardSource, collate
from ssync_pl.data.index import load_shards
from ssync_pl.data.samples import SampleRules, find_member
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ShardError

CHANNELS = {"masks": True, "mask_format": "channels"}


def _open(pattern: str | Path, rules: SampleRules, **options: object) -> ShardDataset:
    paths = sorted(str(path) for path in Path(pattern).parent.glob(Path(pattern).name))
    return ShardDataset(ShardSource(paths, load_shards(paths)), rules, **options)


def test_clips_are_where_their_numbers_say_and_start_anywhere(make_shards, numbered_video):
    pattern = make_shards(size=(8, 11))
    rules = {"clip_length": 2, "frame_stride": 2, "masks": True, "image_size": (8, 8), "crop": "random"}
    data, other = (_open(pattern, SampleRules(**rules, seed=seed)) for seed in (0, 1))
    starts, offsets = set(), set()
    for clip in range(7 * 40):
        sample = data.sample(clip)
        start = int(sample["video"][0, 0, 0, 1])
        original = numbered_video(clip % 7, size=(8, 11))
        assert np.array_equal(sample["video"].numpy(), original["video.npy"][start : start + 3 : 2])
        assert np.array_equal(sample["segmentations"].numpy(), original["segmentations.npy.gz"][start : start + 3 : 2])
        assert sample["video"].untyped_storage().nbytes() == sample["video"].numel()  # no whole video is kept alive
        starts.add((clip % 7, start))
        offsets.add(tuple(sample["crop"].tolist()))
    assert len(starts) == 7 * 4
    assert offsets == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert any(not torch.equal(data.sample(n)["video"], other.sample(n)["video"]) for n in range(7))


def test_evaluation_takes_whole_videos_and_pads(tmp_path, numbered_video):
    with ShardWriter(tmp_path, "a") as writer:
        for number, frames in enumerate((2, 4, 3)):
            writer.write(str(number), numbered_video(number, frames))
    data = _open(tmp_path / "a-*.tar", SampleRules(masks=True, max_objects=5))
    batch = collate([data.sample(clip) for clip in (0, 1, 2, 3)], data.rules)
    assert batch["__key__"] == ["0", "1", "2", "0"]
    assert batch["batch_padding_mask"].tolist() == [True, True, True, False]
    assert batch["frame_mask"].sum(1).tolist() == [2, 4, 3, 2]
    assert batch["video"].shape == (4, 4, 8, 8, 3)
    assert batch["video"][0, :, 0, 0, 1].tolist() == [0, 1, 1, 1]
    assert batch["segmentations"][0, 2:].eq(0).all()
    assert (batch["max_objects"], batch["mask_ids"]) == (5, True)


@pytest.mark.parametrize("video", ["video.npy.gz", "video.npy"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_packed_and_fortran_members_give_the_same_clips(write_tar, npy_bytes, numbered_video, video, order):
    arrays = list(numbered_video(3).values())
    data = npy_bytes(np.array(arrays[0], order=order))
    members = {f"3.{video}": gzip.compress(data) if video.endswith("gz") else data}
    path = write_tar({**members, "3.segmentations.npy": npy_bytes(arrays[1])})
    sample = _open(path, SampleRules(clip_length=6, masks=True)).sample(0)
    assert np.array_equal(sample["video"].numpy(), arrays[0])
    assert np.array_equal(sample["segmentations"].numpy(), arrays[1])
    assert find_member(["video.mp4", "video.npy"], "video") == "video.npy"  # the cheapest first


@pytest.mark.parametrize("masks", [np.ones((4, 6, 2), np.uint8), np.ones((2, 4, 6), np.uint8)])
def test_pictures_are_videos_of_one_frame_with_masks_in_either_layout(write_tar, npy_bytes, masks):
    image = np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8)
    path = write_tar({"0.image.npy": npy_bytes(image), "0.segmentations.npy": npy_bytes(masks)}, "coco-0.tar")
    sample = _open(path, SampleRules(**CHANNELS)).sample(0)
    assert np.array_equal(sample["video"].numpy(), image[None])
    assert sample["segmentations"].shape == (1, 4, 6, 2)
    assert _open(path, SampleRules(clip_length=1)).sample(0)["video"].shape == (1, 4, 6, 3)


def test_mp4_clips(write_tar):
    path = write_tar({"0.video.mp4": video_bytes([grey(level) for level in range(0, 240, 20)])})
    levels = _open(path, SampleRules(clip_length=3, frame_stride=2)).sample(0)["video"].float().mean((1, 2, 3))
    assert torch.allclose(levels.diff(), torch.tensor([40.0, 40.0]), atol=6)
    assert _open(path, SampleRules()).sample(0)["video"].shape == (12, 16, 32, 3)
    with pytest.raises(ShardError, match="key 0 to have at least 13 frames"):
        _open(path, SampleRules(clip_length=13)).sample(0)


def test_bad_samples_are_named(write_tar, npy_bytes, numbered_video):
    arrays = numbered_video(0)
    video, masks = npy_bytes(arrays["video.npy"]), npy_bytes(arrays["segmentations.npy.gz"])

    def zeros(*shape, dtype=np.uint8):
        return npy_bytes(np.zeros(shape, dtype))

    cases = [
        (video[:-1], {"segmentations.npy": masks}, "`video.npy` of .*key 0 .*half written"),
        (None, {"video.pkl": b"x", "segmentations.npy": masks}, "video.pkl"),
        (None, {"video.avi": b"x", "segmentations.npy": masks}, "video.avi"),
        (None, {"segmentations.npy": masks}, "key 0 to have one of the members video.npy"),
        (video, {}, "key 0 to have one of the members segmentations.npy"),
        (video, {"segmentations.pth": masks}, "segmentations.pth"),
        (video, {"segmentations.npy": zeros(5, 8, 8, 1)}, "6 of 8x8, but got 5"),
        (video, {"segmentations.npy": zeros(6, 8, 4, 1)}, "proportions"),
        (video, {"segmentations.npy": zeros(6, 8, 8, 1, dtype=np.float32)}, "float32"),
        (video, {"segmentations.npy": npy_bytes(np.full((6, 8, 8, 1), -1))}, "from 0 on"),
        (zeros(6, 8, 8, 3, dtype=np.float32), {"segmentations.npy": masks}, "uint8 frames"),
        (npy_bytes(np.array([None])), {"segmentations.npy": masks}, "Python objects"),
    ]
    for number, (first, rest, message) in enumerate(cases):
        members = {} if first is None else {"video.npy": first}
        path = write_tar({f"0.{name}": data for name, data in {**members, **rest}.items()}, f"case{number}.tar")
        with pytest.raises(ShardError, match=message):
            _open(path, SampleRules(masks=True)).sample(0)
        with pytest.raises(ShardError, match="at least one readable sample"):
            _open(path, SampleRules(masks=True), skip_bad=True).sample(0)
        if rest:  # data check reads videos without masks
            (problem,) = check_shards({"case": [str(path)]}).problems
            assert (problem.kind, problem.key) == ("sample", "0")
            assert re.search(message, problem.message)
