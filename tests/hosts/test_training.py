import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import make_trainer
from tiny_models import FEATURE_HOSTS, FEATURES, OPTIONS, Batch, loader, pixel_clips, tiny, train, window_clips

from ssync_pl import SSyncCallback
from ssync_pl.errors import ShapeError
from ssync_pl.hosts import DINOSAUR, SOLV, SAVi, SlotContrast, VideoSAUR
from ssync_pl.hosts.evaluation import Evaluated, SlotEvaluation
from ssync_pl.hosts.training import exponential_for, schedule_for


def test_evaluation_weighs_videos_and_frames_resets_and_refuses() -> None:
    truth = torch.zeros(1, 1, 3, 4, 4, dtype=torch.bool)
    truth[:, :, 1, :, :2] = truth[:, :, 2, :, 2:] = True
    batch = {"video": torch.zeros(1, 1, 3, 4, 4), "segmentations": truth}
    evaluation = SlotEvaluation("x/")
    evaluation.update(Evaluated(truth.float(), torch.tensor(2.0)), batch)
    padded = batch | {"batch_padding_mask": torch.tensor([False])}
    evaluation.update(Evaluated(truth.float(), torch.tensor(100.0)), padded)
    scores = evaluation.compute()
    assert not [name for name in scores if "encoder_" in name or "merged_" in name]
    assert (scores["x/loss"].item(), scores["x/used_slots"].item()) == (2.0, 2.0)
    assert scores["x/video_mbo"].item() == scores["x/video_fg_ari"].item() == pytest.approx(1.0)
    evaluation.reset()
    evaluation.update(Evaluated(truth.float(), torch.tensor(4.0)), batch)
    assert evaluation.compute()["x/loss"].item() == 4.0
    short = Evaluated(torch.rand(1, 2, 3, 4, 4), torch.tensor(1.0))
    with pytest.raises(ShapeError, match="segmentations"):
        evaluation.update(short, batch | {"video": torch.zeros(1, 2, 3, 4, 4)})


def test_both_maps_are_scored_alone_and_with_redundant_slots_merged() -> None:
    """Frame 0: slots 0 and 1 share the left object, and slot 1 wins its lower half; frame 1: slot 0 has it alone."""
    truth = torch.zeros(1, 2, 2, 4, 4, dtype=torch.bool)
    truth[:, :, 0, :, 2:], truth[:, :, 1, :, :2] = True, True
    attention = torch.zeros(1, 2, 3, 4, 4)
    attention[:, :, 0, :, :2], attention[:, :, 1, :, :2], attention[:, :, 2, :, 2:] = 2.0, 1.5, 2.0
    attention[:, 0, 1, 2:, :2] = 3.0
    scores = {}
    for images in (False, True):
        evaluation = SlotEvaluation("x/")
        batch = {"video": torch.zeros(1, 2, 3, 4, 4), "segmentations": truth}
        masks = torch.nn.functional.one_hot(attention.argmax(2), 3).movedim(-1, 2).float()
        evaluation.update(Evaluated(masks, torch.tensor(1.0), attention, images), batch)
        scores[images] = evaluation.compute()
    assert scores[False]["x/video_mbo"] == scores[False]["x/encoder_video_mbo"] == pytest.approx(0.75)
    assert scores[False]["x/merged_video_mbo"] == scores[False]["x/merged_encoder_video_mbo"] == 1.0
    assert scores[True]["x/merged_video_mbo"] == 1.0


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (schedule_for(1000, 4, "constant"), {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 5: 1.0}),
        (schedule_for(1000, 0, "cosine"), {0: 1.0, 250: 0.5 + math.sqrt(0.125), 500: 0.5, 1000: 0.0}),
        (schedule_for(900, 0, "exponential", 3), {0: 1, 300: 0.5, 600: 0.25, 900: 0.125, 5000: 0.125}),
        (schedule_for(50, 100, "constant"), {0: 1 / 6, 5: 1.0}),
        (schedule_for(0, 100), {0: 1.0}),
        (schedule_for(math.inf, 10, "constant"), {100: 1.0}),
        (exponential_for(500, 10, 110, 0.25), {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.5, 110: 0.25, 210: 0.0625}),
        (exponential_for(1000, 100), {1000: 0.5}),
        (exponential_for(50, 100), {0: 0.0, 5: 1.0, 50: 0.5}),
        (exponential_for(0, 100), {0: 1.0}),
        (exponential_for(-1, 10, rate=1.0), {0: 0.0, 10: 1.0, 10_000: 1.0}),
    ],
)
def test_schedules_by_hand(factor: Any, expected: dict[int, float]) -> None:
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


CLIPS: dict[Any, Callable[[], Batch]] = {SAVi: pixel_clips, **dict.fromkeys([*FEATURE_HOSTS, SOLV], window_clips)}
# How learning rates of 3e-3 decay, and what is left of them after four steps
DECAYS: dict[Any, tuple[dict[str, Any], float]] = {
    SAVi: ({"slot_init": "learned", "decay": "cosine"}, 0.0),
    SOLV: ({"decay": "exponential", "merge_rise": 1.0}, 3e-3 / 8),
}
PIXELS = {key: value for key, value in OPTIONS[SAVi].items() if key not in ("init", "learning_rate", "decay")}
SMALL = {key: FEATURES[key] for key in ("num_slots", "slot_dim", "backbone", "feature_dim", "decoder_hidden")}
SMALL["grid"] = (2, 3)
WINDOW = {"clip_length": 3, "temporal_heads": 2, "temporal_blocks": 1, "dropout": 0.0}
QUICK = {"encoder_position": 0.5, "corrector_init": "kmeans", "init": "fan_in"}
# Losses of the steps 0, 7, 14, …, 49
RECORDED: dict[str, tuple[Any, dict[str, Any], list[float]]] = {
    "savi": (SAVi, PIXELS, [0.2840989, 0.268051, 0.2644934, 0.2613299, 0.2569141, 0.2547613, 0.2520722, 0.2480242]),
    "savi_boxes": (
        SAVi, {**PIXELS, "slot_init": "boxes", "init": "fan_in", "corrector_sharpness": 2.0},
        [0.7346642, 0.4854275, 0.3823616, 0.3315478, 0.302177, 0.2843691, 0.2726362, 0.2646811],
    ),
    "videosaur": (VideoSAUR, SMALL, [1.240298, 1.240215, 1.227007, 1.232644, 1.215848, 1.218615, 1.224285, 1.208933]),
    "slotcontrast": (
        SlotContrast, SMALL, [1.671878, 1.486052, 1.393003, 1.348609, 1.321687, 1.300943, 1.286878, 1.274648]
    ),
    "slotcontrast_quick": (
        SlotContrast, SMALL | QUICK, [2.200798, 1.738822, 1.544685, 1.414945, 1.315226, 1.245186, 1.19975, 1.165801]
    ),
    "slotcontrast_fourier": (
        SlotContrast, {**SMALL, **QUICK, "slot_init": "features", "decoder": "fourier", "fourier_bands": 2},
        [2.8578458, 2.3857214, 2.1213734, 1.899652, 1.7359881, 1.6008786, 1.4811823, 1.3763499],
    ),
    "dinosaur": (DINOSAUR, SMALL, [1.077415, 1.068806, 1.070286, 1.056795, 1.054723, 1.057818, 1.049659, 1.053291]),
    "solv": (
        SOLV, {**SMALL, **WINDOW}, [0.8292246, 1.186644, 0.811561, 0.8073176, 0.8010862, 0.7924412, 0.785345, 0.7792116]
    ),
    "solv_quick": (
        SOLV, {**SMALL, **WINDOW, "corrector_init": "kmeans"},
        [0.7721073, 0.7643553, 0.765318, 0.7953144, 0.7761944, 0.7543694, 0.733297, 0.7277712],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_losses_of_fifty_steps_are_those_that_were_recorded(name: str) -> None:
    """Up to reordered sums."""
    kind, options, recorded = RECORDED[name]
    generator, masks = torch.Generator().manual_seed(3), torch.zeros(2, 3, 3, 16, 16, dtype=torch.bool)
    masks[:, :, 1, 2:8, 3:9] = masks[:, :, 2, 10:14, 5:13] = True
    masks[:, :, 0] = ~masks[:, :, 1:].any(2)
    video = torch.randn(2, 3, 3, 16, 16, generator=generator)
    batch = {"video": video, "features": torch.randn(2, 3, 6, 6, generator=generator), "segmentations": masks}
    torch.manual_seed(0)
    model = kind(**options)
    model.log = model.log_dict = lambda *args, **kwargs: None
    # Small steps: with large ones rounding grows a hundredfold every ten steps.
    assert train(model, batch, 50, 5e-4)[::7] == pytest.approx(recorded, rel=1e-4)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", CLIPS)
def test_slots_from_features_differ_between_clips_and_draw_no_random_numbers(kind: Any) -> None:
    model, batch = tiny(kind, slot_init="features"), CLIPS[kind]()
    losses = train(model, batch, 12)
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    inputs, state = batch["video" if kind is SAVi else "features"], torch.get_rng_state()
    first, second = (model.eval()(inputs).slots for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(model(inputs[1:]).slots, first[1:])
    assert not torch.allclose(first[0], first[1], atol=1e-3)


@pytest.mark.parametrize("kind", [SAVi, VideoSAUR, SOLV])
def test_padded_frames_and_samples_neither_count_nor_inform(kind: Any) -> None:
    options = {SAVi: {"slot_init": "learned"}, VideoSAUR: {"slot_init": "learned", "contrast_weight": 1.0}}
    model, batch, frames = tiny(kind, **options.get(kind, {})).eval(), CLIPS[kind](frames=4), torch.ones(2, 4).bool()
    name = "video" if kind is SAVi else "features"
    padded, frames[0, 3] = batch[name].clone(), False
    padded[0, 3], padded[1] = 50.0, -50.0
    with torch.no_grad():
        marks = {"frame_mask": frames, "batch_padding_mask": torch.tensor([True, False])}
        masks, loss, *_ = model.evaluate({name: padded, **marks})
        expected, expected_loss, *_ = model.evaluate({name: batch[name][:1, :3]})
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(masks[:1, :3], expected)


@pytest.mark.parametrize("kind", CLIPS)
def test_fit_with_ssync_validates_saves_loads_predicts_and_tests(kind: Any, tmp_path: Path) -> None:
    options, rate = DECAYS.get(kind, ({"slot_init": "learned", "decay_steps": None, "decay_rate": 0.5}, 1.5e-3))
    batch = window_clips(frames=5) if kind is SOLV else CLIPS[kind]()
    model = tiny(kind, trained=True, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = make_trainer(SSyncCallback(warmup_ratio=0.0), steps=4)
    run.fit(model, loader(CLIPS[kind](), 4), loader(batch))
    scores = run.callback_metrics
    wanted = {"train/loss", "val/loss", "val/used_slots", "val/video_fg_ari", "val/video_ari", "val/video_mbo"}
    assert {*wanted, "ssync/interior_loss", "ssync/agreement"} <= set(scores)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate, abs=1e-9)
    assert not any(part._forward_hooks for part in model.modules())
    assert list(model.state_dict()) == list(before)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("decoder" in name for name in moved)
    run.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)  # which Lightning before 2.6 cannot be asked for
    loaded = kind.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu").eval()
    assert loaded.hparams == model.hparams
    with torch.no_grad():
        torch.testing.assert_close(loaded.segment(batch), model.eval().segment(batch))
    (predicted,) = make_trainer().predict(loaded, loader(batch))  # type: ignore[misc]
    shape = batch["segmentations"].shape
    assert predicted["masks"].shape == (*shape[:2], model.hparams.num_slots, *shape[3:])
    torch.testing.assert_close(predicted["masks"].sum(dim=2), torch.ones(*shape[:2], *shape[3:]))
    assert torch.equal(predicted["masks"].argmax(dim=2), predicted["labels"])
    if kind is not SAVi:  # without frames, masks have the size of the patches
        without = {name: value for name, value in batch.items() if name != "video"}
        assert loaded.predict_step(without, 0)["labels"].shape == (*shape[:2], *model.hparams.grid)
    tested = make_trainer().test(loaded, loader(batch), verbose=False)[0]
    assert tested["test/loss"] == pytest.approx(scores["val/loss"].item())


def test_the_defaults_are_the_published_sizes() -> None:
    model = SAVi()
    assert sum(p.numel() for p in model.encoder.convolutions.parameters()) == (3 + 3 * 32) * 32 * 25 + 4 * 32
    assert model.decoder.size == (64, 64)
    assert model.corrector.to_q.weight.shape == (128, 128)
    assert len(model.predictor.blocks) == 1


def test_background_is_read_from_the_data_module() -> None:
    class Data(L.LightningDataModule):
        has_background = False

        def val_dataloader(self) -> Any:
            return loader(pixel_clips())

        test_dataloader = val_dataloader

    model = tiny(SAVi, trained=True)
    scores = make_trainer().validate(model, datamodule=Data(), verbose=False)[0]
    assert model.evaluation.has_background is False
    assert "val/video_ari" not in scores
    assert "test/video_mbo" in make_trainer().test(model, datamodule=Data(), verbose=False)[0]


def test_bf16_autocast_keeps_logits_in_float32_and_frames_need_not_be_square() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tiny(SAVi, decoder_broadcast=(4, 6))(torch.randn(1, 2, 3, 16, 24))
    assert (out.attention_grid, out.mask_logits.shape) == ((8, 12), (1, 2, 3, 8, 12))
    assert out.attention_logits.dtype == out.mask_logits.dtype == torch.float32
    assert torch.isfinite(out.reconstruction).all()
