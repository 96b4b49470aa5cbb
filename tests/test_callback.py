"""Arguments and state of the callback; how it behaves in a Trainer is in `contract`."""

import copy
import inspect
import pickle
from dataclasses import fields

import pytest
import torch

from ssync_pl import SSyncCallback, SSyncConfig
from ssync_pl.adapters import PathAdapter, SaviAdapter
from ssync_pl.errors import ConfigError

PATHS = {"attention": "corrector:masks", "masks": "decoder:masks"}


def test_takes_every_setting_with_the_same_default_and_type():
    parameters = inspect.signature(SSyncCallback.__init__).parameters
    for field in fields(SSyncConfig):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].annotation == field.type
    own = set(parameters) - {field.name for field in fields(SSyncConfig)}
    assert own == {"self", "adapter", "attention", "masks", "attention_kind", "masks_kind", "grid"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("merge_threshold", 0.6),
        ("merge", False),
        ("n_bd", 2),
        ("n_nbd", 3),
        ("n_noise", 4),
        ("temperature", 0.5),
        ("loss", "ce"),
        ("boundary_weight", 0.5),
        ("interior_weight", 0.25),
        ("relative_weight", 0.1),
        ("warmup_ratio", 0.2),
        ("warmup_steps", 7),
        ("ramp_steps", 8),
        ("start", "mature"),
        ("mature_agreement", 0.4),
        ("on_collapse", "stop"),
        ("collapse_threshold", 0.7),
        ("guard_window", 9),
        ("sync_counts", True),
    ],
)
def test_every_setting_reaches_the_engine(name, value):
    callback = SSyncCallback(**{name: value})
    assert callback.engine.config == SSyncConfig(**{name: value})


def test_docstring_names_every_argument():
    documented = {line.strip().partition(":")[0] for line in SSyncCallback.__doc__.splitlines()}
    assert set(inspect.signature(SSyncCallback.__init__).parameters) - {"self"} <= documented


def test_bad_settings_are_refused_when_it_is_made():
    with pytest.raises(ConfigError, match="`temperature`"):
        SSyncCallback(temperature=0)
    with pytest.raises(ConfigError, match="`on_collapse`"):
        SSyncCallback(on_collapse="panic")


def test_paths_make_a_path_adapter():
    adapter = SSyncCallback(**PATHS, attention_kind="logits", grid=(6, 8)).adapter
    assert isinstance(adapter, PathAdapter)
    assert (adapter.attention, adapter.masks) == ("corrector:masks", "decoder:masks")
    assert (adapter.attention_kind, adapter.masks_kind, adapter.grid) == ("logits", "probs", (6, 8))


@pytest.mark.parametrize("name", PATHS)
def test_one_path_alone(name):
    with pytest.raises(ConfigError, match="`attention` and `masks` to come together"):
        SSyncCallback(**{name: PATHS[name]})


@pytest.mark.parametrize("adapter", ["savi", SaviAdapter()])
def test_adapter_and_paths(adapter):
    with pytest.raises(ConfigError, match="either `adapter` or `attention` and `masks`, but got both"):
        SSyncCallback(adapter, **PATHS)


@pytest.mark.parametrize("options", [{"attention_kind": "logits"}, {"masks_kind": "logits"}])
def test_details_of_paths_without_paths(options):
    with pytest.raises(ConfigError, match="only beside `attention` and `masks`"):
        SSyncCallback(**options)


def test_state_is_plain_and_loads_safely(tmp_path):
    callback = SSyncCallback(relative_weight=0.1)
    callback.engine._host_average = torch.tensor(0.1)
    callback.engine.guard.watch(torch.tensor([3.0, 4.0]))
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    other = SSyncCallback(relative_weight=0.1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.state_dict() == callback.state_dict()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(way):
    callback = SSyncCallback(**PATHS, merge_threshold=0.6)
    twin = way(callback)
    assert twin.config == callback.config
    assert twin.adapter is not callback.adapter
    assert twin.adapter.attention == "corrector:masks"
    assert twin.engine is not callback.engine


def test_other_stages_do_nothing():
    callback = SSyncCallback()
    for stage in ("validate", "test", "predict"):
        callback.setup(None, None, stage)
        callback.teardown(None, None, stage)
    callback.on_exception(None, None, ValueError())
