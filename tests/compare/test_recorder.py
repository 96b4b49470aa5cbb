"""The recorder writes what runs are compared by, and changes no bit of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from recorded_runs import GRID, feature_host, feature_loaders, feature_videos, fit, read, synthetic, tiny_savi
from torch import Tensor
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback
from ssync_pl.compare import final
from ssync_pl.compare.recorder import RunRecorder
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SOLV, SlotContrast, VideoSAUR
from ssync_pl.metrics import SegmentationMetrics, metric_names

SCORES = {*metric_names("segmentation"), *metric_names("slots")}
BOTH_MAPS = SCORES | {f"encoder_{name}" for name in SCORES}


def test_savi_on_the_packaged_set(tmp_path: Path, root: Path) -> None:
    trainer, folder = fit(tmp_path, tiny_savi(), [RunRecorder(videos=3, frames=2)], synthetic(root))
    content = read(folder)
    assert set(content["scores"]) == BOTH_MAPS
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
    encoder = SegmentationMetrics()
    for batch in DataLoader(feature_videos(6, 1), batch_size=2):  # type: ignore[arg-type]
        with torch.no_grad():
            attention = host(batch["features"]).attention_logits.softmax(2).unflatten(-1, host.grid)
            encoder.update(attention, batch["segmentations"])
    for name, value in encoder.compute().items():
        assert scores[f"encoder_{name}"] == pytest.approx(value.item(), abs=1e-9), name
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


@pytest.mark.parametrize(
    ("kind", "ssync"),
    [(SlotContrast, False), (SlotContrast, True), (SOLV, False), (SOLV, True), (VideoSAUR, False), (DINOSAUR, True)],
)
def test_every_host_on_cached_features(tmp_path: Path, kind: Any, ssync: bool) -> None:
    callbacks: list[L.Callback] = [SSyncCallback(warmup_ratio=0.5)] if ssync else []
    _, folder = fit(tmp_path, feature_host(kind), [*callbacks, RunRecorder()], *feature_loaders())
    content = read(folder)
    # SOLV may order its slots anew after decoding, DINOSAUR sees frames as images of their own.
    fits = {SOLV: (SCORES, BOTH_MAPS), DINOSAUR: (SCORES,)}.get(kind, (BOTH_MAPS,))
    assert set(content["scores"]) in fits
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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [SlotContrast, SOLV])
def test_on_cuda(tmp_path: Path, kind: Any) -> None:
    host = feature_host(kind)
    callbacks = [SSyncCallback(warmup_ratio=0.5), RunRecorder()]
    _, folder = fit(tmp_path, host, callbacks, *feature_loaders(), accelerator="cuda", devices=1, max_steps=30)
    content = read(folder)
    assert set(content["scores"]) >= (BOTH_MAPS if kind is SlotContrast else SCORES)
    assert 0.0 < content["step_ms"] < 1000.0
    assert 0.0 < content["peak_mib"] < 1000.0
    assert "position_r2" in content["probe"]
    assert (folder / "pictures.npz").exists()
    assert next(host.parameters()).device.type == "cpu"  # where Lightning leaves it
