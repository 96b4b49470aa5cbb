"""The recorder writes what runs are compared by, and changes no bit of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback
from ssync_pl.compare.callbacks import RunRecorder
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SOLV, SlotContrast, VideoSAUR
from ssync_pl.metrics import SegmentationMetrics, metric_names

GRID = (4, 4)
SCORES = {*metric_names("segmentation"), *metric_names("slots")} - {"slots_per_object"}  # of objects too small here
BOTH_MAPS = SCORES | {f"encoder_{name}" for name in SCORES}


def videos(count: int, seed: int) -> Any:
    """Cached features of squares that move over a floor, with their masks."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        masks = torch.zeros(3, 2, 16, 16, dtype=torch.bool)
        for t in range(3):
            masks[t, 1, 4 * (index % 3) : 4 * (index % 3) + 8, 4 * (t % 2) : 4 * (t % 2) + 8] = True
        masks[:, 0] = ~masks[:, 1]
        patches = masks[:, 1, ::4, ::4].flatten(1).float()
        features = patches.unsqueeze(-1) * torch.linspace(-2, 2, 6) + 0.1 * torch.randn(3, 16, 6, generator=generator)
        items.append({"features": features, "segmentations": masks})
    return items


def make_host(kind: Any, **changes: Any) -> Any:
    options: dict[str, Any] = {"num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 6, "grid": GRID}
    if kind is SOLV:
        options |= {"clip_length": 3, "temporal_heads": 2, "temporal_blocks": 1, "decoder_hidden": (16,)}
    else:
        options |= {"encoder_hidden": 16, "decoder_hidden": (16,), "decay_rate": 1.0}
    torch.manual_seed(0)
    return kind(**(options | {"warmup_steps": 0} | changes))


def fit(path: Path, host: Any, *callbacks: L.Callback, validation: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_steps": 4, "accelerator": "cpu", "logger": CSVLogger(str(path), "", "")}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    torch.manual_seed(5)
    trainer = L.Trainer(**(settings | options), callbacks=list(callbacks))
    validation = videos(6, 1) if validation is None else validation
    trainer.fit(host, DataLoader(videos(4, 0), batch_size=2), DataLoader(validation, batch_size=2))
    return trainer


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def names_in(folder: Path) -> set[str]:
    return {name for name in read(folder)["scores"] if "slots_per_object" not in name}


def test_scores_are_those_of_the_trained_host(tmp_path: Path) -> None:
    host = make_host(SlotContrast, slot_init="learned")
    trainer = fit(tmp_path, host, RunRecorder())
    decoder, encoder = SegmentationMetrics(), SegmentationMetrics()
    host.eval()
    for batch in DataLoader(videos(6, 1), batch_size=2):
        with torch.no_grad():
            decoder.update(host.evaluate(batch)[0], batch["segmentations"])
            attention = host(batch["features"]).attention_logits.softmax(2).unflatten(-1, host.grid)
            encoder.update(attention, batch["segmentations"])
    content = read(tmp_path)
    for prefix, metrics in (("", decoder), ("encoder_", encoder)):
        for name, value in metrics.compute().items():
            assert content["scores"][prefix + name] == pytest.approx(value.item(), abs=1e-9), name
    # the training's own last validation, where slots are not drawn at random
    assert content["scores"]["video_mbo"] == pytest.approx(float(trainer.callback_metrics["val/video_mbo"]), abs=1e-6)
    assert (content["first_step"], content["step"], content["device"][:3]) == (0, 4, "CPU")
    assert content["wall_seconds"] >= 0


def test_no_bit_of_the_training_changes(tmp_path: Path) -> None:
    results = []
    for name in ("plain", "recorded"):
        host = make_host(SlotContrast)
        extra = [RunRecorder()] if name == "recorded" else []
        trainer = fit(tmp_path / name, host, SSyncCallback(warmup_ratio=0.25), *extra)
        results.append((host.state_dict(), torch.get_rng_state(), dict(trainer.callback_metrics)))
        assert not any(module._forward_hooks for module in host.modules())
    (weights, state, metrics), (others, other_state, other_metrics) = results
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert torch.equal(state, other_state)
    assert metrics.keys() == other_metrics.keys()
    assert all(torch.equal(value, other_metrics[name]) for name, value in metrics.items())


@pytest.mark.parametrize(
    ("kind", "ssync"), [(SlotContrast, True), (SOLV, False), (SOLV, True), (VideoSAUR, False), (DINOSAUR, True)]
)
def test_every_host_on_cached_features(tmp_path: Path, kind: Any, ssync: bool) -> None:
    callbacks: list[L.Callback] = [SSyncCallback(warmup_ratio=0.5)] if ssync else []
    fit(tmp_path, make_host(kind), *callbacks, RunRecorder())
    # SOLV may order its slots anew after decoding, DINOSAUR sees frames as images of their own.
    assert names_in(tmp_path) in {SOLV: (SCORES, BOTH_MAPS), DINOSAUR: (SCORES,)}.get(kind, (BOTH_MAPS,))


def test_padding_is_not_scored(tmp_path: Path) -> None:
    items = videos(4, 1)
    for index, item in enumerate(items):
        item["batch_padding_mask"] = torch.tensor(index < 2)
    scores = []
    for name, validation in (("padded", items), ("short", items[:2])):
        fit(tmp_path / name, make_host(SlotContrast, slot_init="learned"), RunRecorder(), validation=validation)
        scores.append(read(tmp_path / name)["scores"])
    assert scores[0] == scores[1]


def test_a_validation_that_was_never_due_is_read_at_the_end(tmp_path: Path) -> None:
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 100}
    fit(tmp_path, make_host(SlotContrast), RunRecorder(), **options)
    assert names_in(tmp_path) == BOTH_MAPS
    blind = [{"features": item["features"]} for item in videos(2, 1)]
    with pytest.raises(ConfigError, match="segmentations"):
        fit(tmp_path / "blind", make_host(SlotContrast), RunRecorder(), validation=blind, **options)
    assert not (tmp_path / "blind" / "evaluation.json").exists()


def test_no_validation_set_leaves_no_scores_and_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no validation set"):
        fit(tmp_path, make_host(SlotContrast), RunRecorder(), limit_val_batches=0)
    assert read(tmp_path)["scores"] == {}
    with pytest.raises(ConfigError, match="SlotHost"):
        fit(tmp_path, BoringModel(), RunRecorder())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [SlotContrast, SOLV])
def test_on_cuda(tmp_path: Path, kind: Any) -> None:
    callbacks = [SSyncCallback(warmup_ratio=0.5), RunRecorder()]
    fit(tmp_path, make_host(kind), *callbacks, accelerator="cuda", devices=1, max_steps=30)
    assert names_in(tmp_path) >= (BOTH_MAPS if kind is SlotContrast else SCORES)
