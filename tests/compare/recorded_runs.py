"""Small sets, hosts and trainings for the tests of the recorder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from ssync_pl.data.synthetic_datamodule import SyntheticDataModule
from ssync_pl.hosts import SOLV, SAVi

GRID = (4, 4)


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
