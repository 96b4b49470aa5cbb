import dataclasses
import inspect
import types

import lightning.pytorch as L
import pytest
import torch
from jsonargparse import ArgumentParser
from tiny_hosts import ManualHost, MixinHost, assert_untouched, fit, in_hook, make_callback, make_host
from torch import nn

from ssync_pl import SSyncCallback, SSyncConfig, ssync_loss
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.plugin.callback import callback_class

NAN, INF = float("nan"), float("inf")
PATHS = {"attention": "corrector:masks", "masks": "decoder:masks"}
# Values that are taken, and values that are refused
RANGES = {
    "mode": (["auto"], ["best", None, ["auto"]]),
    "merge_threshold": ([0.0, 1.0], [-0.1, 1.1, NAN, "0.7"]),
    "merge": ([False], ["yes"]),
    "merge_by": (["soft_iou"], ["iou", None]),
    "n_bd": ([0, 10], [-1, 11, 1.5, True]),
    "n_nbd": ([1, 11], [0, 12, "1"]),
    "n_noise": ([4], [-1, 11]),
    "temperature": ([0.5], [0.0, -1.0, INF, NAN]),
    "loss": (["ce"], ["mse", None]),
    "boundary_weight": ([0.0, 1], [-1.0, INF, NAN]),
    "interior_weight": ([0.25], [-1.0, INF, NAN]),
    "relative_weight": ([1e-6, 10.0, None], [0.0, -1.0, INF, NAN, "0.1"]),
    "least_agreement": ([0.0, 0.6], [-0.1, 1.0, NAN, "0.6"]),
    "gradient_share": ([0.3, None], [0.0, 1.0, INF, NAN, "0.1"]),
    "warmup_ratio": ([0.0, 1.0], [-0.1, 1.1, NAN, True]),
    "warmup_steps": ([0, None], [-1, 1.5]),
    "ramp_steps": ([8], [-1, None]),
    "on_collapse": (["stop"], ["ignore"]),
    "collapse_threshold": ([0.7], [0.0, 1.0, NAN]),
    "guard_window": ([1], [0, -1, 2.0]),
    "sync_counts": ([True], [None]),
    "backend": (["torch"], ["cuda", None]),
}
NAMES = [field.name for field in dataclasses.fields(SSyncConfig)]


def test_defaults_are_the_published_ones():
    config = SSyncConfig()
    assert (config.merge_threshold, config.n_bd, config.n_nbd, config.n_noise, config.temperature) == (0.7, 1, 1, 1, 1)
    assert (config.loss, config.boundary_weight, config.interior_weight) == ("brier", 1, 1)
    assert (config.warmup_ratio, config.ramp_steps, config.relative_weight, config.sync_counts) == (0.3, 0, None, False)
    parameters, options = inspect.signature(ssync_loss).parameters, config.loss_options()
    assert {name: parameters[name].default for name in options} == options
    changes = {"merge_threshold": 0.5, "merge": False, "n_bd": 2, "loss": "ce", "sync_counts": True}
    assert SSyncConfig(**changes).loss_options() == options | changes


@pytest.mark.parametrize(
    ("given", "others"),
    [
        ({}, {"merge_threshold": 0.5, "warmup_ratio": 0.5, "on_collapse": "backoff", "gradient_share": 0.1}),
        ({"merge_threshold": 0.7, "on_collapse": "warn"}, {"warmup_ratio": 0.5, "gradient_share": 0.1}),
        ({"relative_weight": 0.1}, {"gradient_share": None}),
        ({"gradient_share": 0.3, "warmup_ratio": 0.3}, {"relative_weight": None, "collapse_threshold": 0.9}),
    ],
)
def test_auto_settles_what_is_not_given(given, others):
    config = SSyncCallback(mode="auto", **given).config
    assert {name: getattr(config, name) for name in given | others} == given | others


@pytest.mark.parametrize("name", NAMES)
def test_ranges(name):
    taken, refused = RANGES[name]
    for value in taken:
        assert getattr(SSyncConfig(**{name: value}), name) == value
        assert SSyncCallback(**{name: value}).engine.config == SSyncConfig(**{name: value})
    for value in refused:
        with pytest.raises(ConfigError, match=f"Expected argument `{name}` to be .*, but got ") as caught:
            SSyncConfig(**{name: value})
        assert str(value) in str(caught.value)


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


def test_a_configuration_file_reaches_the_callback(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SSyncCallback, "callback")
    file = tmp_path / "a.yaml"
    file.write_text("callback: {class_path: SSyncCallback, init_args: {relative_weight: 0.1, grid: [3, 4], merge: no}}")
    made = parser.instantiate_classes(parser.parse_args(["--config", str(file), "--callback.n_bd=2"])).callback
    assert (made.config, made.grid) == (SSyncConfig(relative_weight=0.1, merge=False, n_bd=2), (3, 4))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention": "corrector"}, "`attention` and `masks` to come together"),
        ({"adapter": "savi", **PATHS}, "either `adapter` or `attention` and `masks`"),
        ({"attention_kind": "logits"}, "only beside `attention` and `masks`"),
        ({"start": "mature"}, "but got start. Did you mean `warmup_ratio`"),
        ({"warm_up_steps": 3}, "but got warm_up_steps. Did you mean `warmup_steps`"),
        ({"zzz": 3}, "but got zzz.$"),
        ({"adapter": ["savi"]}, "`adapter` to be a name or an adapter"),
        ({"n_bd": "1"}, "`n_bd` .* but got '1'"),
        ({"relative_weight": "0.1"}, "a number above 0, without quotes, .* but got '0.1'"),
    ],
)
def test_arguments_that_contradict_each_other_or_do_not_exist(options, match):
    with pytest.raises(ConfigError, match=match):
        SSyncCallback(**options)


def test_a_class_of_another_namespace():
    class OldCallback:
        pass

    kind = callback_class(types.SimpleNamespace(Callback=OldCallback))
    made = kind(merge_threshold=0.6, warmup_steps=3)
    assert isinstance(made, OldCallback)
    assert not isinstance(made, L.Callback)
    assert (kind.__name__, kind.__doc__) == ("SSyncCallback", SSyncCallback.__doc__)
    assert made.config == SSyncConfig(merge_threshold=0.6, warmup_steps=3)
    assert kind.on_fit_start is SSyncCallback.on_fit_start
    assert callback_class(L) is SSyncCallback
    with pytest.raises(ConfigError, match="a class `Callback`"):
        callback_class(types)


SecondCallback = type("SecondCallback", (SSyncCallback,), {})


def with_part(part, name, value):
    def make():
        host = make_host()
        setattr(host.get_submodule(part), name, value)
        return host

    return make


DETACHED, SPOILED = with_part("corrector", "detach", True), with_part("decoder", "nan", True)
MORE = with_part("decoder", "extra_slots", 1)
LATE, SPARE = {"warmup_steps": 100}, with_part("", "spare", nn.Identity())
SOFT = {"attention": "corrector.soft", "attention_kind": "probs"}
# The host, the options of the callback or callbacks, the error, and words of its message.
CASES = {
    "manual optimization": (lambda: make_host(ManualHost), {}, HostError, ["automatic_optimization=False", "mixin"]),
    "unrecognised": (make_host, [SSyncCallback()], HostError, ["TinyHost is none", "attention='path", "Candidates: c"]),
    "unknown path": (make_host, {"attention": "corrector.softmax"}, HostError, ["no child 'softmax'", "to_q, to_k"]),
    "another adapter": (make_host, [SSyncCallback("savi")], HostError, ["'savi'", "TinyHost", "corrector"]),
    "silent module": (SPARE, {"attention": "spare"}, HostError, ["run 'spare', but it did not", "_dynamo.reset()"]),
    "a list is returned": (lambda: make_host(returns="list"), {}, HostError, ["or None, but got list"]),
    "attention without gradient": (DETACHED, {}, HostError, ["slot attention of TinyHost", "detached"]),
    "masks without gradient": (with_part("decoder", "detach", True), {}, HostError, ["decoder masks", "detached"]),
    "no gradient, in the warm-up": (DETACHED, LATE, HostError, ["slot attention of TinyHost"]),
    "reentrant": (lambda: make_host(checkpointing="reentrant"), SOFT, HostError, ["use_reentrant=False"]),
    "NaN": (SPOILED, {}, ShapeError, ["`mask_logits` to be finite"]),
    "NaN, in the warm-up": (SPOILED, LATE, ShapeError, ["`mask_logits` to be finite"]),
    "slot counts that differ": (MORE, {}, ShapeError, ["(2, 4, 12)", "(2, 2, 5, 12)"]),
    "logits as probabilities": (make_host, {"masks_kind": "probs"}, ShapeError, ["`mask_probs`"]),
    "two callbacks": (make_host, [make_callback(), make_callback(SecondCallback)], HostError, ["already has SSync"]),
    "mixin beside the callback": (lambda: make_host(MixinHost), {}, HostError, ["is an SSyncRegularizer"]),
}


@pytest.mark.parametrize(("host", "callbacks", "error", "words"), CASES.values(), ids=CASES.keys())
def test_refused_with_what_to_do(host, callbacks, error, words):
    host = host()
    with pytest.raises(error) as caught:
        fit(host, *(callbacks if isinstance(callbacks, list) else [make_callback(**callbacks)]), steps=1)
    assert [word for word in words if word not in str(caught.value)] == []
    assert_untouched(host)


@pytest.mark.parametrize(("part", "weight"), [("corrector", "interior_weight"), ("decoder", "boundary_weight")])
def test_a_side_that_is_not_trained_needs_no_gradient(part, weight):
    trainer = fit(with_part(part, "detach", True)(), make_callback(**{weight: 0.0}), steps=1)
    assert "ssync/boundary_loss" in trainer.callback_metrics


def test_maps_that_turn_to_nan_later_are_named():
    def turn(trainer, module, *args):
        module.decoder.nan = trainer.global_step == 2

    host = make_host()
    with pytest.raises(ShapeError, match=r"mask.* to be finite"):
        fit(host, make_callback(), in_hook("on_train_batch_start", turn))
    assert_untouched(host)
    assert all(bool(torch.isfinite(value).all()) for value in host.state_dict().values())
