from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssync_pl.hosts import DINOSAUR, SOLV, SAVi, SlotContrast, VideoSAUR
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder

Batch = dict[str, Tensor]
FEATURE_HOSTS = [VideoSAUR, SlotContrast, DINOSAUR]
OPTIONS: dict[Any, dict[str, Any]] = {
    SAVi: {
        "num_slots": 3, "slot_dim": 16, "encoder_channels": (8, 16), "encoder_strides": (2, 1), "feature_dim": 16,
        "corrector_mlp_hidden": 32, "predictor_mlp_hidden": 32, "decoder_broadcast": (4, 4), "decoder_channels": (16,),
        "decoder_strides": (2,), "init": "fan_in", "learning_rate": 3e-3, "warmup_steps": 0, "decay": "constant",
    },
    SOLV: {
        "num_slots": 4, "slot_dim": 16, "backbone": None, "feature_dim": 6, "grid": (2, 4), "clip_length": 3,
        "iterations": 2, "temporal_blocks": 1, "temporal_heads": 2, "decoder_hidden": (32,), "dropout": 0.0,
        "edge_probability": 0.0, "learning_rate": 3e-3, "warmup_steps": 0, "decay": "constant",
    },
}  # fmt: skip
FEATURES: dict[str, Any] = {
    "num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 6, "grid": (2, 4), "encoder_hidden": 16,
    "decoder_hidden": (16, 12), "learning_rate": 3e-3, "warmup_steps": 0, "decay_rate": 1.0,
}  # fmt: skip


def tiny(kind: Any, trained: bool = False, **changes: Any) -> Any:
    """A host of tiny sizes; only one that a Trainer has may log, if it is to be ``trained``."""
    torch.manual_seed(0)
    model = kind(**{**OPTIONS.get(kind, FEATURES), **changes})
    if not trained:
        model.log = model.log_dict = lambda *args, **kwargs: None
    return model


def encoder_of(**changes: Any) -> FeatureEncoder:
    names = ("backbone", "layer", "similarity_layer", "checkpoint", "feature_dim", "similarity_dim", "hidden")
    options = {**dict.fromkeys(names), "weights": "none", "grid": (4, 6), "slot_dim": 8}
    return FeatureEncoder(**(options | changes))


def pixel_clips(videos: int = 2, frames: int = 2, size: int = 16) -> Batch:
    """One bright square that moves right over a dark floor; masks have a background channel."""
    masks, colours = torch.zeros(videos, frames, 2, size, size).bool(), torch.tensor([2.0, -1.0, 0.5])
    for index in range(videos):
        for t in range(frames):
            masks[index, t, 1, 2 + index : 8 + index, 1 + t : 7 + t] = True
    masks[:, :, 0] = ~masks[:, :, 1]
    colour = torch.stack([colours.roll(-index) for index in range(videos)]).view(videos, 1, 3, 1, 1)
    return {"video": torch.where(masks[:, :, 1:], colour, torch.full((), -0.5)), "segmentations": masks}


def window_clips(videos: int = 2, frames: int = 3) -> Batch:
    """Cached features (B, T, 8, 6) whose left and right half differ; each video has features of its own."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.randn(videos, 1, 2, 6, generator=generator).expand(-1, frames, -1, -1)
    labels = (torch.arange(8) % 4 >= 2).long().view(1, 1, 2, 4).expand(videos, frames, -1, -1)
    features = sides.gather(2, labels.flatten(2).unsqueeze(-1).expand(-1, -1, -1, 6))
    masks = torch.nn.functional.one_hot(labels, 2).movedim(-1, 2).bool()
    return {
        "features": features + 0.05 * torch.randn(features.shape, generator=generator),
        "video": torch.zeros(videos, frames, 3, 8, 16),
        "segmentations": masks.repeat_interleave(4, -1).repeat_interleave(4, -2),
    }


def loader(batch: Batch, count: int = 1) -> DataLoader[Any]:
    return DataLoader([batch] * count, batch_size=None)  # type: ignore[arg-type]


def train(model: Any, batch: Batch, steps: int, rate: float = 3e-3) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.parameters(), rate), []
    for step in range(steps):
        loss = model.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parser_of(kind: Any) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # jsonargparse before 4.49
    return parser, lambda values: instantiate(parser.parse_args([f"--model.{value}" for value in values])).model
