"""Features from a backbone or a cache, first slots, and the recurrence over frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import encoder_of
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.initializers import ConditionedSlots, GaussianSlots, LearnedSlots, first_frame_hints
from ssync_pl.hosts.nn.over_time import ScanOverTime, SlotProcessor


def test_cached_channels_are_split_and_projected_or_not() -> None:
    encoder, raw = encoder_of(feature_dim=5, similarity_dim=3), torch.randn(2, 24, 8)
    output = encoder(raw)
    assert torch.equal(output["backbone_features"], raw[..., :5])
    assert torch.equal(output["similarity_features"], raw[..., 5:])
    torch.testing.assert_close(output["features"], encoder.output_transform(raw[..., :5]))
    assert encoder.output_transform.layers[1].weight.shape == (10, 5)
    encoder, raw = encoder_of(feature_dim=5, hidden=0), raw[..., :5]
    assert torch.equal(encoder(raw)["features"], raw)
    assert torch.equal(encoder(raw)["similarity_features"], raw)
    assert encoder.output_dim == 5
    assert list(encoder.parameters()) == []


def test_a_position_is_added_inside_the_projection() -> None:
    plain, placed = encoder_of(feature_dim=5, hidden=7), encoder_of(feature_dim=5, hidden=7, position=0.5)
    assert set(placed.state_dict()) - set(plain.state_dict()) == {"position.weight"}
    placed.load_state_dict({**plain.state_dict(), "position.weight": torch.randn(7, 2)})
    raw = torch.randn(2, 24, 5)
    norm, first, _, last = placed.output_transform.layers
    torch.testing.assert_close(placed(raw)["features"], last((first(norm(raw)) + placed.position()).relu()))
    assert torch.equal(placed(raw)["backbone_features"], raw)
    # One patch everywhere: only its place tells patches apart.
    same = raw[:, :1].expand(-1, 24, -1)
    assert plain(same)["features"].std(1).max() < 1e-5 < 0.01 < placed(same)["features"].std(1).min()


def test_hints_are_the_objects_of_the_first_frame_in_order_then_filled() -> None:
    masks = torch.zeros(2, 2, 4, 8, 10, dtype=torch.bool)
    masks[0, 0, 1, 2:4, 5:10] = masks[0, 0, 3, 0, 0] = masks[0, 1, 2] = masks[1, 0, 2, 7, 3] = True
    masks[:, :, 0] = ~masks[:, :, 1:].any(dim=2)
    boxes = first_frame_hints(masks, num_slots=4)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([2 / 8, 5 / 10, 4 / 8, 1.0]))
    # Channel 2 shows up in the second frame only, so channel 3 moves up.
    torch.testing.assert_close(boxes[0, 1], torch.tensor([0, 0, 1 / 8, 1 / 10]))
    torch.testing.assert_close(boxes[1, 0], torch.tensor([7 / 8, 3 / 10, 1.0, 4 / 10]))
    assert (boxes[0, 2:] == -1).all()
    assert (boxes[1, 1:] == -1).all()
    centres = first_frame_hints(masks, num_slots=2, kind="centres")
    torch.testing.assert_close(centres[0], torch.tensor([[3 / 8, 7.5 / 10], [0.5 / 8, 0.5 / 10]]))
    assert torch.equal(first_frame_hints(masks, num_slots=1), boxes[:, :1])  # objects beyond the slots are dropped
    assert first_frame_hints(masks, 4, has_background=False)[0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_first_slots_are_drawn_learned_or_made_of_hints() -> None:
    torch.manual_seed(0)
    gaussian = GaussianSlots(4, 3)
    with torch.no_grad():
        gaussian.mean.fill_(5.0)
        gaussian.log_std.fill_(-2.0)
    slots = gaussian(2000)
    assert slots.mean().item() == pytest.approx(5.0, abs=0.01)
    assert slots.std().item() == pytest.approx(0.1353, abs=0.005)
    assert not torch.equal(slots[:, 0], slots[:, 1])
    assert not torch.equal(slots, gaussian(2000))
    learned = LearnedSlots(4, 3)(2)
    assert torch.equal(learned[0], learned[1])
    assert not torch.equal(learned[0, 0], learned[0, 1])
    conditioned, hints = ConditionedSlots(3, 8, hint_dim=2), torch.tensor([[[0.1, 0.2], [0.5, 0.5], [-1.0, -1.0]]])
    slots = conditioned(hints)
    torch.testing.assert_close(slots[0, 2], conditioned.empty[0, 2])
    hints[0, 1, 0] = 0.9
    assert torch.equal(slots[0, 0], conditioned(hints)[0, 0])
    assert not torch.allclose(slots[0, 1], conditioned(hints)[0, 1])


class _Adds(nn.Module):
    """A corrector that adds the frame's first feature, and tells its iterations."""

    def forward(self, slots: Tensor, features: Tensor, iterations: int | None = None) -> dict[str, Tensor]:
        return {"slots": slots + features[:, :1], "iterations": slots.new_tensor([iterations or 0])}


def test_a_scan_predicts_between_frames_only() -> None:
    double = nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    scan = ScanOverTime(SlotProcessor(_Adds(), double, iterations_first=3))
    output = scan(torch.zeros(1, 2, 1), torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1))
    # 0 + 1; 2 * 1 + 10; 2 * 12 + 100
    assert output["slots"][0, :, 0, 0].tolist() == [1.0, 12.0, 124.0]
    assert output["iterations"].tolist() == [[3.0, 0.0, 0.0]]


class TestWithBackbones:
    """With timm's smallest nets."""

    @pytest.fixture(autouse=True)
    def timm(self) -> Any:
        return pytest.importorskip("timm")

    def test_layers_of_a_transformer_are_split_and_frames_normalised_again(self) -> None:
        encoder = encoder_of(backbone="test_vit", layer="vit_block1", similarity_layer="vit_block_keys2")
        frames = torch.rand(2, 3, 64, 96)
        output, both = encoder(frames), encoder.backbone(frames).features
        assert encoder.feature_dim == encoder.similarity_dim == both.shape[-1] // 2
        assert torch.equal(output["backbone_features"], both[..., : encoder.feature_dim])
        assert torch.equal(output["similarity_features"], both[..., encoder.feature_dim :])
        assert not output["backbone_features"].requires_grad
        wanted = encoder(encoder.backbone.renormalize(frames, (0.0,) * 3, (1.0,) * 3))["backbone_features"]
        encoder.frame_mean, encoder.frame_std = (0.0,) * 3, (1.0,) * 3
        torch.testing.assert_close(encoder(frames)["backbone_features"], wanted)

    def test_stages_of_different_widths_are_split(self) -> None:
        encoder = encoder_of(backbone="test_resnet", layer="layer3", similarity_layer="layer2", grid=(8, 8))
        assert encoder.feature_dim + encoder.similarity_dim == encoder.backbone.dim
        assert encoder.feature_dim == encoder_of(backbone="test_resnet", layer="layer3").feature_dim
        assert encoder.feature_dim != encoder.similarity_dim

    def test_refusals(self) -> None:
        with pytest.raises(ShapeError, match=r"64 x 64 pixels give 4 x 4. Set `grid` of the model to \[4, 4\]"):
            encoder_of(backbone="test_vit", layer="vit_block1")(torch.zeros(1, 3, 64, 64))
        with pytest.raises(ConfigError, match="`layer` to be named"):
            encoder_of(backbone="test_vit", similarity_layer="vit_block_keys2")
        with pytest.raises(ConfigError, match="only without a backbone"):
            encoder_of(backbone="test_vit", feature_dim=5)
