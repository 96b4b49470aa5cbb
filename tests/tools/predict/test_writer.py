import errno
import io
import json
import os
import socket
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.utils.data import DataLoader

from ssync_pl.data import ShardDataModule, ShardWriter
from ssync_pl.errors import ConfigError, ShapeError, ShardError
from ssync_pl.tools.predict import files as video_files
from ssync_pl.tools.predict import writer as predictions
from ssync_pl.tools.predict.writer import SlotPredictions
from ssync_pl.tools.viz import overlay_labels

SLOTS = 3


class BrightnessHost(L.LightningModule):
    """Slot of a pixel: its red value in thirds. Returns what SAVi returns."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        red = batch["video"][:, :, 0]
        return self.answer((red * SLOTS).long().clamp(0, SLOTS - 1))

    def answer(self, labels: torch.Tensor) -> Any:
        masks = torch.nn.functional.one_hot(labels, SLOTS).movedim(-1, 2).float()
        return {"labels": labels, "masks": masks}


def answering(function: Any) -> L.LightningModule:
    host = BrightnessHost()
    host.answer = function  # type: ignore[method-assign, assignment]
    return host


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, SLOTS).movedim(-1, 2).float()


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


def index(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "index.json").read_text())["videos"]


def test_every_video_with_its_own_length(tmp_path: Path, shards: str) -> None:
    av = pytest.importorskip("av")
    callback = SlotPredictions(cell=48)
    trainer = predict(tmp_path, callback, data_module(shards))
    folder = Path(trainer.log_dir) / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["index.json", *(f"clip-{n}{end}" for n in range(3) for end in (".mp4", ".labels.npz", ".tracks.csv"))]
    )
    assert [(v["key"], v["name"], v["frames"], v["slots_used"]) for v in index(folder)] == [
        ("clip-0", "clip-0", 2, 1),
        ("clip-1", "clip-1", 5, 3),
        ("clip-2", "clip-2", 3, 3),
    ]
    assert (callback.folder, callback.total) == (folder, 3)
    with np.load(folder / "clip-1.labels.npz") as stored:  # allow_pickle is off
        assert stored.files == ["labels"]
        assert stored["labels"].dtype == np.uint8
        assert stored["labels"].shape == (5, 12, 12)
        assert stored["labels"][4, 7].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with av.open(str(folder / "clip-1.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5


def test_frames_are_shown_as_stored_beside_the_labels(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def keep(panels: Any, **options: Any) -> np.ndarray:
        seen.append((panels, options))
        return np.zeros((2, 16, 16, 3), np.uint8)

    class Encoder:
        def __init__(self, fps: int) -> None:
            self.fps = fps

        def add(self, frames: np.ndarray) -> None:
            assert frames.shape == (2, 16, 16, 3)

        def close(self) -> bytes:
            return b"mp4 at %d" % self.fps

        def discard(self) -> None:
            return

    monkeypatch.setattr(video_files, "compose_frames", keep)
    monkeypatch.setattr(video_files, "Mp4Encoder", Encoder)
    monkeypatch.setattr(predictions, "mp4_available", lambda: True)
    data = ShardDataModule(predict=shards, batch_size=2, num_workers=0)  # ImageNet's mean and deviation
    host = answering(lambda labels: {"labels": torch.full_like(labels, 2)})
    trainer = predict(tmp_path, SlotPredictions(fps=9), data, host)
    (frames, overlay), options = seen[1][0][0], seen[1][1]
    expected = np.zeros((5, 12, 12, 3), np.uint8)
    expected[..., 0] = columns()
    assert np.array_equal(frames, expected)
    assert np.array_equal(overlay, overlay_labels(expected, np.full((5, 12, 12), 2)))
    assert "clip-1" in options["title"]
    assert (Path(trainer.log_dir) / "predictions" / "clip-1.mp4").read_bytes() == b"mp4 at 9"


def test_padding_is_not_written(tmp_path: Path) -> None:
    real = torch.tensor([True, False])
    frames = torch.tensor([[True, False], [True, True]])
    batch = clip(["a", "a"], 2, batch_padding_mask=real, frame_mask=frames)
    predict(tmp_path, SlotPredictions(str(tmp_path / "out"), video=False), batches(batch))
    assert [(v["key"], v["frames"]) for v in index(tmp_path / "out")] == [("a", 1)]
    assert np.load(tmp_path / "out" / "a.labels.npz")["labels"].shape == (1, 6, 6)


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
    assert names[:7] == ["evil", "etc_passwd", "a_b", "a_b-2", "A_b-3", "dup", "dup-2"]
    assert names[7] == "dup-2-2"
    assert all(len(name) <= 110 for name in names)
    assert not (tmp_path / "evil.labels.npz").exists()


def test_batches_without_keys_are_numbered(tmp_path: Path) -> None:
    predict(tmp_path, SlotPredictions(str(tmp_path / "out"), video=False), batches(clip(count=2), clip()))
    assert [video["key"] for video in index(tmp_path / "out")] == ["000000", "000001", "000002"]


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".ssync_claims" / "b").mkdir(parents=True)  # left by a run that was killed
    (out / ".ssync_index.rank-00007.json").write_text('[{"key": "old"}]')
    (out / "b.labels.npz").write_bytes(b"")
    callback = SlotPredictions(str(out), video=False)
    for _ in range(2):
        predict(tmp_path, callback, batches(clip(["a"])))
        assert [(video["key"], video["name"]) for video in index(out)] == [("a", "a")]
        assert sorted(path.name for path in out.iterdir()) == ["a.labels.npz", "a.tracks.csv", "index.json"]
    predict(tmp_path, callback, batches(clip(["c"])))  # other videos join those that are there
    assert [video["name"] for video in index(out)] == ["a", "c"]
    assert callback.total == 1
    predict(tmp_path, callback, batches(clip(["a"])))
    assert [video["name"] for video in index(out)] == ["c", "a"]


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


@pytest.mark.parametrize("masks", ["labels", "soft", "none"])
def test_what_is_written_of_the_masks(tmp_path: Path, masks: Any) -> None:
    predict(tmp_path, SlotPredictions(str(tmp_path / "out"), video=False, masks=masks), batches(clip(["a"])))
    path = tmp_path / "out" / "a.labels.npz"
    if masks == "none":
        assert not path.exists()
        return
    stored = np.load(path)
    assert sorted(stored.files) == (["labels", "masks"] if masks == "soft" else ["labels"])
    if masks == "soft":
        assert stored["masks"].dtype == np.float16
        assert stored["masks"].shape == (2, SLOTS, 6, 6)
        assert np.array_equal(stored["masks"].argmax(1), stored["labels"])


def test_most_videos(tmp_path: Path, shards: str) -> None:
    out = str(tmp_path / "out")
    predict(tmp_path, SlotPredictions(out, video=False, max_videos=2), data_module(shards, 1))
    assert [video["key"] for video in index(tmp_path / "out")] == ["clip-0", "clip-1"]


Nested = namedtuple("Nested", ["object_masks"])


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        (lambda labels: {"decoder": {"masks": one_hot(labels)}}, {"masks_key": "decoder.masks"}),
        (lambda labels: {"decoder.masks": one_hot(labels)}, {"masks_key": "decoder.masks"}),
        (lambda labels: Nested(one_hot(labels)), {"masks_key": "object_masks"}),
        (lambda labels: {"hard": labels.int()}, {"labels_key": "hard"}),
        (lambda labels: labels, {}),
        (one_hot, {"labels_key": "any"}),
    ],
)
def test_foreign_hosts(tmp_path: Path, answer: Any, options: dict[str, str]) -> None:
    callback = SlotPredictions(str(tmp_path / "out"), video=False, **options)
    predict(tmp_path, callback, batches(clip(["a"])), answering(answer))
    assert np.load(tmp_path / "out" / "a.labels.npz")["labels"][1, 3].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("answer", "options", "error", "message"),
    [
        (lambda labels: {"slots": labels.float()}, {}, ConfigError, r"got the keys \['slots'\]. Set `labels_key`"),
        (lambda labels: None, {}, ConfigError, "got a NoneType"),
        (lambda labels: {"labels": labels[:, :1]}, {}, ShapeError, r"B, T = \(1, 2\) as in the batch"),
        (lambda labels: {"labels": labels.float()}, {}, ShapeError, "integers .* but got torch.float32"),
        (lambda labels: {"masks": one_hot(labels)[0]}, {}, ShapeError, r"\(B, T, S, H, W\)"),
        (lambda labels: {"labels": labels}, {"masks": "soft"}, ConfigError, "for masks='soft'"),
        (lambda labels: {"labels": labels + 300}, {}, ShapeError, "labels from 0 to 255, but got 300 to 302"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, answer: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        predict(tmp_path, SlotPredictions(video=False, **options), batches(clip(["a"])), answering(answer))


def test_frames_that_are_not_found_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"batch key `frames` to be \(B, T, 3, H, W\)"):
        predict(tmp_path, SlotPredictions(video_key="frames"), batches(clip(["a"])))


def test_without_pyav_one_warning_and_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "mp4_available", lambda: False)
    out = tmp_path / "out"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict(tmp_path, SlotPredictions(str(out), cell=32), batches(clip(["a", "b"], 2), clip(["c"])))
    assert sum("pip install av" in str(warning.message) for warning in caught) == 1
    assert sorted(path.name for path in out.glob("*.png")) == ["a.png", "b.png", "c.png"]
    assert Image.open(out / "a.png").size[1] > 2 * 32
    assert not list(out.glob("*.mp4"))


def test_a_full_disk_is_named_and_what_was_written_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = video_files.write_bytes

    def full(path: Path, content: bytes) -> Path:
        if Path(path).name.startswith("b."):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(video_files, "write_bytes", full)
    callback = SlotPredictions(str(tmp_path / "out"), video=False)
    with pytest.raises(ShardError, match=r"out, but the disk is full after 1 videos\. Free space"):
        predict(tmp_path, callback, batches(clip(["a"]), clip(["b"])))
    assert [video["key"] for video in index(tmp_path / "out")] == ["a"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.labels.npz", "a.tracks.csv", "index.json"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ShardError, match=r"writing failed .*Change the rights of the folder, or set `out`"):
        predict(tmp_path, SlotPredictions(str(tmp_path / "out")), batches(clip(["a"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "`fps` to be at least 1"),
        ({"cell": 8}, "`cell` to be at least 16"),
        ({"max_videos": 0}, "`max_videos` to be at least 1"),
        ({"masks": "hard"}, "'labels', 'none' or 'soft', but got 'hard'"),
    ],
)
def test_settings_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlotPredictions(**options)


def test_max_videos_is_shared_among_processes(tmp_path: Path) -> None:
    rooms = []
    for rank in range(3):
        strategy = SimpleNamespace(barrier=lambda name: None)
        trainer = SimpleNamespace(
            log_dir=str(tmp_path), world_size=3, global_rank=rank, local_rank=rank, strategy=strategy
        )
        callback = SlotPredictions(max_videos=5, video=False)
        callback.on_predict_start(trainer, BrightnessHost())  # type: ignore[arg-type]
        rooms.append(callback._room)
    assert rooms == [2, 2, 1]


SCRIPT = """
import sys
import lightning.pytorch as L
import torch
from ssync_pl.data import ShardDataModule
from ssync_pl.tools.predict.writer import SlotPredictions


class Host(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def predict_step(self, batch, batch_idx):
        return {"labels": (batch["video"][:, :, 0] * 3).long().clamp(0, 2)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = ShardDataModule(
        predict=sys.argv[1], batch_size=2, num_workers=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SlotPredictions(sys.argv[2], video=False)],
    )
    trainer.predict(Host(), data, return_predictions=False)
"""


def test_two_processes_write_each_video_once(tmp_path: Path) -> None:
    for part in range(2):  # equal keys in both shards: the ranks meet the same names
        with ShardWriter(tmp_path / f"part{part}", "videos") as writer:
            for n in range(3 - part):
                writer.write(str(n), {"video.npy": np.full((2, 6, 6, 3), 100 * part + 20, np.uint8)})
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Variables of an outer cluster job would tell Lightning that the processes exist already.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PL_", "LOCAL_"))}
    env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "script.py", str(tmp_path / "part*" / "videos-*.tar"), str(out)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    videos = index(out)
    assert sorted(video["key"] for video in videos) == ["0", "0", "1", "1", "2"]
    assert {video["rank"] for video in videos} == {0, 1}
    names = sorted(video["name"] for video in videos)
    assert names == ["0", "0-2", "1", "1-2", "2"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{n}.{end}" for n in names for end in ("labels.npz", "tracks.csv")), "index.json"]
    )
    labels = [int(np.load(out / f"{name}.labels.npz")["labels"].max()) for name in names]
    assert sorted(labels) == [0, 0, 0, 1, 1]  # nothing was replaced


class QuietWriter(BasePredictionWriter):
    """A prediction writer of the user's own."""

    def __init__(self) -> None:
        super().__init__("batch")

    def write_on_batch_end(self, *args: Any) -> None:
        return


def tiny_config(tmp_path: Path, shards: str) -> Path:
    import yaml

    model = {"num_slots": 3, "slot_dim": 8, "feature_dim": 8, "encoder_channels": [8], "encoder_strides": [2]}
    model |= {"encoder_mlp_hidden": 8, "corrector_mlp_hidden": 8, "predictor_mlp_hidden": 8, "warmup_steps": 1}
    model |= {"decoder_broadcast": [4, 4], "decoder_channels": [8], "decoder_strides": [2]}
    settings = {
        "model": {"class_path": "SAVi", "init_args": model},
        "data": {"class_path": "ShardDataModule", "init_args": {"predict": shards, "num_workers": 0, "image_size": 16}},
        "trainer": {"accelerator": "cpu", "enable_model_summary": False, "default_root_dir": str(tmp_path / "runs")},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_command_writes_predictions_by_itself(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssync_pl.cli import main

    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    words = ["predict", "--config", str(tiny_config(tmp_path, shards))]
    assert main(words) == 0
    streams = capsys.readouterr()
    folder = tmp_path / "runs" / "tiny" / "version_0" / "predictions"
    assert streams.out.splitlines()[-1] == f"predictions: 3 videos in {folder}"
    assert "without --ckpt_path the host predicts with the weights that it starts with" in streams.err
    assert [video["frames"] for video in index(folder)] == [2, 5, 3]
    own = ["--trainer.callbacks+=SlotPredictions", "--trainer.callbacks.video=false"]
    own += [f"--trainer.callbacks.out={tmp_path / 'mine'}"]
    assert main([*words, *own]) == 0
    assert len(list((tmp_path / "mine").glob("*.npz"))) == 3
    assert not (tmp_path / "runs" / "tiny" / "version_1" / "predictions").exists()


def test_the_command_keeps_no_predictions_in_memory(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssync_pl.cli.trainer import run_trainer

    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    monkeypatch.setattr(predictions, "mp4_available", lambda: False)
    words = ["predict", "--config", str(tiny_config(tmp_path, shards))]
    assert run_trainer(words).trainer.predict_loop.return_predictions is False
    kept = run_trainer([*words, "--return_predictions=true", "--trainer.callbacks+=SlotPredictions"])
    assert kept.trainer.predict_loop.return_predictions is True
    assert sum(isinstance(c, SlotPredictions) for c in kept.trainer.callbacks) == 1  # type: ignore[attr-defined]


def test_a_writer_of_the_users_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssync_pl.cli.trainer import SSyncCLI

    def build(callbacks: list[L.Callback], verb: str) -> list[L.Callback]:
        cli = SSyncCLI.__new__(SSyncCLI)
        settings = {"callbacks": callbacks, "logger": False}
        cli.subcommand = verb  # type: ignore[misc]
        cli.config_init = {verb: {"trainer": settings, "name": "x"}}  # type: ignore[assignment]
        seen: dict[str, Any] = {}
        monkeypatch.setattr("lightning.pytorch.cli.LightningCLI.instantiate_trainer", lambda self, **k: seen.update(k))
        cli.instantiate_trainer()
        return seen["callbacks"]

    assert any(isinstance(callback, SlotPredictions) for callback in build([], "predict"))
    assert not any(isinstance(callback, SlotPredictions) for callback in build([QuietWriter()], "predict"))
    assert not any(isinstance(callback, SlotPredictions) for callback in build([], "fit"))


def test_mp4_bytes_are_whole(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    predict(tmp_path, SlotPredictions(str(tmp_path / "out"), cell=33, fps=4), batches(clip(["a"])))
    with av.open(io.BytesIO((tmp_path / "out" / "a.mp4").read_bytes())) as container:
        assert container.streams.video[0].average_rate == 4
        assert sum(1 for _ in container.decode(video=0)) == 2
