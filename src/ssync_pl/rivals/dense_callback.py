"""`DenseAlignmentCallback`: SRL's dense alignment, the quadratic rival of SSync, in the training of a feature host."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch

from ssync_pl.adapters.capture import Capture
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts.videosaur import FeatureHost, FeatureHostOutput
from ssync_pl.plugin.schedule import steps_of
from ssync_pl.plugin.wrapped_step import LogSteps, WrappedMethod, loss_of, step_logger, with_loss
from ssync_pl.rivals.dense_alignment import DenseAlignment
from ssync_pl.rivals.dense_host import checked_host, dense_losses, encoder_of, frames_of_group
from ssync_pl.rivals.extra_parameters import average_gradients, join_state, split_state, with_parameters

__all__ = ["DenseAlignmentCallback"]


class DenseAlignmentCallback(L.Callback):
    """Adds SRL's dense alignment to the training step of a host that rebuilds features.

    It is there to be compared with SSync: it takes all pairs of patches of a group of frames, where SSync takes a few
    regions. VideoSAUR, SlotContrast and DINOSAUR of `ssync_pl.hosts` can be trained with it, on videos or on cached
    features. Nothing of the host changes: no parameter, buffer or state-dict key is added, and everything is put back
    when the training ends or fails. Until its losses are on, the training is that of the host alone, bit for bit.

    The two projections are trained by the host's optimizer, in the group of the host's own parameters, so that they
    follow its learning rate and are clipped with it. Checkpoints hold them, and their part of the optimizer's state,
    beside the host's: those of a training without the callback can be taken up with it, and the other way round.

    Note:
        Padded frames of a clip count as frames. Not for strategies that split parameters (FSDP, DeepSpeed), and not
        beside `SSyncCallback`.

    Args:
        weight: Of both consistency losses, at least 0.
        warmup_ratio: Share of the training's optimizer steps during which they are off, in [0, 1].
        warmup_steps: The same as a number of optimizer steps; takes the place of ``warmup_ratio``. Published: 20 000.
        projection_dim: Size of the projections that are compared, at least 1.
        group_frames: Frames that are compared with each other; must divide those of a clip. None takes 4, as
            published, or the largest number below that divides them.
        neighbours: Nearest patches of each frame that count as alike, in [1, patches].
        redundant: Slots that are spread by the redundancy loss, at least 1.
        redundancy_weight: Of the redundancy loss, at least 0.
        redundancy_ratio: Share of the training, from its start, during which the redundancy loss is on, in [0, 1].
        redundancy_steps: The same as a number of optimizer steps; takes its place. Published: 10 000.

    Raises:
        ConfigError: A setting is out of range.
        HostError: In `setup` or `on_fit_start`: the host cannot be used; the message says why.

    Example:
        >>> callback = DenseAlignmentCallback(warmup_ratio=0.5)
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.callbacks[0].weight
        0.1

    Source: SRL, dense synergistic learning for video object-centric models; see `DenseAlignment`.
    """

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
        for name, ratio in (("warmup_ratio", warmup_ratio), ("redundancy_ratio", redundancy_ratio)):
            if not 0.0 <= ratio <= 1.0:
                raise ConfigError(f"Expected argument `{name}` to be in [0, 1], but got {ratio}. It is a share.")
        for name, weight_of in (("weight", weight), ("redundancy_weight", redundancy_weight)):
            if not 0.0 <= weight_of < math.inf:
                raise ConfigError(f"Expected argument `{name}` to be finite and at least 0, but got {weight_of}.")
        counts = {"warmup_steps": (warmup_steps, 0), "redundancy_steps": (redundancy_steps, 0)}
        counts.update({"projection_dim": (projection_dim, 1), "group_frames": (group_frames, 1)})
        counts.update({"neighbours": (neighbours, 1), "redundant": (redundant, 1)})
        for name, (count, least) in counts.items():
            if count is not None and count < least:
                raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {count}.")
        self.weight = weight
        self.warmup_ratio = warmup_ratio
        self.warmup_steps = warmup_steps
        self.projection_dim = projection_dim
        self.group_frames = group_frames
        self.neighbours = neighbours
        self.redundant = redundant
        self.redundancy_weight = redundancy_weight
        self.redundancy_ratio = redundancy_ratio
        self.redundancy_steps = redundancy_steps
        self.losses: DenseAlignment | None = None
        self._capture: Capture | None = None
        self._wrapped: list[WrappedMethod] = []
        self._checked = False
        self._log_steps = LogSteps()
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse hosts that cannot be served, make the projections, and let the host's optimizer have them.

        Args:
            trainer: The trainer.
            pl_module: The host.
            stage: Only ``"fit"`` does anything.

        Raises:
            HostError: The host is of another family, uses manual optimization, or is trained by a strategy that splits
                parameters.
            ConfigError: There are fewer patches than ``neighbours``.
        """
        if stage != "fit":
            return
        host = checked_host(trainer, pl_module)
        if self.neighbours > math.prod(host.grid):
            raise ConfigError(
                f"Expected argument `neighbours` to be in [1, {math.prod(host.grid)}], the patches of a frame, but got "
                f"{self.neighbours}."
            )
        # Whether the callback is there must not change what the host and the data draw.
        with torch.random.fork_rng(devices=[]):
            encoder = encoder_of(host)
            self.losses = DenseAlignment(
                encoder.feature_dim,
                encoder.output_dim,
                projection_dim=self.projection_dim,
                neighbours=self.neighbours,
                redundant=self.redundant,
                weight=self.weight,
                redundancy_weight=self.redundancy_weight,
            )
        self._checked = False
        self._loaded = None
        configure = functools.partial(self._configure, host)
        self._wrapped = [WrappedMethod(host, "configure_optimizers", configure, "dense alignment")]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the hooks on and wrap the training step.

        Args:
            trainer: The trainer.
            pl_module: The host.

        Raises:
            HostError: Another callback is in the training step, or the optimizer does not train the projections.
        """
        other = pl_module.__dict__.get("training_step")
        if isinstance(other, WrappedMethod):
            raise HostError(
                f"Expected one regulariser, but {type(pl_module).__name__} already has {other.owner} in its training "
                "step. Remove one of the two callbacks."
            )
        losses = self._losses
        trained = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        if not all(id(parameter) in trained for parameter in losses.parameters()):
            raise HostError(
                f"Expected configure_optimizers of {type(pl_module).__name__} to give an optimizer of "
                "self.parameters(), but the projections of dense alignment, which are among them, are not in it. Build "
                "it from self.parameters() or self.named_parameters()."
            )
        self._take_up(trainer)
        self._capture = Capture()
        self._capture.watch("encoder", pl_module.encoder)  # type: ignore[arg-type]
        self._capture.watch("host", pl_module)
        step = functools.partial(self._step, trainer, pl_module)
        self._wrapped.append(WrappedMethod(pl_module, "training_step", step, "dense alignment"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fix the schedule for the length of this training.

        Args:
            trainer: The trainer.
            pl_module: The host.

        Raises:
            ConfigError: A span is a share of an unknown length.
        """
        total = trainer.estimated_stepping_batches
        total = total if total >= 0 else math.inf  # Lightning gives -1 for a length that nobody knows
        losses = self._losses
        losses.start_step = steps_of(self.warmup_ratio, self.warmup_steps, total)
        losses.redundancy_steps = 0
        if self.redundancy_weight > 0:
            losses.redundancy_steps = steps_of(self.redundancy_ratio, self.redundancy_steps, total, "redundancy")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Average the projections' gradients over ranks: DDP knows the host only.

        Args:
            trainer: The trainer.
            pl_module: The host.
        """
        average_gradients(list(self._losses.parameters()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the host back as it was.

        Args:
            trainer: The trainer.
            pl_module: The host.
            stage: Of the trainer.
        """
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the host back as it was; Lightning calls no `teardown` after an error or Ctrl-C.

        Args:
            trainer: The trainer.
            pl_module: The host.
            exception: What went wrong.
        """
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """The projections.

        Returns:
            Tensors by name.

        Example:
            >>> DenseAlignmentCallback().state_dict()
            {'projections': {}}
        """
        return {"projections": {} if self.losses is None else dict(self.losses.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state_dict: What `state_dict` returned.

        Example:
            >>> DenseAlignmentCallback().load_state_dict({"projections": {}})
        """
        if self.losses is not None and state_dict["projections"]:
            self.losses.load_state_dict(state_dict["projections"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the projections' part of the optimizers' state beside the projections, out of the host's.

        Args:
            trainer: The trainer.
            pl_module: The host.
            checkpoint: Written to.
        """
        states = checkpoint.get("optimizer_states")
        if self.losses is None or not states:
            return
        parts = [split_state(state, opt, self.losses) for state, opt in zip(states, trainer.optimizers, strict=True)]
        checkpoint["optimizer_states"] = [plain for plain, _ in parts]
        checkpoint["callbacks"][self.state_key]["optimizers"] = [taken for _, taken in parts]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the checkpoint until there are optimizers, just before Lightning loads their state from it.

        Args:
            trainer: The trainer.
            pl_module: The host.
            checkpoint: Read from, and in `on_fit_start` written to.
        """
        self._loaded = checkpoint

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not hold on to the host, its hooks or tensors of a graph.
        return {**self.__dict__, "_capture": None, "_wrapped": [], "_loaded": None}

    @property
    def _losses(self) -> DenseAlignment:
        if self.losses is None:
            raise HostError("Expected the Trainer to call `setup` with stage 'fit' first, but it did not.")
        return self.losses

    def _configure(self, host: FeatureHost, configure: Callable[[], Any]) -> Any:
        losses = self._losses.to(host.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in losses.parameters():  # ranks need not have drawn the same
                torch.distributed.broadcast(parameter.data, src=0)
        return with_parameters(host, losses, "dense_alignment", configure)

    def _take_up(self, trainer: L.Trainer) -> None:
        checkpoint, self._loaded = self._loaded, None
        states = (checkpoint or {}).get("optimizer_states")
        if checkpoint is None or not states or len(states) != len(trainer.optimizers):
            return
        taken = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("optimizers") or [{}] * len(states)
        checkpoint["optimizer_states"] = [
            join_state(state, optimizer, self._losses, extra)
            for state, optimizer, extra in zip(states, trainer.optimizers, taken, strict=True)
        ]

    def _restore(self) -> None:
        for wrapped in reversed(self._wrapped):
            wrapped.restore()
        self._wrapped = []
        if self._capture is not None:
            self._capture.remove()
        self._capture = None

    def _step(self, trainer: Any, host: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        capture, losses = self._capture, self._losses
        now = trainer.global_step
        off = not (now >= losses.start_step and losses.weight > 0) and now >= losses.redundancy_steps
        if capture is None or (off and self._checked):
            return step(*args, **kwargs)
        capture.clear()
        capture.open()
        try:
            output = step(*args, **kwargs)
            capture.close()
            loss = loss_of(output)
            if loss is None:
                return output
            seen: FeatureHostOutput = capture.only("host")
            # Also during the warm-up: clips that cannot be used are refused in the first step.
            losses.group_frames = frames_of_group(seen.targets.shape[1], self.group_frames)
            self._checked = True
            if off:
                return output
            dense = dense_losses(losses, seen, capture.only("encoder")["features"], now)
        finally:
            capture.close()
            capture.clear()
        if self._log_steps.due(trainer):
            log = step_logger(host, len(seen.targets))
            log("dense/encoder_loss", dense.encoder_loss.detach())
            log("dense/decoder_loss", dense.decoder_loss.detach())
            log("dense/redundancy_loss", dense.redundancy_loss.detach())
            log("dense/weight", losses.weight if now >= losses.start_step else 0.0)
        return with_loss(output, loss + dense.loss)
