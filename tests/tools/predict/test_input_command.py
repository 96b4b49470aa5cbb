"""`ssync-pl predict --input` from the words to the files."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from input_files import index, labels_of, moving, write_frames, write_shard, write_video
from PIL import Image

from ssync_pl.tools.predict.datamodule import CarrySlots
from ssync_pl.tools.predict.files import slot_tracks

Run = Callable[..., int]


def test_videos_frames_and_shards_without_a_configuration(
    tmp_path: Path, run: Run, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    video = moving(11)
    clip = write_video(tmp_path / "clip.mp4", video)
    frames = write_frames(tmp_path / "frames", video[:3])
    shard = write_shard(tmp_path / "shards", video[:2, :20], video[:4])
    out = tmp_path / "out"
    assert run("--input", clip, frames, "--input", shard, "--clip-frames", 5, "--out", out) == 0
    streams = capsys.readouterr()
    assert f"configuration: {checkpoint.parent.parent / 'config.yaml'}" in streams.err
    assert streams.out.splitlines()[-1] == f"predictions: 4 videos in {out}"
    assert [(v["key"], v["frames"], v["windows"]) for v in index(out)] == [
        ("clip", 11, 3), ("frames", 3, 1), ("0", 2, 1), ("1", 4, 1),
    ]  # fmt: skip
    assert index(out)[0]["source"] == str(clip)
    for name, size in (("clip", (11, 24, 40)), ("frames", (3, 24, 40)), ("0", (2, 20, 40)), ("1", (4, 24, 40))):
        labels = labels_of(out, name)
        assert labels.shape == size
        assert labels.max() <= 2
        pictures = sorted((out / f"{name}_labels").iterdir())
        assert [path.name for path in pictures] == [f"{number:05d}.png" for number in range(size[0])]
        assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pictures]), labels)
        assert (out / f"{name}.tracks.csv").read_text() == slot_tracks(labels, 3)
        with av.open(io.BytesIO((out / f"{name}.mp4").read_bytes())) as container:
            assert sum(1 for _ in container.decode(video=0)) == size[0]
            assert container.streams.video[0].average_rate == (10 if name == "clip" else 6)
    assert not list(out.glob(".*"))


def test_windows_carry_slots_and_give_nearly_the_labels_of_the_whole(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh: list[bool] = []
    begin = CarrySlots._begin
    monkeypatch.setattr(
        CarrySlots, "_begin", lambda self, *rest: fresh.append(self.slots is None) or begin(self, *rest)
    )
    frames = write_frames(tmp_path / "frames", np.repeat(moving(1), 9, axis=0))
    short = write_frames(tmp_path / "short", moving(2))
    for name, length in (("whole", 64), ("cut", 4)):
        assert run("--input", frames, short, "--clip-frames", length, "--out", tmp_path / name) == 0
    assert fresh == [True, True, True, False, False, True]
    whole, cut = labels_of(tmp_path / "whole", "frames"), labels_of(tmp_path / "cut", "frames")
    assert np.mean(whole == cut) > 0.8


def test_shards_give_the_labels_of_the_data_module(tmp_path: Path, run: Run, checkpoint: Path) -> None:
    shard = write_shard(tmp_path / "shards", moving(3, 24, 24)[:, 4:20, 4:20], moving(5, 24, 24)[:, 4:20, 4:20])
    data = ["--data=ShardDataModule", "--data.image_size=16", "--data.num_workers=0", f"--data.predict={shard}"]
    settings = ["--config", checkpoint.parent.parent / "config.yaml", *data]
    own = ["--trainer.callbacks+=SlotPredictions", "--trainer.callbacks.video=false"]
    assert run(*settings, *own, f"--trainer.callbacks.out={tmp_path / 'data'}") == 0
    assert run(*settings, *own, f"--trainer.callbacks.out={tmp_path / 'input'}", "--input", shard) == 0
    for name, frames in (("0", 3), ("1", 5)):
        assert labels_of(tmp_path / "data", name).shape == (frames, 16, 16)
        assert np.array_equal(labels_of(tmp_path / "data", name), labels_of(tmp_path / "input", name))


def test_a_crop_leaves_the_rest_of_the_frame_without_a_slot(tmp_path: Path, run: Run) -> None:
    frames = write_frames(tmp_path / "frames", moving(2))
    assert run("--input", frames, "--data.image_size=16", "--data.crop=center", "--out", tmp_path / "out") == 0
    labels = labels_of(tmp_path / "out", "frames")
    # 24 x 40 is resized to 16 x 27, of which columns 5 to 21 are seen.
    assert (labels[:, :, :7] == 255).all()
    assert (labels[:, :, 31:] == 255).all()
    assert labels[:, :, 7:31].max() <= 2


def refused(run: Run, capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert run(*words) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_run_is_refused_before_anything_is_computed(
    tmp_path: Path, run: Run, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = write_frames(tmp_path / "frames", moving(2))
    assert "gone.mp4, which does not exist" in refused(run, capsys, "--input", tmp_path / "gone.mp4")
    assert "--clip-frames to be at least 2" in refused(run, capsys, "--input", frames, "--clip_frames=1")
    (tmp_path / "file").write_text("")
    assert "to write predictions to" in refused(run, capsys, "--input", frames, "--out", tmp_path / "file")
    settings = checkpoint.parent.parent / "config.yaml"
    other = ["--model=DINOSAUR", "--model.backbone=null", "--model.feature_dim=8", "--model.grid=[2, 2]"]
    other += ["--data=ShardDataModule", "--input", frames]
    message = refused(run, capsys, *other)
    assert "a checkpoint of DINOSAUR, the model of the configuration, but got one of SAVi" in message
    content = torch.load(checkpoint, weights_only=True)
    nameless = tmp_path / "nameless.ckpt"  # as one of the user's own training loop may be
    torch.save({name: value for name, value in content.items() if name != "hyper_parameters"}, nameless)
    message = refused(run, capsys, "--ckpt_path", nameless, *other)
    assert "a whole checkpoint of this model" in message
    assert "only with --input" in refused(run, capsys, "--config", settings, "--clip-frames", 8)
    alone = tmp_path / "alone.ckpt"
    shutil.copy(checkpoint, alone)
    assert "--config FILE" in refused(run, capsys, "--ckpt_path", alone, "--input", frames)
    own = ["--trainer.callbacks+=SlotPredictions", "--out", tmp_path / "out"]
    assert "--out only without a prediction writer" in refused(run, capsys, "--input", frames, *own)
    assert not (tmp_path / "out").exists()


def test_a_video_that_breaks_off_leaves_no_half_files(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssync_pl.errors import ShardError
    from ssync_pl.tools.predict import inputs

    good = write_frames(tmp_path / "good", moving(2))
    torn = write_frames(tmp_path / "torn", moving(6))
    real = inputs.read_frames

    def breaking(path: Path, *rest: Any) -> Any:
        for number, frame in enumerate(real(path, *rest)):
            if path == torn and number == 5:
                raise ShardError("Expected frame 5 to be whole, but it is torn. Export it again.")
            yield frame

    monkeypatch.setattr(inputs, "read_frames", breaking)
    out = tmp_path / "out"
    assert "frame 5 to be whole" in refused(run, capsys, "--input", good, torn, "--clip-frames", 3, "--out", out)
    assert [video["key"] for video in index(out)] == ["good"]
    assert not [path.name for path in out.iterdir() if "torn" in path.name]
    assert not list(out.glob(".*"))


def test_a_prediction_that_ends_in_the_middle_of_a_video_says_so(tmp_path: Path, run: Run) -> None:
    frames = write_frames(tmp_path / "frames", moving(7))
    words = ["--clip-frames=4", "--out", tmp_path / "out", "--trainer.limit_predict_batches=1"]
    with pytest.warns(UserWarning, match="writes nothing of frames: the prediction ended before"):
        assert run("--input", frames, *words) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.json"]


def test_the_options_are_in_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ssync_pl.cli import main

    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    assert main(["predict", "--help"]) == 0
    assert "--clip_frames" in capsys.readouterr().out
    assert main(["validate", "--input", "a"]) == 2
