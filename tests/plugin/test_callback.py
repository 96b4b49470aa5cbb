"""Arguments, state and other namespaces of the callback; how it behaves in a Trainer is in the files beside."""

import copy
import pickle
import types

import lightning.pytorch as L
import pytest
import torch

from ssync_pl import SSyncCallback
from ssync_pl.adapters import PathAdapter, SaviAdapter
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.callback import callback_class

PATHS = {"attention": "corrector:masks", "masks": "decoder:masks"}


def test_paths_make_a_path_adapter():
    adapter = SSyncCallback(**PATHS, attention_kind="logits", grid=(6, 8)).adapter
    assert isinstance(adapter, PathAdapter)
    assert (adapter.attention, adapter.masks) == ("corrector:masks", "decoder:masks")
    assert (adapter.attention_kind, adapter.masks_kind, adapter.grid) == ("logits", "probs", (6, 8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention": "corrector"}, "`attention` and `masks` to come together"),
        ({"masks": "decoder"}, "`attention` and `masks` to come together"),
        ({"adapter": "savi", **PATHS}, "either `adapter` or `attention` and `masks`"),
        ({"adapter": SaviAdapter(), **PATHS}, "either `adapter` or `attention` and `masks`"),
        ({"attention_kind": "logits"}, "only beside `attention` and `masks`"),
        ({"masks_kind": "logits"}, "only beside `attention` and `masks`"),
    ],
)
def test_arguments_that_contradict_each_other(options, match):
    with pytest.raises(ConfigError, match=match):
        SSyncCallback(**options)


def test_state_is_plain_and_loads_safely(tmp_path):
    callback = SSyncCallback(relative_weight=0.1)
    callback.engine._host_average = torch.tensor(0.1)
    callback.engine.first_step = 3
    callback.engine.guard.watch(torch.tensor([3.0, 4.0]))
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    other = SSyncCallback(relative_weight=0.1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.state_dict() == callback.state_dict()
    earlier = {key: value for key, value in callback.state_dict().items() if key != "first_step"}
    other.load_state_dict(earlier)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(way):
    callback = SSyncCallback(**PATHS, merge_threshold=0.6)
    twin = way(callback)
    assert twin.config == callback.config
    assert twin.adapter.attention == "corrector:masks"
    assert twin.engine is not callback.engine


def test_other_stages_do_nothing():
    callback = SSyncCallback()
    for stage in ("validate", "test", "predict"):
        callback.setup(None, None, stage)
        callback.teardown(None, None, stage)
    callback.on_exception(None, None, ValueError())


def test_a_class_of_another_namespace():
    class OldCallback:
        """Stands for the `Callback` of a package whose Trainer accepts no other."""

    namespace = types.ModuleType("old_lightning")
    namespace.Callback = OldCallback
    kind = callback_class(namespace)
    made = kind(merge_threshold=0.6, warmup_steps=3)
    assert isinstance(made, OldCallback)
    assert not isinstance(made, L.Callback)
    assert (kind.__name__, kind.__doc__) == ("SSyncCallback", SSyncCallback.__doc__)
    assert made.config == SSyncCallback(merge_threshold=0.6, warmup_steps=3).config
    # Whatever Lightning may call is there in both.
    hooks = [name for name in dir(L.Callback) if not name.startswith("_")]
    own = [name for name in hooks if getattr(SSyncCallback, name) is not getattr(L.Callback, name)]
    assert own
    assert all(getattr(kind, name) is getattr(SSyncCallback, name) for name in own)
    assert callback_class(L) is SSyncCallback
    with pytest.raises(ConfigError, match="a class `Callback`"):
        callback_class(types)
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    assert issubclass(callback_class(pytorch_lightning), pytorch_lightning.Callback)
