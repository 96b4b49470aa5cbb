"""VideoSAUR, SlotContrast and DINOSAUR: layout of the public checkpoints, losses, options, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback
from ssync_pl.adapters import find_adapter
from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts import DINOSAUR, SOLV, SlotContrast, VideoSAUR
from ssync_pl.hosts.losses import slot_contrast_loss, temporal_similarity, temporal_similarity_loss
from ssync_pl.hosts.nn.decoders import MLPDecoder
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.nn.slot_attention import SlotCorrector

Build = Callable[..., Any]
Batch = dict[str, Tensor]
HOSTS = [VideoSAUR, SlotContrast, DINOSAUR]
QUICK = {"encoder_position": 0.5, "corrector_init": "kmeans", "corrector_sharpness": 2.0, "init": "fan_in"}


BLOCK = {
    "self_attn.qkv.weight": (24, 8),
    "self_attn.qkv.bias": (24,),
    "self_attn.out_proj.weight": (8, 8),
    "self_attn.out_proj.bias": (8,),
    "linear1.weight": (32, 8),
    "linear1.bias": (32,),
    "linear2.weight": (8, 32),
    "linear2.bias": (8,),
    "norm1.weight": (8,),
    "norm1.bias": (8,),
    "norm2.weight": (8,),
    "norm2.bias": (8,),
}
PUBLIC = {
    "initializer.mean": (1, 1, 8),
    "initializer.log_std": (1, 1, 8),
    "encoder.module.output_transform.layers.0.weight": (6,),
    "encoder.module.output_transform.layers.0.bias": (6,),
    "encoder.module.output_transform.layers.1.weight": (16, 6),
    "encoder.module.output_transform.layers.1.bias": (16,),
    "encoder.module.output_transform.layers.3.weight": (8, 16),
    "encoder.module.output_transform.layers.3.bias": (8,),
    "processor.module.corrector.to_k.weight": (8, 8),
    "processor.module.corrector.to_v.weight": (8, 8),
    "processor.module.corrector.to_q.weight": (8, 8),
    "processor.module.corrector.gru.weight_ih": (24, 8),
    "processor.module.corrector.gru.weight_hh": (24, 8),
    "processor.module.corrector.gru.bias_ih": (24,),
    "processor.module.corrector.gru.bias_hh": (24,),
    "processor.module.corrector.norm_features.weight": (8,),
    "processor.module.corrector.norm_features.bias": (8,),
    "processor.module.corrector.norm_slots.weight": (8,),
    "processor.module.corrector.norm_slots.bias": (8,),
    **{f"processor.module.predictor.blocks.0.{name}": shape for name, shape in BLOCK.items()},
    "decoder.module.pos_emb": (1, 6, 8),
    **{f"decoder.module.allocator.blocks.0.{name}": shape for name, shape in BLOCK.items()},
    **{f"decoder.module.allocator.blocks.1.{name}": shape for name, shape in BLOCK.items()},
    "decoder.module.renderer.layers.0.weight": (16, 8),
    "decoder.module.renderer.layers.0.bias": (16,),
    "decoder.module.renderer.layers.2.weight": (12, 16),
    "decoder.module.renderer.layers.2.bias": (12,),
    "decoder.module.to_q.weight": (8, 8),
    "decoder.module.to_k.weight": (8, 8),
    "decoder.module.norm_k.weight": (8,),
    "decoder.module.norm_k.bias": (8,),
    "decoder.module.norm_q.weight": (8,),
    "decoder.module.norm_q.bias": (8,),
    "decoder.module.norm_memory.weight": (8,),
    "decoder.module.norm_memory.bias": (8,),
    "decoder.module.output_transform.weight": (12, 12),
    "decoder.module.output_transform.bias": (12,),
}


CONTRAST = {
    "initializer.slots": (1, 3, 8),
    "processor.module.corrector.mlp.layers.0.weight": (8,),
    "processor.module.corrector.mlp.layers.0.bias": (8,),
    "processor.module.corrector.mlp.layers.1.weight": (32, 8),
    "processor.module.corrector.mlp.layers.1.bias": (32,),
    "processor.module.corrector.mlp.layers.3.weight": (8, 32),
    "processor.module.corrector.mlp.layers.3.bias": (8,),
    "decoder.module.pos_emb": (1, 1, 6, 8),
    "decoder.module.mlp.layers.0.weight": (16, 8),
    "decoder.module.mlp.layers.0.bias": (16,),
    "decoder.module.mlp.layers.2.weight": (12, 16),
    "decoder.module.mlp.layers.2.bias": (12,),
    "decoder.module.mlp.layers.4.weight": (7, 12),
    "decoder.module.mlp.layers.4.bias": (7,),
}
# The video model's parts without `module`, slot attention's MLP and an MLP decoder
IMAGE = {
    name.replace("module.", ""): shape
    for name, shape in {**PUBLIC, **CONTRAST}.items()
    if not name.startswith(("initializer.slots", "processor.module.predictor"))
    and (name in CONTRAST or not name.startswith("decoder"))
}


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(**(defaults | options))


def _loader(batch: Batch, count: int = 1) -> DataLoader[Any]:
    return DataLoader([batch] * count, batch_size=None)  # type: ignore[arg-type]


def _real(kind: Any, **options: Any) -> Any:
    """A host whose `log` is Lightning's."""
    tiny: dict[str, Any] = {"num_slots": 3, "slot_dim": 8, "backbone": None, "feature_dim": 6, "grid": (2, 3)}
    return kind(**(tiny | {"decoder_hidden": (16,), "warmup_steps": 0, "learning_rate": 3e-3} | options))


def test_keys_and_shapes_are_those_of_public_checkpoints(tiny_host: Build) -> None:
    for kind, shapes in ((VideoSAUR, PUBLIC), (DINOSAUR, IMAGE)):
        model = tiny_host(kind)
        assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
        # Optimizer states are kept by position.
        names = [name for name, _ in model.named_parameters()]
        assert names == list(model.state_dict())
        assert kind is DINOSAUR or names == list(PUBLIC)
    state = {name: tuple(value.shape) for name, value in tiny_host(SlotContrast).state_dict().items()}
    shared = {name: shape for name, shape in PUBLIC.items() if not name.startswith(("initializer", "decoder"))}
    assert state == shared | CONTRAST


def test_first_slots_have_the_published_spread(tiny_host: Build) -> None:
    model = tiny_host(VideoSAUR)
    torch.testing.assert_close(model.initializer.log_std.exp(), torch.full((1, 1, 8), 8**-0.5))
    wide = tiny_host(VideoSAUR, slot_init="learned", slot_init_std=3.0, num_slots=500)
    assert wide.initializer.slots.std().item() == pytest.approx(3.0, rel=0.1)


def test_strict_loading_refuses_another_layout(tiny_host: Build) -> None:
    state = tiny_host(VideoSAUR).state_dict()
    tiny_host(VideoSAUR, slot_init_std=1.0).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*initializer.slots"):
        tiny_host(VideoSAUR, slot_init="learned").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*corrector.mlp.layers.0.weight"):
        tiny_host(VideoSAUR, corrector_mlp_hidden=None).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for decoder.module.pos_emb"):
        tiny_host(VideoSAUR, grid=(3, 3)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*decoder.module.allocator"):
        tiny_host(VideoSAUR, decoder="mlp").load_state_dict(state)


def test_slots_follow_the_recurrence(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(VideoSAUR, slot_init="learned", iterations_first=3, iterations_later=2)
    features = feature_batch["features"]
    out = model(features)
    encoder, processor = model.encoder.module, model.processor.module
    slots = model.initializer(2)
    for t in range(3):
        slots = slots if t == 0 else processor.predictor(slots)
        seen = encoder.output_transform(features[:, t])
        bound = processor.corrector(slots, seen, 3 if t == 0 else 2)
        slots = bound["slots"]
        torch.testing.assert_close(out.slots[:, t], slots)
        torch.testing.assert_close(out.attention_logits[:, t], bound["dots"])
        decoded = model.decoder.module(slots)
        torch.testing.assert_close(out.reconstruction[:, t], decoded["reconstruction"])
        torch.testing.assert_close(out.mask_logits[:, t].flatten(2), decoded["dots"])
    assert out.attention_grid == (2, 3)
    assert out.mask_logits.shape == (2, 3, 3, 2, 3)
    assert torch.equal(out.targets, features)


def test_every_frame_is_an_image_of_its_own(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(DINOSAUR, slot_init="learned")
    features = feature_batch["features"]
    out, backwards = model(features), model(features.flip(1))
    assert out.slots.shape == (2, 3, 3, 8)
    torch.testing.assert_close(backwards.slots.flip(1), out.slots)
    torch.testing.assert_close(backwards.mask_logits.flip(1), out.mask_logits)
    image = model(features[1:, 2:])
    torch.testing.assert_close(image.attention_logits[0, 0], out.attention_logits[1, 2])


def test_training_loss_is_the_weighted_sum_of_its_parts(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(
        VideoSAUR,
        slot_init="learned",
        reconstruction_weight=2.0,
        similarity_weight=0.3,
        similarity_temperature=0.2,
        similarity_threshold=0.1,
        contrast_weight=0.7,
        contrast_temperature=0.4,
        contrast_across_batch=False,
    )
    logged: dict[str, float] = {}
    model.log = lambda name, value, **_: logged.update({name: value.item()})
    model.log_dict = lambda values, **_: logged.update({name: value.item() for name, value in values.items()})
    features = feature_batch["features"]
    loss = model.training_step({"features": features}, 0)
    out = model(features)
    reconstruction = F.mse_loss(out.reconstruction[..., :6], features)
    target = temporal_similarity(features, temperature=0.2, threshold=0.1)
    similarity = temporal_similarity_loss(out.reconstruction[:, :-1, :, 6:], target)
    contrast = slot_contrast_loss(out.slots, temperature=0.4, across_batch=False)
    torch.testing.assert_close(loss, 2 * reconstruction + 0.3 * similarity + 0.7 * contrast)
    assert logged == pytest.approx(
        {
            "train/reconstruction": reconstruction.item(),
            "train/similarity": similarity.item(),
            "train/contrast": contrast.item(),
            "train/loss": loss.item(),
        }
    )


@pytest.mark.parametrize("shift", [1, 2])
def test_similarity_alone_compares_features_of_their_own(tiny_host: Build, feature_batch: Batch, shift: int) -> None:
    model = tiny_host(
        VideoSAUR,
        slot_init="learned",
        feature_dim=4,
        similarity_dim=2,
        reconstruction_weight=0.0,
        similarity_weight=1.0,
        similarity_shift=shift,
    )
    features = feature_batch["features"]
    out = model(features)
    assert out.reconstruction.shape == (2, 3, 6, 6)
    target = temporal_similarity(features[..., 4:], shift=shift)
    expected = temporal_similarity_loss(out.reconstruction[:, :-shift], target)
    torch.testing.assert_close(model.training_step({"features": features}, 0), expected)


def test_padded_frames_and_samples_do_not_count(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(VideoSAUR, slot_init="learned", contrast_weight=1.0)
    features = feature_batch["features"]
    short = model.evaluate({"features": features[:1, :2]})[1]
    padded = features.clone()
    padded[0, 2], padded[1] = 50.0, -50.0
    batch = {
        "features": padded,
        "frame_mask": torch.tensor([[True, True, False], [True, True, True]]),
        "batch_padding_mask": torch.tensor([True, False]),
    }
    torch.testing.assert_close(model.evaluate(batch)[1], short)


def test_clips_too_short_to_compare_are_refused_in_training_only(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(VideoSAUR, slot_init="learned", contrast_weight=1.0)
    still = {"features": feature_batch["features"][:, :1]}
    with pytest.raises(ConfigError, match=r"at least 2 frames for the similarity loss, but got 1. Raise `clip_length`"):
        model.training_step(still, 0)
    model.similarity_weight = 0.0
    with pytest.raises(ConfigError, match=r"for the contrast loss.*contrast_weight=0"):
        model.training_step(still, 0)
    model.eval().similarity_weight = 0.1
    masks, loss = model.evaluate(still)
    reconstruction = F.mse_loss(model(still["features"]).reconstruction[..., :6], still["features"])
    assert masks.shape == (2, 1, 3, 2, 3)
    torch.testing.assert_close(loss, reconstruction)


@pytest.mark.parametrize("decoder", ["mlp", "mixer"])
@pytest.mark.parametrize("slot_init", ["gaussian", "learned"])
def test_learns_a_tiny_clip_and_trains_every_parameter(
    tiny_host: Build, feature_batch: Batch, decoder: str, slot_init: str
) -> None:
    model = tiny_host(VideoSAUR, decoder=decoder, slot_init=slot_init, contrast_weight=0.1, corrector_mlp_hidden=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses: list[dict[str, float]] = []
    model.log_dict = lambda values, **_: losses.append({name: value.item() for name, value in values.items()})
    for _ in range(60):
        optimizer.zero_grad()
        model.training_step(feature_batch, 0).backward()
        optimizer.step()
    assert losses[-1]["train/reconstruction"] < 0.6 * losses[0]["train/reconstruction"]
    assert losses[-1]["train/similarity"] < losses[0]["train/similarity"]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", [VideoSAUR, SlotContrast, DINOSAUR])
def test_fit_validates_saves_loads_and_predicts(kind: Any, feature_batch: Batch, tmp_path: Path) -> None:
    model = _real(kind, slot_init="learned", decay_steps=None)
    trainer = _trainer(tmp_path, max_steps=4)
    only_features = {"features": feature_batch["features"]}
    trainer.fit(model, _loader(only_features, 4), _loader(feature_batch))
    scores = trainer.callback_metrics
    assert {"train/loss", "val/loss", "val/used_slots", "val/video_fg_ari", "val/video_mbo"} <= set(scores)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 * 0.5)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, map_location="cpu")
    assert loaded.hparams == model.hparams
    inputs = feature_batch["features"]
    torch.testing.assert_close(loaded(inputs).mask_logits, model(inputs).mask_logits)
    outputs = _trainer(tmp_path).predict(loaded, _loader(feature_batch))
    assert outputs is not None
    first: Batch = outputs[0]  # type: ignore[assignment]
    assert first["labels"].shape == (2, 3, 8, 12)
    assert first["masks"].shape == (2, 3, 3, 8, 12)
    assert torch.equal(first["masks"].argmax(dim=2), first["labels"])
    tested = _trainer(tmp_path).test(loaded, _loader(feature_batch), verbose=False)[0]
    assert tested["test/loss"] == pytest.approx(scores["val/loss"].item())


@pytest.mark.parametrize("kind", [VideoSAUR, SlotContrast, DINOSAUR])
@pytest.mark.parametrize("decoder", ["mlp", "mixer"])
def test_ssync_reads_the_exact_maps(kind: Any, decoder: str, feature_batch: Batch) -> None:
    model = _real(kind, decoder=decoder, slot_init="learned")
    adapter = find_adapter(model)
    assert adapter.name == "videosaur"
    capture = adapter.attach(model)
    capture.open()
    out = model(feature_batch["features"])
    capture.close()
    # Features of 3 frames look like frames of 3 colours: the grid is the host's own.
    maps = adapter.collect(capture, {"features": feature_batch["features"]})
    assert maps.grid == (2, 3)
    adapter.verify(capture, maps)
    images = kind is DINOSAUR
    for found, own in ((maps.attention_logits, out.attention_logits), (maps.mask_logits, out.mask_logits.flatten(3))):
        assert found is not None
        assert torch.equal(found, own.reshape(6, 1, 3, 6) if images else own)
        assert found.requires_grad
    capture.remove()


@pytest.mark.parametrize("kind", [VideoSAUR, SlotContrast, DINOSAUR])
def test_trains_with_ssync(kind: Any, feature_batch: Batch, tmp_path: Path) -> None:
    model = _real(kind, slot_init="learned")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = _trainer(tmp_path, callbacks=[SSyncCallback(warmup_ratio=0.0)])
    trainer.fit(model, _loader({"features": feature_batch["features"]}, 3))
    assert list(model.state_dict()) == list(before)
    assert {"ssync/interior_loss", "ssync/agreement"} <= set(trainer.callback_metrics)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("corrector" in name for name in moved)
    assert any("decoder" in name for name in moved)


def test_bf16_autocast_keeps_logits_in_float32(tiny_host: Build, feature_batch: Batch) -> None:
    model = tiny_host(VideoSAUR, contrast_weight=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_step(feature_batch, 0)
        out = model(feature_batch["features"])
    assert out.attention_logits.dtype == out.mask_logits.dtype == loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_contrast_tells_slots_apart(tiny_host: Build, feature_batch: dict[str, Tensor]) -> None:
    model = tiny_host(SlotContrast)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    contrasts = []
    for _ in range(40):
        optimizer.zero_grad()
        model.training_step(feature_batch, 0).backward()
        optimizer.step()
        contrasts.append(slot_contrast_loss(model(feature_batch["features"]).slots, across_batch=False).item())
    assert contrasts[-1] < 0.5 * contrasts[0]


def test_all_options_of_the_mother_are_there(tiny_host: Build) -> None:
    model = tiny_host(SlotContrast, similarity_weight=0.2, similarity_temperature=0.5, decoder="mixer", slot_dim=16)
    assert (model.similarity_weight, model.similarity_temperature, model.contrast_weight) == (0.2, 0.5, 0.5)
    assert model.hparams.similarity_temperature == 0.5
    assert model.hparams.slot_dim == 16
    with pytest.raises(TypeError, match="slots_num"):
        tiny_host(SlotContrast, slots_num=4)


def test_command_line_knows_the_options_of_both_classes() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SlotContrast, "model")
    defaults = parser.get_defaults().model
    assert (defaults.slot_dim, defaults.decoder, defaults.contrast_weight, defaults.num_slots) == (64, "mlp", 0.5, 11)
    values = ["backbone=null", "feature_dim=6", "grid=[2, 3]", "decoder_hidden=[16]", "num_slots=3"]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # jsonargparse before 4.49
    model = instantiate(parser.parse_args([f"--model.{value}" for value in values])).model
    assert isinstance(model, SlotContrast)
    assert model(torch.randn(1, 2, 6, 6)).slots.shape == (1, 2, 3, 64)
    with pytest.raises(jsonargparse.ArgumentError, match="nothing"):
        parser.parse_args(["--model.nothing=1"])


def test_options_of_videos_are_none_of_an_image_host(tiny_host: Build) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DINOSAUR, "model")
    defaults = vars(parser.get_defaults().model)
    assert defaults["decay_steps"] == 100_000
    assert defaults["grid"] == (14, 14)
    assert not {"similarity_weight", "predictor_blocks", "iterations_first"} & set(defaults)
    assert set(tiny_host(DINOSAUR).hparams) == set(defaults)
    with pytest.raises(TypeError, match="similarity_weight"):
        tiny_host(DINOSAUR, similarity_weight=1.0)


def test_decay_goes_on_after_its_steps_as_published() -> None:
    model = DINOSAUR(backbone=None, feature_dim=6, grid=(2, 3))
    assert (model.warmup_steps, model.decay_steps, model.decay_rate) == (10_000, 100_000, 0.5)
    model.trainer = type("Trainer", (), {"estimated_stepping_batches": 500_000})()  # type: ignore[assignment]
    factor: Any = model.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]  # type: ignore[index,call-overload]
    assert [factor(step) for step in (0, 5_000, 10_000, 100_000, 190_000)] == pytest.approx([0, 0.5, 1, 0.5, 0.25])


def _part(model: nn.Module, kind: type[nn.Module]) -> Any:
    return next(part for part in model.modules() if isinstance(part, kind))


@pytest.mark.parametrize("kind", HOSTS)
def test_only_a_position_adds_a_key(tiny_host: Build, kind: Any) -> None:
    plain, quick = tiny_host(kind), tiny_host(kind, **QUICK)
    prefix = "encoder" if kind is DINOSAUR else "encoder.module"
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    assert {name: value.shape for name, value in quick.state_dict().items()} == {
        **shapes,
        f"{prefix}.position.weight": (16, 2),
    }
    # A checkpoint of a model without these options loads into one with other initial values only.
    tiny_host(kind, corrector_init="kmeans", init="fan_in").load_state_dict(plain.state_dict())


@pytest.mark.parametrize("kind", HOSTS)
def test_a_seed_gives_the_same_model_as_without_the_options(tiny_host: Build, kind: Any) -> None:
    defaults = {"encoder_position": 0.0, "corrector_init": "default", "corrector_sharpness": 1.5, "init": "default"}
    one = tiny_host(kind)
    drawn = torch.rand(())
    other = tiny_host(kind, **defaults)
    assert torch.equal(torch.rand(()), drawn)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", HOSTS)
def test_slot_attention_starts_as_soft_kmeans(tiny_host: Build, kind: Any) -> None:
    corrector = _part(tiny_host(kind, corrector_init="kmeans", corrector_sharpness=2.0), SlotCorrector)
    assert torch.equal(corrector.to_q.weight, corrector.to_k.weight)
    torch.testing.assert_close(corrector.to_q.weight.mT @ corrector.to_q.weight, 4 * torch.eye(8))
    assert torch.equal(corrector.to_v.weight, torch.eye(8))


@pytest.mark.parametrize("decoder", ["mlp", "mixer"])
def test_layers_start_with_the_spread_of_their_inputs(tiny_host: Build, decoder: str) -> None:
    sizes = {"encoder_hidden": 400, "decoder_hidden": (400, 400), "slot_dim": 200, "decoder": decoder}
    plain, model = tiny_host(SlotContrast, **sizes), tiny_host(SlotContrast, **sizes, init="fan_in")

    def spreads(stack: nn.Module) -> list[float]:
        return [layer.weight.std().item() for layer in stack.modules() if isinstance(layer, nn.Linear)]

    encoder = _part(model, FeatureEncoder).output_transform
    assert spreads(encoder) == pytest.approx([(2 / 6) ** 0.5, (1 / 400) ** 0.5], rel=0.05)
    if decoder == "mlp":
        mlp = _part(model, MLPDecoder).mlp
        assert spreads(mlp) == pytest.approx([(2 / 200) ** 0.5, (2 / 400) ** 0.5, (1 / 400) ** 0.5], rel=0.05)
        assert all(not layer.bias.any() for layer in mlp.modules() if isinstance(layer, nn.Linear))
    else:
        pairs = zip(plain.decoder.parameters(), model.decoder.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def _build(tiny_host: Build, kind: Any, memory_efficient: bool) -> Any:
    options = {"memory_efficient": memory_efficient}
    if kind is not SOLV:
        return tiny_host(kind, decoder="mlp", **options)
    torch.manual_seed(0)
    host = SOLV(
        3, 8, None, feature_dim=6, grid=(2, 3), clip_length=3, temporal_heads=2, decoder_hidden=(16, 12), **options
    )
    host.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return host


def _train(host: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of a training step with a loss on the maps that SSync's adapter collects."""
    adapter = find_adapter(host)
    capture = adapter.attach(host)
    capture.open(training_only=True)
    torch.manual_seed(1)
    loss = host.training_step(batch, 0)
    maps = adapter.collect(capture, batch)
    adapter.verify(capture, maps)
    assert maps.mask_logits is not None
    assert maps.mask_logits.requires_grad
    (loss + maps.mask_logits.square().mean()).backward()
    assert not capture.silent
    capture.remove()
    found = {"loss": loss.detach(), "masks": maps.mask_logits.detach()}
    return found | {name: p.grad for name, p in host.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [*HOSTS, SOLV], ids=lambda kind: kind.__name__)
def test_a_training_step_with_ssync_is_the_same(kind: Any, tiny_host: Build, feature_batch: dict[str, Tensor]) -> None:
    plain, efficient = (_train(_build(tiny_host, kind, option), feature_batch) for option in (False, True))
    assert plain.keys() == efficient.keys()
    assert any(name.startswith("decoder") for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(
            efficient[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reconstruction_weight": 0.0, "similarity_weight": 0.0}, "reconstruction_weight"),
        ({"similarity_shift": 0}, "similarity_shift"),
        ({"slot_init": "boxes"}, "slot_init"),
        ({"decoder": "broadcast"}, "decoder"),
        ({"num_slots": 0}, "num_slots"),
        ({"slot_init_std": 0.0}, "spread"),
        ({"feature_dim": None}, "feature_dim"),
        ({"iterations_later": 0}, "iterations"),
        ({"encoder_position": 0.5, "encoder_hidden": 0}, "encoder_hidden"),
        ({"corrector_init": "kmeans", "encoder_hidden": 0}, "as many channels"),
        ({"corrector_sharpness": 2.0}, "corrector_init"),
        ({"corrector_init": "means"}, "corrector_init"),
        ({"init": "fan"}, "init"),
        ({"init": "fan_in", "encoder_hidden": 0, "decoder": "mixer"}, "neither"),
    ],
)
def test_options_that_cannot_be_are_refused(tiny_host: Build, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        tiny_host(VideoSAUR, **options)


def test_wrong_batches_are_refused(tiny_host: Build) -> None:
    with pytest.raises(ShapeError, match="inputs"):
        tiny_host(VideoSAUR)(torch.zeros(2, 6, 6))
    with pytest.raises(ConfigError, match="`features` or `video`"):
        tiny_host(VideoSAUR).training_step({"image": torch.zeros(2, 3, 8, 8)}, 0)


class TestWithBackbone:
    """With timm's smallest transformer."""

    OPTIONS: dict[str, Any] = {  # noqa: RUF012
        "backbone": "test_vit",
        "layer": "vit_block1",
        "similarity_layer": "vit_block_keys2",
        "backbone_weights": "none",
        "feature_dim": None,
        "grid": (2, 3),
        "slot_init": "learned",
    }

    @pytest.fixture(autouse=True)
    def timm(self) -> Any:
        return pytest.importorskip("timm")

    def test_frames_and_their_cached_features_are_the_same(self, tiny_host: Build) -> None:
        model = tiny_host(VideoSAUR, **self.OPTIONS)
        video = torch.randn(2, 3, 3, 32, 48)
        out = model(video)
        cached = torch.cat([out.targets, out.similarity_features], -1)
        again = model(cached)
        torch.testing.assert_close(again.slots, out.slots)
        torch.testing.assert_close(again.similarity_features, out.similarity_features)
        calls: list[int] = []
        model.encoder.module.backbone.register_forward_hook(lambda *_: calls.append(1))
        model.training_step({"video": video, "features": cached}, 0)
        assert calls == []

    def test_weights_of_a_public_checkpoint_go_into_the_backbone(self, tiny_host: Build) -> None:
        model, other = tiny_host(VideoSAUR, **self.OPTIONS), tiny_host(VideoSAUR, **self.OPTIONS)
        backbone = other.encoder.module.backbone
        public = {name: value for name, value in other.state_dict().items() if not name.endswith("fingerprint")}
        frozen = {
            f"encoder.module.backbone.model.{name}": value + 1 for name, value in backbone.model.named_parameters()
        }
        assert "encoder.module.backbone.model.blocks.0.attn.qkv.weight" in frozen
        model.load_state_dict(public | frozen)
        loaded = dict(model.encoder.module.backbone.model.named_parameters())
        assert all(torch.equal(loaded[name], value + 1) for name, value in backbone.model.named_parameters())
        own = model.state_dict()
        assert [name for name in own if "backbone" in name] == ["encoder.module.backbone.fingerprint"]
        with pytest.raises(RuntimeError, match="Expected the weights of backbone test_vit"):
            other.load_state_dict(own)

    def test_backbone_stays_frozen(self, tiny_host: Build) -> None:
        model = tiny_host(VideoSAUR, **self.OPTIONS).train()
        model.training_step({"video": torch.randn(1, 2, 3, 32, 48)}, 0).backward()
        backbone = model.encoder.module.backbone
        assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
        assert not any(module.training for module in backbone.modules())

    def test_normalisation_is_taken_from_the_data_module(self, tmp_path: Path) -> None:
        class Data(L.LightningDataModule):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

            def predict_dataloader(self) -> Any:
                return _loader({"video": pixels})

        pixels = torch.rand(1, 2, 3, 32, 48)
        torch.manual_seed(0)
        model = _real(VideoSAUR, **self.OPTIONS)
        backbone = model.encoder.module.backbone
        expected = model.segment({"video": backbone.renormalize(pixels, Data.mean, Data.std)})
        outputs = _trainer(tmp_path).predict(model, datamodule=Data())
        assert outputs is not None
        masks = outputs[0]["masks"]  # type: ignore[index]
        resized = F.interpolate(expected[0], size=(32, 48), mode="bilinear")
        torch.testing.assert_close(masks[0], resized)

    def test_grid_of_ssync_follows_from_the_patch_size(self, tmp_path: Path) -> None:
        model = _real(VideoSAUR, **self.OPTIONS)
        batch = {"video": torch.randn(1, 2, 3, 32, 48)}
        _trainer(tmp_path, max_steps=1, callbacks=[SSyncCallback(warmup_ratio=0.0)]).fit(model, _loader(batch))
