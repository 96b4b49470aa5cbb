"""VideoSAUR: layout of the public checkpoints, losses, batches, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback
from ssync_pl.adapters import find_adapter
from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts import DINOSAUR, SlotContrast, VideoSAUR
from ssync_pl.hosts.slot_contrast import slot_contrast_loss
from ssync_pl.hosts.temporal_similarity import temporal_similarity, temporal_similarity_loss

Build = Callable[..., Any]
Batch = dict[str, Tensor]

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
# 3 slots of size 8, features of 6 channels on 2 x 3 patches, projection 16, renderer 16 and 12, losses of both kinds.
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
    model = tiny_host(VideoSAUR)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == PUBLIC
    # Optimizer states are kept by position.
    assert [name for name, _ in model.named_parameters()] == list(PUBLIC)


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


def test_refusals(tiny_host: Build) -> None:
    with pytest.raises(ConfigError, match=r"one of the first two to be above, but got 0.0, 0.0, 1.0"):
        tiny_host(VideoSAUR, reconstruction_weight=0.0, similarity_weight=0.0, contrast_weight=1.0)
    with pytest.raises(ConfigError, match="`similarity_shift` to be at least 1"):
        tiny_host(VideoSAUR, similarity_shift=0)
    with pytest.raises(ConfigError, match="`slot_init` to be 'gaussian' or 'learned', but got 'boxes'"):
        tiny_host(VideoSAUR, slot_init="boxes")
    with pytest.raises(ConfigError, match="`decoder` to be 'mlp' or 'mixer'"):
        tiny_host(VideoSAUR, decoder="broadcast")
    with pytest.raises(ConfigError, match="at least 1, but got 0 and 8"):
        tiny_host(VideoSAUR, num_slots=0)
    with pytest.raises(ConfigError, match="initial spread of the slots to be above 0"):
        tiny_host(VideoSAUR, slot_init_std=0.0)
    with pytest.raises(ShapeError, match=r"`inputs` to be frames \(B, T, 3, H, W\) or cached features"):
        tiny_host(VideoSAUR)(torch.zeros(2, 6, 6))
    with pytest.raises(ConfigError, match="key `features` or `video` in the batch"):
        tiny_host(VideoSAUR).training_step({"image": torch.zeros(2, 3, 8, 8)}, 0)


def test_command_line_builds_it_from_flat_arguments() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VideoSAUR, "model")
    values = ["backbone=null", "feature_dim=6", "grid=[2, 3]", "decoder_hidden=[16]", "slot_dim=8", "decoder=mlp"]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # jsonargparse before 4.49
    model = instantiate(parser.parse_args([f"--model.{value}" for value in values])).model
    assert model(torch.randn(1, 2, 6, 6)).mask_logits.shape == (1, 2, 11, 2, 3)
    with pytest.raises(jsonargparse.ArgumentError, match="decoder"):
        parser.parse_args(["--model.decoder=other"])


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
