"""`DenseAlignmentCallback`: SRL's dense alignment, the quadratic rival of SSync, in the training of a feature host."""

import functools
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from ssync_pl.adapters.capture import Capture
from ssync_pl.errors import HostError, require
from ssync_pl.hosts import DINOSAUR, SlotContrast, VideoSAUR
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.method.labels import compute_dtype
from ssync_pl.method.loss import mean_over_ranks
from ssync_pl.plugin.schedule import steps_of, training_length
from ssync_pl.plugin.wrapped_step import StepCallback, loss_of, with_loss
from ssync_pl.rivals.dense_alignment import DenseAlignment, DenseAlignmentOutput, check_group

_HOSTS = (VideoSAUR, SlotContrast, DINOSAUR)
_PUBLISHED_FRAMES = 4


class DenseAlignmentCallback(StepCallback, L.Callback):
    """Adds SRL's dense alignment to the training step of a host that rebuilds features.

    It is there to be compared with SSync: it takes all pairs of patches of a group of frames, where SSync takes a few
    regions. VideoSAUR, SlotContrast and DINOSAUR of `ssync_pl.hosts` can be trained with it, on one device or with DDP.
    No parameter, buffer or state-dict key is added to the host, and until the losses are on, the training is that of
    the host alone, bit for bit. The host's optimizer trains the two projections in the group of the host's own
    parameters, and the callback's state holds them. A training is resumed as it began, with the callback or without.
    Padded frames count as frames.

    Args:
        weight: Of both consistency losses, at least 0.
        warmup_ratio: Share of the training's optimizer steps during which they are off, in [0, 1].
        warmup_steps: The same as a number of optimizer steps; takes the place of ``warmup_ratio``. Published: 20 000.
        projection_dim: Size of the projections that are compared, at least 1.
        group_frames: Frames that are compared with each other; must divide those of a clip. None takes 4, as
            published, or the largest number below that divides them.
        neighbours: Nearest patches per frame that count as alike, in [1, patches].
        redundant: Slots that are spread by the redundancy loss, at least 1.
        redundancy_weight: Of the redundancy loss, at least 0.
        redundancy_ratio: Share of the training, from its start, during which the redundancy loss is on, in [0, 1].
        redundancy_steps: The same as a number of optimizer steps; takes its place. Published: 10 000.

    Raises:
        ConfigError: A setting is out of range, or a training without the callback is resumed with it.
        HostError: In `setup` or `on_fit_start`: the host cannot be used; the message says why.

    Source: SRL, dense synergistic learning for video object-centric models; see `DenseAlignment`.
    """

    owner = "dense alignment"

    def __init__(
        self,
        weight: float = 0.1,
        warmup_ratio: float = 0.2,
        warmup_steps: int | None = None,
        projection_dim: int = 128,
        group_frames: int | None = None,
        neighbours: int = 8,
        redundant: int = 5,
        redundancy_weight: float = 0.1,
        redundancy_ratio: float = 0.1,
        redundancy_steps: int | None = None,
    ) -> None:
        super().__init__()
        _check_range({"weight": weight, "redundancy_weight": redundancy_weight}, 0, math.inf)
        _check_range({"warmup_ratio": warmup_ratio, "redundancy_ratio": redundancy_ratio}, 0, 1)
        _check_range({"warmup_steps": warmup_steps, "redundancy_steps": redundancy_steps}, 0, math.inf)
        _check_range({"projection_dim": projection_dim, "group_frames": group_frames}, 1, math.inf)
        _check_range({"neighbours": neighbours, "redundant": redundant}, 1, math.inf)
        self._options: dict[str, Any] = {"projection_dim": projection_dim, "neighbours": neighbours}
        self._options |= {"redundant": redundant, "weight": weight, "redundancy_weight": redundancy_weight}
        self._group_frames = group_frames
        self._warmup = (warmup_ratio, warmup_steps)
        self._redundancy = (redundancy_ratio, redundancy_steps) if redundancy_weight > 0 else (0.0, 0)
        self.losses: Any = None  # a DenseAlignment from `setup` on
        self._checked = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses hosts that cannot be served, and makes the projections."""
        if stage != "fit":
            return
        encoder = _encoder_of(trainer, pl_module)
        patches = math.prod(pl_module.grid)  # type: ignore[arg-type]
        _check_range({"neighbours": self._options["neighbours"]}, 1, patches)
        # Whether the callback is there must not change what the host and the data draw.
        with torch.random.fork_rng(devices=[]):
            self.losses = DenseAlignment(encoder.feature_dim, encoder.output_dim, **self._options)
        self._checked = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the projections to the host's optimizer, puts the hooks on and wraps the training step."""
        projections = [*self.losses.to(pl_module.device).parameters()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in projections:  # ranks need not have drawn the same
                torch.distributed.broadcast(parameter.data, src=0)
        # Before Lightning loads its state from a checkpoint; a group of their own would lack the scheduler's factor.
        trainer.optimizers[0].param_groups[0]["params"] += projections
        self._session = Capture()
        self._session.watch("encoder", pl_module.encoder)
        self._session.watch("host", pl_module)
        self.wrap(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fixes the schedule for the length of this training."""
        total = training_length(trainer)
        self.losses.start_step = steps_of(*self._warmup, total)
        self.losses.redundancy_steps = steps_of(*self._redundancy, total, "redundancy")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Averages the projections' gradients over ranks, since DDP knows the host only."""
        # After each backward pass of an accumulation: what was averaged before stays what it is.
        for parameter in self.losses.parameters():
            if parameter.grad is not None:
                parameter.grad = mean_over_ranks(parameter.grad)

    def state_dict(self) -> dict[str, Any]:
        """Returns the projections."""
        return {"projections": {} if self.losses is None else dict(self.losses.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        if self.losses is not None and state_dict["projections"]:
            self.losses.load_state_dict(state_dict["projections"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume a training without this callback, whose optimizer knows no projections."""
        fits = trainer.state.fn != "fit" or self.state_key in checkpoint["callbacks"]
        advice = "Resume without it, or start a new training from the weights alone."
        require(fits, "a checkpoint of a training with DenseAlignmentCallback", "one without it", advice=advice)

    def _step(self, trainer: Any, host: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        capture, losses, now = self._session, self.losses, trainer.global_step
        off = (now < losses.start_step or losses.weight == 0) and now >= losses.redundancy_steps
        if off and self._checked:
            return step(*args, **kwargs)
        with capture.window():
            output = step(*args, **kwargs)
            capture.close()
            loss = loss_of(output)
            if loss is None:
                return output
            seen = capture.only("host")
            # Also during the warm-up: clips that cannot be used are refused in the first step.
            frames = seen.targets.shape[1]
            fitting = max(size for size in range(1, _PUBLISHED_FRAMES + 1) if frames % size == 0)
            losses.group_frames = self._group_frames or fitting
            check_group(frames, losses.group_frames)
            self._checked = True
            if off:
                return output
            dense = _dense_losses(losses, seen, capture.only("encoder")["features"], now)
        if self._log_steps.due(trainer):
            log = functools.partial(host.log, batch_size=len(seen.targets))
            for name in ("encoder_loss", "decoder_loss", "redundancy_loss"):
                log(f"dense/{name}", getattr(dense, name).detach())
            log("dense/weight", losses.weight if now >= losses.start_step else 0.0)
        return with_loss(output, loss + dense.loss)


def _encoder_of(trainer: L.Trainer, host: L.LightningModule) -> FeatureEncoder:
    """The encoder of a host that can be served; it may be wrapped, over time or by `torch.compile`."""
    # A host with manual optimization calls backward itself, so a loss that a callback adds would have no effect.
    obstacles = {
        "a host that rebuilds features: VideoSAUR, SlotContrast or DINOSAUR": not isinstance(host, _HOSTS),
        "automatic optimization, not automatic_optimization=False": not host.automatic_optimization,
        "a host that rebuilds features, not reconstruction_weight=0": getattr(host, "loss_weights", {}).get(
            "reconstruction", 1
        )
        == 0,
        "strategy='ddp' or one device, since parameters are split": trainer.strategy.restore_checkpoint_after_setup,
    }
    if wanted := next((wanted for wanted, missed in obstacles.items() if missed), None):
        raise HostError(
            f"Expected {wanted}, but got {type(host).__name__} with {type(trainer.strategy).__name__}. "
            "Use the functions of ssync_pl.rivals.dense_alignment inside your own training step."
        )
    return next(module for module in host.encoder.modules() if isinstance(module, FeatureEncoder))  # type: ignore[union-attr]


def _check_range(values: dict[str, Any], low: float, high: float) -> None:
    for name, value in values.items():
        # Infinity and NaN are outside of every range.
        fits = value is None or (low <= value <= high and value < math.inf)
        require(fits, f"argument `{name}` to be in [{low}, {high}]", value)


def _dense_losses(losses: DenseAlignment, seen: Any, features: Tensor, step: int) -> DenseAlignmentOutput:
    """Losses of one forward pass of a host, with its output and what slot attention read, in float32 at least."""

    def wide(x: Tensor) -> Tensor:
        return x.to(compute_dtype(x.dtype))

    features = features if features.ndim == 4 else features.unflatten(0, seen.targets.shape[:2])  # of images
    rebuilt = seen.reconstruction[..., : seen.targets.shape[-1]]
    with torch.autocast(seen.targets.device.type, enabled=False):
        maps = [wide(x).softmax(2) for x in (seen.attention_logits, seen.mask_logits.flatten(3))]
        return losses(wide(seen.targets), wide(rebuilt), wide(features), *maps, wide(seen.slots), step)
