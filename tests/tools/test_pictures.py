from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tiny_hosts import make_trainer
from torch import nn
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback, SSyncPictures
from ssync_pl.adapters import PathAdapter
from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.tools import pictures, viz

SLOTS, FRAMES, SIZE = 3, 4, 16


def picture_batch(seed, padded=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (2, FRAMES, SIZE, SIZE), generator=generator)
    batch = {
        "video": torch.randn(2, FRAMES, 3, SIZE, SIZE, generator=generator),
        "segmentations": nn.functional.one_hot(ids, 3).movedim(-1, 2).bool(),
        "__key__": [f"clip-{seed}", f"clip-{seed}b"],
    }
    if padded:
        frames = torch.tensor([[True, True, False, False], [True] * FRAMES])
        batch |= {"batch_padding_mask": torch.tensor([True, False]), "frame_mask": frames}
    return batch


class Patches(nn.Module):
    """Logits `(B, S, N)` of a frame."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, SLOTS, 4, stride=4)

    def forward(self, frame):
        return self.layer(frame).flatten(2)


class Host(L.LightningModule):
    """Slot attention and a decoder of frames one by one, or of all as clips of their own; with dropout."""

    def __init__(self, together=False):
        super().__init__()
        self.corrector, self.decoder = Patches(), Patches()
        self.dropout, self.together = nn.Dropout(0.3), together  # so that random states matter

    def training_step(self, batch, batch_idx):
        frames = [batch["video"].flatten(0, 1)] if self.together else batch["video"].unbind(1)
        pairs = [(self.dropout(self.corrector(frame)), self.decoder(frame)) for frame in frames]
        return torch.stack([(one - other).square().mean() for one, other in pairs]).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def picture_adapter():
    return PathAdapter("corrector", "decoder", "logits", "logits", (4, 4))


def run(tmp_path, callbacks, host=None, **options):
    torch.manual_seed(3)
    options = {"steps": -1, "max_epochs": 2, "logger": CSVLogger(str(tmp_path), version=0), **options}
    trainer, host = make_trainer(*callbacks, **options), host or Host()
    train = DataLoader([picture_batch(k) for k in range(2)], batch_size=None)
    trainer.fit(host, train, DataLoader([picture_batch(7), picture_batch(8)], batch_size=None))
    return trainer


def names(trainer):
    return sorted(path.name for path in (Path(trainer.log_dir) / "pictures").iterdir())


def test_a_sheet_per_validation_and_a_training_that_is_the_same_to_the_bit(tmp_path):
    plain, host, callback = Host(), Host(), SSyncPictures(picture_adapter(), max_frames=3)
    host.load_state_dict(plain.state_dict())
    run(tmp_path / "a", [], plain)
    state = torch.get_rng_state()
    trainer = run(tmp_path / "b", [callback], host, num_sanity_val_steps=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, host.state_dict()[name]) for name, value in plain.state_dict().items())
    assert not any(module._forward_hooks for module in host.modules())
    assert names(trainer) == ["step-000002.png", "step-000004.png"]
    assert callback.last_path == Path(trainer.log_dir) / "pictures" / "step-000004.png"
    sheet = np.asarray(Image.open(callback.last_path))
    assert sheet.shape[0] > 2 * 7 * 112  # two videos of seven rows
    assert 3 * 112 < sheet.shape[1] < 6 * 112


@pytest.fixture
def videos(monkeypatch):
    """What is drawn, by caption, of each video."""
    found = []
    draw = viz.draw_sheet

    def spy(rows, title):
        for caption, frames in rows:
            found.extend([{}] if caption.startswith("video") else [])
            found[-1][caption] = frames
        return draw(rows, title)

    monkeypatch.setattr(viz, "draw_sheet", spy)
    return found


def drawn(rows, word):
    (found,) = (frames for caption, frames in rows.items() if caption.startswith(word))
    return found


def validate(tmp_path, batch, host):
    trainer = make_trainer(SSyncPictures(picture_adapter()), default_root_dir=tmp_path)
    trainer.validate(host, DataLoader([batch, picture_batch(6)], batch_size=None), verbose=False)


def test_padding_is_not_drawn_and_truth_is_that_of_the_batch(tmp_path, videos):
    validate(tmp_path, picture_batch(1, padded=True), Host())
    (rows,) = videos
    assert next(iter(rows)) == "video clip-1\nframes 0, 1"
    truth = picture_batch(1)["segmentations"][0, :2].int().argmax(1).numpy()
    assert np.array_equal(drawn(rows, "ground truth"), viz.color_labels(truth, background=0))


@pytest.mark.parametrize("together", [False, True])
def test_slots_have_the_colours_of_the_objects_that_they_cover(tmp_path, videos, together):
    batch, host = picture_batch(5), Host(together)
    frames = batch["video"].flatten(0, 1)
    ids = torch.tensor([2, 0, 1])[host.decoder(frames).argmax(1)].view(2, FRAMES, 4, 4)
    large = ids.repeat_interleave(4, -1).repeat_interleave(4, -2)
    batch["segmentations"] = nn.functional.one_hot(large, 3).movedim(-1, 2).bool()
    validate(tmp_path, batch, host)
    labels = host.corrector(frames).argmax(1).view(2, FRAMES, 4, 4).numpy()
    for video, rows in enumerate(videos):
        assert np.array_equal(drawn(rows, "ground truth"), viz.color_labels(large[video].numpy(), background=0))
        assert np.array_equal(drawn(rows, "decoder\n"), viz.color_labels(ids[video].numpy(), background=0))
        encoder = viz.color_labels(np.array([2, 0, 1])[labels[video]], background=0)
        assert np.array_equal(drawn(rows, "encoder\n"), encoder)


def test_without_truth_slots_keep_their_own_colours(tmp_path, videos):
    batch, host = picture_batch(5), Host()
    del batch["segmentations"], batch["__key__"]
    validate(tmp_path, batch, host)
    labels = host.decoder(batch["video"][0]).argmax(1).view(FRAMES, 4, 4).numpy()
    assert np.array_equal(drawn(videos[0], "decoder\n"), viz.slot_colors(SLOTS)[labels])
    assert not any("truth" in caption for caption in videos[0])


@pytest.mark.parametrize("merge", [True, False])
def test_adapter_and_settings_of_the_callback_are_used(tmp_path, videos, merge):
    paths = {"attention": "corrector", "masks": "decoder", "attention_kind": "logits", "masks_kind": "logits"}
    callback = SSyncCallback(**paths, grid=(4, 4), warmup_ratio=0.0, merge=merge)
    run(tmp_path, [SSyncPictures(), callback], max_epochs=1)
    assert any("merged" in caption for caption in videos[0]) == merge


def test_own_pictures_are_replaced_and_no_others(tmp_path):
    for _ in range(2):
        trainer = run(tmp_path, [SSyncPictures(picture_adapter())], max_epochs=1)
    file = Path(trainer.log_dir) / "pictures" / names(trainer)[0]
    file.write_bytes(b"mine")
    with pytest.warns(UserWarning, match=f"{file.name}.*Move it away"):
        run(tmp_path, [SSyncPictures(picture_adapter())], max_epochs=1)
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize("trouble", ["host", "disk"])
def test_trouble_gives_one_warning_and_trains(tmp_path, monkeypatch, trouble):
    callback = SSyncPictures("auto" if trouble == "host" else picture_adapter())
    if trouble == "disk":
        monkeypatch.setattr(pictures, "write_bytes", lambda path, content: 1 / 0)
    with pytest.warns(UserWarning, match="SSyncPictures draws no picture: ") as caught:
        trainer = run(tmp_path, [callback])
    assert sum("SSyncPictures" in str(w.message) for w in caught) == 1
    assert (trainer.global_step, callback.last_path) == (4, None)
    assert not any(module._forward_hooks for module in trainer.lightning_module.modules())


@pytest.mark.parametrize("batch", [torch.zeros(2, 3, 8, 8), {"video": torch.zeros(2, 3, 8, 8)}, {"img": 1}])
def test_batches_without_videos_are_named(batch):
    with pytest.raises(ShapeError, match=r"`video` to be \(B, T, 3, H, W\)"):
        pictures._sheet_rows(batch, None, None, None, 1, 1)


def test_the_sheet_goes_to_loggers_that_take_images():
    seen = []
    board = SimpleNamespace(add_image=lambda key, image, step, dataformats: seen.append((key, dataformats, step)))
    other = SimpleNamespace(log_image=lambda key, images, step: seen.append((key, len(images), step)))
    trainer = SimpleNamespace(global_step=2, loggers=[other, SimpleNamespace(experiment=board)])
    SSyncPictures()._write(trainer, np.zeros((4, 4, 3), np.uint8))
    assert seen == [("pictures/slots", 1, 2), ("pictures/slots", "HWC", 2)]


def test_settings_are_checked_at_once_and_hooks_are_gone_after_an_exception(tmp_path):
    for name in ("max_videos", "max_frames"):
        with pytest.raises(ConfigError, match=name):
            SSyncPictures(**{name: 0})
    host = Host()
    host.validation_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ArithmeticError):
        run(tmp_path, [SSyncPictures(picture_adapter())], host, num_sanity_val_steps=0)
    assert not any(module._forward_hooks for module in host.modules())


def test_slot_colors_are_distinct_and_do_not_depend_on_the_count_and_labels_are_painted_or_hidden():
    many = viz.slot_colors(64)
    assert len({tuple(color) for color in many.tolist()}) == 64
    for count in (0, 1, 16, 17, 33):
        assert np.array_equal(viz.slot_colors(count), many[:count])
    first = many[:11].astype(float)
    assert (np.linalg.norm(first[:, None] - first[None], axis=-1) + 1e9 * np.eye(11)).min() > 60

    picture = viz.color_labels(np.array([[2, -1], [0, 2]]), background=0)
    colour = viz.slot_colors(3)[2].tolist()
    assert picture.tolist() == [[colour, [0, 0, 0]], [[70, 70, 70], colour]]


def test_normalisation_is_undone_or_guessed():
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    frames = ((expected / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    assert np.array_equal(viz.to_uint8(frames, mean, std), expected)
    guessed = viz.to_uint8(rng.normal(5.0, 3.0, (2, 3, 16, 16)))
    assert (guessed.min(), guessed.max()) == (0, 255)
    assert 90 < guessed.mean() < 165
    assert viz.to_uint8(np.full((3, 2, 2), np.nan)).shape == (2, 2, 3)
