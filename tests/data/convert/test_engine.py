from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import tarfile
from pathlib import Path
from typing import Any

import convert_jobs
import numpy as np
import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.convert import ConversionReport, Item, convert
from ssync_pl.data.convert.locking import exclusive
from ssync_pl.data.decode import decode_member
from ssync_pl.data.index import load_shards, read_index
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ConfigError, ShardError


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.tar"))}


def _hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


_PLAN = {".colors-train.plan.json"}


def test_converts_to_shards_that_load_back_exactly(tmp_path: Path) -> None:
    report = convert_jobs.run(tmp_path, count=7)
    names = [f"colors-train-{number:06d}.tar" for number in range(3)]
    assert [path.name for path in report.shards] == names
    assert (report.videos, report.frames, report.kept, report.skipped) == (7, 14, 0, {})
    assert report.bytes == sum((tmp_path / name).stat().st_size for name in names)
    assert _hidden(tmp_path) == _PLAN
    found = {}
    with contextlib.closing(ShardReader()) as reader:
        for path, shard in zip(report.shards, load_shards(report.shards), strict=True):
            for sample in shard.samples:
                found[sample.key] = {
                    name: decode_member(name, reader.member(str(path), shard, sample, name)) for name in sample.members
                }
    assert list(found) == [f"{number:06d}" for number in range(7)]
    for number in range(7):
        expected = convert_jobs.members(number)
        assert found[f"{number:06d}"].keys() == expected.keys()
        np.testing.assert_array_equal(found[f"{number:06d}"]["video.npy"], expected["video.npy"])
        np.testing.assert_array_equal(found[f"{number:06d}"]["segmentations.npy.gz"], expected["segmentations.npy.gz"])


def test_a_converted_set_goes_through_the_data_module(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path, count=4)
    pattern = str(tmp_path / "colors-train-{000000..000001}.tar")
    data = ShardDataModule(
        validation=pattern,
        val_batch_size=2,
        num_workers=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        max_objects=1,
    )
    data.setup("validate")
    seen = {}
    for batch in data.val_dataloader():
        batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, torch.device("cpu"), 0), 0)
        for key, video, masks in zip(batch["__key__"], batch["video"], batch["segmentations"], strict=True):
            seen[key] = (torch.round(video * 255).byte().permute(0, 2, 3, 1).numpy(), masks[:, 1].numpy())
    assert len(seen) == 4
    for key, (video, mask) in seen.items():
        expected = convert_jobs.members(int(str(key).split("/")[-1]))
        np.testing.assert_array_equal(video, expected["video.npy"])
        np.testing.assert_array_equal(mask, expected["segmentations.npy.gz"][..., 0] == 1)


def test_workers_change_no_byte(tmp_path: Path) -> None:
    alone = convert_jobs.run(tmp_path / "0", workers=0)
    together = convert_jobs.run(tmp_path / "2", workers=2)
    assert _contents(tmp_path / "0") == _contents(tmp_path / "2")
    assert (alone.videos, alone.frames, alone.bytes) == (together.videos, together.frames, together.bytes)
    assert not multiprocessing.active_children()


def test_the_index_names_recipe_videos_and_all_prefixes(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path, count=4)
    convert(convert_jobs.items(2), convert_jobs.paint, tmp_path, "colors-test", recipe={"a": (1, 2)}, progress=False)
    index = read_index(tmp_path)
    assert index is not None
    assert sorted(index.shards) == ["colors-test-000000.tar", "colors-train-000000.tar", "colors-train-000001.tar"]
    assert index.recipe == {
        "colors-train": {"source": "paint", "videos": 4, "samples_per_shard": 3, "skipped": {}},
        "colors-test": {"a": [1, 2], "videos": 2, "samples_per_shard": 32, "skipped": {}},
    }
    assert index.shards["colors-test-000000.tar"].samples[1].frames == 2


def test_a_second_call_returns_without_decoding_or_writing(tmp_path: Path) -> None:
    first = convert_jobs.run(tmp_path)
    before, stamps = _contents(tmp_path), _stamps(tmp_path)
    second = convert_jobs.run(tmp_path, decode=convert_jobs.die)
    assert second == ConversionReport(first.shards, first.videos, 4, {}, first.frames, first.bytes)
    assert (_contents(tmp_path), _stamps(tmp_path)) == (before, stamps)


def test_a_complete_set_needs_no_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_jobs.run(tmp_path)

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("ssync_pl.data.convert.engine.exclusive", refuse)
    assert convert_jobs.run(tmp_path).kept == 4
    (tmp_path / "index.json").unlink()
    with pytest.raises(ShardError, match=r"Read-only file system. The folder cannot be written"):
        convert_jobs.run(tmp_path)


def test_a_lost_index_is_written_again_from_the_shards(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path)
    before, stamps = _contents(tmp_path), _stamps(tmp_path)
    (tmp_path / "index.json").unlink()
    assert convert_jobs.run(tmp_path, decode=convert_jobs.die).kept == 4
    assert (_contents(tmp_path), _stamps(tmp_path)) == (before, stamps)


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:2000])
    elif how == "member":  # inside of the compressed masks
        at = data.index(b"segmentations.npy.gz") + 512 + 30
        data[at] ^= 0xFF
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "member", "missing"])
def test_a_shard_that_is_not_whole_is_made_again(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    convert_jobs.run(tmp_path)
    before, stamps = _contents(tmp_path), _stamps(tmp_path)
    (tmp_path / "index.json").unlink()
    _damage(tmp_path / "colors-train-000001.tar", how)
    with caplog.at_level(logging.WARNING):
        assert convert_jobs.run(tmp_path).kept == 3
    assert ("Making" in caplog.text and "colors-train-000001.tar again" in caplog.text) == (how != "missing")
    assert _contents(tmp_path) == before
    after = _stamps(tmp_path)
    assert {name: stamp for name, stamp in after.items() if "000001" not in name} == {
        name: stamp for name, stamp in stamps.items() if "000001" not in name
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 2}, "samples_per_shard 3, not 2"),
        ({"recipe": {"source": "paint", "size": 8}}, "size null, not 8"),
        ({"recipe": {"source": "other"}}, 'source "paint", not "other"'),
        ({"count": 11}, "12 videos, not 11"),
    ],
)
def test_shards_of_another_plan_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    convert_jobs.run(tmp_path)
    before = _contents(tmp_path)
    with pytest.raises(ShardError, match=message):
        convert_jobs.run(tmp_path, **options)
    assert _contents(tmp_path) == before
    assert _hidden(tmp_path) == _PLAN


def test_other_sources_are_another_plan(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path, count=2)
    swapped = [Item("000000", {"color": 1}), Item("000001", {"color": 0})]
    with pytest.raises(ShardError, match="other source files"):
        convert(
            swapped,
            convert_jobs.paint,
            tmp_path,
            "colors-train",
            recipe={"source": "paint"},
            samples_per_shard=3,
            progress=False,
        )


def test_a_plan_without_shards_can_be_replaced(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("[0]")
    out = tmp_path / "out"
    with pytest.raises(ShardError, match="colour 0"):
        convert_jobs.run(out, decode=convert_jobs.PaintExcept(bad))
    assert convert_jobs.run(out, samples_per_shard=4).videos == 12


def test_shards_without_a_plan_are_refused_but_other_prefixes_do_not_count(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path)
    (tmp_path / ".colors-train.plan.json").unlink()
    with pytest.raises(ShardError, match="no plan of a conversion lies beside"):
        convert_jobs.run(tmp_path)
    # `colors` is the start of the other prefix, and none of its shards
    report = convert(convert_jobs.items(2), convert_jobs.paint, tmp_path, "colors", recipe={}, progress=False)
    assert report.videos == 2


def test_a_foreign_shard_above_the_last_number_is_refused(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path)
    (tmp_path / "colors-train-000009.tar").write_bytes(b"")
    (tmp_path / "index.json").unlink()
    with pytest.raises(ShardError, match=r"colors-train-000009.tar is none of this conversion"):
        convert_jobs.run(tmp_path)


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path)
    (tmp_path / ".colors-train.plan.json").write_text('{"format": "ssync_pl.conversion", "version": 9}')
    with pytest.raises(ShardError, match=r"to be the plan of a conversion, version 1.*Delete it"):
        convert_jobs.run(tmp_path)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.json"
    path.write_text("[1, 3, 4, 5]")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_named_and_kept_in_mind(
    tmp_path: Path, bad: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    options = {"decode": convert_jobs.PaintExcept(bad), "on_bad_sample": "skip", "workers": workers}
    with caplog.at_level(logging.WARNING):
        report = convert_jobs.run(out, **options)
    expected = {f"{n:06d}": f"Expected colour {n} to be good, but it is bad." for n in (1, 3, 4, 5)}
    assert report.skipped == expected
    assert report.videos == 8
    # every video of the second shard is bad
    assert [path.name for path in report.shards] == [f"colors-train-{n:06d}.tar" for n in (0, 2, 3)]
    assert "Left out video 000003: Expected colour 3" in caplog.text
    index = read_index(out)
    assert index is not None
    assert index.recipe["colors-train"]["skipped"] == expected
    assert [s.key for s in index.shards["colors-train-000000.tar"].samples] == ["000000", "000002"]
    assert _hidden(out) == _PLAN
    again = convert_jobs.run(out, **{**options, "decode": convert_jobs.die})
    assert (again.skipped, again.kept, again.videos) == (expected, 3, 8)
    (out / "index.json").unlink()
    again = convert_jobs.run(out, **{**options, "decode": convert_jobs.die, "workers": 0})
    assert (again.skipped, again.videos) == (expected, 8)


def test_left_out_samples_are_tried_again_when_nothing_is_to_be_left_out(tmp_path: Path, bad: Path) -> None:
    out = tmp_path / "out"
    decode = convert_jobs.PaintExcept(bad)
    convert_jobs.run(out, decode=decode, on_bad_sample="skip")
    stamps = _stamps(out)
    with pytest.raises(ShardError, match="colour 1"):
        convert_jobs.run(out, decode=decode)
    assert _stamps(out) == stamps
    bad.write_text("[]")
    report = convert_jobs.run(out, decode=decode)
    assert (report.skipped, report.videos, report.kept) == ({}, 12, 2)
    convert_jobs.run(tmp_path / "clean")
    assert _contents(out) == _contents(tmp_path / "clean")


def test_an_interrupted_run_remembers_what_it_left_out(tmp_path: Path, bad: Path) -> None:
    out = tmp_path / "out"
    seen: list[str] = []

    def decode(item: Item) -> dict[str, Any]:
        seen.append(item.key)
        if item.key == "000007" and len(seen) == 8:
            raise KeyboardInterrupt
        return convert_jobs.PaintExcept(bad)(item)

    with pytest.raises(KeyboardInterrupt):
        convert_jobs.run(out, decode=decode, on_bad_sample="skip")
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["colors-train-000000.tar"]
    assert not list(out.glob(".*.tmp"))
    assert not (out / ".colors-train.lock").exists()
    report = convert_jobs.run(out, decode=decode, on_bad_sample="skip")
    assert seen[8:] == [f"{number:06d}" for number in range(6, 12)]
    assert sorted(report.skipped) == ["000001", "000003", "000004", "000005"]


def test_only_bad_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"at least one good video.*all 12 were skipped.*/nowhere/000000"):
        convert_jobs.run(tmp_path, decode=convert_jobs.missing_file, on_bad_sample="skip")
    assert not list(tmp_path.glob("*.tar"))


def test_a_source_that_cannot_be_read_is_a_bad_sample(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"source of video 000000 to be readable.*/nowhere/000000"):
        convert_jobs.run(tmp_path, decode=convert_jobs.missing_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video.npy": np.zeros((3, 8, 8, 3), np.uint8)}, r"same frames.*\(3, 8, 8\) and \(2, 8, 8\)"),
        ({"video.npy": np.zeros((2, 8, 8), np.uint8)}, r"uint8 \(frames, height, width, 3\)"),
        ({"video.npy": np.zeros((2, 8, 8, 3), np.float32)}, "got float32"),
        ({"video.npy": np.zeros((0, 8, 8, 3), np.uint8)}, "not empty"),
        ({"segmentations.npy.gz": np.zeros((2, 8, 9, 1), np.uint8)}, "same frames, height and width"),
        ({"segmentations.npy.gz": np.zeros((2, 8, 8), np.uint8)}, r"\(frames, height, width, objects\)"),
        ({"segmentations.npy.gz": np.zeros((2, 8, 8, 1))}, "masks of colors-train, key 000000 to be integers"),
        ({"facts.npy": np.array([None])}, "numeric array"),
        ({"code.pkl": b""}, "can execute code"),
    ],
)
def test_members_that_do_not_fit_are_bad_samples(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def decode(item: Item) -> dict[str, Any]:
        return {**convert_jobs.members(1), **(change if item.key == "000000" else {})}

    with pytest.raises(ShardError, match=message):
        convert_jobs.run(tmp_path, decode=decode)
    assert not list(tmp_path.glob("*.tar"))
    report = convert_jobs.run(tmp_path, decode=decode, on_bad_sample="skip")
    assert list(report.skipped) == ["000000"]


def test_a_full_disk_loses_nothing_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real = tarfile.TarFile.addfile
    written = []

    def addfile(self: tarfile.TarFile, info: tarfile.TarInfo, stream: Any = None) -> None:
        written.append(info.name)
        if len(written) > 14:  # in the second sample of the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, info, stream)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        with pytest.raises(ShardError, match=r"No space left.*The disk is full: free some space"):
            convert_jobs.run(out, on_bad_sample="skip")
    assert [path.name for path in sorted(out.glob("*"))] == [
        *sorted(_PLAN),
        "colors-train-000000.tar",
    ]
    stamps = _stamps(out)
    assert convert_jobs.run(out).kept == 1
    assert stamps.items() <= _stamps(out).items()
    convert_jobs.run(tmp_path / "clean")
    assert _contents(out) == _contents(tmp_path / "clean")


def test_a_disk_that_is_full_for_the_plan_or_the_index_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_plan", "write_index"):
        with monkeypatch.context() as patch:
            patch.setattr(f"ssync_pl.data.convert.engine.{name}", refuse)
            with pytest.raises(ShardError, match="The disk is full"):
                convert_jobs.run(tmp_path)
        assert not (tmp_path / "index.json").exists()
    assert convert_jobs.run(tmp_path).kept == 4


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match=r"Expected to write shards to .*file/out"):
        convert_jobs.run(tmp_path / "file" / "out")


def test_an_error_of_the_code_is_not_taken_for_a_bad_sample(tmp_path: Path) -> None:
    def decode(item: Item) -> dict[str, Any]:
        raise ZeroDivisionError("a mistake in the decoder")

    with pytest.raises(ZeroDivisionError):
        convert_jobs.run(tmp_path, decode=decode, on_bad_sample="skip")
    assert _hidden(tmp_path) == _PLAN


def test_a_worker_that_dies_is_named_and_the_folder_stays_usable(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"ended early: memory ran out.*fewer workers"):
        convert_jobs.run(tmp_path, decode=convert_jobs.die, workers=1)
    assert convert_jobs.run(tmp_path).videos == 12
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_error_in_a_worker_stops_the_others_and_leaves_nothing_half(tmp_path: Path, bad: Path) -> None:
    bad.write_text("[10]")
    out = tmp_path / "out"
    with pytest.raises(ShardError, match="colour 10"):
        convert_jobs.run(out, decode=convert_jobs.PaintExcept(bad), workers=2)
    assert not (out / "index.json").exists()
    assert not list(out.glob(".*.tmp"))
    bad.write_text("[]")
    convert_jobs.run(out, decode=convert_jobs.PaintExcept(bad))
    convert_jobs.run(tmp_path / "clean")
    assert _contents(out) == _contents(tmp_path / "clean")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / ".colors-train.lock"),
        pytest.raises(ShardError, match="only process that writes `colors-train"),
    ):
        convert_jobs.run(tmp_path)
    assert convert_jobs.run(tmp_path).videos == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"num_workers": -1}, "num_workers"),
        ({"on_bad_sample": "ignore"}, "'raise' or 'skip', but got 'ignore'"),
        ({"items": []}, "at least one video"),
        ({"items": [Item("a.b", 0)]}, "keys of letters"),
        ({"items": [Item("0", 0), Item("0", 1)]}, "'0' twice"),
        ({"items": [Item("0", object())]}, "JSON values and paths only, but got a object"),
        ({"recipe": {"a": object()}}, "argument `recipe`"),
        ({"prefix": "a/b"}, "plain file name part"),
        ({"prefix": ".a"}, "plain file name part"),
        ({"prefix": ""}, "plain file name part"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {"items": convert_jobs.items(1), "prefix": "a", "recipe": {}, **change}
    with pytest.raises(ConfigError, match=message):
        convert(arguments.pop("items"), convert_jobs.paint, tmp_path / "out", arguments.pop("prefix"), **arguments)
    assert not (tmp_path / "out").exists()
