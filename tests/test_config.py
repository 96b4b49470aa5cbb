"""Settings are checked when they are made, and the error names the setting."""

import dataclasses
import inspect

import pytest

from ssync_pl import SSyncConfig, ssync_loss
from ssync_pl.errors import ConfigError

NAN = float("nan")
INF = float("inf")


def test_defaults_are_the_published_ones():
    config = SSyncConfig()
    published = {
        "merge_threshold": 0.7,
        "n_bd": 1,
        "n_nbd": 1,
        "n_noise": 1,
        "temperature": 1.0,
        "loss": "brier",
        "boundary_weight": 1.0,
        "interior_weight": 1.0,
        "relative_weight": None,
        "warmup_ratio": 0.3,
        "warmup_steps": None,
        "ramp_steps": 0,
        "start": "schedule",
        "sync_counts": False,
    }
    assert {name: getattr(config, name) for name in published} == published


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("merge_threshold", [-0.1, 1.1, NAN]),
        ("n_bd", [-1, 11, 1.5, True]),
        ("n_nbd", [0, 12, "1"]),
        ("n_noise", [-1, 11]),
        ("temperature", [0.0, -1.0, INF, NAN]),
        ("loss", ["mse", None]),
        ("boundary_weight", [-1.0, INF, NAN]),
        ("interior_weight", [-1.0, INF, NAN]),
        ("relative_weight", [0.0, -1.0, INF, NAN]),
        ("warmup_ratio", [-0.1, 1.1, NAN]),
        ("warmup_steps", [-1]),
        ("ramp_steps", [-1]),
        ("start", ["late", None]),
        ("mature_agreement", [0.0, 1.1, NAN]),
        ("on_collapse", ["ignore", None]),
        ("collapse_threshold", [0.0, 1.0, NAN]),
        ("guard_window", [0, -1]),
    ],
)
def test_out_of_range(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"Expected argument `{name}` to be .*, but got ") as caught:
            SSyncConfig(**{name: value})
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("merge_threshold", [0.0, 1.0]),
        ("n_bd", [0, 10]),
        ("n_nbd", [1, 11]),
        ("warmup_ratio", [0.0, 1.0]),
        ("warmup_steps", [0, None]),
        ("boundary_weight", [0.0]),
        ("relative_weight", [1e-6, 10.0, None]),
        ("guard_window", [1]),
    ],
)
def test_limits_are_allowed(name, values):
    for value in values:
        assert getattr(SSyncConfig(**{name: value}), name) == value


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SSyncConfig().n_bd = 2


def test_loss_options_are_arguments_of_the_loss_with_the_same_defaults():
    options = SSyncConfig().loss_options()
    parameters = inspect.signature(ssync_loss).parameters
    assert {name: parameters[name].default for name in options} == options
    assert set(parameters) - set(options) == {"maps", "check_finite", "backend"}


def test_loss_options_carry_the_settings():
    config = SSyncConfig(merge_threshold=0.5, merge=False, n_bd=2, loss="ce", sync_counts=True)
    assert config.loss_options() | {"merge_threshold": 0.5, "merge": False, "n_bd": 2} == config.loss_options()
    assert (config.loss_options()["loss"], config.loss_options()["sync_counts"]) == ("ce", True)
