"""What callbacks put around a method of a host, and what they do with the loss of a training step."""

import copy
import functools
import types
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar

from torch import Tensor

from ssync_pl.errors import HostError


class WrappedMethod:
    """A method of one host with something around it, once; a copied or pickled host gets its own plain method back.

    ``run(method, *args, **kwargs)`` is called in the method's place; ``owner`` says whose it is, for messages.
    """

    def __init__(self, host: Any, name: str, run: Callable[..., Any], owner: str) -> None:
        method = getattr(host, name)
        if isinstance(method, WrappedMethod):
            found = f"{type(host).__name__} already has {method.owner} in its {name}"
            raise HostError(f"Expected one regulariser, but {found}. Remove one of the two callbacks.")
        functools.update_wrapper(self, method)
        self.host = host
        self.name = name
        self.owner: str = owner
        self.run = run
        self._method = method
        self._own = host.__dict__.get(name)
        setattr(host, name, self)

    def restore(self) -> None:
        """Puts the host's method back."""
        if self._own is not None:
            setattr(self.host, self.name, self._own)
        else:
            self.host.__dict__.pop(self.name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs what stands in the method's place."""
        return self.run(self._method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.host))
        return _plain_method(twin if twin is not None else self.host, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_plain_method, (self.host, self.name))


def _plain_method(host: Any, name: str) -> Callable[..., Any]:
    return types.MethodType(getattr(type(host), name), host)


def loss_of(output: Any) -> Tensor | None:
    """Finds the 0-dim loss in what a training step returned; None where the step is skipped."""
    loss = output.get("loss") if isinstance(output, MutableMapping) else output
    if isinstance(loss, Tensor) or output is None:
        return loss
    raise HostError(
        f"Expected the training step to return a tensor, a dict with 'loss', or None, but got {type(output).__name__}."
    )


def with_loss(output: Any, total: Tensor) -> Any:
    """Returns what a training step returned with another loss; a dict is copied, since the host may keep its own."""
    if isinstance(output, Tensor):
        return total
    output = copy.copy(output)
    output["loss"] = total
    return output


class LogSteps:
    """Says in which training steps numbers are worth logging.

    Lightning makes some 1,800 Python calls for each number that is logged, and drops it unless the step is one of
    ``log_every_n_steps``. The first step of each epoch counts too, so that ``callback_metrics`` has the names.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None

    def due(self, trainer: Any) -> bool:
        """Says whether this step's numbers are logged; called once in each step that has some."""
        first = trainer.current_epoch != self._epoch
        self._epoch = trainer.current_epoch
        return first or getattr(getattr(trainer, "_logger_connector", None), "should_update_logs", True)


class StepCallback:
    """What callbacks that change a host's training step share: it is wrapped, and hooks listen, while it is trained.

    A subclass sets ``_session``, calls `wrap` in `on_fit_start`, and gives ``_step(trainer, host, step, *args)``, which
    runs in the step's place.
    """

    owner: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._session: Any = None  # whose `remove` takes the hooks off
        self._wrapped: WrappedMethod | None = None
        self._log_steps = LogSteps()

    def wrap(self, trainer: Any, host: Any) -> None:
        """Puts `_step` in the place of the host's training step."""
        step = functools.partial(self._step, trainer, host)  # type: ignore[attr-defined]
        self._wrapped = WrappedMethod(host, "training_step", step, self.owner)
        self._log_steps = LogSteps()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Puts the host back as it was."""
        session, self._session = self._session, None
        wrapped, self._wrapped = self._wrapped, None
        if session is not None:
            session.remove()
        if wrapped is not None:
            wrapped.restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Puts the host back as it was; Lightning calls no `teardown` after an error or Ctrl-C."""
        self.teardown(trainer, pl_module, "fit")

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not hold on to the host, its hooks or tensors of a graph.
        return {**self.__dict__, "_session": None, "_wrapped": None}
