"""MOVi records, written here byte by byte, to shards and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folder_sets import load_back, run_convert
from movi_records import example, frame_record, movi_features, png, write_movi

from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError

FIELDS = ("depth", "forward_flow", "backward_flow")


def convert(root: Path, out: Path, *words: object) -> int:
    return run_convert("movi", "--root", root, "--out", out, "--samples-per-shard", 2, *words)


def rows(values: Any) -> np.ndarray:
    """Back from JSON to float32."""
    return np.array(values, np.float32)


@pytest.mark.parametrize("layout", ["", "movi_c/8x8/1.0.0"])
def test_pixels_masks_and_facts_come_back_exactly(tmp_path: Path, layout: str, capsys: Any) -> None:
    truths = write_movi(tmp_path / "tfds" / layout)
    write_movi(tmp_path / "tfds" / layout, "validation", (1,))
    write_movi(tmp_path / "tfds" / f"{layout}x.incompleteABC123", counts=(1,))  # an unfinished download
    assert convert(tmp_path / "tfds", tmp_path / "out") == 0
    assert "movi_c-train: 5 videos, 15 frames" in capsys.readouterr().out
    assert len(load_back(tmp_path / "out", "movi_c-validation")) == 1
    samples = load_back(tmp_path / "out", "movi_c-train")
    for number, (sample, truth) in enumerate(zip(samples, truths, strict=True)):
        assert sorted(sample) == ["info.json", "key", "segmentations.npy.gz", "video.npy"]
        for name, field in (("video.npy", "video"), ("segmentations.npy.gz", "segmentations")):
            assert sample[name].dtype == np.uint8
            np.testing.assert_array_equal(sample[name], truth[field])
        info = sample["info.json"]
        assert (info["fps"], info["background"], info["metadata"]["video_name"]) == (12, "studio", str(number))
        np.testing.assert_array_equal(rows(info["metadata"]["forward_flow_range"]), truth["forward_flow_range"])
        assert info["camera"]["focal_length"] == 35.0
        np.testing.assert_array_equal(rows(info["camera"]["positions"]), truth["camera_positions"])
        for index, found in enumerate(info["instances"]):
            assert (found["asset_id"], found["category"]) == (f"asset-{index}", index)
            assert np.float32(found["mass"]) == truth["mass"][index]
            np.testing.assert_array_equal(rows(found["positions"]), truth["positions"][index])
            np.testing.assert_array_equal(rows(found["bboxes_3d"]), truth["bboxes_3d"][index])
            assert found["visibility"] == truth["visibility"][index].tolist()
            assert found["bbox_frames"] == truth["bbox_frames"][index]
            np.testing.assert_array_equal(rows(found["bboxes"]).reshape(-1, 4), truth["bboxes"][index])
        assert [row["frame"] for row in info["collisions"]] == [3, 7, 11]
        assert [row["instances"] for row in info["collisions"]] == [[0, 1], [1, 65535], [0, 65535]]
    assert samples[2]["info.json"]["record"] == ["movi_c-train.tfrecord-00001-of-00002", 0]


def test_depth_and_flow_keep_all_sixteen_bits_and_belong_to_the_plan(tmp_path: Path) -> None:
    truths = write_movi(tmp_path / "tfds", counts=(2,))
    convert(tmp_path / "tfds", tmp_path / "out", "--fields", "backward_flow", "depth", "forward_flow")
    for sample, truth in zip(load_back(tmp_path / "out", "movi_c-train"), truths, strict=True):
        for field in FIELDS:
            assert sample[f"{field}.npy"].dtype == np.float32
            np.testing.assert_array_equal(sample[f"{field}.npy"].astype(np.uint16), truth[field])
            ranges = sample["info.json"]["metadata"][f"{field}_range"]
            np.testing.assert_array_equal(rows(ranges), truth[f"{field}_range"])
    convert(tmp_path / "tfds", tmp_path / "out", "--fields", *FIELDS)
    with pytest.raises(ShardError, match="fields"):
        convert(tmp_path / "tfds", tmp_path / "out")


def test_processes_change_no_byte_and_the_originals_may_move(tmp_path: Path, capsys: Any) -> None:
    write_movi(tmp_path / "tfds")
    convert(tmp_path / "tfds", tmp_path / "0")
    convert(tmp_path / "tfds", tmp_path / "2", "--workers", 2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tar")} for n in "02")
    assert one == two
    (tmp_path / "tfds").rename(tmp_path / "moved")
    convert(tmp_path / "moved", tmp_path / "2")
    assert "of which 3 were there already" in capsys.readouterr().out


def test_splits_and_limit(tmp_path: Path) -> None:
    write_movi(tmp_path / "tfds")
    write_movi(tmp_path / "tfds", "test", (2,))
    convert(tmp_path / "tfds", tmp_path / "out", "--splits", "train", "--limit", 3)
    assert len(load_back(tmp_path / "out", "movi_c-train")) == 3
    assert list(tmp_path.glob("out/*test*")) == []
    for words, message in ((("--splits", "validation"), "train, test"), (("--limit", 0), "--limit")):
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path / "tfds", tmp_path / "out", *words)
    with pytest.raises(ShardError, match="3 videos, not 5"):
        convert(tmp_path / "tfds", tmp_path / "out", "--splits", "train")


def test_mp4_is_lossy_keeps_the_masks_and_refuses_odd_sizes(tmp_path: Path) -> None:
    truths = write_movi(tmp_path / "even", counts=(1,), size=16)
    convert(tmp_path / "even", tmp_path / "out", "--video-format", "mp4")
    (sample,) = load_back(tmp_path / "out", "movi_c-train")
    assert sample["video.mp4"].shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(sample["segmentations.npy.gz"], truths[0]["segmentations"])
    write_movi(tmp_path / "odd", counts=(1,), size=9)
    with pytest.raises(ShardError, match="9 x 9"):
        convert(tmp_path / "odd", tmp_path / "out2", "--video-format", "mp4")


# -- the files --------------------------------------------------------------------------------------------------------


def _name(number: int, total: int) -> str:
    return f"movi_c-train.tfrecord-{number:05d}-of-{total:05d}"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda root: (root / _name(1, 3)).unlink(), ShardError, "00001"),
        (lambda root: (root / _name(2, 4)).write_bytes(b""), ShardError, "-of-00003, -of-00004"),
        (lambda root: (root / _name(3, 3)).write_bytes(b""), ShardError, "00003"),
        (lambda root: [path.unlink() for path in root.iterdir()], ConfigError, "movi_c-train.tfrecord"),
        (lambda root: write_movi(root / "movi_e", name="movi_e"), ConfigError, "movi_e in"),
        (lambda root: (root / _name(1, 3)).write_bytes((root / _name(1, 3)).read_bytes()[:-3]), ShardError, "truncat"),
        (lambda root: (root / _name(1, 3)).write_bytes(b"no record" * 9), ShardError, "checksum"),
        (lambda root: (root / "dataset_info.json").write_text("{"), ShardError, "JSON"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, damage: Any, error: type[Exception], message: str
) -> None:
    write_movi(tmp_path / "in", counts=(1, 1, 1))
    damage(tmp_path / "in")
    with pytest.raises(error, match=message):
        convert(tmp_path / "in", tmp_path / "out", "--on-bad-sample", "skip")
    assert not (tmp_path / "out").exists()


def test_counts_are_compared_with_dataset_info(tmp_path: Path) -> None:
    write_movi(tmp_path)

    def write_info(*lengths: str) -> None:
        splits = [{"name": "test", "shardLengths": ["9"]}, {"name": "train", "shardLengths": lengths}]
        (tmp_path / "dataset_info.json").write_text(json.dumps({"version": "1.0.0", "splits": splits}))

    for lengths, message in ((("2", "4"), "4 records"), (("2", "3", "1"), "3 files")):
        write_info(*lengths)
        with pytest.raises(ShardError, match=message):
            convert(tmp_path, tmp_path / "out")
    write_info("2", "3")
    convert(tmp_path, tmp_path / "out")
    index = read_index(tmp_path / "out")
    assert index is not None
    assert index.recipe["movi_c-train"]["dataset_version"] == "1.0.0"


# -- bad records ------------------------------------------------------------------------------------------------------


def test_a_damaged_record_is_refused_or_left_out(tmp_path: Path) -> None:
    write_movi(tmp_path, counts=(4,))
    path = tmp_path / _name(0, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1  # in the first record
    path.write_bytes(data)
    with pytest.raises(ShardError, match="checksum"):
        convert(tmp_path, tmp_path / "out")
    convert(tmp_path, tmp_path / "out", "--on-bad-sample", "skip")
    assert [s["key"] for s in load_back(tmp_path / "out", "movi_c-train")] == ["000001", "000002", "000003"]


def _frames(count: int, shape: tuple[int, ...], dtype: type = np.uint8) -> list[bytes]:
    return [png(np.zeros(shape, dtype)) for _ in range(count)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, "video"),
        ({"segmentations": None}, "segmentations"),
        ({"video": np.array([1])}, "video"),
        ({"video": []}, "video"),
        ({"video": [b"no picture"] * 3}, "frame 0 of `video`"),
        ({"video": _frames(3, (8, 8))}, "mode L"),
        ({"segmentations": _frames(3, (8, 8, 3))}, "mode RGB"),
        ({"segmentations": _frames(3, (8, 8), np.uint16)}, "mode I"),
        ({"depth": _frames(3, (8, 8))}, "depth"),
        ({"video": _frames(2, (8, 8, 3))}, "num_frames"),
        ({"segmentations": _frames(2, (8, 8))}, "segmentations"),
        ({"video": [*_frames(2, (8, 8, 3)), *_frames(1, (8, 9, 3))]}, "one size"),
        ({"metadata/width": np.array([9])}, "width"),
        ({"forward_flow": np.zeros(5, np.int64)}, "forward_flow"),
        ({"forward_flow": np.full(3 * 8 * 8 * 2, 70000)}, "65535"),
        ({"metadata/depth_range": None}, "depth_range"),
        ({"metadata/depth_range": np.zeros(3, np.float32)}, "two numbers"),
        ({"instances/positions": np.zeros(17, np.float32)}, "positions"),
        ({"instances/mass": np.zeros(3, np.float32)}, "mass"),
        ({"instances/bboxes/ragged_row_lengths_0": np.array([9, 9])}, "bboxes"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good, _ = movi_features(0)
    bad = {name: value for name, value in {**good, **change}.items() if value is not None}
    (tmp_path / _name(0, 1)).write_bytes(b"".join(frame_record(example(features)) for features in (bad, good)))
    with pytest.raises(ShardError, match=message):
        convert(tmp_path, tmp_path / "out", "--fields", *FIELDS)
    convert(tmp_path, tmp_path / "out", "--fields", *FIELDS, "--on-bad-sample", "skip")
    assert [sample["key"] for sample in load_back(tmp_path / "out", "movi_c-train")] == ["000001"]


def test_records_without_objects_or_facts_and_unpacked_ones_convert(tmp_path: Path) -> None:
    features, truth = movi_features(0, objects=0)
    bare = {name: features[name] for name in ("video", "segmentations")}
    odd = {**features, "camera/focal_length": np.array([np.nan], np.float32), "instances/tags": []}
    records = [example(odd), example(bare), example(features, packed=False), example({**bare, "metadata/empty": []})]
    (tmp_path / _name(0, 1)).write_bytes(b"".join(map(frame_record, records)))
    convert(tmp_path, tmp_path / "out")
    samples = load_back(tmp_path / "out", "movi_c-train")
    assert samples[0]["info.json"]["instances"] == []
    assert samples[0]["info.json"]["camera"]["focal_length"] is None
    assert "instances" not in samples[1]["info.json"]
    for sample in samples:
        np.testing.assert_array_equal(sample["video.npy"], truth["video"])
    (tmp_path / _name(0, 1)).write_bytes(frame_record(b"\xff" * 40))
    with pytest.raises(ShardError, match="malformed"):
        convert(tmp_path, tmp_path / "out2")
