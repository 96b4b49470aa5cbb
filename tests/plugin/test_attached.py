import copy
import warnings

import pytest
import torch
from tiny_hosts import EXACT, PATHS, assert_same_weights, fit, hooks_of, make_callback, make_host, make_loader
from torch import nn

from ssync_pl import attach
from ssync_pl.errors import ConfigError, HostError, SSyncError
from ssync_pl.hosts import SAVi

BATCHES = list(make_loader(20))


@pytest.fixture
def host():
    return make_host()


def attached(host, **options):
    return attach(host, **{"warmup_steps": 0, **PATHS, **options})


def host_loss(host, batch=BATCHES[0]):
    return host(batch["video"])[1].reconstruction.square().mean()


def train(host, ssync, batches, optimizer=None):
    optimizer = host.configure_optimizers() if optimizer is None else optimizer
    for batch in batches:
        optimizer.zero_grad()
        ssync.add(host.host_loss(batch)[0]).backward()
        optimizer.step()


def test_a_loop_equals_the_callback(host):
    options = {"warmup_steps": 2, "ramp_steps": 2, "relative_weight": 0.3, "guard_window": 1}
    with attached(host, **options) as ssync:
        train(host, ssync, BATCHES[:4])
    wrapped = make_host()
    fit(wrapped, make_callback(**options))
    assert_same_weights(host, wrapped, **EXACT)
    assert not torch.equal(host.corrector.to_q.weight, make_host().corrector.to_q.weight)


def test_validation_is_not_heard(host):
    with attached(host) as ssync:
        loss = host_loss(host)
        with torch.no_grad():
            host_loss(host, BATCHES[1])
        host_loss(host.eval(), BATCHES[2])
        host.train()
        with ssync.paused():
            host_loss(host, BATCHES[3])
        first = ssync.loss(loss)
        host_loss(host, BATCHES[4])
        ssync.discard()
        host_loss(host)
        assert torch.equal(ssync.loss(), first)
        assert ssync.step == 2


def test_accumulation_counts_optimizer_steps_and_the_end_says_when_it_ran(host, caplog):
    terms, settings = [], {"accumulate": 2, "collapse_threshold": 0.01}
    with warnings.catch_warnings(), caplog.at_level("INFO", logger="lightning.pytorch.ssync_pl"):
        warnings.simplefilter("error")
        with attached(host, warmup_steps=2, **settings) as ssync:
            for _ in range(6):
                host_loss(host)
                terms.append(bool(ssync.loss() > 0))
    assert terms == [False, False, False, False, True, True]
    assert caplog.messages[-1] == "SSync ran from optimizer step 2 to the end at step 3."
    ssync = attached(host, warmup_steps=9)
    ssync.__enter__()
    train(host, ssync, BATCHES[:1])
    with pytest.warns(UserWarning, match="SSync never ran.*ended at step 1"):
        ssync.__exit__(None)


def test_a_resumed_loop_goes_on(host):
    options = {"warmup_steps": None, "warmup_ratio": 0.3, "total_steps": 10, "relative_weight": 0.2, "guard_window": 2}
    parts = make_host()
    with attached(host, **options) as ssync:
        train(host, ssync, BATCHES)
        expected = ssync.state_dict()
    optimizer = parts.configure_optimizers()
    with attached(parts, **options) as ssync:
        train(parts, ssync, BATCHES[:6], optimizer)
        state = copy.deepcopy(ssync.state_dict())
    with attached(parts, **options) as ssync:
        ssync.load_state_dict(state)
        train(parts, ssync, BATCHES[6:], optimizer)
        assert ssync.state_dict() == expected
    assert_same_weights(host, parts, **EXACT)


def test_nothing_stays_on_the_model(host):
    keys, ssync = list(host.state_dict()), attached(host)

    def fail():
        with ssync:
            host_loss(host)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(host.state_dict()) == keys
    assert hooks_of(host) == 0
    with ssync, pytest.raises(SSyncError, match="entered already"), ssync:
        pass


def test_collapse_can_stop_a_loop(host):
    with attached(host, guard_window=1, on_collapse="stop", collapse_threshold=0.9) as ssync:
        host_loss(host)
        ssync.loss()
        host.decoder.bias = 50.0
        host_loss(host)
        assert not ssync.should_stop
        with pytest.warns(UserWarning, match="Slots fall out of use"):
            ssync.loss()
        assert ssync.should_stop


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": None}, r"`total_steps` for warmup_ratio=0\.3"),
        ({"start": "mature"}, "got start. Did you mean `warmup_ratio`"),
        ({"accumulate": 0}, "`accumulate`.* but got 0"),
        ({"total_steps": "100"}, "`total_steps`.* but got '100'"),
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


def test_models_losses_and_states_that_cannot_be_used(host):
    with pytest.raises(HostError, match="Linear"), attach(nn.Linear(1, 1), warmup_steps=0):
        pass
    with attached(host, warmup_steps=5) as ssync:
        for wrong in (None, 1.0, {"loss": torch.ones(())}, torch.ones(2)):
            with pytest.raises(ConfigError, match="Expected argument `host_loss` to be"):
                ssync.add(wrong)
    with attached(host, relative_weight=0.1) as ssync:
        host_loss(host)
        with pytest.raises(ConfigError, match="relative_weight"):
            ssync.loss()
    with pytest.raises(SSyncError, match="not entered"):
        ssync.loss()
    with attached(host) as ssync:
        host_loss(host)
        host_loss(host)
        with pytest.raises(HostError, match=r"ran 2 times since the last `loss`.*discard.*paused"):
            ssync.loss()
    host.decoder.detach = True
    with attached(host) as ssync:
        host_loss(host)
        with pytest.raises(HostError, match="decoder masks of TinyHost to carry gradient"):
            ssync.loss()
    good = attached(host).state_dict()
    wrong = [{**good, name: value} for name in good for value in ("x", [], {}, object())]
    inside = [("factor", None), ("before", [1]), ("sum", [1, 2]), ("count", "many"), ("sum", 3)]
    wrong += [{**good, "guard": {**good["guard"], name: value}} for name, value in inside]
    for state in (None, 3, {}, {"calls": 3}, {**good, "calls": -1}, {**good, "calls": "3"}, *wrong):
        with pytest.raises(ConfigError, match="Expected what `state_dict` of"):
            attached(host).load_state_dict(state)


@pytest.mark.parametrize("forget", ["eval", "no_grad", "forward"])
def test_an_unheard_forward_pass_is_named(host, forget):
    host.train(forget != "eval")
    with attached(host) as ssync:
        if forget != "forward":
            with torch.set_grad_enabled(forget != "no_grad"):
                host_loss(host)
        with pytest.raises(HostError, match=r"in training mode and with gradients, but none was heard: .*model.train"):
            ssync.loss()
