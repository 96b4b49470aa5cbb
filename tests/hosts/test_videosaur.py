from typing import Any

import jsonargparse
import lightning.pytorch as L
import pytest
import torch
from tiny_hosts import make_trainer
from tiny_models import FEATURE_HOSTS, Batch, loader, parser_of, tiny, window_clips
from torch.nn import functional as F

from ssync_pl import SSyncCallback
from ssync_pl.adapters import locate
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SlotContrast, VideoSAUR
from ssync_pl.hosts.losses import slot_contrast_loss, temporal_similarity, temporal_similarity_loss
from ssync_pl.hosts.nn.slot_attention import SlotCorrector

EVERY = pytest.mark.parametrize("kind", FEATURE_HOSTS)
QUICK = {"encoder_position": 0.5, "corrector_init": "kmeans", "corrector_sharpness": 2.0, "init": "fan_in"}
BATCH = window_clips()
FEATURES = BATCH["features"]


def test_first_slots_have_the_published_spread() -> None:
    torch.testing.assert_close(tiny(VideoSAUR).initializer.log_std.exp(), torch.full((1, 1, 8), 8**-0.5))
    wide = tiny(VideoSAUR, slot_init="learned", slot_init_std=3.0, num_slots=500)
    assert wide.initializer.slots.std().item() == pytest.approx(3.0, rel=0.1)


def test_windows_are_for_training_alone() -> None:
    model = tiny(SlotContrast, slot_init="learned", feature_windows=0.5)
    assert not torch.allclose(model(FEATURES).targets, FEATURES)
    assert torch.equal(model.eval()(FEATURES).targets, FEATURES)


def test_every_frame_is_an_image_of_its_own() -> None:
    model = tiny(DINOSAUR, slot_init="learned")
    out, backwards = model(FEATURES), model(FEATURES.flip(1))
    torch.testing.assert_close(backwards.slots.flip(1), out.slots)
    torch.testing.assert_close(backwards.mask_logits.flip(1), out.mask_logits)
    torch.testing.assert_close(model(FEATURES[1:, 2:]).attention_logits[0, 0], out.attention_logits[1, 2])


def test_training_loss_is_the_weighted_sum_of_its_parts() -> None:
    similar = {"similarity_weight": 0.3, "similarity_temperature": 0.2, "similarity_threshold": 0.1}
    contrast = {"contrast_weight": 0.7, "contrast_temperature": 0.4, "contrast_across_batch": False}
    model = tiny(VideoSAUR, slot_init="learned", reconstruction_weight=2.0, **similar, **contrast)
    logged: dict[str, float] = {}
    model.log = lambda name, value, **_: logged.update({name: value.item()})
    model.log_dict = lambda values, **_: logged.update({name: value.item() for name, value in values.items()})
    loss, out = model.training_step({"features": FEATURES}, 0), model(FEATURES)
    target = temporal_similarity(FEATURES, temperature=0.2, threshold=0.1)
    every = torch.ones(FEATURES.shape[:2], dtype=torch.bool)
    parts = {
        "train/reconstruction": F.mse_loss(out.reconstruction[..., :6], FEATURES),
        "train/similarity": temporal_similarity_loss(out.reconstruction[:, :-1, :, 6:], target, every[:, 1:]),
        "train/contrast": slot_contrast_loss(out.slots, every, temperature=0.4, across_batch=False),
    }
    torch.testing.assert_close(loss, sum(w * part for w, part in zip((2, 0.3, 0.7), parts.values(), strict=True)))
    assert logged == pytest.approx({name: part.item() for name, part in {**parts, "train/loss": loss}.items()})


def test_clips_too_short_to_compare_are_refused_in_training_only() -> None:
    model, still = tiny(VideoSAUR, slot_init="learned", contrast_weight=1.0), {"features": FEATURES[:, :1]}
    with pytest.raises(ConfigError, match=r"at least 2 frames for similarity, but got 1. Raise `clip_length`"):
        model.training_step(still, 0)
    model.loss_weights["similarity"] = 0.0
    with pytest.raises(ConfigError, match=r"for contrast.*contrast_weight=0"):
        model.training_step(still, 0)
    masks, loss, *_ = model.eval().evaluate(still)
    assert masks.shape == (2, 1, 3, 2, 4)
    torch.testing.assert_close(loss, F.mse_loss(model(FEATURES[:, :1]).reconstruction[..., :6], FEATURES[:, :1]))


@EVERY
@pytest.mark.parametrize("decoder", ["mlp", "mixer", "fourier", "fourier_mixer"])
def test_ssync_reads_the_exact_maps(kind: Any, decoder: str) -> None:
    model = tiny(kind, decoder=decoder, slot_init="learned", fourier_bands=2)
    adapter = locate("auto", model).adapter
    capture = adapter.attach(model)
    capture.open()
    out = model(FEATURES)
    capture.close()
    # Features of 3 frames look like frames of 3 colours: the grid is the host's own.
    maps = adapter.collect(capture, {"features": FEATURES})
    assert maps.grid == (2, 4)
    adapter.verify(capture, maps)
    for found, own in ((maps.attention_logits, out.attention_logits), (maps.mask_logits, out.mask_logits.flatten(3))):
        assert torch.equal(found, own.reshape(6, 1, 3, 8) if kind is DINOSAUR else own)
        assert found.requires_grad


def test_the_command_line_knows_the_options_of_both_classes() -> None:
    parser, build = parser_of(SlotContrast)
    defaults = parser.get_defaults().model
    assert (defaults.slot_dim, defaults.decoder, defaults.contrast_weight, defaults.num_slots) == (64, "mlp", 0.5, 11)
    model = build(["backbone=null", "feature_dim=6", "grid=[2, 3]", "decoder_hidden=[16]", "similarity_weight=0.2"])
    assert model(torch.randn(1, 2, 6, 6)).slots.shape == (1, 2, 11, 64)
    assert model.hparams.similarity_weight == model.loss_weights["similarity"] == 0.2
    with pytest.raises(jsonargparse.ArgumentError, match="nothing"):
        parser.parse_args(["--model.nothing=1"])
    with pytest.raises(TypeError, match="slots_num"):
        tiny(SlotContrast, slots_num=4)


def test_an_image_host_has_no_options_of_videos_and_decays_on_after_its_steps_as_published() -> None:
    defaults = vars(parser_of(DINOSAUR)[0].get_defaults().model)
    assert defaults["grid"] == (14, 14)
    assert not {"similarity_weight", "predictor_blocks", "iterations_first"} & set(defaults)
    assert set(tiny(DINOSAUR).hparams) == set(defaults)
    with pytest.raises(TypeError, match="similarity_weight"):
        tiny(DINOSAUR, similarity_weight=1.0)
    model = DINOSAUR(backbone=None, feature_dim=6, grid=(2, 3))
    assert [model.hparams[name] for name in ("warmup_steps", "decay_steps", "decay_rate")] == [10_000, 100_000, 0.5]
    model.trainer = type("Trainer", (), {"estimated_stepping_batches": 500_000})()  # type: ignore[assignment]
    factor: Any = model.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]  # type: ignore[index,call-overload]
    assert [factor(step) for step in (0, 5_000, 10_000, 100_000, 190_000)] == pytest.approx([0, 0.5, 1, 0.5, 0.25])


@EVERY
def test_the_quick_start_adds_one_key_and_changes_nothing_while_it_is_off(kind: Any) -> None:
    plain, quick = tiny(kind), tiny(kind, **QUICK)
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    position = f"{'encoder' if kind is DINOSAUR else 'encoder.module'}.position.weight"
    assert {name: value.shape for name, value in quick.state_dict().items()} == {**shapes, position: (16, 2)}
    # A checkpoint of a model without these options loads into one with other initial values only.
    tiny(kind, corrector_init="kmeans", init="fan_in").load_state_dict(plain.state_dict())
    one = tiny(kind)
    drawn = torch.rand(())
    other = tiny(kind, encoder_position=0.0, corrector_init="default", corrector_sharpness=1.5, init="default")
    assert torch.equal(torch.rand(()), drawn)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    corrector = next(part for part in quick.modules() if isinstance(part, SlotCorrector))
    torch.testing.assert_close(corrector.to_q.weight.mT @ corrector.to_q.weight, 4 * torch.eye(8))


def _with_backbone(trained: bool = False) -> Any:
    layers = {"layer": "vit_block1", "similarity_layer": "vit_block_keys2"}
    options = {"backbone": "test_vit", "backbone_weights": "none", "feature_dim": None, "slot_init": "learned"}
    return tiny(VideoSAUR, trained=trained, **layers, **options)


def test_frames_and_their_cached_features_are_the_same_and_the_backbone_stays_frozen() -> None:
    pytest.importorskip("timm")
    model, video = _with_backbone().train(), torch.randn(2, 3, 3, 32, 64)
    out, backbone = model(video), model.encoder.module.backbone
    cached = torch.cat([out.targets, out.similarity_features], -1)
    again = model(cached)
    torch.testing.assert_close(again.slots, out.slots)
    torch.testing.assert_close(again.similarity_features, out.similarity_features)
    model.training_step({"video": video}, 0).backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    calls: list[int] = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    model.training_step({"video": video, "features": cached}, 0)
    assert calls == []


def test_normalisation_is_taken_from_the_data_module_and_the_grid_from_the_patches() -> None:
    pytest.importorskip("timm")
    pixels = torch.rand(1, 2, 3, 32, 64)

    class Data(L.LightningDataModule):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

        def predict_dataloader(self) -> Any:
            return loader({"video": pixels})

    model = _with_backbone(trained=True)
    expected = model.segment({"video": model.encoder.module.backbone.renormalize(pixels, Data.mean, Data.std)})
    (output,) = make_trainer().predict(model, datamodule=Data())  # type: ignore[misc]
    torch.testing.assert_close(output["masks"][0], F.interpolate(expected[0], size=(32, 64), mode="bilinear"))
    batch: Batch = {"video": torch.randn(1, 2, 3, 32, 64)}
    make_trainer(SSyncCallback(warmup_ratio=0.0), steps=1).fit(model, loader(batch))
