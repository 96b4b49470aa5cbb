"""The recorder writes what runs are compared by, and changes no bit of a training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ssync_pl import SSyncCallback
from ssync_pl.compare import final
from ssync_pl.compare.recorder import RunRecorder
from ssync_pl.data import ShardDataModule
from ssync_pl.data.synthetic_datamodule import SyntheticDataModule
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SOLV, SAVi, SlotContrast, VideoSAUR
from ssync_pl.metrics import SegmentationMetrics

SCORES = {f"{level}_{score}" for level in ("video", "image") for score in ("fg_ari", "ari", "mbo", "miou")}
SCORES |= {"boundary_f", "slots_per_object", "unused_slots", "used_slots", "identity"}
GRID = (4, 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rendered set for all tests."""
    return tmp_path_factory.mktemp("synthetic")


def synthetic(root: Path, **options: Any) -> SyntheticDataModule:
    settings: dict[str, Any] = {"preset": "a_zoom", "num_train": 4, "num_validation": 5, "resolution": 16, "frames": 3}
    settings |= {"batch_size": 2, "val_batch_size": 2, "clip_length": 2, "num_workers": 0, "generate_workers": 0}
    return SyntheticDataModule(root=str(root), **(settings | options))


def tiny_savi() -> SAVi:
    torch.manual_seed(0)
    return SAVi(
        num_slots=4,
        slot_dim=8,
        encoder_channels=(8,),
        encoder_strides=(2,),
        encoder_kernel=3,
        feature_dim=8,
        corrector_mlp_hidden=8,
        predictor_mlp_hidden=8,
        predictor_heads=2,
        decoder_broadcast=(4, 4),
        decoder_channels=(8,),
        decoder_strides=(2,),
        learning_rate=1e-2,
        warmup_steps=0,
    )


def fit(
    path: Path, host: L.LightningModule, callbacks: list[L.Callback], *loaders: Any, **options: Any
) -> tuple[L.Trainer, Path]:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "accelerator": "cpu",
        "logger": CSVLogger(str(path), name="", version=""),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks,
    }
    torch.manual_seed(5)
    trainer = L.Trainer(**(settings | options))
    if len(loaders) == 1:
        trainer.fit(host, datamodule=loaders[0])
    else:
        trainer.fit(host, *loaders)
    return trainer, Path(str(trainer.log_dir))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def feature_videos(count: int, seed: int, video: bool = True) -> list[dict[str, Any]]:
    """Cached features of squares that move over a floor, with the frames or without."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        masks = torch.zeros(3, 2, 16, 16, dtype=torch.bool)
        for t in range(3):
            masks[t, 1, 4 * (index % 3) : 4 * (index % 3) + 8, 4 * (t % 2) : 4 * (t % 2) + 8] = True
        masks[:, 0] = ~masks[:, 1]
        patches = masks[:, 1, ::4, ::4].flatten(1).float()
        features = patches.unsqueeze(-1) * torch.linspace(-2, 2, 6) + 0.1 * torch.randn(3, 16, 6, generator=generator)
        item: dict[str, Any] = {"features": features}
        if video:
            item["video"] = masks[:, 1:].float().expand(-1, 3, -1, -1).clone()
            item |= {"segmentations": masks, "__key__": f"{seed}-{index}"}
        items.append(item)
    return items


def feature_loaders(validation: int = 6) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return (
        DataLoader(feature_videos(4, 0, video=False), batch_size=2),  # type: ignore[arg-type]
        DataLoader(feature_videos(validation, 1), batch_size=2),  # type: ignore[arg-type]
    )


def feature_host(kind: Any, **changes: Any) -> Any:
    options: dict[str, Any] = {"num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 6, "grid": GRID}
    if kind is SOLV:
        options |= {"clip_length": 3, "temporal_heads": 2, "temporal_blocks": 1, "decoder_hidden": (16,)}
    else:
        options |= {"encoder_hidden": 16, "decoder_hidden": (16,), "decay_rate": 1.0}
    torch.manual_seed(0)
    return kind(**(options | {"warmup_steps": 0} | changes))


def test_savi_on_the_packaged_set(tmp_path: Path, root: Path) -> None:
    trainer, folder = fit(tmp_path, tiny_savi(), [RunRecorder(videos=3, frames=2)], synthetic(root))
    content = read(folder)
    assert set(content["scores"]) == SCORES
    assert content["steps"] == 4
    assert content["num_videos"] == 5  # each once, although they come in batches of two
    assert content["step_ms"] > 0.0
    assert content["peak_mib"] > 1.0
    assert content["scores"]["used_slots"] + content["scores"]["unused_slots"] == 4.0
    assert set(content["probe"]) == {"position_r2", "color_r2", "shape_accuracy"}
    assert all(value <= 1.0 for value in content["probe"].values())
    with np.load(folder / "pictures.npz", allow_pickle=False) as pictures:
        assert pictures["keys"].tolist() == ["000000", "000001", "000002"]
        shapes = {name: (pictures[name].shape, str(pictures[name].dtype)) for name in pictures.files}
        data = trainer.datamodule  # type: ignore[attr-defined]
        stored = data._datasets["validation"][0]
        np.testing.assert_array_equal(pictures["frames"][0], stored["video"].numpy()[[0, 2]])
        np.testing.assert_array_equal(pictures["truth"][0], stored["segmentations"].numpy()[[0, 2], ..., 0])
        assert pictures["decoder"].max() < 4
    full = (3, 2, 16, 16)
    assert shapes == {
        "keys": ((3,), "<U6"),
        "frames": ((*full, 3), "uint8"),
        "truth": (full, "uint8"),
        "decoder": (full, "uint8"),
        "encoder": ((3, 2, 8, 8), "uint8"),
        "boundary": ((3, 2, 8, 8), "bool"),
        "interior": ((3, 2, 8, 8), "bool"),
    }


def test_scores_are_those_of_the_trained_host(tmp_path: Path) -> None:
    host = feature_host(SlotContrast, slot_init="learned")
    trainer, folder = fit(tmp_path, host, [RunRecorder()], *feature_loaders())
    metrics = SegmentationMetrics()
    host.eval()
    for batch in DataLoader(feature_videos(6, 1), batch_size=2):  # type: ignore[arg-type]
        with torch.no_grad():
            metrics.update(host.evaluate(batch)[0], batch["segmentations"])
    scores = read(folder)["scores"]
    for name, value in metrics.compute().items():
        assert scores[name] == pytest.approx(value.item(), abs=1e-9), name
    # the training's own last validation, where slots are not drawn at random
    assert scores["video_mbo"] == pytest.approx(float(trainer.callback_metrics["val/video_mbo"]), abs=1e-6)


@pytest.mark.parametrize("callbacks", [[], [SSyncCallback]], ids=["host", "with SSync"])
def test_no_bit_of_the_training_changes(tmp_path: Path, root: Path, callbacks: list[Any]) -> None:
    results = []
    for name in ("plain", "recorded"):
        host = tiny_savi()
        extra: list[L.Callback] = [RunRecorder()] if name == "recorded" else []
        made = [kind(warmup_ratio=0.25) for kind in callbacks]
        options = {"max_epochs": 3, "max_steps": -1}
        trainer, _ = fit(tmp_path / name, host, made + extra, synthetic(root), **options)
        results.append((host.state_dict(), torch.get_rng_state(), dict(trainer.callback_metrics)))
        assert not host._forward_hooks
        assert not any(module._forward_hooks for module in host.modules())
    (weights, state, metrics), (others, other_state, other_metrics) = results
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert torch.equal(state, other_state)
    assert metrics.keys() == other_metrics.keys()
    assert all(torch.equal(value, other_metrics[name]) for name, value in metrics.items())


@pytest.mark.parametrize("kind", [SlotContrast, VideoSAUR, DINOSAUR, SOLV])
@pytest.mark.parametrize("ssync", [False, True])
def test_every_host_on_cached_features(tmp_path: Path, kind: Any, ssync: bool) -> None:
    callbacks: list[L.Callback] = [SSyncCallback(warmup_ratio=0.5)] if ssync else []
    _, folder = fit(tmp_path, feature_host(kind), [*callbacks, RunRecorder()], *feature_loaders())
    content = read(folder)
    assert set(content["scores"]) == SCORES
    assert {"position_r2"} <= set(content["probe"])
    with np.load(folder / "pictures.npz", allow_pickle=False) as pictures:
        assert pictures["encoder"].shape == (6, 4, *GRID)
        assert pictures["frames"].shape == (6, 4, 16, 16, 3)
        assert pictures["truth"].any()
        assert pictures["keys"][0] == "1-0"


def test_slots_of_solv_are_matched_by_their_own_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluation links slots over time, which renames masks but not slots."""
    given: list[tuple[Tensor, Tensor]] = []
    whole = final.sample_slots

    def spy(slots: Tensor, masks: Tensor, *args: Any, **options: Any) -> Any:
        given.append((slots, masks))
        return whole(slots, masks, *args, **options)

    monkeypatch.setattr(final, "sample_slots", spy)
    host = feature_host(SOLV, merge_threshold=None)
    fit(tmp_path, host, [RunRecorder(videos=0)], *feature_loaders())
    host.eval()
    assert len(given) == 3
    for (slots, labels), batch in zip(given, DataLoader(feature_videos(6, 1), batch_size=2), strict=True):  # type: ignore[arg-type]
        with torch.no_grad():
            output = host(batch["features"])
        torch.testing.assert_close(output.slots, slots)
        small = labels[..., 2::4, 2::4].flatten(2)
        assert (output.masks.argmax(2) == small).float().mean() > 0.9
    assert not (tmp_path / "pictures.npz").exists()


def test_batches_without_frames_give_scores_but_no_pictures(tmp_path: Path) -> None:
    train, _ = feature_loaders()
    bare = [{name: value for name, value in item.items() if name != "video"} for item in feature_videos(6, 1)]
    with pytest.warns(UserWarning, match="keeps no more pictures"):
        _, folder = fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, DataLoader(bare, batch_size=2))  # type: ignore[arg-type]
    content = read(folder)
    assert set(content["probe"]) == {"position_r2"}
    assert not (folder / "pictures.npz").exists()


def test_padding_is_neither_scored_nor_drawn(tmp_path: Path) -> None:
    train, _ = feature_loaders()
    items = feature_videos(4, 1)
    for index, item in enumerate(items):
        item["batch_padding_mask"] = torch.tensor(index != 1)
        item["frame_mask"] = torch.tensor([True, index != 2, index != 2])
    _, folder = fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, DataLoader(items, batch_size=2))  # type: ignore[arg-type]
    assert read(folder)["num_videos"] == 3
    with np.load(folder / "pictures.npz", allow_pickle=False) as pictures:
        assert pictures["keys"].tolist() == ["1-0", "1-2", "1-3"]
        assert (pictures["frames"][1] == pictures["frames"][1, :1]).all()  # one real frame, four times


def test_the_hash_names_the_videos_that_were_scored(tmp_path: Path, root: Path) -> None:
    hashes = {}
    for name, options in {
        "whole": {},
        "again": {"val_batch_size": 5},
        "part": {"limit": 1},
        "others": {"data_seed": 1},
    }.items():
        limit = options.pop("limit", None)
        recorder = RunRecorder(videos=0, probe=False)
        extra = {} if limit is None else {"limit_val_batches": limit}
        _, folder = fit(tmp_path / name, tiny_savi(), [recorder], synthetic(root, **options), max_steps=1, **extra)
        hashes[name] = read(folder)["val_keys_hash"]
        assert read(folder)["num_videos"] == (2 if limit else 5)
    assert hashes["whole"] == hashes["again"]
    assert len(set(hashes.values())) >= 2
    assert hashes["part"] != hashes["whole"]


def test_training_videos_are_never_scored(tmp_path: Path, root: Path) -> None:
    data = synthetic(root)
    data.prepare_data()
    data.setup("fit")
    shards = data.patterns["train"]
    same = ShardDataModule(train=shards, validation=str(shards), batch_size=2, clip_length=2, num_workers=0)
    with pytest.raises(ConfigError, match="4 of 4 are in the training set"):
        fit(tmp_path, tiny_savi(), [RunRecorder()], same)
    items = feature_videos(6, 1)
    train = DataLoader(Subset(items, [0, 1, 2, 3]), batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 of 3"):
        fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, DataLoader(Subset(items, [3, 4, 5])))  # type: ignore[arg-type]
    assert not (tmp_path / "evaluation.json").exists()
    # without a validation in the training, it shows at its end
    with pytest.raises(ConfigError, match="1 of 3"):
        fit(
            tmp_path,
            feature_host(SlotContrast),
            [RunRecorder()],
            train,
            DataLoader(Subset(items, [3, 4, 5])),  # type: ignore[arg-type]
            num_sanity_val_steps=0,
        )
    assert not (tmp_path / "evaluation.json").exists()


def test_a_run_that_had_nothing_left_to_do_is_recorded(tmp_path: Path, root: Path) -> None:
    trainer, _ = fit(tmp_path / "a", tiny_savi(), [], synthetic(root))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=CSVLogger(str(tmp_path / "b"), name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[RunRecorder(videos=1)],
    )
    again.fit(tiny_savi(), datamodule=synthetic(root), ckpt_path=str(tmp_path / "last.ckpt"))
    content = read(tmp_path / "b")
    assert content["num_videos"] == 5
    assert content["step_ms"] is None
    assert content["steps"] == 4


def test_no_validation_set_leaves_the_costs(tmp_path: Path) -> None:
    train, _ = feature_loaders()
    with pytest.warns(UserWarning, match="no validation set"):
        _, folder = fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, None)
    content = read(folder)
    assert content["scores"] == {}
    assert content["num_videos"] == 0
    assert content["step_ms"] > 0.0


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="frames"):
        RunRecorder(frames=0)
    with pytest.raises(ConfigError, match="videos"):
        RunRecorder(videos=-1)

    class Other(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ConfigError, match="SlotHost"):
        fit(tmp_path, Other(), [RunRecorder()], *feature_loaders())
    train, _ = feature_loaders()
    blind = [{"features": item["features"]} for item in feature_videos(2, 1)]
    with pytest.raises(ConfigError, match="segmentations"):
        fit(
            tmp_path,
            feature_host(SlotContrast),
            [RunRecorder()],
            train,
            DataLoader(blind),  # type: ignore[arg-type]
            num_sanity_val_steps=0,
            check_val_every_n_epoch=100,
        )
