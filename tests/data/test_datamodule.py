import logging
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from tiny_hosts import make_trainer

from ssync_pl.data import ShardDataModule, SyntheticDataModule
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError, ShardError
from tiny_run import PatchBackbone

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "num_workers": 0}


def _content(batch: dict) -> list[tuple]:
    """(video, first frame, flipped) of each clip, read back from the pixels."""
    video = (batch["video"] * 255).round().int()
    return [(int(v[0, 0, 0, 0]), int(v[0, 1, 0, 0]), int(v[0, 2, 0, 0]) > 0) for v in video]


def _passes(data: ShardDataModule, epochs: int = 1) -> list[list[list[tuple]]]:
    loader = data.train_dataloader()
    result = []
    for epoch in range(epochs):
        data.trainer.current_epoch = epoch
        result.append([_content(data.on_after_batch_transfer(batch, 0)) for batch in loader])
    return result


def _write(folder: Path, masks: list[np.ndarray], prefix: str = "val") -> str:
    with ShardWriter(folder, prefix) as writer:
        for number, mask in enumerate(masks):
            video = np.full((*mask.shape[:3], 3), 40 * number, np.uint8)
            writer.write(str(number), {"video.npy": video, "segmentations.npy": mask})
    return f"{folder}/{prefix}-*.tar"


def _validation(opened, pattern: str, **options):
    data = opened(stage="validate", validation=pattern, **options)
    return data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)


def test_batches_depend_on_the_seed_but_not_on_workers_or_start_method(make_shards, opened):
    pattern = make_shards(count=9)
    reference = _passes(opened(pattern), 2)
    assert reference[0] != reference[1]
    assert _passes(opened(pattern, num_workers=2, start_method="fork"), 2) == reference
    assert _passes(opened(pattern, num_workers=1, start_method="spawn"), 1) == reference[:1]
    assert _passes(opened(pattern, seed=1)) != reference[:1]


def test_batch_contents_in_training(make_shards, opened):
    data = opened(make_shards(), batch_size=3, image_size=16, clip_length=4)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert set(batch) == {"video", "__key__"}
    assert batch["video"].shape == (3, 4, 3, 16, 16)
    data = opened(make_shards(folder="b"), batch_size=3, masks_in_training=True)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert set(batch) == {"video", "__key__", "segmentations"}
    assert batch["segmentations"].shape == (3, 2, 3, 8, 8)
    assert batch["segmentations"].sum(2).eq(1).all()
    # Object 1 is the leftmost column of the original, so flips move it along with the picture.
    flipped = (batch["video"][:, 0, 2, 0, 0] * 255).round() > 0
    assert torch.equal(batch["segmentations"][:, 0, 1, 0, -1], flipped)
    assert torch.equal(batch["segmentations"][:, 0, 1, 0, 0], ~flipped)


def test_ytvis_like_set(tmp_path, opened):
    masks = []
    for frames, width, objects in ((2, 12, 1), (3, 9, 3), (3, 9, 2)):
        masks.append(np.zeros((frames, 8, width, objects), np.uint8))
        for channel in range(objects):
            masks[-1][:, channel : channel + 2, :, channel] = 9  # overlapping stripes, values are categories
    options = {"has_background": False, "image_size": 8, "crop": "random", "val_batch_size": 3}
    pattern = _write(tmp_path, masks)
    batch = _validation(opened, pattern, **options)
    assert batch["video"].shape == batch["segmentations"].shape == (3, 3, 3, 8, 8)
    assert batch["frame_mask"].tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert batch["segmentations"].flatten(3).any(3).tolist() == [
        [[True, False, False], [True, False, False], [False] * 3],
        [[True] * 3] * 3,
        [[True, True, False]] * 3,
    ]
    assert _validation(opened, pattern, **options, max_objects=25)["segmentations"].shape[2] == 25
    with pytest.raises(ShardError, match="key 1 to have at most 2 objects"):
        _validation(opened, pattern, **options, max_objects=2)


def test_ids_and_single_channels(tmp_path, opened):
    mask = np.zeros((3, 16, 16), np.uint8)
    mask[:, :4], mask[:, 8:] = 1, 2
    batch = _validation(opened, _write(tmp_path / "a", [mask]))  # ids without a last axis
    assert batch["segmentations"][0, 0].flatten(1).sum(1).tolist() == [64, 64, 128]
    category = np.full((2, 4, 4, 1), 40, np.uint8)  # not 40 objects
    options = {"mask_format": "channels", "has_background": False}
    batch = _validation(opened, _write(tmp_path / "b", [category]), **options)
    assert batch["segmentations"].shape[2] == 1
    with pytest.raises(ShardError, match="255 at most in the masks of `validation`"):
        _validation(opened, _write(tmp_path / "c", [np.full((3, 16, 16, 1), 256, np.int32)]))


@pytest.mark.parametrize("backend", ["mmap", "webdataset"])
def test_bad_and_short_videos_raise_or_are_counted(write_tar, npy_bytes, numbered_video, caplog, opened, backend):
    frames = [6, 1, 6, 6, 6]
    members = {f"{n}.video.npy": npy_bytes(numbered_video(n, count)["video.npy"]) for n, count in enumerate(frames)}
    members["3.video.npy"] = members["3.video.npy"][:-7]
    path = str(write_tar(members))
    with caplog.at_level(logging.WARNING):
        data = opened(path, batch_size=1, on_bad_sample="skip", backend=backend)
        clips = [clip for epoch in _passes(data, 3) for batch in epoch for clip in batch]
    assert len(clips) == 15
    assert {clip[0] for clip in clips} == {0, 2, 4}
    assert sorted(data.bad_samples) == [f"{path}, key 1", f"{path}, key 3"]
    data.teardown("fit")
    words = ("half written", "at least 2 frames", "could not be read: 2 samples")
    assert [sum(word in text for text in caplog.messages) for word in words] == [1, 1, 1]
    with pytest.raises(ShardError, match=r"key [13]"):
        _passes(opened(path, batch_size=1, backend=backend))
    left = opened(stage="predict", predict=path, batch_size=1, on_bad_sample="skip", backend=backend)
    assert len(list(left.predict_dataloader())) == 4  # a batch of nothing but a stand-in is left out


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *(({name: 0}, name) for name in ("batch_size", "val_batch_size", "clip_length", "frame_stride")),
        *(({name: 0}, name) for name in ("clips_per_video", "max_objects", "image_size", "max_member_bytes")),
        *(({name: -1}, name) for name in ("num_workers", "shuffle_buffer")),
        *(({name: "x"}, name) for name in ("resize_mode", "mask_format", "on_bad_sample", "sampling", "backend")),
        ({"max_objects": 255}, "max_objects"),
        ({"flip_probability": 2.0}, "flip_probability"),
        ({"crop": "random"}, "image_size"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (0.5, 0.0, 1.0)}, "std"),
        ({"sampling": "reference", "frame_stride": 2}, "frame_stride"),
        ({"sampling": "reference", "crop": "center", "image_size": (4, 8)}, "image_size"),
        ({"features_only": True}, "features"),
    ],
)
def test_settings_out_of_range(settings, name):
    with pytest.raises(ConfigError, match=f"arguments? .*`{name}`"):
        ShardDataModule("x.tar", **settings)


def test_errors_before_any_work(make_shards, tmp_path, opened):
    pattern = make_shards(count=3)
    with pytest.raises(ConfigError, match="`train` to name shards for the stage 'fit'"):
        ShardDataModule().setup("fit")
    with pytest.raises(FileNotFoundError, match="argument `validation`"):
        ShardDataModule(pattern, validation=f"{tmp_path}/no.tar").setup("fit")
    for split in ("train", "validation"):
        with pytest.raises(ConfigError, match=f"`{split}` to be patterns.*List"):
            ShardDataModule(**{split: {pattern: 3}})
    with pytest.raises(ConfigError, match="batch_size=8 clips for each of 1 processes, but got 3"):
        opened(pattern, batch_size=8).train_dataloader()
    with pytest.raises(ConfigError, match="`test` to name shards"):
        ShardDataModule(pattern).test_dataloader()
    with pytest.raises(ConfigError, match="backend='mmap'"):
        opened("https://nowhere.invalid/a.tar", backend="mmap")


class Watcher(L.LightningModule):
    """Records what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained: list[list[int]] = [[]]
        self.validated: list[str] = []
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.trained[-1] += [content[0] for content in _content(batch)]
        return self.layer(batch["video"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pairs = zip(batch["__key__"], batch["batch_padding_mask"].tolist(), strict=True)
        self.validated += [key for key, real in pairs if real]

    def on_train_epoch_end(self):
        self.trained.append([])

    def on_fit_start(self):
        self.steps = int(self.trainer.estimated_stepping_batches)

    def predict_step(self, batch, batch_idx):
        return batch["__key__"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("source", ["local", "remote"])
def test_a_trainer_sees_each_pass(make_shards, served, tmp_path, source):
    make_shards("train", count=7)
    make_shards("validation", count=3)
    root = str(tmp_path) if source == "local" else served
    train, validation = f"{root}/shards/train-{{000000..000002}}.tar", f"{root}/shards/validation-000000.tar"
    data = ShardDataModule(train, validation, batch_size=2, predict=validation, **{**PLAIN, "num_workers": 1})
    model = Watcher()
    trainer = make_trainer(steps=-1, max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    assert model.steps == 9
    assert [len(set(videos)) for videos in model.trained[:3]] == [6, 6, 6]
    assert len({tuple(videos) for videos in model.trained[:3]}) == 3
    assert model.validated == ["0", "1", "2"] * 3
    predictions = trainer.predict(model, datamodule=data)
    assert [key for keys in predictions for key in keys] == ["0", "1", "2"]


@pytest.mark.gpu
def test_the_data_module_gives_the_same_batches_on_cuda(make_shards):
    models, pattern = [Watcher(), Watcher()], make_shards(count=8)
    for model, accelerator in zip(models, ("cpu", "cuda"), strict=True):
        data = ShardDataModule(pattern, batch_size=2, **PLAIN)
        make_trainer(steps=-1, max_epochs=2, accelerator=accelerator).fit(model, datamodule=data)
    assert models[0].trained == models[1].trained


SYNTHETIC = {"num_train": 4, "num_validation": 2, "resolution": 16, "frames": 4, "generate_workers": 0, "batch_size": 2}


def test_the_synthetic_set_is_made_once(tmp_path):
    options = {"root": str(tmp_path), "scene": {"zoom": 1.5, "max_objects": 4}, **SYNTHETIC, **PLAIN}
    data = SyntheticDataModule(**options)
    data.prepare_data()
    files = {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*.tar")}
    assert files
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["video"].shape == (2, 4, 3, 16, 16)
    (batch,) = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert batch["segmentations"].shape == (2, 4, 5, 16, 16)
    assert len(list(data.predict_dataloader())) == 1
    SyntheticDataModule(**options).prepare_data()
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*.tar")} == files
    for wrong, word in (
        ({"scene": {"zoomm": 1.0}}, "zoomm"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"cache_backbone": "means", "features": "x"}, "either `features` or `cache_backbone`"),
        ({"cache_components": 4}, "Name the backbone"),
    ):
        with pytest.raises(ConfigError, match=word):
            SyntheticDataModule(**wrong)


def test_synthetic_features_are_stored_on_first_use(tmp_path, monkeypatch):
    built = []

    def load(name, layer):
        built.append((name, layer))
        return PatchBackbone(torch.nn.AvgPool2d(4), name=name, layer=layer, dim=3, mean=[0.5] * 3, std=[0.5] * 3)

    monkeypatch.setattr("ssync_pl.data.features.builders", [load])
    options = {"root": str(tmp_path), "flip_probability": 0.0, "cache_backbone": "means", "cache_layer": "pool"}
    options |= {"features_only": True, **SYNTHETIC, **PLAIN}
    data = SyntheticDataModule(**options)
    data.prepare_data()
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["features"].shape == (2, 4, 16, 3)
    assert "video" not in batch
    (batch,) = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    expected = torch.nn.functional.avg_pool2d((batch["video"].flatten(0, 1) - 0.5) / 0.5, 4).flatten(2).mT
    torch.testing.assert_close(batch["features"].flatten(0, 1), expected, rtol=0.01, atol=0.01)
    SyntheticDataModule(**options).prepare_data()
    assert built == [("means", "pool")]
    assert SyntheticDataModule(**{**options, "cache_components": 2}).features != data.features


def test_the_command_line_reads_every_option(make_shards):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ShardDataModule, "data")
    pattern = make_shards()
    args = ["--data.train", f'["{pattern}"]', "--data.image_size", "[8, 8]", "--data.mean", "[0.5, 0.5, 0.5]"]
    built = parser.instantiate_classes(parser.parse_args([*args, "--data.crop=random"]))
    assert built.data.transform.image_size == (8, 8)
    assert built.data.patterns["train"] == [pattern]
    assert (built.data.ignore_overlaps, ShardDataModule(has_background=False).ignore_overlaps) == (False, True)
