"""What callbacks put around a method of a host, and what they do with the loss of a training step."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor

from ssync_pl.errors import HostError

__all__ = ["LogSteps", "WrappedMethod", "loss_of", "step_logger", "with_loss"]


class WrappedMethod:
    """A method of one host with something around it; a copied or pickled host gets its own plain method back.

    Args:
        host: The host; its method is replaced at once.
        name: Of the method.
        run: Called as ``run(method, *args, **kwargs)`` in its place.
        owner: What is put around it, for messages.

    Example:
        >>> class Host:
        ...     def training_step(self, batch): return batch
        >>> host = Host()
        >>> wrapped = WrappedMethod(host, "training_step", lambda step, batch: 1 + step(batch), "one more")
        >>> host.training_step(2)
        3
        >>> wrapped.restore()
        >>> host.training_step(2), vars(host)
        (2, {})
    """

    def __init__(self, host: Any, name: str, run: Callable[..., Any], owner: str) -> None:
        method = getattr(host, name)
        functools.update_wrapper(self, method)
        self.host = host
        self.name = name
        self.owner = owner
        self._method = method
        self.run = run
        self._own = host.__dict__.get(name)
        setattr(host, name, self)

    def restore(self) -> None:
        """Put the host's method back.

        Example:
            >>> import types
            >>> host = types.SimpleNamespace(step=len)
            >>> WrappedMethod(host, "step", lambda step, x: 0, "nothing").restore()
            >>> host.step is len
            True
        """
        if self._own is not None:
            setattr(self.host, self.name, self._own)
        else:
            self.host.__dict__.pop(self.name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what stands in the method's place.

        Args:
            *args: Of the method.
            **kwargs: Of the method.

        Returns:
            What it returns.
        """
        return self.run(self._method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.host))
        return _plain_method(twin if twin is not None else self.host, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_plain_method, (self.host, self.name))


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned.

    Args:
        output: Of ``training_step``.

    Returns:
        0-dim loss; None where the step is skipped.

    Raises:
        HostError: There is none.

    Example:
        >>> loss_of(None) is None
        True
    """
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, MutableMapping):
        loss = output.get("loss")
        if isinstance(loss, Tensor):
            return loss
    raise HostError(
        f"Expected the training step to return a tensor, a dict with 'loss', or None, but got {type(output).__name__}."
    )


def with_loss(output: Any, total: Tensor) -> Any:
    """The same output with another loss in it.

    Args:
        output: Of ``training_step``, a tensor or a dict.
        total: 0-dim loss.

    Returns:
        The output for the Trainer; a dict is copied, since the host may keep a reference to its own.

    Example:
        >>> import torch
        >>> with_loss({"loss": torch.tensor(1.0), "aux": 3}, torch.tensor(2.0))
        {'loss': tensor(2.), 'aux': 3}
    """
    if isinstance(output, Tensor):
        return total
    output = copy.copy(output)
    output["loss"] = total
    return output


class LogSteps:
    """Says in which training steps numbers are worth logging.

    Lightning makes some 1,800 Python calls for each number that is logged, and drops it unless the step is one of
    ``log_every_n_steps``. In each pass the first step counts too, so that ``callback_metrics`` has the names.

    Example:
        >>> import types
        >>> epoch_loop = types.SimpleNamespace(_batches_that_stepped=0)
        >>> trainer = types.SimpleNamespace(current_epoch=0, log_every_n_steps=3, should_stop=False,
        ...     fit_loop=types.SimpleNamespace(epoch_loop=epoch_loop))
        >>> steps = LogSteps()
        >>> for epoch_loop._batches_that_stepped in range(4):
        ...     print(steps.due(trainer))
        True
        False
        True
        False
    """

    def __init__(self) -> None:
        self._pass: int | None = None

    def due(self, trainer: Any) -> bool:
        """Say whether this step's numbers are logged; called once in each step that has some.

        Args:
            trainer: The Trainer.

        Returns:
            Also True for a Trainer that does not tell its steps.
        """
        first = trainer.current_epoch != self._pass
        self._pass = trainer.current_epoch
        loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
        stepped, every = getattr(loop, "_batches_that_stepped", None), getattr(trainer, "log_every_n_steps", None)
        if first or not isinstance(stepped, int) or not isinstance(every, int):
            return True
        return (every > 0 and (stepped + 1) % every == 0) or trainer.should_stop


def step_logger(host: Any, batch_size: int) -> Callable[..., None]:
    """Writes numbers of a training step to a LightningModule's log.

    Args:
        host: The LightningModule.
        batch_size: Clips of the batch.

    Returns:
        A `LogFunction`.

    Example:
        >>> import types
        >>> host = types.SimpleNamespace(log=lambda name, value, **options: print(name, value, options))
        >>> step_logger(host, 4)("ssync/weight", 1.0)
        ssync/weight 1.0 {'prog_bar': False, 'batch_size': 4}
    """

    def log(name: str, value: Tensor | float, *, prog_bar: bool = False) -> None:
        host.log(name, value, prog_bar=prog_bar, batch_size=batch_size)

    return log


def _plain_method(host: Any, name: str) -> Callable[..., Any]:
    return types.MethodType(getattr(type(host), name), host)
