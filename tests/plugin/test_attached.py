"""`attach`: SSync in a loop without Lightning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from ssync_pl import LightningHost, SSyncCallback, SSyncConfig, attach
from ssync_pl.errors import ConfigError, HostError, SSyncError
from ssync_pl.hosts import SAVi


@pytest.fixture
def model() -> SAVi:
    return _model()


def _model() -> SAVi:
    torch.manual_seed(0)
    return SAVi(
        num_slots=3, slot_dim=8, slot_init="learned", encoder_channels=(8,), encoder_strides=(2,), feature_dim=8,
        decoder_broadcast=(4, 4), decoder_channels=(8,), decoder_strides=(2,), corrector_sharpness=3.0,
    )  # fmt: skip


def _video(seed: int = 1) -> torch.Tensor:
    return torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def _host_loss(model: nn.Module, video: torch.Tensor | None = None) -> torch.Tensor:
    return model(_video() if video is None else video).reconstruction.square().mean()


def _train(model: nn.Module, ssync: Any, seeds: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in seeds:
        optimizer.zero_grad()
        ssync.add(_host_loss(model, _video(seed))).backward()
        optimizer.step()


def test_a_loop_equals_the_callback():
    options: dict[str, Any] = {"warmup_steps": 2, "ramp_steps": 2, "relative_weight": 0.3, "guard_window": 1}
    looped, wrapped = _model(), _model()
    with attach(looped, **options) as ssync:
        _train(looped, ssync, range(5))
    trainer = L.Trainer(
        max_epochs=1, callbacks=[SSyncCallback(**options)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    host = LightningHost(wrapped, _host_loss, lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    trainer.fit(host, torch.utils.data.DataLoader([_video(seed) for seed in range(5)], batch_size=None, shuffle=False))
    for (name, a), b in zip(looped.state_dict().items(), wrapped.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(looped.corrector.to_q.weight, _model().corrector.to_q.weight)


def test_validation_is_not_heard(model):
    with attach(model, warmup_steps=0) as ssync:
        loss = _host_loss(model)
        with torch.no_grad():
            _host_loss(model, _video(2))
        _host_loss(model.eval(), _video(3))
        model.train()
        with ssync.paused():
            _host_loss(model, _video(4))
        first = ssync.loss(loss)
        _host_loss(model, _video(5))
        ssync.discard()
        _host_loss(model)
        assert torch.equal(ssync.loss(), first)
        assert ssync.step == 2


def test_accumulation_counts_optimizer_steps(model):
    terms = []
    with attach(model, warmup_steps=2, accumulate=2) as ssync:
        for _ in range(6):
            _host_loss(model)
            terms.append(bool(ssync.loss() > 0))
    assert terms == [False, False, False, False, True, True]


def test_a_resumed_loop_goes_on():
    options: dict[str, Any] = {"total_steps": 10, "warmup_ratio": 0.3, "relative_weight": 0.2, "guard_window": 2}
    whole, parts = _model(), _model()
    with attach(whole, **options) as ssync:
        _train(whole, ssync, range(10))
        expected = ssync.state_dict()
    with attach(parts, **options) as ssync:
        _train(parts, ssync, range(6))
        state = copy.deepcopy(ssync.state_dict())
    with attach(parts, **options) as ssync:
        ssync.load_state_dict(state)
        _train(parts, ssync, range(6, 10))
        assert ssync.state_dict() == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert attach(parts, start_step=6, **options).step == 6


def test_wrapped_models_are_found_inside(model):
    compiled, parallel = torch.compile(model, backend="eager"), nn.DataParallel(model)
    outer, terms = nn.Sequential(nn.ModuleDict({"net": model})), []
    for host, run in ((compiled, compiled), (outer, model), (parallel, parallel)):
        torch._dynamo.reset()
        with attach(host, warmup_steps=0) as ssync:
            _host_loss(run)
            terms.append(ssync.loss())
    assert terms[0] > 0
    torch.testing.assert_close(terms[0], terms[1])
    torch.testing.assert_close(terms[2], terms[1], rtol=0, atol=0)


def test_nothing_stays_on_the_model(model):
    keys = list(model.state_dict())

    def fail() -> None:
        with attach(model, warmup_steps=0):
            _host_loss(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    ssync = attach(model, warmup_steps=0)
    with ssync, pytest.raises(SSyncError, match="entered already"), ssync:
        pass


def test_collapse_can_stop_a_loop(model):
    with attach(model, warmup_steps=0, guard_window=1, on_collapse="stop", collapse_threshold=0.9) as ssync:
        _host_loss(model)
        ssync.loss()
        with torch.no_grad():
            model.decoder.layers[-1].weight.zero_()
            model.decoder.layers[-1].bias.zero_()
        _host_loss(model)
        assert not ssync.should_stop
        with pytest.warns(UserWarning, match="Slots fall out of use"):
            ssync.loss()
        assert ssync.should_stop


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": None}, r"`total_steps` for warmup_ratio=0\.3"),
        ({"config": SSyncConfig(), "n_bd": 2}, r"got both \(n_bd\)"),
        ({"config": {"warmup_steps": 0}}, "`config` to be an SSyncConfig, but got dict"),
        ({"start": "mature"}, "start"),
        ({"accumulate": 0}, "`accumulate`.* but got 0"),
        ({"start_step": -1}, "`start_step`.* but got -1"),
        ({"total_steps": "100"}, "`total_steps`.* but got '100'"),
        ({"total_steps": -5}, "`total_steps`.* but got -5"),
        ({"model": SAVi}, "`model` to be a torch.nn.Module, but got SAVi"),
        ({"attention": "corrector"}, "`attention` and `masks` to come together"),
        ({"attention": 3, "masks": "decoder"}, "a place"),
        ({"attention": "softmax:a:\u00b2", "masks": "decoder"}, "axis"),
        ({"attention": "a", "masks": "b", "grid": ("a", "b")}, "`grid`"),
        ({"attention": "a", "masks": "b", "grid": (-4, -6)}, "`grid`"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, message):
    with pytest.raises(ConfigError, match=message):
        attach(**{"model": nn.Identity(), "total_steps": 10, **arguments})


def test_models_losses_and_states_that_cannot_be_used(model):
    with pytest.raises(HostError, match="Linear"), attach(nn.Linear(1, 1), warmup_steps=0):
        pass
    with attach(model, warmup_steps=5) as ssync:
        for wrong in (None, 1.0, {"loss": torch.ones(())}, torch.ones(2)):
            _host_loss(model)
            with pytest.raises(ConfigError, match="Expected argument `host_loss` to be"):
                ssync.add(wrong)
            ssync.discard()
    with attach(model, warmup_steps=0, relative_weight=0.1) as ssync:
        _host_loss(model)
        with pytest.raises(ConfigError, match="relative_weight"):
            ssync.loss()
    with attach(model, warmup_steps=0) as ssync:
        _host_loss(model)
        _host_loss(model)
        with pytest.raises(HostError, match=r"ran 2 times since the last `loss`.*discard.*paused"):
            ssync.loss()
    model.requires_grad_(False)
    with attach(model, warmup_steps=0) as ssync:
        _host_loss(model)
        with pytest.raises(HostError, match="decoder masks of SAVi to carry gradient"):
            ssync.loss()
    with pytest.raises(SSyncError, match="not entered"):
        ssync.loss()
    for state in (None, {}, {"calls": 3}):
        with pytest.raises(ConfigError, match=r"what `state_dict` of an attached SSync returned, but .*guard"):
            attach(nn.Identity(), total_steps=10).load_state_dict(state)


@pytest.mark.parametrize("forget", ["eval", "no_grad", "forward"])
def test_an_unheard_forward_pass_is_named(model, forget):
    model.train(forget != "eval")
    with attach(model, warmup_steps=0) as ssync:
        if forget != "forward":
            with torch.set_grad_enabled(forget != "no_grad"):
                model(_video())
        with pytest.raises(HostError, match=r"in training mode and with gradients, but none was heard: .*model.train"):
            ssync.loss()


def test_the_end_says_when_it_ran(model, caplog):
    with warnings.catch_warnings(), caplog.at_level("INFO", logger="lightning.pytorch.ssync_pl"):
        warnings.simplefilter("error")
        with attach(model, warmup_steps=1, guard_window=1) as ssync:
            for _ in range(3):
                _host_loss(model)
                ssync.loss()
    assert caplog.messages[-1] == "SSync ran from optimizer step 1 to the end at step 3."
    ssync = attach(model, warmup_steps=9)
    ssync.__enter__()
    _host_loss(model)
    ssync.loss()
    with pytest.warns(UserWarning, match="SSync never ran.*ended at step 1"):
        ssync.__exit__(None)
