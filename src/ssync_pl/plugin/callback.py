"""`SSyncCallback`: SSync for a LightningModule that its user does not want to edit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import lightning.pytorch as L

from ssync_pl.errors import ConfigError
from ssync_pl.plugin.callback_hooks import SSyncHooks

__all__ = ["SSyncCallback", "callback_class"]


class SSyncCallback(SSyncHooks, L.Callback):  # noqa: D101
    __doc__ = SSyncHooks.__doc__


def callback_class(namespace: ModuleType) -> Any:
    """`SSyncCallback` for the Trainer of another Lightning package.

    Trainers of ``pytorch_lightning`` 1.x take only callbacks that derive from their own ``Callback``; those of 2.x
    take `SSyncCallback` as it is.

    Args:
        namespace: The imported package that has the Trainer, such as ``pytorch_lightning``.

    Returns:
        A class with the arguments of `SSyncCallback`.

    Raises:
        ConfigError: The namespace has no ``Callback``.

    Example:
        >>> kind = callback_class(L)
        >>> issubclass(kind, L.Callback), kind(merge_threshold=0.6).config.merge_threshold
        (True, 0.6)
    """
    base = getattr(namespace, "Callback", None)
    if not isinstance(base, type):
        raise ConfigError(
            f"Expected a package with a class `Callback`, such as pytorch_lightning, but got {namespace!r}."
        )
    if base is L.Callback:
        return SSyncCallback
    return type("SSyncCallback", (SSyncHooks, base), {"__doc__": SSyncHooks.__doc__, "__module__": __name__})
