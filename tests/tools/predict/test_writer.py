import json
import sys
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml
from input_files import index, labels_of, moving, write_shard
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from tiny_hosts import make_trainer
from torch.utils.data import DataLoader

from ssync_pl.cli import main
from ssync_pl.cli.trainer import run_trainer
from ssync_pl.data import ShardDataModule
from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.tools.predict import writer
from ssync_pl.tools.predict.writer import SlotPredictions, VideoFiles, slot_tracks
from ssync_pl.tools.viz import color_labels
from tiny_run import tiny_config

ENDINGS = (".labels.npz", ".tracks.csv", "_labels")


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No MP4, unless a test asks for it."""
    if "capsys" not in request.fixturenames:
        monkeypatch.setattr(writer, "mp4_available", lambda: False)


def one_hot(labels):
    return torch.nn.functional.one_hot(labels, 3).movedim(-1, 2).float()


class BrightnessHost(L.LightningModule):
    """Slot of a pixel: its red value in thirds. Returns what SAVi returns, or an answer of the test's."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer or (lambda labels: {"labels": labels, "masks": one_hot(labels)})

    def predict_step(self, batch, batch_idx):
        return self.answer((batch["video"][:, :, 0] * 3).long().clamp(0, 2))


def predict(out, data, answer=None):
    trainer = make_trainer(SlotPredictions(str(out)))
    data = data if isinstance(data, ShardDataModule) else DataLoader(data, batch_size=None)
    trainer.predict(BrightnessHost(answer), data, return_predictions=False)


def clip(*keys, **more):
    """A batch of a clip per key, in which red rises in three steps from left to right."""
    video = torch.zeros(len(keys), 2, 3, 6, 6)
    video[:, :, 0] = torch.tensor([0.1, 0.1, 0.5, 0.5, 0.9, 0.9])
    return {"video": video, "__key__": list(keys), **more}


def test_frames_are_shown_as_stored(tmp_path, monkeypatch):
    seen, add = [], VideoFiles.add
    monkeypatch.setattr(VideoFiles, "add", lambda self, *args: seen.append(args[0]) or add(self, *args))
    videos = [moving(frames, 24, 24) for frames in (2, 5, 3)]
    data = ShardDataModule(predict=str(write_shard(tmp_path / "shards", *videos)), batch_size=2, num_workers=0)
    predict(tmp_path / "out", data)  # with ImageNet's mean and deviation
    assert all(np.array_equal(frames, video) for frames, video in zip(seen, videos, strict=True))


def test_padding_is_not_written_and_batches_without_keys_are_numbered(tmp_path):
    frames = torch.tensor([[True, False], [True, True]])
    batch = clip("a", "a", batch_padding_mask=torch.tensor([True, False]), frame_mask=frames)
    with pytest.warns(UserWarning, match="pip install av") as caught:
        predict(tmp_path / "out", [batch, {"video": clip("", "")["video"]}])
    assert sum("pip install av" in str(warning.message) for warning in caught) == 1
    found = [(video["key"], video["frames"], video["slots_used"]) for video in index(tmp_path / "out")]
    assert found == [("a", 1, 3), ("000001", 2, 3), ("000002", 2, 3)]
    assert labels_of(tmp_path / "out", "a").shape == (1, 6, 6)


def test_keys_cannot_leave_the_folder_or_replace_each_other(tmp_path):
    keys = ["../../evil", "/etc/passwd", "a/b", "a_b", "A_b", "dup", "dup", "dup-2", "", "..", "x" * 300, "\udcff"]
    out = tmp_path / "deep" / "out"
    predict(out, [clip(*keys)])
    assert [video["key"] for video in index(out)] == keys
    names = [video["name"] for video in index(out)]
    assert len({name.lower() for name in names}) == len(keys)
    assert {path.name for path in out.iterdir()} == {"index.json", *(f"{n}{end}" for n in names for end in ENDINGS)}
    assert names[:8] == ["evil", "etc_passwd", "a_b", "a_b-2", "A_b-3", "dup", "dup-2", "dup-2-2"]
    assert all(len(name) <= 110 for name in names)
    assert not list(tmp_path.glob("evil*"))


def test_a_second_run_replaces_the_first_and_what_a_killed_one_left(tmp_path):
    out = tmp_path / "out"
    for name in (".mine", ".ssync_pl-killed"):
        (out / name).mkdir(parents=True)
        (out / name / "labels.raw").write_bytes(b"half")
    for key, names in (("a", ["a"]), ("a", ["a"]), ("c", ["a", "c"]), ("a", ["c", "a"]), ("c", ["a", "c"])):
        if names == ["c", "a"]:  # a run was killed while it showed the files of `a`
            (out / "a.labels.npz").unlink()
        predict(out, [clip(key)])
        assert [video["name"] for video in index(out)] == names
        files = {"index.json", ".mine", *(f"{name}{end}" for name in names for end in ENDINGS)}
        assert {path.name for path in out.iterdir()} == files


def test_a_prediction_into_the_folder_of_one_that_runs_is_refused(tmp_path):
    def answer(labels):
        with pytest.raises(BlockingIOError, match="another process holds the lock"):
            predict(tmp_path, [clip("b")])
        return {"labels": labels}

    predict(tmp_path, [clip("a")], answer)
    assert [video["key"] for video in index(tmp_path)] == ["a"]


OURS = {"format": "ssync_pl.predictions", "videos": [{"name": "a", "frames": 1, "files": ["a_labels"], "bytes": {}}]}
FOREIGN = [
    ("a.mp4", None),
    ("a_labels/mine.png", None),
    ("index.json", {"version": 2, "shards": []}),
    ("index.json", {**OURS, "videos": [{"name": 3, "files": []}]}),
    ("index.json", [1]),
    ("notes.txt", OURS),
    ("a.mp4", OURS),  # PyAV was missing when these predictions were made
    ("a_labels/mine.png", OURS),
    ("a_labels/00001.png", OURS),  # it has one frame
    (
        "a.labels.npz",
        {**OURS, "videos": [{**OURS["videos"][0], "files": ["a.labels.npz"], "bytes": {"a.labels.npz": 9}}]},
    ),
]


@pytest.mark.parametrize(("name", "content"), FOREIGN)
def test_a_folder_with_files_of_others_is_refused_by_name(tmp_path, name, content):
    out = tmp_path / "out"
    mine = out / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    if content is not None:
        (out / "index.json").write_text(json.dumps(content))
    before = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=name.replace("/", "|")):
        predict(out, [clip("a")])
    assert {path: path.read_text() for path in out.rglob("*") if path.is_file()} == before


def test_labels_of_our_hosts_and_of_others(tmp_path):
    small, plain = lambda found: {"masks": one_hot(found)[..., ::2, ::2]}, lambda found: {"labels": found.int()}
    for answer in (None, small, plain):
        predict(tmp_path, [clip("a")], answer)
        labels = labels_of(tmp_path, "a")
        assert (labels.dtype, labels.shape) == (np.uint8, (2, 6, 6))
        assert (labels == [0, 0, 1, 1, 2, 2]).all()


REFUSED = [
    (lambda labels: {"slots": labels.float()}, ConfigError, r"got \['slots'\]"),
    (lambda labels: {"labels": labels.tolist()}, ConfigError, r"tensors .* got \['labels'\]"),
    (lambda labels: None, ConfigError, "got NoneType"),
    (lambda labels: {"labels": labels[:, :1]}, ShapeError, r"B, T = \(1, 2\) as in the batch"),
    (lambda labels: {"labels": labels.float()}, ShapeError, "integers .* but got torch.float32"),
    (lambda labels: {"masks": one_hot(labels)[0]}, ShapeError, r"\(B, T, S, H, W\)"),
    (lambda labels: {"masks": torch.zeros(1, 2, 256, 2, 2)}, ShapeError, "integers from 0 to 255"),
    (lambda labels: {"labels": labels + 300}, ShapeError, "integers from 0 to 255"),
]


def test_what_cannot_be_written_is_refused(tmp_path):
    for answer, error, message in REFUSED:
        with pytest.raises(error, match=message):
            predict(tmp_path, [clip("a")], answer)
    with pytest.raises(ShapeError, match=r"`video` to be \(B, T, 3, H, W\)"):
        predict(tmp_path, [{"video": torch.zeros(2, 3, 6, 6)}])


def test_a_full_disk_leaves_what_was_written_and_its_index(tmp_path, monkeypatch):
    real, out = np.savez_compressed, tmp_path / "out"

    def full(path, **arrays):
        if "/b." in path:
            raise OSError(28, "No space left on device")
        real(path, **arrays)

    monkeypatch.setattr(writer.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        predict(out, [clip("a"), clip("b")])
    assert [video["key"] for video in index(out)] == ["a"]
    assert {path.name for path in out.iterdir()} == {"index.json", *(f"a{end}" for end in ENDINGS)}


def test_each_process_has_a_folder_of_its_own(tmp_path):
    for rank in range(2):
        trainer = SimpleNamespace(log_dir=None, world_size=2, global_rank=rank)
        callback = SlotPredictions(str(tmp_path / "out"))
        callback.on_predict_start(trainer, BrightnessHost())
        callback.on_predict_batch_end(trainer, None, {"labels": torch.zeros(1, 2, 6, 6).long()}, clip("a"), 0)
        callback.on_predict_end(trainer, None)
        assert [video["name"] for video in index(tmp_path / "out" / f"rank{rank}")] == ["a"]


class QuietWriter(BasePredictionWriter):
    """A prediction writer of the user's own."""

    def write_on_epoch_end(self, *args):
        return


def test_the_command_writes_predictions_unless_it_has_a_writer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    shard = write_shard(tmp_path / "shards", moving(2), moving(5))
    settings = tiny_config(tmp_path, default_root_dir=str(tmp_path / "runs"))
    data = {"predict": str(shard), "num_workers": 0, "image_size": 16}
    settings["data"] = {"class_path": "ShardDataModule", "init_args": data}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    words = ["predict", "--config", str(tmp_path / "tiny.yaml")]
    assert main(words) == 0
    streams = capsys.readouterr()
    folder = tmp_path / "runs" / "tiny" / "version_0" / "predictions"
    assert streams.out.splitlines()[-1] == f"predictions: 2 videos in {folder}"
    assert "without --ckpt_path the host has the weights that it starts with" in streams.err
    assert [(video["name"], video["frames"]) for video in index(folder)] == [("0", 2), ("1", 5)]
    files = {f"{name}{ending}" for name in "01" for ending in (".mp4", *ENDINGS)}
    assert {path.name for path in folder.iterdir()} == {"index.json", *files}
    monkeypatch.setitem(sys.modules, "quiet_writer", sys.modules[__name__])
    words += ["--trainer.callbacks+=quiet_writer.QuietWriter", "--trainer.callbacks.write_interval=epoch"]
    kept = run_trainer(words)
    assert kept.trainer.predict_loop.return_predictions is False  # which would fill the memory
    assert not any(isinstance(callback, SlotPredictions) for callback in kept.trainer.callbacks)
    assert not list((tmp_path / "runs").glob("tiny/version_1/predictions"))


def test_tracks_have_area_centre_and_box_of_each_slot():
    labels = np.array([[[0, 0, 3, 255], [0, 1, 3, 255]], [[1, 1, 1, 1], [1, 1, 1, 1]]], np.uint8)
    head, *lines = slot_tracks(labels, 3).splitlines()  # slot 2 is empty, label 3 is no slot
    assert head == "frame,slot,area,center_x,center_y,x0,y0,x1,y1"
    assert lines[:3] == ["0,0,0.375000,0.83,0.83,0,0,2,2", "0,1,0.125000,1.50,1.50,1,1,2,2", "0,2,0.000000,,,,,,"]
    assert lines[3:] == ["1,0,0.000000,,,,,,", "1,1,1.000000,2.00,1.00,0,0,4,2", "1,2,0.000000,,,,,,"]


def test_pieces_give_the_files_of_the_whole_and_nothing_of_an_earlier_run_stays(tmp_path):
    frames, labels = np.zeros((5, 6, 8, 3), np.uint8), np.random.default_rng(0).integers(0, 4, (5, 6, 8), np.uint8)
    labels[:, :, :2] = 255  # pixels that were not seen are no slot

    (hidden := tmp_path / ".hidden").mkdir()

    def write(name, ends):
        files = VideoFiles(tmp_path, hidden, name, 6)
        for first, end in zip([0, *ends], ends, strict=False):
            files.add(frames[first:end], labels[first:end], 6)
        told = files.finish()
        files.show()
        return told

    for name, ends in (("whole", [5]), ("pieces", [2, 3, 5])):
        told = write(name, ends)
        assert (told["frames"], told["slots_used"]) == (5, 4)
        assert told["files"] == sorted(path.name for path in tmp_path.glob(f"{name}*"))
        assert np.array_equal(np.load(tmp_path / f"{name}.labels.npz")["labels"], labels)
        assert len(list((tmp_path / f"{name}_labels").glob("0000[0-4].png"))) == 5
    assert (tmp_path / "whole.tracks.csv").read_text() == (tmp_path / "pieces.tracks.csv").read_text()
    with Image.open(tmp_path / "whole_labels" / "00000.png") as picture:  # in the colours of the overlay
        colours = color_labels(np.where(labels[0] == 255, -1, labels[0].astype(int)))
        assert np.array_equal(np.asarray(picture), labels[0])
        assert np.array_equal(np.asarray(picture.convert("RGB")), colours)
    write("whole", [2])
    assert len(list((tmp_path / "whole_labels").iterdir())) == 2
    assert not list(hidden.iterdir())
