from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from ssync_pl.data.dataset import BAD_SAMPLES, Collate, ShardDataset
from ssync_pl.data.index import load_shards
from ssync_pl.data.samples import SampleRules, find_member
from ssync_pl.errors import ConfigError, ShardError


def _open(pattern: str | Path, rules: SampleRules, **options: object) -> ShardDataset:
    paths = sorted(str(path) for path in Path(pattern).parent.glob(Path(pattern).name))
    return ShardDataset(paths, load_shards(paths), rules, **options)


def _by_key(dataset: ShardDataset, epoch: int = 0) -> dict[str, list[int]]:
    start = epoch * len(dataset)
    samples = [dataset[start + index] for index in range(len(dataset))]
    return {sample["__key__"]: sample["video"][:, 0, 0, 1].tolist() for sample in samples}


def test_clips_are_where_their_numbers_say(make_shards, numbered_video):
    dataset = _open(make_shards(), SampleRules(clip_length=3, frame_stride=2, masks=True))
    for index in range(7):
        sample = dataset[index]
        original = numbered_video(int(sample["__key__"]))
        start = int(sample["video"][0, 0, 0, 1])
        assert sample["video"].dtype == torch.uint8
        assert np.array_equal(sample["video"].numpy(), original["video.npy"][start : start + 5 : 2])
        want = original["segmentations.npy.gz"][start : start + 5 : 2]
        assert np.array_equal(sample["segmentations"].numpy(), want)
    dataset.close()


def test_starts_change_with_the_pass_and_reach_every_frame(make_shards):
    dataset = _open(make_shards(), SampleRules(clip_length=3))
    passes = [_by_key(dataset, epoch) for epoch in range(40)]
    assert passes[0] == _by_key(dataset, 0)
    assert passes[0] != passes[1]
    for key in "0123456":
        assert {each[key][0] for each in passes} == {0, 1, 2, 3}
    other = _open(Path(dataset.paths[0]).parent / "train-*.tar", SampleRules(clip_length=3, seed=1))
    assert _by_key(other) != passes[0]


def test_clips_per_video_differ(make_shards):
    dataset = _open(make_shards(frames=40), SampleRules(clip_length=2), clips_per_video=3)
    assert len(dataset) == 21
    clips = [dataset[index] for index in range(21)]
    assert [clip["__key__"] for clip in clips] == list("0123456") * 3
    for number in range(7):
        assert len({int(clips[number + 7 * turn]["video"][0, 0, 0, 1]) for turn in range(3)}) > 1


def test_a_clip_keeps_no_memory_map(make_shards):
    dataset = _open(make_shards(), SampleRules(clip_length=3))
    video = dataset[0]["video"]
    assert video.untyped_storage().nbytes() == video.numel()
    dataset.close()


def test_eval_takes_whole_videos_and_pads(make_shards, tmp_path, numbered_video):
    from ssync_pl.data.shards import ShardWriter

    with ShardWriter(tmp_path / "v", "val") as writer:
        for number, frames in enumerate((2, 4, 3)):
            writer.write(str(number), numbered_video(number, frames))
    dataset = _open(tmp_path / "v" / "val-*.tar", SampleRules(masks=True, max_objects=5))
    batch = Collate(dataset.rules)([dataset[index] for index in (0, 1, 2, 3)])
    assert batch["__key__"] == ["0", "1", "2", "0"]
    assert batch["batch_padding_mask"].tolist() == [True, True, True, False]
    assert batch["frame_mask"].sum(1).tolist() == [2, 4, 3, 2]
    assert batch["video"].shape == (4, 4, 8, 8, 3)
    assert batch["video"][0, :, 0, 0, 1].tolist() == [0, 1, 1, 1]
    assert batch["segmentations"][0, 2:].eq(0).all()
    assert batch["max_objects"] == 5
    assert batch["mask_ids"] is True


def test_channel_masks_with_various_objects(tmp_path):
    from ssync_pl.data.shards import ShardWriter

    with ShardWriter(tmp_path, "val") as writer:
        for number, objects in enumerate((1, 3)):
            masks = np.zeros((2, 4, 6, objects), np.uint8)
            masks[:, :, :2] = 40 + number  # category ids
            writer.write(str(number), {"video.npy": np.zeros((2, 4, 6, 3), np.uint8), "segmentations.npy": masks})
    dataset = _open(tmp_path / "val-*.tar", SampleRules(masks=True, mask_format="channels", max_objects=3))
    batch = Collate(dataset.rules)([dataset[0], dataset[1]])
    assert batch["segmentations"].shape == (2, 2, 4, 6, 3)
    assert batch["segmentations"].sum((1, 2, 3)).tolist() == [[16, 0, 0], [16, 16, 16]]
    tight = _open(tmp_path / "val-*.tar", SampleRules(masks=True, mask_format="channels", max_objects=2))
    with pytest.raises(ShardError, match=r"key 1 to have at most 2 objects"):
        tight[1]
    ids = _open(tmp_path / "val-*.tar", SampleRules(masks=True))
    with pytest.raises(ShardError, match="mask_format='channels'"):
        ids[1]


def test_sizes_that_differ_stay_a_list(tmp_path):
    from ssync_pl.data.shards import ShardWriter

    with ShardWriter(tmp_path, "val") as writer:
        for number, width in enumerate((6, 8)):
            writer.write(str(number), {"video.npy": np.zeros((2, 4, width, 3), np.uint8)})
    dataset = _open(tmp_path / "val-*.tar", SampleRules(image_size=(4, 4), crop="center"))
    batch = Collate(dataset.rules)([dataset[0], dataset[1]])
    assert [video.shape for video in batch["video"]] == [(2, 4, 6, 3), (2, 4, 8, 3)]
    assert batch["crop"].tolist() == [[0, 1], [0, 2]]


def test_crop_offsets_reach_both_ends(make_shards):
    rules = SampleRules(clip_length=2, image_size=(8, 8), crop="random")
    dataset = _open(make_shards(size=(8, 11)), rules)
    offsets = {tuple(dataset[index]["crop"].tolist()) for index in range(140)}
    assert offsets == {(0, 0), (0, 1), (0, 2), (0, 3)}


@pytest.mark.parametrize(
    ("video", "masks"), [("video.npy.gz", "segmentations.npy"), ("video.npy", "segmentations.npy.gz")]
)
def test_gz_members_give_the_same_clips(tmp_path, numbered_video, video, masks):
    from ssync_pl.data.shards import ShardWriter

    arrays = list(numbered_video(3).values())
    with ShardWriter(tmp_path, "a") as writer:
        writer.write("3", {video: arrays[0], masks: arrays[1]})
    sample = _open(tmp_path / "a-*.tar", SampleRules(clip_length=6, masks=True))[0]
    assert np.array_equal(sample["video"].numpy(), arrays[0])
    assert np.array_equal(sample["segmentations"].numpy(), arrays[1])


def test_pictures_are_videos_of_one_frame(write_tar, npy_bytes, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8)
    masks = np.zeros((4, 6, 2), np.uint8)
    path = write_tar({"0.image.npy": npy_bytes(image), "0.segmentations.npy": npy_bytes(masks)}, "coco-0.tar")
    sample = _open(path, SampleRules(masks=True, mask_format="channels"))[0]
    assert np.array_equal(sample["video"].numpy(), image[None])
    assert sample["segmentations"].shape == (1, 4, 6, 2)
    assert _open(path, SampleRules(clip_length=1))[0]["video"].shape == (1, 4, 6, 3)


def test_mp4_clips(write_tar):
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in range(0, 240, 20):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path = write_tar({"0.video.mp4": buffer.getvalue()})
    levels = _open(path, SampleRules(clip_length=3, frame_stride=2))[0]["video"].float().mean((1, 2, 3))
    assert torch.allclose(levels.diff(), torch.tensor([40.0, 40.0]), atol=6)
    assert _open(path, SampleRules())[0]["video"].shape == (12, 16, 32, 3)
    with pytest.raises(ShardError, match="key 0 to have at least 13 frames"):
        _open(path, SampleRules(clip_length=13))[0]


def test_bad_samples_are_named(write_tar, npy_bytes, numbered_video):
    arrays = numbered_video(0)
    video, masks = npy_bytes(arrays["video.npy"]), npy_bytes(arrays["segmentations.npy.gz"])
    cases = [
        ({"0.video.npy": video[:-1], "0.segmentations.npy": masks}, "`video.npy` of .*key 0 .*half written"),
        ({"0.video.npy": b"\x93NUMPY", "0.segmentations.npy": masks}, "`video.npy` of .*key 0"),
        ({"0.video.pkl": b"x", "0.segmentations.npy": masks}, "`video.pkl` of .*key 0 .*execute code"),
        ({"0.video.avi": b"x", "0.segmentations.npy": masks}, "`video.avi` of .*key 0 .*not on the allow-list"),
        ({"0.segmentations.npy": masks}, "key 0 to have one of the members video.npy"),
        ({"0.video.npy": video}, "key 0 to have one of the members segmentations.npy"),
        ({"0.video.npy": video, "0.segmentations.pth": masks}, "`segmentations.pth` of .*execute code"),
        (
            {"0.video.npy": video, "0.segmentations.npy": npy_bytes(np.zeros((5, 8, 8, 1), np.uint8))},
            "as many frames as the video, 6, but got 5",
        ),
        (
            {"0.video.npy": video, "0.segmentations.npy": npy_bytes(np.zeros((6, 8, 4, 1), np.uint8))},
            "the video's proportions 8x8, but got 8x4",
        ),
        (
            {"0.video.npy": video, "0.segmentations.npy": npy_bytes(np.zeros((6, 8, 8, 1), np.float32))},
            "integer masks .* float32",
        ),
        (
            {"0.video.npy": npy_bytes(np.zeros((6, 8, 8, 3), np.float32)), "0.segmentations.npy": masks},
            r"uint8 frames \(F, h, w, 3\)",
        ),
        (
            {"0.video.npy": npy_bytes(np.array([None])), "0.segmentations.npy": masks},
            "Python objects",
        ),
    ]
    for number, (members, message) in enumerate(cases):
        path = write_tar(members, f"case{number}.tar")
        dataset = _open(path, SampleRules(masks=True))
        with pytest.raises(ShardError, match=message):
            dataset[0]
        skipping = _open(path, SampleRules(masks=True), skip_bad=True)
        with pytest.raises(ShardError, match=r"all 1 failed; the last: Expected "):
            skipping[0]


def test_too_many_objects_name_key_and_count(make_shards):
    dataset = _open(make_shards(objects=4), SampleRules(masks=True, max_objects=3))
    with pytest.raises(ShardError, match=r"key 2 to have at most 3 objects, but got 4"):
        dataset[2]


def test_short_videos_name_key_and_frames(make_shards):
    dataset = _open(make_shards(), SampleRules(clip_length=4, frame_stride=2))
    with pytest.raises(ShardError, match=r"key 5 to have at least 7 frames .*but got 6"):
        dataset[5]


def test_skipping_puts_the_next_in_place_and_says_so(write_tar, npy_bytes, numbered_video):
    good = {number: npy_bytes(numbered_video(number)["video.npy"]) for number in range(3)}
    path = write_tar({"0.video.npy": good[0], "1.video.npy": good[1][:-9], "2.video.npy": good[2]})
    dataset = _open(path, SampleRules(), skip_bad=True)
    samples = [dataset[index] for index in range(3)]
    assert [sample["__key__"] for sample in samples] == ["0", "2", "2"]
    assert [sample["real"] for sample in samples] == [True, False, True]
    assert [len(sample[BAD_SAMPLES]) for sample in samples] == [0, 1, 0]
    assert "key 1" in samples[1][BAD_SAMPLES][0][0]
    batch = Collate(dataset.rules)(samples)
    assert len(batch[BAD_SAMPLES]) == 1


def test_members_are_chosen_cheapest_first():
    assert find_member(["video.mp4", "video.npy"], "video") == "video.npy"
    assert find_member(["image.png", "info.json"], "video") == "image.png"


def test_unwanted_members_do_no_harm(write_tar, npy_bytes, numbered_video):
    path = write_tar({"0.video.npy": npy_bytes(numbered_video(0)["video.npy"]), "0.meta.pyd": b"\x80evil"})
    assert _open(path, SampleRules())[0]["video"].shape == (6, 8, 8, 3)


@pytest.mark.parametrize(
    "settings", [{"clip_length": 0}, {"frame_stride": 0}, {"flip_probability": 1.5}, {"flip_probability": -0.1}]
)
def test_rules_out_of_range(settings):
    with pytest.raises(ConfigError, match=f"`{next(iter(settings))}`"):
        SampleRules(**settings)


def test_an_empty_set_is_refused(write_tar):
    with pytest.raises(ShardError, match="at least one sample"):
        _open(write_tar({"README": b"x"}), SampleRules())


def test_gz_bytes_are_needed_only_once(write_tar, npy_bytes, numbered_video):
    data = gzip.compress(npy_bytes(numbered_video(0)["video.npy"]))
    path = write_tar({"0.video.npy.gz": data[:-4]})
    with pytest.raises(ShardError, match=r"`video\.npy\.gz` of .*key 0"):
        _open(path, SampleRules())[0]
