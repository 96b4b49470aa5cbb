"""What `SSyncCallback` does, for callbacks of any Lightning namespace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ssync_pl.adapters import HostAdapter
from ssync_pl.adapters.paths import MapKind
from ssync_pl.errors import HostError
from ssync_pl.method.loss import LossKind
from ssync_pl.plugin.config import CollapseAction, SSyncConfig, StartKind
from ssync_pl.plugin.engine import SSyncEngine, heed, tell_never_started
from ssync_pl.plugin.regularizer import SSyncRegularizer
from ssync_pl.plugin.schedule import Phase
from ssync_pl.plugin.session import HostSession, adapter_from
from ssync_pl.plugin.wrapped_step import LogSteps, WrappedMethod, loss_of, step_logger, with_loss

__all__ = ["SSyncHooks"]


class SSyncHooks:
    """Adds SSync to the training step of an existing host.

    The callback wraps the host's ``training_step``: inside it the adapter listens to slot attention and decoder, and
    the two losses are added to what the host returns. Nothing else of the host changes: no parameter, buffer or
    state-dict key is added, and everything is put back when the training ends or fails. During the warm-up nothing is
    captured, except in the first step, so that a host that cannot be used is refused at once, and in the last
    ``guard_window`` steps, which count the slots in use.

    Note:
        Give it to the Trainer inside a list. It works in Trainers of ``lightning`` and of ``pytorch_lightning`` 2.x,
        with mixed precision, accumulation, clipping, weight averaging, compiled hosts and DDP; not with manual
        optimization. A Trainer of ``pytorch_lightning`` 1.x wants a class of its own namespace: see `callback_class`.

    Args:
        adapter: How to read the host's maps: ``"auto"`` recognises it, a name picks an adapter, or pass an adapter.
        attention: For a host that no adapter knows: dotted path of the module that gives the attention over slots, as
            ``"path"`` or ``"path:key"``, or as ``"softmax:path"`` for what a softmax over slots inside of it is given.
            Needs ``masks`` too.
        masks: The same for the decoder's object masks.
        attention_kind: What ``attention`` gives: ``"probs"`` (softmax over slots) or ``"logits"``.
        masks_kind: The same for ``masks``.
        grid: ``(H, W)`` patches, where neither the maps nor the frames' size tell.
        merge_threshold: Overlap above which slots are redundant, in [0, 1]. Published: 0.7 (MOVi-C), 0.65 (MOVi-E),
            0.6 (YT-VIS), 0.9 (COCO).
        merge: Merge redundant slots' labels. None: when the host's attention logits are there.
        n_bd: A boundary patch has at least this many differing neighbours, in [0, 10].
        n_nbd: An interior patch has fewer differing neighbours than this, in [1, 11].
        n_noise: A boundary patch has at least this many agreeing neighbours, in [0, 10].
        temperature: Of the student's softmax, above 0.
        loss: ``"brier"`` (published) or ``"ce"``.
        boundary_weight: Of the encoder → decoder loss, at least 0.
        interior_weight: Of the decoder → encoder loss, at least 0.
        relative_weight: None adds the weighted losses as they are (published). A number, above 0, instead scales them
            so that what is added has, on a running average, this share of the host's own loss; the two weights then
            only set the mix. One setting fits hosts of any loss scale. While the two losses average below 0.01, the
            factor grows no more.
        warmup_ratio: Share of the training's optimizer steps during which SSync is off, in [0, 1].
        warmup_steps: The same as a number of optimizer steps; takes the place of ``warmup_ratio``.
        ramp_steps: Optimizer steps over which the weight then grows linearly to its full size; 0 switches at once.
        start: ``"schedule"`` switches on after the warm-up (published). ``"mature"`` then still waits until the host is
            mature: encoder and decoder agree on ``mature_agreement`` of the patches, or their agreement and the slots
            in use have stopped changing. It is looked at once every ``guard_window`` steps. A host that never matures
            never gets SSync; a warning at the end of the training says so.
        mature_agreement: Share of the patches that the same slot wins in both maps, in (0, 1].
        on_collapse: What to do when slots fall out of use after switching on: ``"warn"``, ``"backoff"`` (halve the
            weight until they recover, then let it grow back) or ``"stop"`` the training.
        collapse_threshold: Share of the slots in use before switching on, in (0, 1), below which it is a collapse.
        guard_window: Training steps over which slots in use are averaged before they are compared, at least 1.
        sync_counts: Under DDP, divide by the selected patches of all ranks instead of each rank's own.

    Raises:
        ConfigError: A setting is out of range.
        HostError: In `setup`, `on_fit_start` or the first training step: the host cannot be used; the message says why.

    Example:
        >>> import lightning.pytorch as L
        >>> from ssync_pl import SSyncCallback
        >>> trainer = L.Trainer(callbacks=[SSyncCallback(merge_threshold=0.65)], logger=False, accelerator="cpu",
        ...                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.callbacks[0].config.merge_threshold
        0.65

    Source: SSync (arXiv 2606.15527).
    """

    _session: _Session | None

    def __init__(
        self,
        adapter: str | HostAdapter = "auto",
        attention: str | None = None,
        masks: str | None = None,
        attention_kind: MapKind = "probs",
        masks_kind: MapKind = "probs",
        grid: tuple[int, int] | None = None,
        merge_threshold: float = 0.7,
        merge: bool | None = None,
        n_bd: int = 1,
        n_nbd: int = 1,
        n_noise: int = 1,
        temperature: float = 1.0,
        loss: LossKind = "brier",
        boundary_weight: float = 1.0,
        interior_weight: float = 1.0,
        relative_weight: float | None = None,
        warmup_ratio: float = 0.3,
        warmup_steps: int | None = None,
        ramp_steps: int = 0,
        start: StartKind = "schedule",
        mature_agreement: float = 0.5,
        on_collapse: CollapseAction = "warn",
        collapse_threshold: float = 0.8,
        guard_window: int = 50,
        sync_counts: bool = False,
    ) -> None:
        super().__init__()
        self.config = SSyncConfig(
            merge_threshold=merge_threshold,
            merge=merge,
            n_bd=n_bd,
            n_nbd=n_nbd,
            n_noise=n_noise,
            temperature=temperature,
            loss=loss,
            boundary_weight=boundary_weight,
            interior_weight=interior_weight,
            relative_weight=relative_weight,
            warmup_ratio=warmup_ratio,
            warmup_steps=warmup_steps,
            ramp_steps=ramp_steps,
            start=start,
            mature_agreement=mature_agreement,
            on_collapse=on_collapse,
            collapse_threshold=collapse_threshold,
            guard_window=guard_window,
            sync_counts=sync_counts,
        )
        adapter, grid = adapter_from(adapter, attention, masks, attention_kind, masks_kind, grid)
        self.adapter = adapter
        self.grid = grid
        self.engine = SSyncEngine(self.config)
        self._session = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse hosts that a callback cannot serve, and forget an earlier training.

        Args:
            trainer: The trainer.
            pl_module: The host.
            stage: Only ``"fit"`` does anything.

        Raises:
            HostError: The host uses manual optimization, or has SSync already.
        """
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise HostError(
                f"Expected {type(pl_module).__name__} to use automatic optimization, but it sets "
                "automatic_optimization=False: it calls backward itself, so a loss added by a callback would have no "
                "effect. Use the SSyncRegularizer mixin, or ssync_loss, inside its training_step."
            )
        if isinstance(pl_module, SSyncRegularizer):
            raise HostError(
                f"Expected a host without SSync, but {type(pl_module).__name__} is an SSyncRegularizer and adds it "
                "itself. Remove the callback."
            )
        self.engine = SSyncEngine(self.config)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Recognise the host, put the hooks on and wrap its training step.

        Only here, since a host may build its modules in its own ``setup`` or in ``configure_model``.

        Args:
            trainer: The trainer.
            pl_module: The host.

        Raises:
            HostError: The host is not recognised, or has SSync already.
        """
        other = pl_module.__dict__.get("training_step")
        if isinstance(other, WrappedMethod):
            raise HostError(
                f"Expected one SSyncCallback and nothing else of its kind, but {type(pl_module).__name__} already has "
                f"{other.owner} in its training step. Remove the second callback."
            )
        self._session = _Session(pl_module, self.adapter, self.grid)
        self._session.wrap(functools.partial(self._step, trainer, pl_module))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fix the warm-up for the length of this training.

        Args:
            trainer: The trainer.
            pl_module: The host.
        """
        self.engine.start_in(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where the host never became mature.

        Args:
            trainer: The trainer.
            pl_module: The host.
        """
        tell_never_started(self.engine, trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the host back as it was.

        Args:
            trainer: The trainer.
            pl_module: The host.
            stage: Of the trainer.
        """
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the host back as it was; Lightning calls no `teardown` after an error or Ctrl-C.

        Args:
            trainer: The trainer.
            pl_module: The host.
            exception: What went wrong.
        """
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: running averages and the guard's state.

        Returns:
            Plain numbers.

        Example:
            >>> sorted(SSyncHooks().state_dict())
            ['guard', 'host_average', 'term_average']
        """
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state_dict: What `state_dict` returned.

        Example:
            >>> SSyncHooks().load_state_dict(SSyncHooks().state_dict())
        """
        self.engine.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not hold on to the host, its hooks or tensors of a graph.
        return {**self.__dict__, "_session": None}

    def _restore(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.restore()

    def _step(self, trainer: Any, host: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        session = self._session
        if session is None:
            return step(*args, **kwargs)
        phase = self.engine.phase(trainer.global_step)
        if phase is Phase.OFF and session.checked:
            return step(*args, **kwargs)
        with session.window():
            output = step(*args, **kwargs)
            loss = loss_of(output)
            if loss is None:
                return output
            batch = args[0] if args else kwargs.get("batch")
            maps = session.collect(batch, self.config)
            due = phase in (Phase.ON, Phase.WAIT) and session.log_steps.due(trainer)
            log = step_logger(host, maps.shape[0]) if due else None
            total, verdict = self.engine.apply(loss, maps, trainer.global_step, log)
        heed(verdict, trainer)
        return with_loss(output, total)


class _Session(HostSession):
    """What the callback holds while a host trains: the hooks, and what it has put around the training step."""

    def __init__(self, host: Any, adapter: str | HostAdapter, grid: tuple[int, int] | None) -> None:
        super().__init__(host, adapter, grid)
        self.step: WrappedMethod | None = None
        self.log_steps = LogSteps()

    def wrap(self, run: Callable[..., Any]) -> None:
        self.step = WrappedMethod(self.host, "training_step", run, "SSync")

    def restore(self) -> None:
        self.remove()
        if self.step is not None:
            self.step.restore()
