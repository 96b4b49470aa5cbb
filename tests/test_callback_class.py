"""`SSyncCallback` in Trainers of other Lightning packages."""

from __future__ import annotations

import types

import lightning.pytorch as L
import pytest

from ssync_pl import SSyncCallback
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.callback import callback_class


class _OldCallback:
    """Stands for the `Callback` of a package whose Trainer accepts no other."""


def test_a_class_of_the_given_namespace():
    namespace = types.ModuleType("old_lightning")
    namespace.Callback = _OldCallback
    kind = callback_class(namespace)
    made = kind(merge_threshold=0.6, warmup_steps=3)
    assert isinstance(made, _OldCallback)
    assert not isinstance(made, L.Callback)
    assert kind.__name__ == "SSyncCallback"
    assert kind.__doc__ == SSyncCallback.__doc__
    assert made.config == SSyncCallback(merge_threshold=0.6, warmup_steps=3).config
    # Whatever Lightning may call is there in both.
    hooks = [name for name in dir(L.Callback) if not name.startswith("_")]
    own = [name for name in hooks if getattr(SSyncCallback, name) is not getattr(L.Callback, name)]
    assert own
    assert [getattr(kind, name) is getattr(SSyncCallback, name) for name in own] == [True] * len(own)


def test_the_packages_own_class_stays():
    assert callback_class(L) is SSyncCallback
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    assert issubclass(callback_class(pytorch_lightning), pytorch_lightning.Callback)


def test_something_else_is_refused():
    with pytest.raises(ConfigError, match=r"a class `Callback`, such as pytorch_lightning, but got <module 'types'"):
        callback_class(types)
