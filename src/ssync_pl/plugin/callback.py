"""`SSyncCallback`: SSync for a LightningModule that its user does not want to edit."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import lightning.pytorch as L

from ssync_pl.adapters import HostAdapter
from ssync_pl.adapters.paths import MapKind, adapter_from
from ssync_pl.data.loader import mend_restart, mend_resume
from ssync_pl.errors import HostError, require
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.engine import SSyncEngine, handle_verdict, tell_end
from ssync_pl.plugin.regularizer import SSyncRegularizer
from ssync_pl.plugin.schedule import Phase
from ssync_pl.plugin.session import HostSession
from ssync_pl.plugin.wrapped_step import StepCallback, loss_of, with_loss


class SSyncHooks(StepCallback):
    """Adds SSync to the training step of an existing host.

    The callback wraps the host's ``training_step``: inside it the adapter listens to slot attention and decoder, and
    the two losses are added to what the host returns. No parameter, buffer or state-dict key is added, and everything
    is put back when the training ends or fails. During the warm-up nothing is captured, except in the first step, so
    that a host that cannot be used is refused at once, and in the last ``guard_window`` steps, which count the slots
    in use. At the end one line says from which step SSync ran, or why it never did.

    Note:
        It works in Trainers of ``lightning`` and of ``pytorch_lightning`` 2.6, with mixed precision, accumulation,
        clipping, weight averaging, compiled hosts and DDP; not with manual optimization. Older Trainers of
        ``pytorch_lightning``, 2.5.1 and 1.x, want a class of their own namespace: see `callback_class`.

    Args:
        adapter: How to read the host's maps: ``"auto"`` recognises it, a name picks an adapter, or pass an adapter.
        attention: For a host that no adapter knows: dotted path of the module that gives the attention over slots, as
            ``"path"`` or ``"path:key"``, or as ``"softmax:path"`` for what a softmax over slots inside of it is given.
            Needs ``masks`` too.
        masks: The same for the decoder's object masks.
        attention_kind: What ``attention`` gives: ``"probs"`` (softmax over slots) or ``"logits"``.
        masks_kind: What ``masks`` gives.
        grid: ``(H, W)`` patches, where neither the maps nor the frames' size tell.
        **settings: Settings of `SSyncConfig`, which explains each; the defaults are the published ones.

    Raises:
        ConfigError: A setting is out of range, or there is none of that name.
        HostError: In `setup`, `on_fit_start` or the first training step: the host cannot be used; the message says why.

    Source: SSync (arXiv 2606.15527).
    """

    owner = "SSync"

    def __init__(
        self,
        adapter: str | HostAdapter = "auto",
        attention: str | None = None,
        masks: str | None = None,
        attention_kind: MapKind = "probs",
        masks_kind: MapKind = "probs",
        grid: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.config = SSyncConfig.from_options(**settings)  # from here the command line knows the settings
        self.adapter, self.grid = adapter_from(adapter, attention, masks, attention_kind, masks_kind, grid)
        self.engine = SSyncEngine(self.config)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses hosts that a callback cannot serve, and forgets an earlier training."""
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
        if not getattr(trainer, "global_step", 0):  # else one that goes on in the same Trainer
            self.engine = SSyncEngine(self.config)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Recognises the host and wraps its step; only here, since a host may build modules in its own ``setup``."""
        self._session = HostSession(pl_module, self.adapter, self.grid)
        self.wrap(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fixes the warm-up, and refuses one that is a share of an unknown length."""
        mend_restart(trainer)
        self.engine.phase_in(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Sets right what Lightning leaves out when it resumes."""
        mend_resume(trainer)

    def _step(self, trainer: Any, host: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs in the place of the host's training step."""
        session: HostSession | None = self._session
        if session is None:
            return step(*args, **kwargs)
        phase = self.engine.phase_in(trainer)
        if phase is Phase.OFF and session.checked:
            return step(*args, **kwargs)
        with session.capture.window():
            output = step(*args, **kwargs)
            loss = loss_of(output)
            if loss is None:
                return output
            maps = session.collect(args[0] if args else kwargs.get("batch"), self.config)
            due = phase is Phase.ON and self._log_steps.due(trainer)
            log = functools.partial(host.log, batch_size=maps.shape[0]) if due else None
            term, verdict = self.engine.term(loss, maps, trainer.global_step, log)
        handle_verdict(verdict, trainer)
        return output if term is None else with_loss(output, loss + term)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Says from which step SSync ran, or why it never did."""
        tell_end(self.engine, trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Puts the host back as it was; after Ctrl-C, says from which step SSync ran."""
        if isinstance(exception, KeyboardInterrupt) and self._session is not None:
            tell_end(self.engine, trainer.global_step)
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: running averages and the guard's state, as plain numbers."""
        return self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self.engine.load_state_dict(state_dict)


# What editors and `help` show in the place of `**settings`; jsonargparse finds the settings by itself.
SSyncHooks.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(one for one in inspect.signature(SSyncHooks).parameters.values() if one.name != "settings"),
        *inspect.signature(SSyncConfig).parameters.values(),
    ]
)


class SSyncCallback(SSyncHooks, L.Callback):  # noqa: D101
    __doc__ = SSyncHooks.__doc__


def callback_class(namespace: ModuleType) -> Any:
    """Makes `SSyncCallback` for the Trainer of another Lightning package.

    Trainers of ``pytorch_lightning`` 2.5.1 and 1.x take only callbacks that derive from their own ``Callback``; those
    of 2.6 take `SSyncCallback` as it is.

    Args:
        namespace: The imported package that has the Trainer, such as ``pytorch_lightning``.

    Returns:
        A class with the arguments of `SSyncCallback`.

    Raises:
        ConfigError: The namespace has no ``Callback``.
    """
    base: Any = getattr(namespace, "Callback", None)
    require(isinstance(base, type), "a package with a class `Callback`, such as pytorch_lightning", repr(namespace))
    if base is L.Callback:
        return SSyncCallback
    return type("SSyncCallback", (SSyncHooks, base), {"__doc__": SSyncHooks.__doc__, "__module__": __name__})
