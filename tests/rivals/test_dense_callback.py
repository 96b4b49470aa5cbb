"""Dense alignment in the training of feature hosts: equal before it is on, trained after, resumed to the bit."""

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback, StepSeed
from ssync_pl.cli.trainer import run_trainer
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast, VideoSAUR
from ssync_pl.rivals.dense_alignment import DenseAlignment
from ssync_pl.rivals.dense_callback import DenseAlignmentCallback, _extended

SIZES = {"num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 6, "grid": (3, 4), "decoder_hidden": (8,)}
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0,
         "enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 0.5}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", [SlotContrast, VideoSAUR, DINOSAUR])


class Recorder(L.Callback):
    """Losses, gradients before clipping, logs and rates of every step."""

    def __init__(self):
        self.losses, self.gradients, self.logs, self.rates = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.logs.append(dict(trainer.callback_metrics))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def make_host(kind=SlotContrast, **options):
    torch.manual_seed(0)
    return kind(**{**SIZES, "warmup_steps": 2, "learning_rate": 1e-2, **options})


def make_callback(**options):
    return DenseAlignmentCallback(**{"warmup_steps": 0, "neighbours": 2, "redundancy_weight": 0.0, **options})


def hook(name, function):
    """A callback of one function."""
    callback = L.Callback()
    setattr(callback, name, function)
    return callback


def fit(host, *callbacks, steps=6, frames=4, seed=3, shuffle=False, ckpt_path=None, **options):
    generator, recorder = torch.Generator().manual_seed(1), Recorder()
    clips = [{"features": torch.randn(frames, 12, 6, generator=generator)} for _ in range(8)]
    trainer = L.Trainer(max_steps=steps, callbacks=[StepSeed(), *callbacks, recorder], **{**QUIET, **options})
    torch.manual_seed(seed)
    trainer.fit(host, DataLoader(clips, batch_size=2, shuffle=shuffle), ckpt_path=ckpt_path)
    return trainer, recorder


def assert_same(one, two):
    torch.testing.assert_close(dict(one), dict(two), rtol=0, atol=0)


def assert_untouched(host):
    assert not {"training_step", "configure_optimizers", "named_parameters"} & set(host.__dict__)
    assert not any(module._forward_hooks for module in host.modules())


@KINDS
def test_before_it_is_on_the_training_is_that_of_the_host_alone(kind):
    plain, never = make_host(kind), make_host(kind)
    _, alone = fit(plain, shuffle=True, steps=4)
    _, both = fit(make_host(kind), make_callback(warmup_steps=3), shuffle=True, steps=4)
    assert both.losses[:3] == alone.losses[:3]
    assert both.losses[3] != alone.losses[3]
    fit(never, make_callback(warmup_steps=100), shuffle=True, steps=4)
    assert_same(never.state_dict(), plain.state_dict())


@KINDS
def test_the_step_adds_what_the_module_gives(kind):
    class ByHand(kind):
        """The losses written into the training step."""

        def training_step(self, batch, batch_idx):
            seen = self(batch["features"])
            items = batch["features"] if self.is_video else batch["features"].flatten(0, 1)
            features = self.encoder(items)["features"].reshape(2, 4, 12, -1)
            rebuilt = seen.reconstruction[..., :6]
            maps = seen.attention_logits.softmax(2), seen.mask_logits.flatten(3).softmax(2)
            dense = self.losses_of(seen.targets, rebuilt, features, *maps, seen.slots, self.global_step).loss
            valid = torch.ones(2, 4, dtype=torch.bool)
            return sum(weight * loss for weight, loss in self.losses(seen, valid).values()) + dense

    by_hand, options = make_host(ByHand), {"neighbours": 2, "weight": 0.3, "redundancy_weight": 0.2}
    torch.manual_seed(3)
    by_hand.losses_of = DenseAlignment(6, 8, start_step=2, redundancy_steps=3, **options)
    callback = make_callback(warmup_steps=2, redundancy_steps=3, **options)
    _, expected = fit(by_hand, gradient_clip_val=None)
    _, recorder = fit(make_host(kind), callback, gradient_clip_val=None)
    torch.testing.assert_close(recorder.losses, expected.losses, rtol=1e-5, atol=1e-6)
    for step, wanted in zip(recorder.gradients, expected.gradients, strict=True):
        own = {name: value for name, value in wanted.items() if not name.startswith("losses_of")}
        torch.testing.assert_close(step, own, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(callback.losses.state_dict(), by_hand.losses_of.state_dict(), rtol=1e-4, atol=1e-5)


def test_projections_are_trained_clipped_and_follow_the_hosts_rate():
    callback, start = make_callback(warmup_steps=3), {}

    def at_start(trainer, module):
        start.update(copy.deepcopy(callback.losses.state_dict()))
        trained = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
        assert {id(p) for p in (*module.parameters(), *callback.losses.parameters())} == trained

    def before_zero(trainer, module, optimizer):
        if trainer.global_step > 3:
            assert all(p.grad is not None for p in callback.losses.parameters())
            every = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            assert torch.stack([g.norm() for g in every]).norm() <= 1e-3 * (1 + 1e-4)

    looks = hook("on_train_start", at_start), hook("on_before_zero_grad", before_zero)
    _, alone = fit(make_host(), gradient_clip_val=1e-3)
    _, recorder = fit(make_host(), callback, *looks, gradient_clip_val=1e-3)
    assert recorder.rates == alone.rates
    assert len({rate for rates in recorder.rates for rate in rates}) > 3
    assert all(not torch.equal(value, start[name]) for name, value in callback.losses.state_dict().items())


@pytest.mark.parametrize(("stop", "redundancy"), [(2, 0.1), (5, 0.0)])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, stop, redundancy):
    options = {"warmup_steps": 3, "redundancy_steps": 4, "redundancy_weight": redundancy}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    # Lightning starts the epoch's data over when it resumes inside an epoch, so one batch is an epoch here.
    host, callback = make_host(), make_callback(**options)
    _, whole = fit(host, callback, saver, steps=8, enable_checkpointing=True, limit_train_batches=1)
    path = tmp_path / f"step={stop}.ckpt"
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(make_host().state_dict())
    again, other = make_host(), make_callback(**options)
    _, rest = fit(again, other, steps=8, seed=99, ckpt_path=path, limit_train_batches=1)
    assert rest.losses == whole.losses[stop:]
    assert_same(again.state_dict(), host.state_dict())
    assert_same(other.losses.state_dict(), callback.losses.state_dict())


def test_a_checkpoint_of_the_host_alone_is_taken_up(tmp_path):
    saver, moments = ModelCheckpoint(tmp_path), []
    alone, _ = fit(make_host(), saver, steps=2, enable_checkpointing=True)

    def at_start(trainer, module):
        moments.extend(trainer.optimizers[0].state[p]["exp_avg"].clone() for p in module.parameters())
        assert len(trainer.optimizers[0].state) == len(moments)

    look = hook("on_train_start", at_start)
    trainer, _ = fit(make_host(), make_callback(), look, steps=4, ckpt_path=saver.best_model_path)
    assert trainer.global_step == 4
    assert len(trainer.optimizers[0].state) == len(moments) + 2
    assert_same(enumerate(moments), enumerate(s["exp_avg"] for s in alone.optimizers[0].state.values()))


def test_schedule_and_logs():
    callback = DenseAlignmentCallback(weight=0.3, warmup_ratio=0.5, redundancy_ratio=0.25, neighbours=2)
    _, recorder = fit(make_host(), callback, steps=8)
    first, last = ({key: recorder.logs[i][f"dense/{key}"] for key in (
        "encoder_loss", "decoder_loss", "redundancy_loss", "weight")} for i in (0, -1))  # fmt: skip
    assert (callback.losses.start_step, callback.losses.redundancy_steps) == (4, 2)
    assert first["redundancy_loss"] > 0 == first["encoder_loss"] == first["decoder_loss"] == first["weight"]
    assert last["redundancy_loss"] == 0 < min(last["encoder_loss"], last["decoder_loss"])
    assert last["weight"] == pytest.approx(0.3)


@pytest.mark.parametrize(("frames", "wanted", "group"), [(6, None, 3), (8, None, 4), (1, None, 1), (6, 6, 6)])
def test_group_follows_the_clip(frames, wanted, group):
    callback = make_callback(group_frames=wanted)
    fit(make_host(DINOSAUR), callback, steps=1, frames=frames)
    assert callback.losses.group_frames == group


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_other_trainers(options):
    _, recorder = fit(make_host(), make_callback(), steps=2, **options)
    assert all(loss == loss for loss in recorder.losses)
    assert recorder.logs[-1]["dense/decoder_loss"] > 0


class Own(SlotContrast):
    def configure_optimizers(self):
        return torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()])


def manual():
    host = make_host()
    host.automatic_optimization = False
    return host


@pytest.mark.parametrize(
    ("host", "callbacks", "error", "match"),
    [
        (manual, [{}], HostError, "automatic_optimization=False"),
        (lambda: SAVi(num_slots=2), [{}], HostError, "but got SAVi"),
        (lambda: make_host(VideoSAUR, reconstruction_weight=0.0), [{}], HostError, "reconstruction_weight=0"),
        (lambda: make_host(Own), [{}], HostError, "Build it from self.parameters"),
        (make_host, [{"group_frames": 3, "warmup_steps": 9}], ShapeError, "divide the 4 frames"),
        (make_host, [{"neighbours": 13}], ConfigError, r"`neighbours` to be in \[1, 12\]"),
        (make_host, [{}, SSyncCallback], HostError, "already has dense alignment"),
        (make_host, [SSyncCallback, {}], HostError, "already has SSync"),
    ],
)
def test_what_cannot_be_trained_with_it_is_refused(host, callbacks, error, match):
    made, clip = host(), None if host is manual else 0.5
    with pytest.raises(error, match=match):
        fit(made, *(make_callback(**c) if isinstance(c, dict) else c() for c in callbacks), gradient_clip_val=clip)
    assert_untouched(made)


BAD = {"weight": -1.0, "warmup_ratio": 1.5, "warmup_steps": -1, "projection_dim": 0, "group_frames": 0,
       "neighbours": 0, "redundant": 0, "redundancy_weight": -0.1, "redundancy_ratio": -0.1,
       "redundancy_steps": -2}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_when_it_is_made(name):
    with pytest.raises(ConfigError, match=f"`{name}`"):
        DenseAlignmentCallback(**{name: BAD[name]})


def test_the_host_is_put_back_copies_are_plain_and_a_callback_can_be_used_twice():
    def copied(trainer, module, *args):
        twins.append(copy.deepcopy((module, callback)))

    def fail(*args):
        raise RuntimeError("no more")

    twins, host, failing = [], make_host(), make_host()
    callback = make_callback(warmup_ratio=0.5, warmup_steps=None)
    _, first = fit(host, callback, hook("on_train_batch_start", copied), steps=2)
    assert_untouched(host)
    for twin, other in twins:
        assert "training_step" not in twin.__dict__ or twin.training_step.__func__ is SlotContrast.training_step
        fit(twin, other, steps=1)
    assert fit(make_host(), callback, steps=2)[1].losses == first.losses
    with pytest.raises(RuntimeError, match="no more"):
        fit(failing, make_callback(), hook("on_train_batch_end", fail), steps=2)
    assert_untouched(failing)


def test_short_name_in_a_configuration(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model=SlotContrast", "--data=SyntheticDataModule", "--trainer.callbacks=DenseAlignmentCallback"]
    with pytest.raises(SystemExit) as stop:
        run_trainer(["fit", *words, "--trainer.callbacks.weight=0.25", "--print_config"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert "class_path: ssync_pl.DenseAlignmentCallback" in text
    assert "weight: 0.25" in text


def stepped(groups):
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


# How an optimizer groups the parameters of two layers and those of the callback.
LAYOUTS = {
    "behind": lambda one, two, own: [{"params": [*one, *two, *own]}],
    "in the middle": lambda one, two, own: [{"params": [*one, *own]}, {"params": two, "lr": 0.2}],
    "scattered": lambda one, two, own: [{"params": [one[0], *own[:1], one[1]]}, {"params": [*own[1:], *two]}],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_state_of_the_optimizer_with_or_without_the_callbacks_parameters_is_taken_up(layout):
    host, extra = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), nn.Linear(5, 6)
    one, two, own = ([*layer.parameters()] for layer in (*host, extra))
    together, alone = stepped(layout(one, two, own)), stepped(layout(one, two, []))
    state, both = together.state_dict(), torch.optim.Adam(layout(one, two, own))
    assert _extended(extra, together, state) is state
    both.load_state_dict(_extended(extra, both, alone.state_dict()))
    assert set(both.state) == set(host.parameters())
    for parameter in host.parameters():
        assert torch.equal(both.state[parameter]["exp_avg"], alone.state[parameter]["exp_avg"])
    # A state of another host is left for the optimizer to refuse.
    other, whole = stepped([{"params": one}]), torch.optim.Adam([*host.parameters()])
    with pytest.raises(ValueError, match="parameter group"):
        whole.load_state_dict(_extended(extra, whole, other.state_dict()))
