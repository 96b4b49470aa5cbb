import math

import pytest
import torch
from tiny_models import tiny, window_clips

from ssync_pl.hosts import SOLV
from ssync_pl.hosts import solv as module
from ssync_pl.hosts.linking import link_slots, relabel_slots

GRID, N, C = (2, 4), 8, 6


def test_the_defaults_are_the_published_sizes() -> None:
    model = SOLV(backbone=None, feature_dim=768, grid=(24, 36))
    assert model.spatial_binder.slots.shape == (8, 128)
    assert model.spatial_binder.iterations == 3
    assert model.temporal_binder.window == 5
    assert len(model.temporal_binder.blocks.layers) == 3
    assert (model.merger.threshold, model.merger.linkage) == (0.12, "complete")
    assert model._drop_tokens(torch.zeros(1, 1, 864, 1))[0].shape[2] == 432
    assert model.decoder.to_features.out_features == 768


def test_evaluation_of_a_frame_is_training_on_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(SOLV, token_drop=0.0, merge_threshold=0.3, merge_min_slots=1)
    features = window_clips(frames=5)["features"]
    whole = model.eval()(features)
    for frame in range(1, 4):
        part = model.train()(features[:, frame - 1 : frame + 2])
        for name in ("slots", "members", "reconstruction", "mask_logits", "targets"):
            torch.testing.assert_close(getattr(whole, name)[:, frame : frame + 1], getattr(part, name), msg=name)
    # At the ends, what is missing is hidden.
    valid = torch.tensor([[False, True, True]] * 2)
    start = model(torch.cat([torch.full_like(features[:, :1], 3.0), features[:, :2]], 1), valid)
    torch.testing.assert_close(whole.mask_logits[:, :1], start.mask_logits)
    monkeypatch.setattr(module, "_FRAMES_AT_A_TIME", 4)
    for one, other in zip(whole, model.eval()(features), strict=True):
        torch.testing.assert_close(one, other)


def test_padding_neither_counts_nor_informs() -> None:
    model, batch = tiny(SOLV).eval(), window_clips(frames=4)
    padded = {**batch, "features": batch["features"].clone()}
    padded["features"][:, 3] = 50.0
    padded["frame_mask"] = torch.tensor([[True, True, True, False]] * 2)
    with torch.no_grad():
        masks, loss = model.evaluate(padded)
        expected, expected_loss = model.evaluate({name: value[:, :3] for name, value in batch.items()})
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(masks[:, :3], expected)


def test_masks_are_linked_over_time_by_slots_or_by_what_they_cover() -> None:
    batch = window_clips(frames=5)
    features = batch["features"]
    for link_by in ("slots", "features"):
        model = tiny(SOLV, merge_threshold=0.2, merge_min_slots=1, link_by=link_by).eval()
        with torch.no_grad():
            masks, out = model.segment(batch), model(features)
        looks = out.slots
        if link_by == "features":
            apart = features - features.mean((1, 2), keepdim=True)
            looks = out.masks @ apart / out.masks.sum(-1, keepdim=True).clamp_min(1e-8)
        expected = relabel_slots(out.masks, link_slots(looks, out.slot_valid))
        torch.testing.assert_close(masks, expected.unflatten(-1, GRID))
        torch.testing.assert_close(masks.sum(2), torch.ones(2, 5, *GRID))


def test_merging_grows_with_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(SOLV, merge_rise=180.0, merge_threshold=1.9, merge_min_slots=1)
    model._total_steps, counts = 180, []
    model.merger.register_forward_hook(lambda _m, _a, out: counts.append(int(out.valid.sum())))
    for step, expected in {0: 0.0, 9: math.log(1 + 179 / 20) / math.log(180), 180: 1.0}.items():
        monkeypatch.setattr(SOLV, "global_step", property(lambda self, step=step: step))
        assert model._merge_probability() == pytest.approx(expected)
        model.training_step(window_clips(), 0)
    assert counts[0] == 8
    assert counts[2] < 8
    assert tiny(SOLV, merge_rise=1.0)._merge_probability() == 1.0


def test_clips_at_the_edge_of_a_video_hide_one_side() -> None:
    def hidden(share: float, length: int = 5) -> torch.Tensor:
        model = tiny(SOLV, clip_length=length, edge_probability=share)
        return model._hidden_neighbours(torch.ones(2000, length, dtype=torch.bool))

    patterns = {tuple(row) for row in hidden(1.0).int().tolist()}
    assert patterns == {(1, 1, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 1, 1), (0, 0, 0, 0, 1)}
    assert hidden(0.25).any(1).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not hidden(0.0).any()
    assert not hidden(1.0, 1).any()


def test_the_step_compiles_to_one_graph() -> None:
    model, features = tiny(SOLV), window_clips()["features"]
    torch.manual_seed(5)
    expected = model(features).mask_logits
    torch.manual_seed(5)
    out = torch.compile(model.forward, backend="eager", fullgraph=True)(features)
    torch.testing.assert_close(out.mask_logits, expected)


def test_a_random_part_of_the_tokens_is_kept_in_training() -> None:
    model, features = tiny(SOLV, token_drop=0.75), torch.randn(500, 1, N, C)
    tokens, indices = model._drop_tokens(features)
    assert tokens.shape == (500, 1, 2, C)
    assert (indices.diff(dim=-1) > 0).all()
    assert torch.equal(tokens[3, 0], features[3, 0, indices[3, 0]])
    assert (torch.bincount(indices.flatten(), minlength=N) / 500 - 0.25).abs().max() < 0.08
    assert torch.equal(model.eval()._drop_tokens(features)[0], features)
