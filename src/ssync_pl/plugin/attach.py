"""`attach`: SSync in any training loop around PyTorch."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssync_pl.adapters import HostAdapter
from ssync_pl.adapters.paths import MapKind, adapter_from
from ssync_pl.errors import HostError, ShapeError, SSyncError, require
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.engine import SSyncEngine, tell_end
from ssync_pl.plugin.schedule import Phase
from ssync_pl.plugin.session import HostSession

_CALLS = "calls of the model"


def attach(
    model: nn.Module,
    adapter: str | HostAdapter = "auto",
    *,
    attention: str | None = None,
    masks: str | None = None,
    attention_kind: MapKind = "probs",
    masks_kind: MapKind = "probs",
    grid: tuple[int, int] | None = None,
    total_steps: int | None = None,
    accumulate: int = 1,
    **settings: Any,
) -> "AttachedSSync":
    """Listens to a model that is trained by a loop of your own.

    Inside the ``with`` block every forward pass in training mode and with gradients is heard. After it, and before the
    next one, `AttachedSSync.loss` gives what is to be added to the loss of that step. Validation (``model.eval()`` or
    ``torch.no_grad()``) is not heard. During the warm-up nothing is captured but the first step, which refuses a model
    that cannot be used.

    Args:
        model: The model; what DDP or `torch.compile` made of it works too.
        adapter: How to read the model's maps: ``"auto"`` recognises it, a name picks an adapter, or pass an adapter.
        attention: Path of the module that gives the attention over slots, as in `SSyncCallback`.
        masks: Path of the module that gives the decoder's object masks.
        attention_kind: What ``attention`` gives: ``"probs"`` (softmax over slots) or ``"logits"``.
        masks_kind: What ``masks`` gives.
        grid: ``(H, W)`` patches, where neither the maps nor the frames' size tell.
        total_steps: Optimizer steps of the whole training; needed where the warm-up is a share of it.
        accumulate: Calls of `AttachedSSync.loss` that make one optimizer step, at least 1.
        **settings: Settings of `SSyncConfig`, as keywords.

    Returns:
        A context manager; see `AttachedSSync`.

    Raises:
        ConfigError: A setting is out of range, or settings contradict each other.
        HostError: On entering: the model is not recognised.

    Examples:
        >>> from ssync_pl.hosts import SAVi
        >>> _ = torch.manual_seed(0)
        >>> model = SAVi(num_slots=2, slot_dim=8, encoder_channels=(8,), encoder_strides=(2,), feature_dim=8,
        ...              decoder_broadcast=(4, 4), decoder_channels=(8,), decoder_strides=(2,))
        >>> with attach(model, warmup_steps=0) as ssync:
        ...     loss = model(torch.rand(1, 2, 3, 16, 16)).reconstruction.square().mean()
        ...     bool(ssync.add(loss) > loss)
        True
    """
    config = SSyncConfig.from_options(**settings)
    name = getattr(model, "__name__", type(model).__name__)
    require(isinstance(model, nn.Module), "argument `model` to be a torch.nn.Module", name, advice="Pass an instance.")
    known = total_steps is None or (isinstance(total_steps, (int, float)) and total_steps >= 0)
    require(known, "argument `total_steps` to be a number of at least 0", repr(total_steps))
    whole = isinstance(accumulate, int) and accumulate >= 1
    require(whole, "argument `accumulate` to be an integer of at least 1", repr(accumulate))
    require(
        total_steps is not None or config.warmup_steps is not None or config.warmup_ratio == 0,
        f"argument `total_steps` for warmup_ratio={config.warmup_ratio}",
        None,
        advice="Give the number of optimizer steps of the whole training, or use `warmup_steps`.",
    )
    spec, grid = adapter_from(adapter, attention, masks, attention_kind, masks_kind, grid)
    engine = SSyncEngine(config)
    engine.start(float("inf") if total_steps is None else total_steps)
    return AttachedSSync(model, spec, grid, engine, accumulate)


class AttachedSSync:
    """What `attach` returns: enter it, train, leave it.

    Attributes:
        maps: ``(B, T, S, N)`` maps of the last step with SSync on or watching, without their graph; None before.
        logs: Numbers of the last step with SSync on, as 0-dim tensors or numbers, by the names that the callback logs.
        should_stop: With ``on_collapse="stop"``, True once slots have fallen out of use; the loop has to look at it.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | HostAdapter,
        grid: tuple[int, int] | None,
        engine: SSyncEngine,
        accumulate: int,
    ) -> None:
        self.model = model
        self.config = engine.config
        self.maps: SSyncMaps | None = None
        self.logs: dict[str, Tensor | float] = {}
        self.should_stop = False
        self._adapter = adapter
        self._grid = grid
        self._engine = engine
        self._calls = self._first_call = 0
        self._accumulate = accumulate
        self._session: HostSession | None = None

    @property
    def step(self) -> int:
        """Optimizer steps taken so far: calls of `loss`, divided by ``accumulate``."""
        return self._calls // self._accumulate

    def __enter__(self) -> "AttachedSSync":
        if self._session is not None:
            raise SSyncError("Expected `attach(...)` to be entered once at a time, but it is entered already.")
        session = self._session = HostSession(self.model, self._adapter, self._grid)
        # The frames' size may be needed for the grid, and a loop need not hand its batch over for that.
        session.capture.watch(_CALLS, session.root, _batch_of, optional=True, inputs=True)
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.remove()
        if kind in (None, KeyboardInterrupt) and self._calls > self._first_call:
            tell_end(self._engine, self.step)

    def loss(self, host_loss: Tensor | None = None, batch: Any = None) -> Tensor:
        """Computes what to add to the loss of the step whose forward pass has just run; call it once per forward pass.

        Args:
            host_loss: 0-dim loss of the model; needed with ``relative_weight``, and not changed.
            batch: The batch, where the frames' size is needed for the grid and is not found among what the model was
                called with.

        Returns:
            0-dim, weighted; 0 during the warm-up.

        Raises:
            SSyncError: Called outside of the ``with`` block.
            ConfigError: ``relative_weight`` is set and ``host_loss`` is not given, or it is not a 0-dim tensor.
            HostError: The forward pass did not run the modules with the maps, or the maps carry no gradient.
            ShapeError: The maps do not fit each other.
        """
        term = self._term(host_loss, batch)
        if term is not None:
            return term
        if host_loss is not None:
            return host_loss.new_zeros(())
        return torch.zeros((), device=next((p.device for p in self.model.parameters()), None))

    def add(self, host_loss: Tensor, batch: Any = None) -> Tensor:
        """Computes the loss of the step with SSync in it: ``host_loss + loss(host_loss)``; arguments as in `loss`.

        Returns:
            0-dim loss to train on; ``host_loss`` itself during the warm-up.
        """
        require(host_loss is not None, "argument `host_loss` to be the model's loss", None, advice="Use ssync.loss().")
        term = self._term(host_loss, batch)
        return host_loss if term is None else host_loss + term

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out forward passes that run in training mode but are not a step, such as a teacher's."""
        session = self._session
        listened = session is not None and session.capture.close()
        try:
            yield
        finally:
            if session is not None and listened:
                session.capture.open(session.root)

    def discard(self) -> None:
        """Forgets a forward pass whose step is given up, as after a loss that is not finite; it counts as no step."""
        self._listen()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain numbers."""
        return {"calls": self._calls, **self._engine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned; raises `ConfigError` for something else."""
        calls = state.get("calls") if isinstance(state, Mapping) else None
        whole, expected = isinstance(calls, int) and calls >= 0, "what `state_dict` of an attached SSync returned"
        require(whole, expected, f"{calls!r} for its `calls`", advice="Load the state that was saved.")
        self._engine.load_state_dict(dict(state))
        self._calls = self._first_call = int(calls or 0)
        self._listen()

    def _term(self, host_loss: Tensor | None, batch: Any) -> Tensor | None:
        session = self._session
        if session is None:
            raise SSyncError("Expected `loss` inside `with attach(model) as ssync:`, but it is not entered.")
        fits = host_loss is not None or self.config.relative_weight is None
        require(fits, "the model's loss beside `relative_weight`", None, advice="Use ssync.add(loss).")
        got = tuple(host_loss.shape) if isinstance(host_loss, Tensor) else type(host_loss).__name__
        fits = host_loss is None or (isinstance(host_loss, Tensor) and host_loss.numel() == 1)
        require(fits, "argument `host_loss` to be a 0-dim tensor", got, advice="Sum up or average the loss first.")
        step = self.step
        off = self._engine.phase(step) is Phase.OFF
        term, verdict = None, None
        try:
            if not off or not session.checked:
                maps = self._collect(session, batch)
                if not off:
                    term, verdict = self._engine.term(
                        host_loss, maps, step, lambda name, value, **_: self.logs.update({name: value})
                    )
                    self.maps = maps.detach()
        finally:
            self._calls += 1
            self._listen()
        if verdict is not None:
            if verdict.message:
                warnings.warn(verdict.message, stacklevel=3)
            self.should_stop = self.should_stop or verdict.stop
        return term

    def _collect(self, session: HostSession, batch: Any) -> SSyncMaps:
        calls = session.capture[_CALLS]
        if not calls and session.capture.silent:
            session.capture.refuse_bypass()
            raise HostError(
                f"Expected a forward pass of {type(self.model).__name__} since the last `loss`, in training mode and "
                f"with gradients, but none was heard: {', '.join(map(repr, session.capture.silent))} did not run. Call "
                "model.train(), leave no_grad off, and call `loss` once after each forward pass, made by "
                "model(...), since model.forward(...) goes past hooks. A model that was compiled and run before needs "
                "torch._dynamo.reset()."
            )
        try:
            return session.collect(session.capture.last(_CALLS) if batch is None else batch, self.config)
        except (HostError, ShapeError) as error:
            if len(calls) < 2:
                raise
            raise type(error)(
                f"{error} {type(self.model).__name__} ran {len(calls)} times since the last `loss`, and all of it "
                "was taken for one step: call `loss` after each forward pass, `discard()` after one whose step is "
                "given up, and put others into `with ssync.paused():`."
            ) from error

    def _listen(self) -> None:
        """Forgets the last step, and listens to the next one if it has to be heard."""
        session = self._session
        if session is None:
            return
        session.close()
        if not session.checked or self._engine.phase(self.step) is not Phase.OFF:
            session.open(training_only=True)


def _batch_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a model is called with: a batch, or tensors."""
    values = [*args, *kwargs.values()]
    return next((value for value in values if isinstance(value, Mapping)), values)
