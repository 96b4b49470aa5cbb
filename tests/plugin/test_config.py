"""Settings are checked when they are made, named in errors, and are the same wherever a user gives them."""

import dataclasses
import inspect

import pytest
from jsonargparse import ArgumentParser

from ssync_pl import SSyncCallback, SSyncConfig, attach, ssync_loss
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import SAVi

NAN, INF = float("nan"), float("inf")

REFUSED = {
    "merge_threshold": [-0.1, 1.1, NAN, "0.7"],
    "merge": ["yes"],
    "n_bd": [-1, 11, 1.5, True],
    "n_nbd": [0, 12, "1"],
    "n_noise": [-1, 11],
    "temperature": [0.0, -1.0, INF, NAN],
    "loss": ["mse", None],
    "boundary_weight": [-1.0, INF, NAN],
    "interior_weight": [-1.0, INF, NAN],
    "relative_weight": [0.0, -1.0, INF, NAN, "0.1"],
    "warmup_ratio": [-0.1, 1.1, NAN, True],
    "warmup_steps": [-1, 1.5],
    "ramp_steps": [-1, None],
    "on_collapse": ["ignore", None],
    "collapse_threshold": [0.0, 1.0, NAN],
    "guard_window": [0, -1, 2.0],
    "sync_counts": [None],
    "backend": ["cuda", None],
}
TAKEN = {
    "merge_threshold": [0.0, 1.0],
    "merge": [False],
    "n_bd": [0, 10],
    "n_nbd": [1, 11],
    "n_noise": [4],
    "temperature": [0.5],
    "loss": ["ce"],
    "boundary_weight": [0.0, 1],
    "interior_weight": [0.25],
    "relative_weight": [1e-6, 10.0, None],
    "warmup_ratio": [0.0, 1.0],
    "warmup_steps": [0, None],
    "ramp_steps": [8],
    "on_collapse": ["stop"],
    "collapse_threshold": [0.7],
    "guard_window": [1],
    "sync_counts": [True],
    "backend": ["torch"],
}
NAMES = [field.name for field in dataclasses.fields(SSyncConfig)]


def test_defaults_are_the_published_ones():
    config = SSyncConfig()
    assert (config.merge_threshold, config.n_bd, config.n_nbd, config.n_noise, config.temperature) == (0.7, 1, 1, 1, 1)
    assert (config.loss, config.boundary_weight, config.interior_weight) == ("brier", 1, 1)
    assert (config.warmup_ratio, config.ramp_steps, config.relative_weight, config.sync_counts) == (0.3, 0, None, False)


@pytest.mark.parametrize("name", NAMES)
def test_ranges(name):
    for value in TAKEN[name]:
        assert getattr(SSyncConfig(**{name: value}), name) == value
        assert SSyncCallback(**{name: value}).engine.config == SSyncConfig(**{name: value})
    for value in REFUSED[name]:
        with pytest.raises(ConfigError, match=f"Expected argument `{name}` to be .*, but got ") as caught:
            SSyncConfig(**{name: value})
        assert str(value) in str(caught.value)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SSyncConfig().n_bd = 2


@pytest.mark.parametrize("make", [SSyncCallback, lambda **options: attach(SAVi(num_slots=2), **options)])
def test_a_setting_that_does_not_exist_is_named(make):
    with pytest.raises(ConfigError, match="start"):
        make(start="mature")


def test_loss_options_are_arguments_of_the_loss_with_the_same_defaults():
    parameters = inspect.signature(ssync_loss).parameters
    options = SSyncConfig().loss_options()
    assert {name: parameters[name].default for name in options} == options
    changed = SSyncConfig(merge_threshold=0.5, merge=False, n_bd=2, loss="ce", sync_counts=True).loss_options()
    assert changed == {**options, "merge_threshold": 0.5, "merge": False, "n_bd": 2, "loss": "ce", "sync_counts": True}


def test_the_command_line_lists_and_explains_every_setting(capsys):
    parser = ArgumentParser()
    parser.add_subclass_arguments(SSyncCallback, "callback")
    with pytest.raises(SystemExit):
        parser.parse_args(["--callback.help", "SSyncCallback"])
    text = capsys.readouterr().out
    own = ["adapter", "attention", "masks", "attention_kind", "masks_kind", "grid"]
    for name in [*own, *NAMES]:
        # The option at the start of a line, its explanation behind it.
        entry = text[text.index(f"\n  --callback.{name} ") :].split("\n  --")[1]
        assert len(entry.partition("(type:")[0].split()) >= 5, name
    assert set(inspect.signature(SSyncCallback).parameters) == {*own, *NAMES}


def test_a_configuration_file_reaches_the_callback(tmp_path, capsys):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SSyncCallback, "callback")
    file = tmp_path / "a.yaml"
    file.write_text("callback: {class_path: SSyncCallback, init_args: {relative_weight: 0.1, grid: [3, 4], merge: no}}")
    made = parser.instantiate_classes(parser.parse_args(["--config", str(file), "--callback.n_bd=2"])).callback
    assert made.config == SSyncConfig(relative_weight=0.1, merge=False, n_bd=2)
    assert made.grid == (3, 4)
    file.write_text("callback: {class_path: SSyncCallback, init_args: {start: mature}}")
    with pytest.raises(SystemExit):
        parser.parse_args(["--config", str(file)])
    assert "start" in capsys.readouterr().err
