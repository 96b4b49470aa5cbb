import copy

import pytest
import tiny_hosts
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_hosts import EXACT, in_hook
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback, StepSeed
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast, VideoSAUR
from ssync_pl.rivals.dense_alignment import DenseAlignment
from ssync_pl.rivals.dense_callback import DenseAlignmentCallback

SIZES = {"num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 6, "grid": (3, 4), "decoder_hidden": (8,)}
KINDS = pytest.mark.parametrize("kind", [SlotContrast, VideoSAUR, DINOSAUR])


def make_host(kind=SlotContrast, **options):
    return tiny_hosts.make_host(kind, **{**SIZES, "warmup_steps": 2, "learning_rate": 1e-2, **options})


def make_callback(**options):
    return DenseAlignmentCallback(**{"warmup_steps": 0, "neighbours": 2, "redundancy_weight": 0.0, **options})


def fit(host, *callbacks, steps=6, frames=4, seed=3, shuffle=False, **options):
    generator, recorder = torch.Generator().manual_seed(1), tiny_hosts.Recorder()
    clips = [{"features": torch.randn(frames, 12, 6, generator=generator)} for _ in range(8)]
    torch.manual_seed(seed)
    data = DataLoader(clips, batch_size=2, shuffle=shuffle)
    options = {"gradient_clip_val": 0.5, **options}
    return tiny_hosts.fit(host, StepSeed(), *callbacks, recorder, steps=steps, loader=data, **options), recorder


def assert_untouched(host):
    assert not {"training_step", "configure_optimizers", "named_parameters"} & set(host.__dict__)
    assert tiny_hosts.hooks_of(host) == 0


@KINDS
def test_before_it_is_on_the_training_is_that_of_the_host_alone(kind):
    plain, never = make_host(kind), make_host(kind)
    _, alone = fit(plain, shuffle=True, steps=4)
    _, both = fit(make_host(kind), make_callback(warmup_steps=3), shuffle=True, steps=4)
    assert both.losses[:3] == alone.losses[:3]
    assert both.losses[3] != alone.losses[3]
    fit(never, make_callback(warmup_steps=100), shuffle=True, steps=4)
    tiny_hosts.assert_same_weights(never, plain, **EXACT)


@KINDS
def test_the_step_adds_what_the_module_gives(kind):
    class ByHand(kind):
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
    callback, start, rates = make_callback(warmup_steps=3), {}, []

    def at_start(trainer, module):
        start.update(copy.deepcopy(callback.losses.state_dict()))
        trained = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
        assert {id(p) for p in (*module.parameters(), *callback.losses.parameters())} == trained

    def before_zero(trainer, module, optimizer):
        if trainer.global_step > 3:
            assert all(p.grad is not None for p in callback.losses.parameters())
            every = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            assert torch.stack([g.norm() for g in every]).norm() <= 1e-3 * (1 + 1e-4)

    looks = in_hook("on_train_start", at_start), in_hook("on_before_zero_grad", before_zero)
    rate = in_hook("on_before_zero_grad", lambda *args: rates.append([g["lr"] for g in args[-1].param_groups]))
    fit(make_host(), callback, *looks, rate, gradient_clip_val=1e-3)
    fit(make_host(), rate)
    assert rates[: len(rates) // 2] == rates[len(rates) // 2 :]
    assert len({tuple(one) for one in rates}) > 3
    assert all(not torch.equal(value, start[name]) for name, value in callback.losses.state_dict().items())


@pytest.mark.parametrize(("stop", "redundancy"), [(2, 0.1), (5, 0.0)])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, stop, redundancy):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    runs, path = [], tmp_path / f"step={stop}.ckpt"
    for seed, extra, more in (3, [saver], {"enable_checkpointing": True}), (99, [], {"ckpt_path": path}):
        host = make_host()
        callback = make_callback(warmup_steps=3, redundancy_steps=4, redundancy_weight=redundancy)
        # Lightning starts the epoch's data over when it resumes inside an epoch, so one batch is an epoch here.
        _, recorder = fit(host, callback, *extra, steps=8, seed=seed, limit_train_batches=1, **more)
        runs.append((recorder.losses[-(8 - stop) :], host.state_dict(), callback.losses.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], **EXACT)
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(make_host().state_dict())


def test_a_training_without_it_is_not_resumed_with_it_but_can_be_validated(tmp_path):
    trainer, _ = fit(make_host(), steps=1, limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "alone.ckpt")
    host, callback = make_host(), make_callback()
    with pytest.raises(ConfigError, match="DenseAlignmentCallback"):
        fit(host, callback, steps=2, ckpt_path=tmp_path / "alone.ckpt")
    assert_untouched(host)
    trainer, _ = fit(host, callback, steps=1)
    trainer.validate(
        host,
        DataLoader([{"features": torch.randn(4, 12, 6), "segmentations": torch.ones(4, 1, 3, 4) > 0}]),
        ckpt_path=tmp_path / "alone.ckpt",
    )


def test_schedule_logs_mixed_precision_and_accumulation():
    callback = DenseAlignmentCallback(weight=0.3, warmup_ratio=0.5, redundancy_ratio=0.25, neighbours=2)
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "max_epochs": 4}
    _, recorder = fit(make_host(), callback, steps=-1, **options)
    names = ("encoder_loss", "decoder_loss", "redundancy_loss", "weight")
    first, last = ({key: recorder.logs[i][f"dense/{key}"] for key in names} for i in (0, -1))
    assert (callback.losses.start_step, callback.losses.redundancy_steps) == (4, 2)
    assert first["redundancy_loss"] > 0 == first["encoder_loss"] == first["decoder_loss"] == first["weight"]
    assert last["redundancy_loss"] == 0 < min(last["encoder_loss"], last["decoder_loss"])
    assert last["weight"] == pytest.approx(0.3)
    assert all(loss.isfinite() for loss in recorder.losses)


@pytest.mark.parametrize(("frames", "wanted", "group"), [(6, None, 3), (8, None, 4), (1, None, 1), (6, 6, 6)])
def test_group_follows_the_clip(frames, wanted, group):
    callback = make_callback(group_frames=wanted)
    fit(make_host(DINOSAUR), callback, steps=1, frames=frames)
    assert callback.losses.group_frames == group


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
    def fail(*args):
        raise RuntimeError("no more")

    twins, host, failing = [], make_host(), make_host()
    callback = make_callback(warmup_ratio=0.5, warmup_steps=None)
    look = in_hook("on_train_batch_start", lambda _, module, *args: twins.append(copy.deepcopy((module, callback))))
    _, first = fit(host, callback, look, steps=2)
    assert_untouched(host)
    for twin, other in twins:
        assert "training_step" not in twin.__dict__ or twin.training_step.__func__ is SlotContrast.training_step
        fit(twin, other, steps=1)
    assert fit(make_host(), callback, steps=2)[1].losses == first.losses
    with pytest.raises(RuntimeError, match="no more"):
        fit(failing, make_callback(), in_hook("on_train_batch_end", fail), steps=2)
    assert_untouched(failing)
