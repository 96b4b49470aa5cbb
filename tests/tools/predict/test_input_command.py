import io
import re
import shutil

import numpy as np
import pytest
import torch
from input_files import index, labels_of, moving, write_frames, write_shard, write_video
from PIL import Image

from ssync_pl.errors import ShardError
from ssync_pl.tools.predict import inputs
from ssync_pl.tools.predict.windows import CarrySlots
from ssync_pl.tools.predict.writer import slot_tracks


@pytest.fixture
def frames(tmp_path):
    return write_frames(tmp_path / "frames", moving(7))


def test_videos_frames_and_shards_without_a_configuration(tmp_path, run, checkpoint, capsys, monkeypatch):
    goes_on, real = [], CarrySlots.next_window
    monkeypatch.setattr(CarrySlots, "next_window", lambda self, on: goes_on.append(on) or real(self, on))
    av = pytest.importorskip("av")
    clip, folder = write_video(tmp_path / "clip.mp4", moving(11)), write_frames(tmp_path / "frames", moving(7))
    shard = write_shard(tmp_path / "shards", moving(2, 20), moving(4))
    out = tmp_path / "out"
    assert run("--input", clip, folder, "--input", shard, "--clip-frames", 5, "--out", out) == 0
    streams = capsys.readouterr()
    assert f"configuration: {checkpoint.parent.parent / 'config.yaml'}" in streams.err
    assert streams.out.splitlines()[-1] == f"predictions: 4 videos in {out}"
    found = [(video["key"], video["frames"], video["windows"]) for video in index(out)]
    assert found == [("clip", 11, 3), ("frames", 7, 2), ("0", 2, 1), ("1", 4, 1)]
    assert index(out)[0]["source"] == str(clip)
    for name, frames, _ in found:
        labels = labels_of(out, name)
        assert labels.shape == (frames, 20 if name == "0" else 24, 40)
        assert labels.max() <= 2
        pictures = sorted((out / f"{name}_labels").iterdir())
        assert [path.name for path in pictures] == [f"{number:05d}.png" for number in range(frames)]
        assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pictures]), labels)
        assert (out / f"{name}.tracks.csv").read_text() == slot_tracks(labels, 3)
        with av.open(io.BytesIO((out / f"{name}.mp4").read_bytes())) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(shown) == frames
            assert np.allclose(shown[0][:20, :20], 60, atol=8)  # the corner of the video, beside its slots
            assert shown[0].shape == (240 if name == "0" else 288, 960, 3)
            assert container.streams.video[0].average_rate == (10 if name == "clip" else 6)
    assert not list(out.glob(".*"))
    assert goes_on == [False, True, True, False, True, False, False]


def test_shards_give_the_labels_of_the_data_module(tmp_path, run, checkpoint):
    shard = write_shard(tmp_path / "shards", moving(3, 24, 24)[:, 4:20, 4:20], moving(5, 24, 24)[:, 4:20, 4:20])
    data = ["--data=ShardDataModule", "--data.image_size=16", "--data.num_workers=0", f"--data.predict={shard}"]
    words = ["--config", checkpoint.parent.parent / "config.yaml", *data]
    assert run(*words, "--out", tmp_path / "data") == 0
    assert run(*words, "--out", tmp_path / "input", "--input", shard) == 0
    for name, length in (("0", 3), ("1", 5)):
        assert labels_of(tmp_path / "data", name).shape == (length, 16, 16)
        assert np.array_equal(labels_of(tmp_path / "data", name), labels_of(tmp_path / "input", name))


def test_redundant_slots_share_a_label(tmp_path, run, frames):
    labels = {}
    for merge in (None, 1.0, 0.7, 0.0):
        out = tmp_path / str(merge)
        assert run("--input", frames, "--clip-frames=3", "--out", out, *[f"--merge={merge}"] * (merge is not None)) == 0
        labels[merge] = labels_of(out, "frames")
        given_up = index(out)[0]["slots_merged"]
        assert (given_up == 0) if merge in (None, 1.0) else given_up <= 2
        assert len(np.unique(labels[merge])) <= 3 - given_up
    assert np.array_equal(labels[None], labels[1.0])
    assert given_up >= 1  # every two slots that overlap anywhere
    for number in range(3):  # a slot has one label in all windows
        assert len(np.unique(labels[0.0][labels[None] == number])) <= 1
    assert run("--input", frames, "--out", tmp_path / "bare", "--merge") == 0
    assert (tmp_path / "bare" / "index.json").is_file()


def test_a_crop_leaves_the_rest_of_the_frame_without_a_slot(tmp_path, run, frames):
    assert run("--input", frames, "--data.image_size=16", "--data.crop=center", "--out", tmp_path / "out") == 0
    labels = labels_of(tmp_path / "out", "frames")
    # 24 x 40 is resized to 16 x 27, of which columns 5 to 21 are seen.
    assert (labels[:, :, :7] == 255).all()
    assert (labels[:, :, 31:] == 255).all()
    assert labels[:, :, 7:31].max() <= 2


OTHER_HOST = ["--model=DINOSAUR", "--model.backbone=null", "--model.feature_dim=8", "--model.grid=[2, 2]"]
OTHER_HOST += ["--data=ShardDataModule", "--input", "frames"]
REFUSED = [
    (["--input", "gone.mp4"], "gone.mp4, which does not exist"),
    (["--input", "frames", "--clip_frames=1"], "--clip-frames to be at least 2"),
    (["--input", "frames", "--out", "file"], "File exists"),
    # Checkpoints of Lightning before 2.6 do not name their host.
    (OTHER_HOST, "a checkpoint of DINOSAUR, .*, but got one of SAVi|a whole checkpoint of this model"),
    (["--ckpt_path", "nameless.ckpt", *OTHER_HOST], "a whole checkpoint of this model"),
    (["--config", "settings.yaml", "--clip-frames", "8"], "only with --input"),
    (["--ckpt_path", "nameless.ckpt", "--input", "frames"], "--config FILE"),
    (
        ["--input", "frames", "--trainer.callbacks+=SlotPredictions", "--out", "out"],
        "--merge only without a prediction",
    ),
]


def test_what_cannot_run_is_refused_before_anything_is_computed(tmp_path, run, frames, checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    shutil.copy(checkpoint.parent.parent / "config.yaml", "settings.yaml")
    content = torch.load(checkpoint, weights_only=True)
    del content["hyper_parameters"]  # as one of the user's own training loop may be
    torch.save(content, "nameless.ckpt")
    for words, message in REFUSED:
        assert run(*words) == 2
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_a_video_that_breaks_off_leaves_no_half_files(tmp_path, run, frames, capsys, caplog, monkeypatch):
    good, real, out = write_frames(tmp_path / "good", moving(2)), inputs.media.read_frames, tmp_path / "out"

    def breaking(path, *rest):
        for number, frame in enumerate(real(path, *rest)):
            if path == frames and number == 5:
                raise ShardError("Expected frame 5 to be whole, but it is torn. Export it again.")
            yield frame

    monkeypatch.setattr(inputs.media, "read_frames", breaking)
    assert run("--input", good, frames, "--clip-frames", 3, "--out", out) == 2
    assert "frame 5 to be whole" in capsys.readouterr().err.splitlines()[-1]
    assert [video["key"] for video in index(out)] == ["good"]
    (tmp_path / "cut.mp4").touch()
    words = ["--data.on_bad_sample=skip", "--clip-frames", 3, "--out", out, "--input", tmp_path / "cut.mp4", frames]
    assert run(*words, write_frames(tmp_path / "last", moving(2))) == 0
    assert [text.partition(":")[0] for text in caplog.messages[-3:]] == [
        "Skipping a bad sample (1 so far)",
        "Skipping a bad sample (2 so far)",
        "Skipped because they could not be read",
    ]
    assert [video["key"] for video in index(out)] == ["good", "last"]
    assert run(*words) == 2
    assert "at least one video of --input that can be read" in capsys.readouterr().err.splitlines()[-1]
    assert not [path.name for path in out.iterdir() if "frames" in path.name or path.name[0] == "."]
    with pytest.warns(UserWarning, match="writes nothing of frames: the prediction ended before"):
        assert run("--input", frames, "--clip-frames=4", "--out", out, "--trainer.limit_predict_batches=1") == 0
    assert [video["key"] for video in index(out)] == ["good", "last"]
