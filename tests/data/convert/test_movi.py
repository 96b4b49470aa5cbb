from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from movi_records import example, frame_record, movi_features, png, write_movi

from ssync_pl.data import ShardDataModule
from ssync_pl.data.convert.engine import ConversionReport, Item
from ssync_pl.data.convert.movi import EXTRA_FIELDS, MoviDecoder, convert_movi
from ssync_pl.data.decode import decode_member
from ssync_pl.data.index import load_shards, read_index
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError


def _convert(root: Path, out: Path, **options: Any) -> list[ConversionReport]:
    return convert_movi(root, out, **{"num_workers": 0, "progress": False, "samples_per_shard": 2, **options})


def _samples(report: ConversionReport) -> dict[str, dict[str, Any]]:
    found = {}
    with contextlib.closing(ShardReader()) as reader:
        for path, shard in zip(report.shards, load_shards(report.shards), strict=True):
            for sample in shard.samples:
                found[sample.key] = {
                    name: decode_member(name, reader.member(str(path), shard, sample, name)) for name in sample.members
                }
    return found


def _rows(values: np.ndarray) -> Any:
    """Back from JSON to float32."""
    return np.array(values, np.float32)


@pytest.mark.parametrize("layout", ["", "movi_c/8x8/1.0.0"])
def test_pixels_masks_and_facts_come_back_exactly(tmp_path: Path, layout: str) -> None:
    truths = write_movi(tmp_path / "tfds" / layout)
    write_movi(tmp_path / "tfds" / layout, "validation", (1,))
    train, validation = _convert(tmp_path / "tfds", tmp_path / "out")
    assert [path.name for path in train.shards] == [f"movi_c-train-{number:06d}.tar" for number in range(3)]
    assert [path.name for path in validation.shards] == ["movi_c-validation-000000.tar"]
    assert (train.videos, train.frames, validation.videos) == (5, 15, 1)
    samples = _samples(train)
    assert list(samples) == [f"{number:06d}" for number in range(5)]
    for number, (sample, truth) in enumerate(zip(samples.values(), truths, strict=True)):
        assert sorted(sample) == ["info.json", "segmentations.npy.gz", "video.npy"]
        for name, field in (("video.npy", "video"), ("segmentations.npy.gz", "segmentations")):
            assert sample[name].dtype == np.uint8
            np.testing.assert_array_equal(sample[name], truth[field])
        info = sample["info.json"]
        assert info["fps"] == 12
        assert info["background"] == "studio"
        assert info["metadata"]["video_name"] == str(number)
        np.testing.assert_array_equal(_rows(info["metadata"]["forward_flow_range"]), truth["forward_flow_range"])
        assert info["camera"]["focal_length"] == 35.0
        np.testing.assert_array_equal(_rows(info["camera"]["positions"]), truth["camera_positions"])
        assert len(info["instances"]) == 2
        for index, found in enumerate(info["instances"]):
            assert found["asset_id"] == f"asset-{index}"
            assert found["category"] == index
            assert np.float32(found["mass"]) == truth["mass"][index]
            np.testing.assert_array_equal(_rows(found["positions"]), truth["positions"][index])
            np.testing.assert_array_equal(_rows(found["bboxes_3d"]), truth["bboxes_3d"][index])
            assert found["visibility"] == truth["visibility"][index].tolist()
            assert found["bbox_frames"] == truth["bbox_frames"][index]
            np.testing.assert_array_equal(_rows(found["bboxes"]).reshape(-1, 4), truth["bboxes"][index])
        assert [row["frame"] for row in info["collisions"]] == [3, 7, 11]
        assert [row["instances"] for row in info["collisions"]] == [[0, 1], [1, 65535], [0, 65535]]
        np.testing.assert_array_equal(_rows([row["force"] for row in info["collisions"]]), truth["collision_forces"])
    assert samples["000002"]["info.json"]["record"] == ["movi_c-train.tfrecord-00001-of-00002", 0]


def test_depth_and_flow_keep_all_sixteen_bits(tmp_path: Path) -> None:
    truths = write_movi(tmp_path / "tfds", counts=(2,))
    (report,) = _convert(tmp_path / "tfds", tmp_path / "out", fields=["backward_flow", "depth", "forward_flow"])
    for sample, truth in zip(_samples(report).values(), truths, strict=True):
        for field in EXTRA_FIELDS:
            values = sample[f"{field}.npy"]
            assert values.dtype == np.float32
            assert values.shape == truth[field].shape
            np.testing.assert_array_equal(values.astype(np.uint16), truth[field])
            np.testing.assert_array_equal(
                _rows(sample["info.json"]["metadata"][f"{field}_range"]), truth[f"{field}_range"]
            )


def test_a_converted_set_evaluates_through_the_data_module(tmp_path: Path) -> None:
    truths = write_movi(tmp_path / "tfds", "validation", (3,), objects=4)
    _convert(tmp_path / "tfds", tmp_path / "out")
    data = ShardDataModule(
        validation=str(tmp_path / "out" / "movi_c-validation-*.tar"),
        val_batch_size=2,
        num_workers=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        max_objects=4,
    )
    data.setup("validate")
    seen = set()
    for batch in data.val_dataloader():
        batch = data.on_after_batch_transfer(batch, 0)
        for row, key in enumerate(batch["__key__"]):
            if not batch["batch_padding_mask"][row]:
                continue
            truth = truths[int(str(key).split("/")[-1])]
            seen.add(int(str(key).split("/")[-1]))
            video = torch.round(batch["video"][row] * 255).byte().permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(video, truth["video"])
            masks = batch["segmentations"][row].numpy()
            for ident in range(masks.shape[1]):
                np.testing.assert_array_equal(masks[:, ident], truth["segmentations"][..., 0] == ident)
    assert seen == {0, 1, 2}


def test_processes_change_no_byte_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    write_movi(tmp_path / "tfds")
    (alone,) = _convert(tmp_path / "tfds", tmp_path / "0")
    (together,) = _convert(tmp_path / "tfds", tmp_path / "2", num_workers=2)
    for one, other in zip(alone.shards, together.shards, strict=True):
        assert one.read_bytes() == other.read_bytes()
    (again,) = _convert(tmp_path / "tfds", tmp_path / "2")
    assert again.kept == 3
    # the plan names no folder, so the originals may move
    (tmp_path / "tfds").rename(tmp_path / "moved")
    (again,) = _convert(tmp_path / "moved", tmp_path / "2", num_workers=0)
    assert again.kept == 3


def test_splits_and_limit(tmp_path: Path) -> None:
    write_movi(tmp_path / "tfds")
    write_movi(tmp_path / "tfds", "test", (2,))
    (report,) = _convert(tmp_path / "tfds", tmp_path / "out", splits=["train"], limit=3)
    assert report.videos == 3
    assert list(tmp_path.glob("out/*test*")) == []
    index = read_index(tmp_path / "out")
    assert index is not None
    assert index.recipe["movi_c-train"]["source"] == "movi"
    with pytest.raises(ConfigError, match="got 'validation'; there are: train, test"):
        _convert(tmp_path / "tfds", tmp_path / "out", splits=["validation"])
    with pytest.raises(ConfigError, match="--limit to be at least 1, but got 0"):
        _convert(tmp_path / "tfds", tmp_path / "out", limit=0)
    with pytest.raises(ShardError, match="3 videos, not 5"):
        _convert(tmp_path / "tfds", tmp_path / "out", splits=["train"])


def test_another_choice_of_fields_is_another_plan(tmp_path: Path) -> None:
    write_movi(tmp_path / "tfds")
    _convert(tmp_path / "tfds", tmp_path / "out", fields=["depth"])
    _convert(tmp_path / "tfds", tmp_path / "out", fields=["depth", "depth"])
    with pytest.raises(ShardError, match=r'fields \["depth"\], not \[\]'):
        _convert(tmp_path / "tfds", tmp_path / "out")


def test_mp4_is_small_lossy_and_keeps_the_masks(tmp_path: Path) -> None:
    pytest.importorskip("av")
    truths = write_movi(tmp_path / "tfds", counts=(1,), size=16)
    (report,) = _convert(tmp_path / "tfds", tmp_path / "out", video_format="mp4")
    assert report.frames == 3
    with contextlib.closing(ShardReader()) as reader:
        (shard,) = load_shards(report.shards)
        data = reader.member(str(report.shards[0]), shard, shard.samples[0], "video.mp4")
        assert decode_member("video.mp4", data).shape == (3, 16, 16, 3)
        del data
    np.testing.assert_array_equal(_samples(report)["000000"]["segmentations.npy.gz"], truths[0]["segmentations"])


def test_mp4_refuses_odd_sizes(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_movi(tmp_path / "tfds", counts=(1,), size=9)
    with pytest.raises(ShardError, match=r"even height and width for --video-format mp4.*9 x 9"):
        _convert(tmp_path / "tfds", tmp_path / "out", video_format="mp4")


# -- the files --------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_movi(tmp_path, counts=(1, 1, 1, 1))
    for number in (1, 3):
        (tmp_path / f"movi_c-train.tfrecord-{number:05d}-of-00004").unlink()
    with pytest.raises(ShardError, match=r"Expected 4 files movi_c-train.*2 are missing: 00001, 00003. Download"):
        _convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_sets_are_refused(tmp_path: Path) -> None:
    write_movi(tmp_path, counts=(1, 1))
    (tmp_path / "movi_c-train.tfrecord-00002-of-00003").write_bytes(b"")
    with pytest.raises(ShardError, match=r"end in -of-00002, -of-00003. Remove"):
        _convert(tmp_path, tmp_path / "out")
    (tmp_path / "movi_c-train.tfrecord-00002-of-00003").rename(tmp_path / "movi_c-train.tfrecord-00001-of-00003")
    with pytest.raises(ShardError, match=r"end in -of-00002, -of-00003. Remove"):
        _convert(tmp_path, tmp_path / "out")


def test_a_number_above_the_total_is_refused(tmp_path: Path) -> None:
    write_movi(tmp_path, counts=(1, 1))
    (tmp_path / "movi_c-train.tfrecord-00002-of-00002").write_bytes(b"")
    with pytest.raises(ShardError, match="1 have a number above that: 00002"):
        _convert(tmp_path, tmp_path / "out")


def test_several_versions_are_listed(tmp_path: Path) -> None:
    for name, version in (("movi_c", "128x128/1.0.0"), ("movi_c", "256x256/1.0.0"), ("movi_e", "128x128/1.0.0")):
        write_movi(tmp_path / name / version, counts=(1,), name=name)
    with pytest.raises(ConfigError, match=r"but got 3: movi_c in .*128x128/1.0.0, movi_c in .*256x256.*, movi_e in"):
        _convert(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="but got 2"):
        _convert(tmp_path / "movi_c", tmp_path / "out")
    assert _convert(tmp_path / "movi_e", tmp_path / "out")[0].shards[0].name == "movi_e-train-000000.tar"


def test_unfinished_downloads_do_not_count(tmp_path: Path) -> None:
    write_movi(tmp_path / "movi_c/8x8/1.0.0", counts=(1,))
    write_movi(tmp_path / "movi_c/8x8/1.0.0.incompleteABC123", counts=(1,))
    assert _convert(tmp_path, tmp_path / "out")[0].videos == 1


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"files such as movi_c-train.tfrecord-00000-of-00256"):
        _convert(tmp_path, tmp_path / "out")


def _write_info(folder: Path, lengths: list[str]) -> None:
    splits = [{"name": "test", "shardLengths": ["9"]}, {"name": "train", "shardLengths": lengths, "numBytes": "5"}]
    content = {"name": "movi_c", "version": "1.0.0", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(content))


def test_counts_are_compared_with_dataset_info(tmp_path: Path) -> None:
    write_movi(tmp_path)
    _write_info(tmp_path, ["2", "4"])
    with pytest.raises(ShardError, match=r"00001-of-00002 to hold 4 records as `dataset_info.json` says, but got 3"):
        _convert(tmp_path, tmp_path / "out")
    _write_info(tmp_path, ["2", "3", "1"])
    with pytest.raises(ShardError, match="Expected 3 files of movi_c-train"):
        _convert(tmp_path, tmp_path / "out")
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ShardError, match=r"dataset_info.json to be JSON"):
        _convert(tmp_path, tmp_path / "out")
    _write_info(tmp_path, ["2", "3"])
    assert _convert(tmp_path, tmp_path / "out")[0].videos == 5
    index = read_index(tmp_path / "out")
    assert index is not None
    assert index.recipe["movi_c-train"]["dataset_version"] == "1.0.0"


# -- bad records ------------------------------------------------------------------------------------------------------


def _write_records(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "movi_c-train.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(frame_record(example(features)) for features in records))
    return path


def test_a_damaged_record_is_refused_or_left_out(tmp_path: Path) -> None:
    write_movi(tmp_path, counts=(4,))
    path = tmp_path / "movi_c-train.tfrecord-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1  # in the first record
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"data of the record of .* at byte 0 to have the checksum"):
        _convert(tmp_path, tmp_path / "out")
    (report,) = _convert(tmp_path, tmp_path / "out", on_bad_sample="skip")
    assert list(report.skipped) == ["000000"]
    assert list(_samples(report)) == ["000001", "000002", "000003"]


def test_a_truncated_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_movi(tmp_path)
    path = tmp_path / "movi_c-train.tfrecord-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ShardError, match=r"00001-of-00002 to hold a record at byte .* truncated"):
        _convert(tmp_path, tmp_path / "out", on_bad_sample="skip")
    assert not (tmp_path / "out").exists()


def _frames(count: int, shape: tuple[int, ...], dtype: type = np.uint8) -> list[bytes]:
    return [png(np.zeros(shape, dtype)) for _ in range(count)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, "to have the feature `video`"),
        ({"segmentations": None}, "to have the feature `segmentations`"),
        ({"video": np.array([1])}, "`video` of .* to be a list of PNG files, but got 1 values of int64"),
        ({"video": []}, "but got 0 byte strings"),
        ({"video": [b"no picture"] * 3}, "frame 0 of `video`"),
        ({"video": _frames(3, (8, 8))}, "PNG file of mode RGB, but got a picture of mode L"),
        ({"segmentations": _frames(3, (8, 8, 3))}, "PNG file of mode L, but got a picture of mode RGB"),
        ({"segmentations": _frames(3, (8, 8), np.uint16)}, "picture of mode I"),
        ({"depth": _frames(3, (8, 8))}, "frame 0 of `depth`.*picture of mode L"),
        ({"video": _frames(2, (8, 8, 3))}, r"num_frames \[.*3.*\] as its metadata says, but got 2"),
        ({"video": _frames(2, (8, 8, 3)) + _frames(1, (8, 9, 3))}, "frame 2 has"),
        ({"segmentations": _frames(2, (8, 8))}, r"`segmentations` of .* \(3, 8, 8\) of the video, but got \(2, 8, 8\)"),
        ({"depth": _frames(3, (8, 9), np.uint16)}, r"`depth` of .* \(3, 8, 8\) of the video, but got \(3, 8, 9\)"),
        ({"forward_flow": np.zeros(10, np.int64)}, r"to be 384 integers for shape \(3, 8, 8, 2\), but got 10 values"),
        ({"forward_flow": np.zeros(384, np.float32)}, "but got 384 values of float32"),
        ({"forward_flow": _frames(3, (8, 8, 3))}, "but got 3 byte strings"),
        ({"backward_flow": np.full(384, 65536)}, "from 0 to 65535, but got 65536 to 65536"),
        ({"backward_flow": np.full(384, -1)}, "from 0 to 65535, but got -1 to -1"),
        ({"metadata/height": np.array([16])}, "height .*16.* as its metadata says, but got 8"),
        ({"metadata/depth_range": np.array([1.0], np.float32)}, "`metadata/depth_range` of .* to be two numbers"),
        ({"metadata/depth_range": None}, "to have the feature `metadata/depth_range`"),
        ({"metadata/num_instances": np.array([3])}, "to hold a multiple of 3 values"),
        ({"metadata/num_instances": np.array([-1])}, "one number, 0 or more"),
        ({"metadata/num_instances": np.array([2**40])}, "one number, 0 or more"),
        ({"instances/positions": np.zeros((2, 2, 3), np.float32)}, r"9 values for shape \(3, 3\), but got 6"),
        ({"instances/bboxes/ragged_row_lengths_0": None}, "2 row lengths, but got 0"),
        ({"instances/bboxes/ragged_row_lengths_0": np.array([7, 7])}, "56 values as its row lengths say"),
        ({"instances/bboxes/ragged_row_lengths_0": np.array([-1, 2])}, "as its row lengths say"),
        ({"camera/positions": np.zeros(5, np.float32)}, r"`camera/positions` of .* 9 values for shape \(3, 3\)"),
    ],
)
def test_records_whose_parts_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    features, _ = movi_features(0)
    changed = {name: values for name, values in {**features, **change}.items() if values is not None}
    path = _write_records(tmp_path, [changed])
    item = Item("000000", [path.name, 0, path.stat().st_size - 16])
    with pytest.raises(ShardError, match=message) as caught:
        MoviDecoder(tmp_path, EXTRA_FIELDS)(item)
    assert "at byte 0" in str(caught.value)


def test_fields_that_are_not_asked_for_need_not_be_good(tmp_path: Path) -> None:
    features, truth = movi_features(0)
    for name in ("depth", "metadata/depth_range"):
        del features[name]
    path = _write_records(tmp_path, [{**features, "forward_flow": np.zeros(1, np.int64)}])
    members = MoviDecoder(tmp_path)(Item("000000", [path.name, 0, path.stat().st_size - 16]))
    np.testing.assert_array_equal(members["video.npy"], truth["video"])


def test_records_without_facts_or_objects(tmp_path: Path) -> None:
    features, truth = movi_features(0)
    bare = {name: features[name] for name in ("video", "segmentations")}
    empty, _ = movi_features(1, objects=0)
    path = _write_records(tmp_path, [bare])
    members = MoviDecoder(tmp_path)(Item("000000", [path.name, 0, path.stat().st_size - 16]))
    np.testing.assert_array_equal(members["segmentations.npy.gz"], truth["segmentations"])
    assert sorted(members["info.json"]) == ["fps", "record"]
    path = _write_records(tmp_path, [empty])
    members = MoviDecoder(tmp_path)(Item("000000", [path.name, 0, path.stat().st_size - 16]))
    assert members["info.json"]["instances"] == []


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    features, _ = movi_features(0)
    features["instances/mass"] = np.array([np.nan, 2.0], np.float32)
    path = _write_records(tmp_path, [features])
    info = MoviDecoder(tmp_path)(Item("000000", [path.name, 0, path.stat().st_size - 16]))["info.json"]
    assert [row["mass"] for row in info["instances"]] == [None, 2.0]
    json.dumps(info, allow_nan=False)


@pytest.mark.parametrize("seed", range(60))
def test_damage_under_a_good_checksum_only_ever_raises_shard_error(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, _ = movi_features(0, frames=2, size=4)
    data = bytearray(example(features))
    for at in rng.integers(0, len(data), rng.integers(1, 30)):
        data[at] = rng.integers(256)
    path = tmp_path / "movi_c-train.tfrecord-00000-of-00001"
    path.write_bytes(frame_record(bytes(data)))
    with contextlib.suppress(ShardError):
        MoviDecoder(tmp_path, EXTRA_FIELDS)(Item("000000", [path.name, 0, len(data)]))
