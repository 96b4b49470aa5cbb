from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.temporal_binder import TemporalBinder, frame_windows


def _binder(window: int = 3) -> TemporalBinder:
    torch.manual_seed(0)
    return TemporalBinder(8, window, blocks=2, heads=2, dropout=0.0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hidden_frames_do_not_matter(mode: str) -> None:
    binder = _binder().train(mode == "train")
    slots = torch.randn(2, 1, 3, 4, 8)
    valid = torch.tensor([[[True, True, False]], [[False, True, True]]])
    other = torch.where(valid[..., None, None], slots, torch.full((), 7.0))
    torch.testing.assert_close(binder(slots, valid), binder(other, valid))
    assert not torch.allclose(binder(slots, valid), binder(slots, torch.ones_like(valid)), atol=1e-3)


def test_a_window_of_padding_alone_stays_finite() -> None:
    out = _binder()(torch.randn(1, 1, 3, 4, 8), torch.zeros(1, 1, 3, dtype=torch.bool))
    assert out.isfinite().all()


def test_slots_of_different_index_do_not_mix() -> None:
    binder, slots = _binder().eval(), torch.randn(1, 1, 3, 4, 8)
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    changed = slots.clone()
    changed[:, :, :, 2] += 1
    same = (binder(slots, valid) - binder(changed, valid)).abs().amax(-1)[0, 0]
    assert same[[0, 1, 3]].max() < 1e-6
    assert same[2] > 1e-3


def test_windows_reach_over_the_edges() -> None:
    values = torch.arange(1, 5).view(1, 4, 1).expand(2, 4, 3)
    windows = frame_windows(values, 2)
    assert windows.shape == (2, 4, 5, 3)
    assert windows[0, :, :, 0].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [2, 3, 4, 0, 0]]
    assert frame_windows(torch.ones(1, 2, dtype=torch.bool), 1).tolist() == [[[False, True, True], [True, True, False]]]
    assert torch.equal(frame_windows(values, 0).squeeze(2), values)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="odd"):
        TemporalBinder(8, window=4)
    with pytest.raises(ConfigError, match="divide the slot size 10"):
        TemporalBinder(10, heads=4)
    with pytest.raises(ConfigError, match="`blocks`"):
        TemporalBinder(8, blocks=0)
    with pytest.raises(ShapeError, match=r"\(B, P, 3, S, D\)"):
        _binder()(torch.zeros(1, 1, 5, 4, 8), torch.ones(1, 1, 5, dtype=torch.bool))
