import io
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback, SSyncPictures
from ssync_pl.adapters import PathAdapter
from ssync_pl.errors import ConfigError
from ssync_pl.tools import pictures
from ssync_pl.tools.viz import color_labels

SLOTS, FRAMES, SIZE = 3, 4, 16


def picture_batch(seed: int, padded: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (2, FRAMES, SIZE, SIZE), generator=generator)
    batch: dict[str, Any] = {
        "video": torch.randn(2, FRAMES, 3, SIZE, SIZE, generator=generator),
        "segmentations": nn.functional.one_hot(ids, 3).movedim(-1, 2).bool(),
        "__key__": [f"clip-{seed}", f"clip-{seed}b"],
    }
    if padded:
        batch["batch_padding_mask"] = torch.tensor([True, False])
        mask = torch.ones(2, FRAMES, dtype=torch.bool)
        mask[0, 2:] = False
        batch["frame_mask"] = mask
    return batch


class Patches(nn.Module):
    """Logits `(B, S, N)` of a frame."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, SLOTS, 4, stride=4)

    def forward(self, frame: Tensor) -> Tensor:
        return self.layer(frame).flatten(2)


class ClipPatches(Patches):
    """Logits `(B, T, S, N)` of a clip."""

    def forward(self, clip: Tensor) -> Tensor:
        return super().forward(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])


class ClipHost(L.LightningModule):
    """Slot attention a frame and a decoder a clip, with dropout so that random states matter."""

    def __init__(self) -> None:
        super().__init__()
        self.corrector = Patches()
        self.decoder = ClipPatches()
        self.dropout = nn.Dropout(0.3)

    def _shared(self, batch: Any) -> Tensor:
        video = batch["video"]
        logits = torch.stack([self.corrector(video[:, t]) for t in range(video.shape[1])], 1)
        return (self.dropout(logits) - self.decoder(video)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._shared(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self._shared(batch), batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class FlatHost(ClipHost):
    """Its decoder forgets which clip a frame is of."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Patches()

    def _shared(self, batch: Any) -> Tensor:
        self.corrector(batch["video"][:, 0])
        return self.decoder(batch["video"].flatten(0, 1)).square().mean()


def picture_adapter() -> PathAdapter:
    return PathAdapter("corrector", "decoder", "logits", "logits", (4, 4))


def run(tmp_path: Path, callbacks: list[L.Callback], host: L.LightningModule | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    host = ClipHost() if host is None else host
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": CSVLogger(str(tmp_path)),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks,
    }
    trainer = L.Trainer(**{**settings, **options})
    train = DataLoader([picture_batch(k) for k in range(2)], batch_size=None)
    trainer.fit(host, train, DataLoader([picture_batch(7), picture_batch(8)], batch_size=None))
    return trainer


def test_a_sheet_and_a_video_a_validation(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    callback = SSyncPictures(picture_adapter(), max_frames=3)
    trainer = run(tmp_path, [callback])
    folder = Path(trainer.log_dir) / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000002.mp4",
        "step-000002.png",
        "step-000004.mp4",
        "step-000004.png",
    ]
    assert callback.last_path == folder / "step-000004.png"
    sheet = np.asarray(Image.open(folder / "step-000004.png"))
    assert sheet.ndim == 3
    assert sheet.shape[0] > 2 * 7 * 112
    with av.open(io.BytesIO((folder / "step-000004.mp4").read_bytes())) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain, drawn = ClipHost(), ClipHost()
    torch.manual_seed(0)
    plain = ClipHost()
    drawn.load_state_dict(plain.state_dict())
    run(tmp_path / "a", [], plain)
    state = torch.get_rng_state()
    run(tmp_path / "b", [SSyncPictures(picture_adapter(), video=False)], drawn)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, drawn.state_dict()[name]), name
    assert not any(module._forward_hooks for module in drawn.modules())


def test_every_n_validations_and_no_sanity_check(tmp_path: Path) -> None:
    callback = SSyncPictures(picture_adapter(), every_n_validations=2, video=False)
    trainer = run(tmp_path, [callback], max_epochs=3, num_sanity_val_steps=2)
    names = sorted(path.name for path in (Path(trainer.log_dir) / "pictures").iterdir())
    assert names == ["step-000002.png", "step-000006.png"]


class Spy(SSyncPictures):
    """Keeps what would be drawn."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drawings: list[Any] = []

    def _write(self, trainer: L.Trainer, drawings: Any) -> None:
        self.drawings += drawings
        super()._write(trainer, drawings)


def validate(tmp_path: Path, callbacks: list[L.Callback], batches: list[Any]) -> ClipHost:
    host = ClipHost()
    trainer = L.Trainer(
        accelerator="cpu", logger=CSVLogger(str(tmp_path)), callbacks=callbacks, enable_progress_bar=False
    )
    trainer.validate(host, DataLoader(batches, batch_size=None), verbose=False)
    return host


def test_padding_is_not_drawn_and_truth_is_that_of_the_batch(tmp_path: Path) -> None:
    spy = Spy(picture_adapter(), video=False)
    validate(tmp_path, [spy], [picture_batch(1, padded=True)])
    (drawing,) = spy.drawings
    assert (drawing.name, drawing.times) == ("clip-1", [0, 1])
    assert drawing.pictures["video"].shape == (2, SIZE, SIZE, 3)
    truth = picture_batch(1)["segmentations"][0, :2].int().argmax(1).numpy()
    assert np.array_equal(drawing.pictures["ground truth"], color_labels(truth, background=0))


def test_labels_are_those_of_the_host_in_the_first_batch(tmp_path: Path) -> None:
    spy = Spy(picture_adapter(), video=False)
    host = validate(tmp_path, [spy], [picture_batch(5), picture_batch(6)])
    with torch.no_grad():
        expected = host.corrector(picture_batch(5)["video"].flatten(0, 1)).argmax(1).view(2, FRAMES, 4, 4)
    assert [drawing.name for drawing in spy.drawings] == ["clip-5", "clip-5b"]
    for drawing, labels in zip(spy.drawings, expected, strict=True):
        (encoder,) = (
            picture for caption, picture in drawing.pictures.items() if "encoder" in caption and "used" in caption
        )
        assert np.array_equal(encoder, color_labels(labels.numpy()))


def test_the_adapter_of_the_callback_is_used(tmp_path: Path) -> None:
    paths = {"attention": "corrector", "masks": "decoder", "attention_kind": "logits", "masks_kind": "logits"}
    method = SSyncCallback(**paths, grid=(4, 4), warmup_ratio=0.0)
    spy = Spy(video=False)
    run(tmp_path, [spy, method])
    assert spy.last_path is not None
    assert any("merged" in caption for caption in spy.drawings[0].pictures)


def test_merging_is_drawn_with_the_settings_of_the_callback(tmp_path: Path) -> None:
    paths = {"attention": "corrector", "masks": "decoder", "attention_kind": "logits", "masks_kind": "logits"}
    method = SSyncCallback(**paths, grid=(4, 4), warmup_ratio=0.0, merge=False)
    spy = Spy(video=False)
    run(tmp_path, [spy, method])
    assert not any("merged" in caption for caption in spy.drawings[0].pictures)


@pytest.mark.parametrize("name", ["step-000002.png", "step-000002.mp4"])
def test_a_file_that_is_not_ours_is_left_alone_and_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "lightning_logs" / "version_0" / "pictures"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"mine")
    logger = CSVLogger(str(tmp_path), version=0)
    with pytest.warns(UserWarning, match=f"{name}.*Move it away"):
        run(tmp_path, [SSyncPictures(picture_adapter())], logger=logger)
    assert (folder / name).read_bytes() == b"mine"
    assert len(list(folder.iterdir())) == 1


def test_own_pictures_are_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        callback = SSyncPictures(picture_adapter())
        run(tmp_path, [callback], logger=CSVLogger(str(tmp_path), version=0))
        assert callback.last_path is not None


def test_an_unknown_host_gives_one_warning_and_trains(tmp_path: Path) -> None:
    callback = SSyncPictures()
    with pytest.warns(UserWarning, match="SSyncPictures draws no picture: HostError") as caught:
        trainer = run(tmp_path, [callback])
    assert sum("SSyncPictures" in str(w.message) for w in caught) == 1
    assert trainer.global_step == 4
    assert callback.last_path is None


@pytest.mark.parametrize("trouble", ["shape", "key", "disk"])
def test_trouble_gives_one_warning_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    host: L.LightningModule | None = None
    callback = SSyncPictures(picture_adapter(), video_key="frames" if trouble == "key" else "video")
    if trouble == "shape":
        host = FlatHost()
    if trouble == "disk":

        def full(path: Path, content: bytes) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(pictures, "write_bytes", full)
    with pytest.warns(UserWarning, match="draws no picture") as caught:
        trainer = run(tmp_path, [callback], host)
    assert sum("SSyncPictures" in str(w.message) for w in caught) == 1
    assert trainer.global_step == 4
    assert not any(module._forward_hooks for module in trainer.lightning_module.modules())


def test_hooks_are_gone_after_an_exception(tmp_path: Path) -> None:
    class Breaks(ClipHost):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ArithmeticError("broken")

    host = Breaks()
    with pytest.raises(ArithmeticError):
        run(tmp_path, [SSyncPictures(picture_adapter())], host, num_sanity_val_steps=0)
    assert not any(module._forward_hooks for module in host.modules())


def test_without_pyav_only_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "mp4_available", lambda: False)
    lines: list[str] = []
    monkeypatch.setattr(pictures, "rank_zero_info", lines.append)
    trainer = run(tmp_path, [SSyncPictures(picture_adapter())])
    names = sorted(path.suffix for path in (Path(trainer.log_dir) / "pictures").iterdir())
    assert names == [".png", ".png"]
    assert len(lines) == 1
    assert "pip install av" in lines[0]


def test_the_sheet_goes_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(tmp_path, [SSyncPictures(picture_adapter(), video=False)], logger=TensorBoardLogger(str(tmp_path)))
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    assert [event.step for event in events.Images("pictures/slots")] == [2, 4]


def test_the_sheet_goes_to_loggers_with_log_image(tmp_path: Path) -> None:
    class ImageLogger(Logger):
        save_dir = str(tmp_path)
        name = "images"
        version = 0

        def __init__(self) -> None:
            super().__init__()
            self.images: list[Any] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            self.images.append((key, images[0].shape[2], step))

    logger = ImageLogger()
    run(tmp_path, [SSyncPictures(picture_adapter(), video=False)], logger=logger)
    assert logger.images == [("pictures/slots", 3, 2), ("pictures/slots", 3, 4)]


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="max_videos"):
        SSyncPictures(max_videos=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSyncPictures()
