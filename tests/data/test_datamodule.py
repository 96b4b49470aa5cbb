from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from ssync_pl.data import ShardDataModule, SyntheticDataModule
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError, ShardError

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "num_workers": 0}


class _Place:
    """What the module asks of a trainer."""

    def __init__(self, rank: int, world: int, epoch: int = 0) -> None:
        self.global_rank, self.world_size, self.current_epoch = rank, world, epoch
        self.num_training_batches = float("inf")
        self.training = self.sanity_checking = False
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


def _on_rank(data: ShardDataModule, rank: int, world: int, stage: str = "fit") -> ShardDataModule:
    data.trainer = _Place(rank, world)
    data.setup(stage)
    return data


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


def test_batches_do_not_depend_on_workers_or_start_method(make_shards):
    pattern = make_shards(count=9)
    reference = None
    for workers, method in ((0, None), (1, "fork"), (2, "fork"), (2, "spawn")):
        options = {**PLAIN, "num_workers": workers, "start_method": method}
        data = _on_rank(ShardDataModule(pattern, batch_size=2, clip_length=2, **options), 0, 1)
        passes = _passes(data, 2)
        reference = reference or passes
        assert passes == reference
    assert reference[0] != reference[1]


def test_seed_changes_everything(make_shards):
    pattern = make_shards(count=9)
    first, second = (_passes(_on_rank(ShardDataModule(pattern, seed=seed, **PLAIN), 0, 1)) for seed in (0, 1))
    assert first != second


def test_batch_contents_in_training(make_shards):
    data = _on_rank(ShardDataModule(make_shards(), batch_size=3, image_size=16, **PLAIN), 0, 1)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert set(batch) == {"video", "__key__"}
    assert batch["video"].shape == (3, 4, 3, 16, 16)
    with_masks = _on_rank(ShardDataModule(make_shards(folder="b"), batch_size=3, masks_in_training=True, **PLAIN), 0, 1)
    batch = with_masks.on_after_batch_transfer(next(iter(with_masks.train_dataloader())), 0)
    assert set(batch) == {"video", "__key__", "segmentations"}
    assert batch["segmentations"].shape == (3, 4, 3, 8, 8)
    assert batch["segmentations"].sum(2).eq(1).all()
    # Object 1 is the leftmost column of the original, so flips move it along with the picture.
    flipped = (batch["video"][:, 0, 2, 0, 0] * 255).round() > 0
    assert torch.equal(batch["segmentations"][:, 0, 1, 0, -1], flipped)
    assert torch.equal(batch["segmentations"][:, 0, 1, 0, 0], ~flipped)


def test_predict_reads_no_masks_and_test_does(make_shards):
    pattern = make_shards("validation", count=2)
    data = ShardDataModule(test=pattern, predict=pattern, **PLAIN)
    data.setup("test")
    data.setup("predict")
    assert "segmentations" in next(iter(data.test_dataloader()))
    batch = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
    assert set(batch) == {"video", "__key__", "batch_padding_mask", "frame_mask"}


def test_ytvis_like_set(tmp_path):
    with ShardWriter(tmp_path, "val") as writer:
        for number, (frames, width, objects) in enumerate(((2, 12, 1), (3, 9, 3), (3, 9, 2))):
            masks = np.zeros((frames, 8, width, objects), np.uint8)
            for channel in range(objects):
                masks[:, channel : channel + 2] = 1 + channel  # overlapping stripes, values are categories
                masks[:, channel : channel + 2, :, channel] = 9
            writer.write(
                str(number), {"video.npy": np.zeros((frames, 8, width, 3), np.uint8), "segmentations.npy": masks}
            )
    options = {**PLAIN, "has_background": False, "image_size": 8, "crop": "random", "val_batch_size": 3}
    data = _on_rank(ShardDataModule(validation=f"{tmp_path}/val-*.tar", **options), 0, 1, "validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert batch["video"].shape == (3, 3, 3, 8, 8)
    assert batch["segmentations"].shape == (3, 3, 3, 8, 8)
    assert batch["frame_mask"].tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert batch["segmentations"].flatten(3).any(3).tolist() == [
        [[True, False, False], [True, False, False], [False] * 3],
        [[True] * 3] * 3,
        [[True, True, False]] * 3,
    ]
    assert not batch["segmentations"][0, 2].any()
    wide = ShardDataModule(validation=f"{tmp_path}/val-*.tar", **options, max_objects=25)
    batch = wide.on_after_batch_transfer(next(iter(_on_rank(wide, 0, 1, "validate").val_dataloader())), 0)
    assert batch["segmentations"].shape[2] == 25
    tight = ShardDataModule(validation=f"{tmp_path}/val-*.tar", **options, max_objects=2)
    with pytest.raises(ShardError, match="key 1 to have at most 2 objects"):
        next(iter(_on_rank(tight, 0, 1, "validate").val_dataloader()))


def test_one_object_per_video_in_channels_needs_the_format(tmp_path):
    with ShardWriter(tmp_path, "val") as writer:
        masks = np.full((2, 4, 4, 1), 40, np.uint8)  # category 40, not 40 objects
        writer.write("0", {"video.npy": np.zeros((2, 4, 4, 3), np.uint8), "segmentations.npy": masks})
    data = ShardDataModule(validation=f"{tmp_path}/val-*.tar", mask_format="channels", has_background=False, **PLAIN)
    batch = next(iter(_on_rank(data, 0, 1, "validate").val_dataloader()))
    assert data.on_after_batch_transfer(batch, 0)["segmentations"].shape[2] == 1


def test_short_videos_raise_or_are_skipped_once(tmp_path, numbered_video, caplog):
    with ShardWriter(tmp_path, "train") as writer:
        for number in range(6):
            writer.write(str(number), numbered_video(number, frames=3 if number in (2, 4) else 8))
    pattern = f"{tmp_path}/train-*.tar"
    with pytest.raises(ShardError, match=r"key 2 to have enough frames .*clip_length=4.* but it has 3"):
        ShardDataModule(pattern, batch_size=2, **PLAIN).setup("fit")
    with caplog.at_level(logging.WARNING):
        data = _on_rank(ShardDataModule(pattern, batch_size=2, on_bad_sample="skip", **PLAIN), 0, 1)
    assert len(data.bad_samples) == 2
    assert sum("Skipping a bad sample" in record.message for record in caplog.records) == 2
    videos = {clip[0] for batch in _passes(data)[0] for clip in batch}
    assert videos == {0, 1, 3, 5}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_and_logged_once(write_tar, npy_bytes, numbered_video, caplog, workers):
    members = {f"{number}.video.npy": npy_bytes(numbered_video(number)["video.npy"]) for number in range(5)}
    members["3.video.npy"] = members["3.video.npy"][:-7]
    path = str(write_tar(members))
    options = {**PLAIN, "num_workers": workers}
    data = _on_rank(ShardDataModule(path, batch_size=1, on_bad_sample="skip", **options), 0, 1)
    with caplog.at_level(logging.WARNING):
        clips = [clip for epoch in _passes(data, 3) for batch in epoch for clip in batch]
    assert len(clips) == 15
    assert list(data.bad_samples) == [f"{path}, key 3"]
    assert sum("half written" in record.message for record in caplog.records) == 1
    # In this process: PyTorch waits seconds for workers after an error in one of them.
    strict = _on_rank(ShardDataModule(path, batch_size=1, **PLAIN), 0, 1)
    with pytest.raises(ShardError, match=r"`video\.npy` of .*key 3"):
        _passes(strict)


def test_errors_before_any_work(make_shards, tmp_path):
    pattern = make_shards(count=3)
    with pytest.raises(ConfigError, match="`train` to name shards for the stage 'fit'"):
        ShardDataModule().setup("fit")
    with pytest.raises(ConfigError, match=r"argument `train` .*shell command"):
        ShardDataModule("pipe:cat x.tar").prepare_data()
    with pytest.raises(FileNotFoundError, match="argument `validation`"):
        ShardDataModule(pattern, validation=f"{tmp_path}/no.tar").prepare_data()
    with pytest.raises(ConfigError, match="batch_size=8 clips for each of 1 processes, but it holds 3"):
        _on_rank(ShardDataModule(pattern, **PLAIN), 0, 1).train_dataloader()
    with pytest.raises(ConfigError, match="`test` to name shards"):
        ShardDataModule(pattern).test_dataloader()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"val_batch_size": 0}, "val_batch_size"),
        ({"clip_length": 0}, "clip_length"),
        ({"frame_stride": 0}, "frame_stride"),
        ({"clips_per_video": 0}, "clips_per_video"),
        ({"num_workers": -1}, "num_workers"),
        ({"max_objects": 255}, "max_objects"),
        ({"max_objects": 0}, "max_objects"),
        ({"flip_probability": 2.0}, "flip_probability"),
        ({"image_size": 0}, "image_size"),
        ({"crop": "random"}, "image_size"),
        ({"resize_mode": "nearest"}, "resize_mode"),
        ({"mask_format": "rle"}, "mask_format"),
        ({"on_bad_sample": "ignore"}, "on_bad_sample"),
    ],
)
def test_settings_out_of_range(settings, name):
    with pytest.raises(ConfigError, match=f"argument `{name}`"):
        ShardDataModule("x.tar", **settings)


def test_remote_sets_work_in_training_and_validation(make_shards, served):
    make_shards("train", count=8)
    make_shards("validation", count=3)
    data = ShardDataModule(
        f"{served}/shards/train-{{000000..000002}}.tar",
        f"{served}/shards/validation-000000.tar",
        batch_size=2,
        **{**PLAIN, "num_workers": 1},
    )
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    clips = [clip for batch in loader for clip in _content(data.on_after_batch_transfer(batch, 0))]
    assert len(loader) == 4
    assert sorted(clip[0] for clip in clips) == list(range(8))
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    assert [batch["segmentations"].shape[:3] for batch in batches] == [(2, 6, 3), (1, 6, 3)]


class _Model(L.LightningModule):
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
        assert batch["video"].dtype == torch.float32
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


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@pytest.mark.parametrize("source", ["local", "remote"])
def test_a_trainer_sees_each_pass(make_shards, served, tmp_path, source):
    make_shards("train", count=7)
    make_shards("validation", count=3)
    root = str(tmp_path) if source == "local" else served
    train, validation = f"{root}/shards/train-{{000000..000002}}.tar", f"{root}/shards/validation-000000.tar"
    data = ShardDataModule(train, validation, batch_size=2, predict=validation, **PLAIN)
    model = _Model()
    trainer = L.Trainer(max_epochs=3, **QUIET)
    trainer.fit(model, datamodule=data)
    assert model.steps == 9
    assert [len(set(videos)) for videos in model.trained[:3]] == [6, 6, 6]
    assert len({tuple(videos) for videos in model.trained[:3]}) == 3
    assert model.validated == ["0", "1", "2"] * 3
    predictions = trainer.predict(model, datamodule=data)
    assert [key for keys in predictions for key in keys] == ["0", "1", "2"]


def test_overfit_batches_work(make_shards):
    model = _Model()
    trainer = L.Trainer(max_epochs=2, overfit_batches=1, **QUIET)
    trainer.fit(model, datamodule=ShardDataModule(make_shards(), batch_size=2, **PLAIN))
    assert model.trained[0] == model.trained[1]


def test_synthetic_set_is_made_once(tmp_path):
    options = {
        "root": str(tmp_path),
        "num_train": 4,
        "num_validation": 2,
        "resolution": 16,
        "frames": 4,
        "generate_workers": 0,
        "scene": {"zoom": 1.5, "max_objects": 4},
        "batch_size": 2,
        **PLAIN,
    }
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
    again = SyntheticDataModule(**options)
    again.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*.tar")} == files
    with pytest.raises(ConfigError, match="zoomm"):
        SyntheticDataModule(scene={"zoomm": 1.0})
    with pytest.raises(ConfigError, match="`batch_size`"):
        SyntheticDataModule(batch_size=0)


def test_synthetic_features_are_stored_on_first_use(tmp_path, monkeypatch):
    from ssync_pl.hosts.nn.backbones import FrozenBackbone

    class Means(FrozenBackbone):
        def extract(self, frames):
            maps = self.model(frames)
            return maps.flatten(2).mT, (maps.shape[2], maps.shape[3])

    built = []

    def load(name, layer):
        built.append((name, layer))
        return Means(torch.nn.AvgPool2d(4), name=name, layer=layer, dim=3, mean=[0.5] * 3, std=[0.5] * 3)

    monkeypatch.setattr("ssync_pl.data.features.backbone._offered", [load])
    options = {
        "root": str(tmp_path),
        "num_train": 4,
        "num_validation": 2,
        "resolution": 16,
        "frames": 4,
        "generate_workers": 0,
        "batch_size": 2,
        "flip_probability": 0.0,
        "cache_backbone": "means",
        "cache_layer": "pool",
        "features_only": True,
        **PLAIN,
    }
    data = SyntheticDataModule(**options)
    data.prepare_data()
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["features"].shape == (2, 4, 16, 3)
    assert "video" not in batch
    (batch,) = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    video = batch["video"].flatten(0, 1) * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    expected = torch.nn.functional.avg_pool2d((video - 0.5) / 0.5, 4).flatten(2).mT
    torch.testing.assert_close(batch["features"].flatten(0, 1), expected, rtol=0.01, atol=0.01)
    SyntheticDataModule(**options).prepare_data()
    assert built == [("means", "pool")]
    # Other features have a folder of their own.
    projected = SyntheticDataModule(**{**options, "cache_components": 2})
    assert projected.features != data.features
    projected.prepare_data()
    projected.setup()
    assert next(iter(projected.train_dataloader()))["features"].shape[-1] == 2
    with pytest.raises(ConfigError, match="either `features` or `cache_backbone`"):
        SyntheticDataModule(cache_backbone="means", features="x")
    with pytest.raises(ConfigError, match="Name the backbone"):
        SyntheticDataModule(cache_components=4)


def test_the_command_line_reads_every_option(make_shards):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ShardDataModule, "data")
    pattern = make_shards()
    args = ["--data.train", f'["{pattern}"]', "--data.image_size", "[8, 8]", "--data.mean", "[0.5, 0.5, 0.5]"]
    built = parser.instantiate(parser.parse_args([*args, "--data.crop=random", "--data.pin_memory=auto"]))
    assert built.data.transform.image_size == (8, 8)
    assert built.data.patterns["train"] == [pattern]
    synthetic = ArgumentParser(exit_on_error=False)
    synthetic.add_class_arguments(SyntheticDataModule, "data")
    namespace = synthetic.parse_args(["--data.batch_size=3", "--data.scene", '{"zoom": 2.0}', "--data.image_size=32"])
    built = synthetic.instantiate(namespace)
    assert built.data.batch_size == 3
    assert built.data.transform.image_size == (32, 32)
    assert built.data.config.zoom == 2.0
    assert "train" not in namespace.data
