from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback
from ssync_pl.adapters.solv import SolvAdapter
from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts import SOLV
from ssync_pl.hosts import solv as module
from ssync_pl.hosts.linking import link_slots, relabel_slots

GRID, C = (2, 4), 6
N = GRID[0] * GRID[1]
Batch = dict[str, Any]


def _solv(**changes: Any) -> SOLV:
    options: dict[str, Any] = {
        "num_slots": 4,
        "slot_dim": 16,
        "backbone": None,
        "feature_dim": C,
        "grid": GRID,
        "clip_length": 3,
        "iterations": 2,
        "temporal_blocks": 1,
        "temporal_heads": 2,
        "decoder_hidden": (32,),
        "dropout": 0.0,
        "edge_probability": 0.0,
        "learning_rate": 3e-3,
        "warmup_steps": 0,
        "decay": "constant",
    }
    torch.manual_seed(0)
    model = SOLV(**(options | changes))
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model


def _clip(videos: int = 2, frames: int = 3) -> Batch:
    """Left and right half differ, and each video has features of its own."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.randn(videos, 1, 2, C, generator=generator).expand(-1, frames, -1, -1)
    right = torch.arange(N) % GRID[1] >= 2
    labels = right.long().view(1, 1, *GRID).expand(videos, frames, -1, -1)
    features = sides.gather(2, labels.flatten(2).unsqueeze(-1).expand(-1, -1, -1, C))
    masks = torch.nn.functional.one_hot(labels, 2).movedim(-1, 2).bool()
    masks = masks.repeat_interleave(4, -1).repeat_interleave(4, -2)
    return {
        "features": features + 0.05 * torch.randn(features.shape, generator=generator),
        "video": torch.zeros(videos, frames, 3, 4 * GRID[0], 4 * GRID[1]),
        "segmentations": masks,
    }


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _loader(batch: Batch) -> DataLoader[Any]:
    return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]


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


def test_shapes_in_training_and_evaluation() -> None:
    model = _solv()
    out = model(_clip()["features"])
    assert out.slots.shape == (2, 1, 4, 16)
    assert out.members.shape == (2, 1, 4, 4)
    assert out.attention_logits.shape == (2, 3, 4, N // 2)
    assert out.token_indices.shape == (2, 3, N // 2)
    assert out.reconstruction.shape == out.targets.shape == (2, 1, N, C)
    assert out.mask_logits.shape == (2, 1, 4, N)
    out = model.eval()(_clip(frames=7)["features"])
    assert out.attention_logits.shape == (2, 7, 4, N)
    assert out.mask_logits.shape == (2, 7, 4, N)
    torch.testing.assert_close(out.masks.sum(2), torch.ones(2, 7, N))


def test_the_defaults_are_the_published_sizes() -> None:
    model = SOLV(backbone=None, feature_dim=768, grid=(24, 36))
    assert model.spatial_binder.slots.shape == (8, 128)
    assert model.spatial_binder.iterations == 3
    assert model.temporal_binder.window == 5
    assert len(model.temporal_binder.blocks.layers) == 3
    assert (model.merger.threshold, model.merger.linkage) == (0.12, "complete")
    assert model._drop_tokens(torch.zeros(1, 1, 864, 1))[0].shape[2] == 432
    assert model.decoder.to_features.out_features == 768


def test_evaluation_of_a_frame_is_training_on_its_window() -> None:
    model = _solv(token_drop=0.0, merge_threshold=0.3, merge_min_slots=1)
    features = _clip(frames=5)["features"]
    whole = model.eval()(features)
    for frame in range(1, 4):
        part = model.train()(features[:, frame - 1 : frame + 2])
        for name in ("slots", "members", "reconstruction", "mask_logits", "targets"):
            torch.testing.assert_close(getattr(whole, name)[:, frame : frame + 1], getattr(part, name), msg=name)
    # At the ends, what is missing is hidden.
    valid = torch.tensor([[False, True, True]] * 2)
    start = model(torch.cat([torch.full_like(features[:, :1], 3.0), features[:, :2]], 1), valid)
    torch.testing.assert_close(whole.mask_logits[:, :1], start.mask_logits)


def test_evaluation_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _solv().eval()
    features = _clip(frames=7)["features"]
    whole = model(features)
    monkeypatch.setattr(module, "_FRAMES_AT_A_TIME", 4)
    pieces = model(features)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_loss_is_the_error_on_the_centre_frame() -> None:
    model, batch = _solv(token_drop=0.0), _clip()
    loss = model.training_step(batch, 0)
    out = model(batch["features"])
    masks = out.mask_logits.masked_fill(~out.slot_valid.unsqueeze(-1), -1e9).softmax(2)
    torch.testing.assert_close(out.masks, masks)
    torch.testing.assert_close(loss, (out.reconstruction[:, 0] - batch["features"][:, 1]).square().mean())


def test_the_centre_is_decoded_where_merged_slots_look() -> None:
    model = _solv(merge_threshold=1.9, merge_min_slots=1)
    torch.manual_seed(3)
    seen: dict[str, Any] = {}
    model.spatial_binder.register_forward_hook(lambda _m, args, out: seen.update(indices=args[1], bound=out))
    model.decoder.register_forward_hook(lambda _m, args, out: seen.update(positions=args[1]))
    out = model(_clip()["features"])
    assert not out.slot_valid.all()
    points = model.spatial_binder.points
    for video in range(2):
        attention = seen["bound"].attention[video, 1]
        at = points[seen["indices"][video, 1]]
        for slot in range(4):
            members = out.members[video, 0, slot]
            if not members.any():
                continue
            share = attention[members].sum(0) / attention[members].sum()
            mean = share @ at
            spread = (share @ (at - mean).square() + 1e-4).sqrt()
            expected = (points - mean) / (5 * spread)
            torch.testing.assert_close(seen["positions"][video, 0, slot], expected, rtol=1e-4, atol=1e-4)


def test_padding_neither_counts_nor_informs() -> None:
    model, batch = _solv().eval(), _clip(frames=4)
    short = {name: value[:, :3] for name, value in batch.items()}
    padded = {**batch, "frame_mask": torch.tensor([[True, True, True, False]] * 2)}
    padded["features"] = batch["features"].clone()
    padded["features"][:, 3] = 50.0
    with torch.no_grad():
        masks, loss = model.evaluate(padded)
        expected, expected_loss = model.evaluate(short)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(masks[:, :3], expected)


def test_masks_are_linked_over_time() -> None:
    model, batch = _solv(merge_threshold=0.2, merge_min_slots=1).eval(), _clip(frames=5)
    with torch.no_grad():
        masks = model.segment(batch)
        out = model(batch["features"])
    expected = relabel_slots(out.masks, link_slots(out.slots, out.slot_valid))
    assert torch.equal(masks, expected.unflatten(-1, GRID))
    torch.testing.assert_close(masks.sum(2), torch.ones(2, 5, *GRID))


def test_masks_may_be_linked_by_what_they_cover() -> None:
    model, batch = _solv(link_by="features").eval(), _clip(frames=5)
    with torch.no_grad():
        masks, out = model.segment(batch), model(batch["features"])
    features = batch["features"]
    for video in range(2):
        apart = features[video] - features[video].mean((0, 1))
        looks = torch.stack(
            [torch.stack([mask @ apart[t] / mask.sum() for mask in out.masks[video, t]]) for t in range(5)]
        )
        linked = link_slots(looks[None], out.slot_valid[video : video + 1])
        expected = relabel_slots(out.masks[video : video + 1], linked)
        torch.testing.assert_close(masks[video], expected[0].unflatten(-1, GRID))


def test_overfits_two_halves_and_trains_every_parameter() -> None:
    model, batch = _solv(merge_threshold=0.05), _clip()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.2 * losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_merging_grows_with_the_training() -> None:
    model = _solv(merge_rise=180.0)
    model._total_steps = 180
    progress = {0: 0.0, 9: math.log(1 + 179 / 20) / math.log(180), 180: 1.0}
    for step, expected in progress.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SOLV, "global_step", property(lambda self, step=step: step))
            assert model._merge_probability() == pytest.approx(expected)
    assert _solv(merge_rise=1.0)._merge_probability() == 1.0


def test_a_training_starts_without_merging() -> None:
    model = _solv(merge_threshold=1.9, merge_min_slots=1)
    model._total_steps = 100
    counts: list[int] = []
    model.merger.register_forward_hook(lambda _m, _a, out: counts.append(int(out.valid.sum())))
    with pytest.MonkeyPatch.context() as patch:
        for step in (0, 100):
            patch.setattr(SOLV, "global_step", property(lambda self, step=step: step))
            model.training_step(_clip(), 0)
    assert counts[0] == 8
    assert counts[1] < 8


def test_clips_at_the_edge_of_a_video_hide_one_side() -> None:
    model = _solv(clip_length=5, edge_probability=1.0)
    hidden = model._hidden_neighbours(torch.ones(400, 5, dtype=torch.bool))
    patterns = {tuple(row) for row in hidden.int().tolist()}
    assert patterns == {(1, 1, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 1, 1), (0, 0, 0, 0, 1)}
    some = _solv(clip_length=5, edge_probability=0.25)._hidden_neighbours(torch.ones(2000, 5, dtype=torch.bool))
    assert some.any(1).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not _solv()._hidden_neighbours(torch.ones(50, 3, dtype=torch.bool)).any()
    assert not _solv(clip_length=1, edge_probability=1.0)._hidden_neighbours(torch.ones(9, 1, dtype=torch.bool)).any()


def test_fit_validates_predicts_saves_and_loads(tmp_path: Path) -> None:
    model = SOLV(**dict(_solv(decay="exponential").hparams))
    trainer = _trainer(tmp_path, enable_checkpointing=True)
    trainer.fit(model, _loader(_clip()), _loader(_clip(frames=5)))
    scores = trainer.callback_metrics
    assert {"train/loss", "train/slots", "val/video_fg_ari", "val/video_mbo", "val/used_slots", "val/loss"} <= set(
        scores
    )
    assert model._total_steps == 3
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    loaded = SOLV.load_from_checkpoint(path, weights_only=True).eval()
    (predicted,) = trainer.predict(loaded, _loader(_clip(frames=5)))  # type: ignore[misc]
    assert predicted["labels"].shape == (2, 5, 8, 16)
    assert predicted["masks"].shape == (2, 5, 4, 8, 16)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.segment(_clip()), model.segment(_clip()))


def test_ssync_joins_a_run(tmp_path: Path) -> None:
    model = SOLV(**dict(_solv(merge_rise=1.0).hparams))
    trainer = _trainer(tmp_path, callbacks=[SSyncCallback(warmup_steps=0, adapter=SolvAdapter())])
    trainer.fit(model, _loader(_clip()), _loader(_clip(frames=5)))
    assert trainer.callback_metrics["ssync/interior_loss"] > 0
    assert not any(part._forward_hooks for part in model.modules())


def test_frames_go_through_the_backbone() -> None:
    pytest.importorskip("timm")
    model = _solv(
        backbone="test_vit", backbone_weights="none", layer="vit_block1", feature_dim=None, grid=(4, 6), token_drop=0.0
    )
    video = torch.randn(2, 3, 3, 64, 96)
    out = model(video)
    features = model.encoder.backbone(video).features.unflatten(0, (2, 3))
    assert torch.equal(out.targets, features[:, 1:2])
    torch.testing.assert_close(model(features).mask_logits, out.mask_logits)
    assert [name for name in model.state_dict() if "backbone" in name] == ["encoder.backbone.fingerprint"]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_step_is_one_graph(compiled: bool) -> None:
    model, batch = _solv(), _clip()
    run: Callable[..., Any] = torch.compile(model.forward, backend="eager", fullgraph=True) if compiled else model
    torch.manual_seed(5)
    out = run(batch["features"])
    torch.manual_seed(5)
    torch.testing.assert_close(out.mask_logits, model(batch["features"]).mask_logits)


def test_half_precision_keeps_masks_finite() -> None:
    model, batch = _solv(), _clip()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_step(batch, 0)
        out = model(batch["features"])
    assert out.mask_logits.dtype == out.attention_logits.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_short_names_work_in_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from ssync_pl.cli import main

    words = ["fit", "--model=SOLV", "--model.backbone=null", "--model.feature_dim=6", "--model.grid=[2,4]"]
    with contextlib.suppress(SystemExit):
        main([*words, "--print_config"])
    printed = capsys.readouterr().out
    assert "class_path: ssync_pl.hosts.SOLV" in printed
    assert "merge_threshold: 0.12" in printed


def test_a_random_part_of_the_tokens_is_kept_in_training() -> None:
    model, features = _solv(token_drop=0.75), torch.randn(500, 1, N, C)
    tokens, indices = model._drop_tokens(features)
    assert tokens.shape == (500, 1, 2, C)
    assert (indices.diff(dim=-1) > 0).all()
    assert torch.equal(tokens[3, 0], features[3, 0, indices[3, 0]])
    share = torch.bincount(indices.flatten(), minlength=N) / 500
    assert (share - 0.25).abs().max() < 0.08
    assert torch.equal(model.eval()._drop_tokens(features)[0], features)


def test_wrong_options_and_clips_are_refused() -> None:
    for changes, word in (
        ({"edge_probability": 2.0}, "`edge_probability`"),
        ({"merge_rise": 0.5}, "`merge_rise`"),
        ({"linking": "never"}, "`linking`"),
        ({"link_by": "names"}, "`link_by`"),
        ({"corrector_init": "other"}, "`corrector_init`"),
        ({"clip_length": 4}, "odd"),
        ({"feature_dim": None}, "`feature_dim`"),
        ({"token_drop": 1.0}, "`token_drop`"),
        ({"merge_threshold": 3.0}, "`merge_threshold`"),
        ({"merge_linkage": "single"}, "`merge_linkage`"),
        ({"temporal_heads": 5}, "`temporal_heads`"),
    ):
        with pytest.raises(ConfigError, match=word):
            _solv(**changes)
    model = _solv()
    with pytest.raises(ShapeError, match="`clip_length`"):
        model(_clip(frames=5)["features"])
    with pytest.raises(ShapeError, match="`grid`"):
        model(torch.zeros(1, 3, N + 1, C))
    with pytest.raises(ConfigError, match="`features` or `video`"):
        model.training_step({"frame_mask": torch.ones(1, 3)}, 0)
