"""Features from a backbone or a cache, and which of their channels serve what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder, build_feature_encoder


def _build(**changes: Any) -> FeatureEncoder:
    options: dict[str, Any] = {
        "backbone": None,
        "layer": None,
        "similarity_layer": None,
        "weights": "none",
        "checkpoint": None,
        "feature_dim": None,
        "similarity_dim": None,
        "grid": (4, 6),
        "slot_dim": 8,
        "hidden": None,
    }
    return build_feature_encoder(**(options | changes))


def test_cached_channels_are_split() -> None:
    encoder = _build(feature_dim=5, similarity_dim=3)
    raw = torch.randn(2, 24, 8)
    output = encoder(raw)
    assert torch.equal(output["backbone_features"], raw[..., :5])
    assert torch.equal(output["similarity_features"], raw[..., 5:])
    assert encoder.output_transform is not None
    torch.testing.assert_close(output["features"], encoder.output_transform(raw[..., :5]))
    assert encoder.output_transform.layers[1].weight.shape == (10, 5)


def test_without_projection_slots_see_the_features() -> None:
    encoder = _build(feature_dim=5, hidden=0)
    raw = torch.randn(2, 24, 5)
    output = encoder(raw)
    assert torch.equal(output["features"], raw)
    assert torch.equal(output["similarity_features"], raw)
    assert encoder.output_dim == 5
    assert list(encoder.parameters()) == []


def test_a_position_is_added_inside_the_projection() -> None:
    plain, placed = _build(feature_dim=5, hidden=7), _build(feature_dim=5, hidden=7, position=0.5)
    assert set(placed.state_dict()) - set(plain.state_dict()) == {"position.weight"}
    placed.load_state_dict({**plain.state_dict(), "position.weight": torch.randn(7, 2)})
    raw = torch.randn(2, 24, 5)
    assert placed.output_transform is not None
    assert placed.position is not None
    norm, first, _, last = placed.output_transform.layers
    hidden = first(norm(raw)) + placed.position()
    torch.testing.assert_close(placed(raw)["features"], last(hidden.relu()))
    assert torch.equal(placed(raw)["backbone_features"], raw)
    assert (placed(raw)["features"] - plain(raw)["features"]).abs().mean() > 0.01
    # One patch everywhere: only its place tells patches apart.
    same = raw[:, :1].expand(-1, 24, -1)
    assert plain(same)["features"].std(1).max() < 1e-5 < 0.01 < placed(same)["features"].std(1).min()


@pytest.mark.parametrize(("hidden", "position"), [(0, 0.5), (7, -0.5)])
def test_a_position_needs_a_projection(hidden: int, position: float) -> None:
    with pytest.raises(ConfigError, match=r"`encoder_position` .* only with `encoder_hidden` above 0"):
        _build(feature_dim=5, hidden=hidden, position=position)


def test_refusals_without_backbone() -> None:
    with pytest.raises(ConfigError, match="`feature_dim` to be the channels of the cached features"):
        _build()
    with pytest.raises(ConfigError, match=r"only with a backbone, but got 'vit_block1'"):
        _build(feature_dim=5, layer="vit_block1")
    with pytest.raises(ConfigError, match="`grid` to be rows and columns"):
        _build(feature_dim=5, grid=(4, 0))
    encoder = _build(feature_dim=5)
    with pytest.raises(ShapeError, match=r"4 x 6 patches, but got 23 patches. Set `grid`"):
        encoder(torch.zeros(1, 23, 5))
    with pytest.raises(ShapeError, match=r"5 \+ 0 channels .* but got 7"):
        encoder(torch.zeros(1, 24, 7))
    with pytest.raises(ConfigError, match="cached `features` in the batch, as this model has no backbone"):
        encoder(torch.zeros(1, 3, 8, 8))


class TestWithBackbones:
    """With timm's smallest nets."""

    @pytest.fixture(autouse=True)
    def timm(self) -> Any:
        return pytest.importorskip("timm")

    def test_layers_of_a_transformer_are_split(self) -> None:
        encoder = _build(backbone="test_vit", layer="vit_block1", similarity_layer="vit_block_keys2")
        assert encoder.backbone is not None
        frames = torch.randn(2, 3, 64, 96)
        output = encoder(frames)
        both = encoder.backbone(frames).features
        assert encoder.feature_dim == encoder.similarity_dim == both.shape[-1] // 2
        assert torch.equal(output["backbone_features"], both[..., : encoder.feature_dim])
        assert torch.equal(output["similarity_features"], both[..., encoder.feature_dim :])
        assert not output["backbone_features"].requires_grad

    def test_stages_of_different_widths_are_split(self) -> None:
        encoder = _build(backbone="test_resnet", layer="layer3", similarity_layer="layer2", grid=(8, 8))
        assert encoder.backbone is not None
        whole = encoder.backbone.dim
        assert encoder.feature_dim + encoder.similarity_dim == whole
        assert encoder.feature_dim == _build(backbone="test_resnet", layer="layer3").feature_dim
        assert encoder.feature_dim != encoder.similarity_dim

    def test_frames_are_normalised_again(self) -> None:
        encoder = _build(backbone="test_vit", layer="vit_block1")
        assert encoder.backbone is not None
        frames = torch.rand(1, 3, 64, 96)
        wanted = encoder(encoder.backbone.renormalize(frames, (0.0,) * 3, (1.0,) * 3))["backbone_features"]
        encoder.frame_mean, encoder.frame_std = (0.0,) * 3, (1.0,) * 3
        torch.testing.assert_close(encoder(frames)["backbone_features"], wanted)

    def test_refusals(self) -> None:
        with pytest.raises(ShapeError, match=r"64 x 64 pixels give 4 x 4. Set `grid` of the model to \[4, 4\]"):
            _build(backbone="test_vit", layer="vit_block1")(torch.zeros(1, 3, 64, 64))
        with pytest.raises(ConfigError, match="`layer` to be set beside similarity_layer='vit_block_keys2'"):
            _build(backbone="test_vit", similarity_layer="vit_block_keys2")
        with pytest.raises(ConfigError, match="only without a backbone"):
            _build(backbone="test_vit", feature_dim=5)
