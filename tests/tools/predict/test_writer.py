import errno
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml
from input_files import MODEL, index, labels_of
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from ssync_pl.data import ShardDataModule, ShardWriter
from ssync_pl.errors import ConfigError, ShapeError, ShardError
from ssync_pl.tools.predict import files as video_files
from ssync_pl.tools.predict import writer as predictions
from ssync_pl.tools.predict.writer import SlotPredictions

SLOTS = 3


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, SLOTS).movedim(-1, 2).float()


class BrightnessHost(L.LightningModule):
    """Slot of a pixel: its red value in thirds. Returns what SAVi returns, or an answer of the test's."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer or (lambda labels: {"labels": labels, "masks": one_hot(labels)})

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.answer((batch["video"][:, :, 0] * SLOTS).long().clamp(0, SLOTS - 1))


def columns(width: int = 12) -> np.ndarray:
    """Red rises in three steps from left to right."""
    return np.repeat(np.array([20, 120, 220], np.uint8), width // SLOTS)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    with ShardWriter(tmp_path / "shards", "videos", 2) as writer:
        for n, frames in enumerate((2, 5, 3)):
            video = np.zeros((frames, 12, 12, 3), np.uint8)
            video[..., 0] = columns() if n else 20
            writer.write(f"clip-{n}", {"video.npy": video})
    return str(tmp_path / "shards" / "videos-*.tar")


def data_module(shards: str, batch_size: int = 2) -> ShardDataModule:
    return ShardDataModule(
        predict=shards, batch_size=batch_size, num_workers=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )


def predict(tmp_path: Path, callback: L.Callback, data: Any, host: L.LightningModule | None = None) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(str(tmp_path / "logs")),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(host or BrightnessHost(), data, return_predictions=False)
    return trainer


def batches(*items: dict[str, Any]) -> DataLoader:
    return DataLoader(list(items), batch_size=None)  # type: ignore[arg-type]


def clip(keys: list[str] | None = None, count: int = 1, **more: Any) -> dict[str, Any]:
    video = torch.zeros(count, 2, 3, 6, 6)
    video[:, :, 0] = torch.tensor([0.1, 0.1, 0.5, 0.5, 0.9, 0.9])
    return {"video": video, **({} if keys is None else {"__key__": keys}), **more}


def test_every_video_with_its_own_length(tmp_path: Path, shards: str) -> None:
    av = pytest.importorskip("av")
    callback = SlotPredictions(cell=48)
    trainer = predict(tmp_path, callback, data_module(shards))
    folder = Path(trainer.log_dir) / "predictions"
    assert callback.folder == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["index.json", *(f"clip-{n}{end}" for n in range(3) for end in (".mp4", ".labels.npz", ".tracks.csv"))]
    )
    found = [(video["key"], video["name"], video["frames"], video["slots_used"]) for video in index(folder)]
    assert found == [("clip-0", "clip-0", 2, 1), ("clip-1", "clip-1", 5, 3), ("clip-2", "clip-2", 3, 3)]
    labels = labels_of(folder, "clip-1")
    assert (labels.dtype, labels.shape) == (np.uint8, (5, 12, 12))
    assert labels[4, 7].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with av.open(str(folder / "clip-1.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 6
    assert len(frames) == 5


def test_frames_are_shown_as_stored(tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(video_files.VideoFiles, "add", lambda self, frames, labels: seen.append(frames))
    monkeypatch.setattr(video_files.VideoFiles, "finish", lambda self, slots: 0)
    data = ShardDataModule(predict=shards, batch_size=2, num_workers=0)  # ImageNet's mean and deviation
    predict(tmp_path, SlotPredictions(video=False), data)
    expected = np.zeros((5, 12, 12, 3), np.uint8)
    expected[..., 0] = columns()
    assert np.array_equal(seen[1], expected)


def test_padding_is_not_written_and_batches_without_keys_are_numbered(tmp_path: Path) -> None:
    real = torch.tensor([True, False])
    frames = torch.tensor([[True, False], [True, True]])
    batch = clip(["a", "a"], 2, batch_padding_mask=real, frame_mask=frames)
    predict(tmp_path, SlotPredictions(str(tmp_path / "out"), video=False), batches(batch, clip(count=2)))
    found = [(video["key"], video["frames"]) for video in index(tmp_path / "out")]
    assert found == [("a", 1), ("000001", 2), ("000002", 2)]
    assert labels_of(tmp_path / "out", "a").shape == (1, 6, 6)


def test_keys_cannot_leave_the_folder_or_replace_each_other(tmp_path: Path) -> None:
    keys = ["../../evil", "/etc/passwd", "a/b", "a_b", "A_b", "dup", "dup", "dup-2", "", "..", "x" * 300, "ключ"]
    out = tmp_path / "deep" / "out"
    predict(tmp_path, SlotPredictions(str(out), video=False), batches(clip(keys, len(keys))))
    videos = index(out)
    assert [video["key"] for video in videos] == keys
    names = [video["name"] for video in videos]
    assert len({name.lower() for name in names}) == len(keys)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["index.json", *(f"{n}.{end}" for n in names for end in ("labels.npz", "tracks.csv"))]
    )
    assert names[:8] == ["evil", "etc_passwd", "a_b", "a_b-2", "A_b-3", "dup", "dup-2", "dup-2-2"]
    assert all(len(name) <= 110 for name in names)
    assert not (tmp_path / "evil.labels.npz").exists()


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".ssync_pl-x" / "a_labels").mkdir(parents=True)  # left by a run that was killed
    (out / ".mine").mkdir()
    callback = SlotPredictions(str(out), video=False)
    for keys, names in ((["a"], ["a"]), (["a"], ["a"]), (["c"], ["a", "c"]), (["a"], ["c", "a"])):
        predict(tmp_path, callback, batches(clip(keys)))
        assert [video["name"] for video in index(out)] == names
        files = {"index.json", ".mine", *(f"{name}.{end}" for name in names for end in ("labels.npz", "tracks.csv"))}
        assert {path.name for path in out.iterdir()} == files


@pytest.mark.parametrize("name", ["a.mp4", "a_labels/mine.png", "index.json", "notes.txt"])
def test_a_folder_with_files_of_others_is_refused_by_name(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"version": 2, "shards": []}')
    callback = SlotPredictions(str(tmp_path / "out"), label_pngs=True)
    with pytest.raises(ConfigError, match=name.partition("/")[0]):
        predict(tmp_path, callback, batches(clip(["a"])))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == '{"version": 2, "shards": []}'


@pytest.mark.parametrize(
    "answer",
    [
        lambda labels: {"masks": one_hot(labels)},
        lambda labels: SimpleNamespace(masks=one_hot(labels)),
        lambda labels: {"labels": labels.int()},
        lambda labels: labels,
        one_hot,
    ],
)
def test_hosts_of_others(tmp_path: Path, answer: Any) -> None:
    callback = SlotPredictions(str(tmp_path / "out"), video=False)
    predict(tmp_path, callback, batches(clip(["a"])), BrightnessHost(answer))
    assert labels_of(tmp_path / "out", "a")[1, 3].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda labels: {"slots": labels.float()}, ConfigError, r"got the keys \['slots'\]"),
        (lambda labels: None, ConfigError, "got a NoneType"),
        (lambda labels: {"labels": labels[:, :1]}, ShapeError, r"B, T = \(1, 2\) as in the batch"),
        (lambda labels: {"labels": labels.float()}, ShapeError, "integers .* but got torch.float32"),
        (lambda labels: {"masks": one_hot(labels)[0]}, ShapeError, r"\(B, T, S, H, W\)"),
        (lambda labels: {"masks": torch.zeros(1, 2, 256, 2, 2)}, ShapeError, "at most 255 slots"),
        (lambda labels: {"labels": labels + 300}, ShapeError, "labels from 0 to 255, but got 300 to 302"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict(tmp_path, SlotPredictions(video=False), batches(clip(["a"])), BrightnessHost(answer))


def test_settings_and_batches_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`cell` to be at least 16"):
        SlotPredictions(cell=8)
    flat = {"video": clip()["video"][0]}
    with pytest.raises(ShapeError, match=r"`video` to be \(B, T, 3, H, W\)"):
        predict(tmp_path, SlotPredictions(), batches(flat), BrightnessHost(lambda labels: labels))


def test_without_pyav_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "mp4_available", lambda: False)
    with pytest.warns(UserWarning, match="pip install av") as caught:
        predict(tmp_path, SlotPredictions(str(tmp_path / "out")), batches(clip(["a", "b"], 2), clip(["c"])))
    assert sum("pip install av" in str(warning.message) for warning in caught) == 1
    assert len(index(tmp_path / "out")) == 3


def test_a_full_disk_is_named_and_what_was_written_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.savez_compressed

    def full(path: Path, **arrays: Any) -> None:
        if Path(path).name.startswith("b."):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, **arrays)

    monkeypatch.setattr(video_files.np, "savez_compressed", full)
    callback = SlotPredictions(str(tmp_path / "out"), video=False)
    with pytest.raises(ShardError, match=r"out, but the disk is full after 1 videos\. Free space"):
        predict(tmp_path, callback, batches(clip(["a"]), clip(["b"])))
    assert [video["key"] for video in index(tmp_path / "out")] == ["a"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.labels.npz", "a.tracks.csv", "index.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"writing failed .*set `out`"):
        predict(tmp_path, SlotPredictions(str(tmp_path / "file")), batches(clip(["a"])))


def test_each_process_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for rank in range(2):
        trainer = SimpleNamespace(log_dir=None, world_size=2, global_rank=rank)
        callback = SlotPredictions(str(tmp_path / "out"), video=False)
        callback.on_predict_start(trainer, BrightnessHost())  # type: ignore[arg-type]
        callback.on_predict_batch_end(trainer, None, torch.zeros(1, 2, 6, 6).long(), clip(["a"]), 0)  # type: ignore[arg-type]
        assert [video["name"] for video in index(tmp_path / "out" / f"rank{rank}")] == ["a"]


class QuietWriter(BasePredictionWriter):
    """A prediction writer of the user's own."""

    def __init__(self) -> None:
        super().__init__("batch")

    def write_on_batch_end(self, *args: Any) -> None:
        return


def test_the_command_writes_predictions_unless_it_has_a_writer(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssync_pl.cli import main
    from ssync_pl.cli.trainer import run_trainer

    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    data = {"predict": shards, "num_workers": 0, "image_size": 16}
    settings = {
        "model": {"class_path": "SAVi", "init_args": MODEL},
        "data": {"class_path": "ShardDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": str(tmp_path / "runs")},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    words = ["predict", "--config", str(tmp_path / "tiny.yaml")]
    assert main(words) == 0
    streams = capsys.readouterr()
    folder = tmp_path / "runs" / "tiny" / "version_0" / "predictions"
    assert streams.out.splitlines()[-1] == f"predictions: 3 videos in {folder}"
    assert "without --ckpt_path the host has the weights that it starts with" in streams.err
    assert [video["frames"] for video in index(folder)] == [2, 5, 3]
    own = ["--trainer.callbacks+=SlotPredictions", f"--trainer.callbacks.out={tmp_path / 'mine'}"]
    done = run_trainer([*words, *own, "--trainer.callbacks.video=false"])
    assert done.trainer.predict_loop.return_predictions is False  # which would fill the memory
    assert len(list((tmp_path / "mine").glob("*.npz"))) == 3
    monkeypatch.setitem(sys.modules, "quiet_writer", sys.modules[__name__])
    kept = run_trainer([*words, "--trainer.callbacks+=quiet_writer.QuietWriter", "--return_predictions=true"])
    assert kept.trainer.predict_loop.return_predictions is True
    assert not any(isinstance(callback, SlotPredictions) for callback in kept.trainer.callbacks)
    assert not list((tmp_path / "runs").glob("tiny/version_[12]/predictions"))
