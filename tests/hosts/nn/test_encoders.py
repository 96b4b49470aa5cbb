"""Features from a backbone or a cache, first slots, and the recurrence over frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.nn.initializers import ConditionedSlots, GaussianSlots, LearnedSlots, first_frame_hints
from ssync_pl.hosts.nn.over_time import ScanOverTime, SlotProcessor


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
    return FeatureEncoder(**(options | changes))


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


def _masks() -> torch.Tensor:
    masks = torch.zeros(2, 2, 4, 8, 10, dtype=torch.bool)
    masks[0, 0, 1, 2:4, 5:10] = True
    masks[0, 0, 3, 0, 0] = True
    masks[0, 1, 2] = True
    masks[1, 0, 2, 7, 3] = True
    masks[:, :, 0] = ~masks[:, :, 1:].any(dim=2)
    return masks


def test_boxes_of_the_first_frame_in_order_then_filled() -> None:
    boxes = first_frame_hints(_masks(), num_slots=4)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([2 / 8, 5 / 10, 4 / 8, 1.0]))
    # Channel 2 shows up in the second frame only, so channel 3 moves up.
    torch.testing.assert_close(boxes[0, 1], torch.tensor([0, 0, 1 / 8, 1 / 10]))
    torch.testing.assert_close(boxes[1, 0], torch.tensor([7 / 8, 3 / 10, 1.0, 4 / 10]))
    assert (boxes[0, 2:] == -1).all()
    assert (boxes[1, 1:] == -1).all()


def test_centres_are_the_middle_of_the_boxes() -> None:
    centres = first_frame_hints(_masks(), num_slots=2, kind="centres")
    torch.testing.assert_close(centres[0], torch.tensor([[3 / 8, 7.5 / 10], [0.5 / 8, 0.5 / 10]]))


def test_objects_beyond_the_slots_are_dropped() -> None:
    boxes = first_frame_hints(_masks(), num_slots=1)
    assert boxes.shape == (2, 1, 4)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([2 / 8, 5 / 10, 4 / 8, 1.0]))


def test_without_background_every_channel_is_an_object() -> None:
    with_all = first_frame_hints(_masks(), num_slots=4, has_background=False)
    assert with_all[0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_gaussian_slots_differ_by_slot_and_draw_and_follow_mean_and_std() -> None:
    torch.manual_seed(0)
    initializer = GaussianSlots(4, 3)
    with torch.no_grad():
        initializer.mean.fill_(5.0)
        initializer.log_std.fill_(-2.0)
    slots = initializer(2000)
    assert slots.mean().item() == pytest.approx(5.0, abs=0.01)
    assert slots.std().item() == pytest.approx(0.1353, abs=0.005)
    assert not torch.equal(slots[:, 0], slots[:, 1])
    assert not torch.equal(slots, initializer(2000))


def test_learned_slots_are_the_same_for_each_clip() -> None:
    slots = LearnedSlots(4, 3)(2)
    assert torch.equal(slots[0], slots[1])
    assert not torch.equal(slots[0, 0], slots[0, 1])


def test_conditioned_slots_depend_on_their_own_hint_only() -> None:
    torch.manual_seed(0)
    initializer = ConditionedSlots(3, 8, hint_dim=2)
    hints = torch.tensor([[[0.1, 0.2], [0.5, 0.5], [-1.0, -1.0]]])
    slots = initializer(hints)
    torch.testing.assert_close(slots[0, 2], initializer.empty[0, 2])
    changed = initializer(torch.tensor([[[0.1, 0.2], [0.9, 0.5], [-1.0, -1.0]]]))
    assert torch.equal(slots[0, 0], changed[0, 0])
    assert not torch.allclose(slots[0, 1], changed[0, 1])


class _Adds(nn.Module):
    """A corrector that adds the frame's first feature, and counts its iterations."""

    def __init__(self) -> None:
        super().__init__()
        self.iterations: list[int | None] = []

    def forward(self, slots: Tensor, features: Tensor, iterations: int | None = None) -> dict[str, Tensor]:
        self.iterations.append(iterations)
        return {"slots": slots + features[:, :1], "dots": slots}


class _Doubles(nn.Module):
    def forward(self, slots: Tensor) -> Tensor:
        return 2 * slots


def test_scan_predicts_between_frames_only() -> None:
    corrector = _Adds()
    scan = ScanOverTime(SlotProcessor(corrector, _Doubles(), iterations_first=3))
    features = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    output = scan(torch.zeros(1, 2, 1), features)
    # 0 + 1; 2 * 1 + 10; 2 * 12 + 100
    assert output["slots"][0, :, 0, 0].tolist() == [1.0, 12.0, 124.0]
    assert output["dots"][0, :, 0, 0].tolist() == [0.0, 2.0, 24.0]
    assert corrector.iterations == [3, None, None]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: _build(), ConfigError, "feature_dim"),
        (lambda: _build(feature_dim=5, layer="vit_block1"), ConfigError, "only with a backbone"),
        (lambda: _build(feature_dim=5, grid=(4, 0)), ConfigError, "grid"),
        (lambda: _build(feature_dim=5, hidden=0, position=0.5), ConfigError, "encoder_position"),
        (lambda: _build(feature_dim=5)(torch.zeros(1, 23, 5)), ShapeError, "got 23 patches"),
        (lambda: _build(feature_dim=5)(torch.zeros(1, 24, 7)), ShapeError, "7 channels"),
        (lambda: _build(feature_dim=5)(torch.zeros(1, 3, 8, 8)), ConfigError, "cached `features`"),
        (lambda: first_frame_hints(torch.zeros(2, 4, 8, 8), 3), ShapeError, "segmentations"),
        (lambda: ConditionedSlots(3, 8, hint_dim=2)(torch.zeros(2, 4, 2)), ShapeError, "conditioning"),
        (lambda: LearnedSlots(4, 8, initial_std=0), ConfigError, "spread"),
        (lambda: GaussianSlots(4, 8, initial_std=0), ConfigError, "spread"),
    ],
)
def test_refusals(call, error, match) -> None:
    with pytest.raises(error, match=match):
        call()


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
        with pytest.raises(ConfigError, match="`layer` to be named"):
            _build(backbone="test_vit", similarity_layer="vit_block_keys2")
        with pytest.raises(ConfigError, match="only without a backbone"):
            _build(backbone="test_vit", feature_dim=5)
