"""The loop reference is itself held against numbers worked out by hand and against finite differences."""

import numpy as np
import pytest
from ssync_naive import naive_ssync


def clip(labels, s, scale=1.0):
    """Logits (B,T,S,N) whose argmax is `labels` (B,T,N)."""
    return scale * (np.asarray(labels)[:, :, None] == np.arange(s)[None, None, :, None]).astype(float)


def test_border_counts_lateral_neighbours_again():
    # One frame, 1x3, labels 0 1 1: the left patch sees label 1 to the right and, clamped, right-up and right-down.
    logits = clip([[[0, 1, 1]]], 2)
    for n_bd, expected in ((1, [1, 1, 0]), (3, [1, 1, 0]), (4, [0, 0, 0])):
        out = naive_ssync(logits, logits, grid=(1, 3), n_bd=n_bd, merge=False)
        assert out.boundary.ravel().tolist() == expected


def test_brier_by_hand():
    # Two patches with labels 0 and 1, decoder flat: (1/2)^2 everywhere; its gradient is p (g - <p, g>) * 2 / 4.
    encoder = clip([[[0, 1]]], 2)
    out = naive_ssync(encoder, np.zeros((1, 1, 2, 2)), grid=(1, 2), merge=False)
    assert out.boundary_loss == pytest.approx(0.25)
    np.testing.assert_allclose(out.grad_decoder[0, 0], [[-0.125, 0.125], [0.125, -0.125]])
    # The decoder's labels are 0 everywhere: the whole clip is interior and teaches label 0.
    p = 1 / (1 + np.exp(-1.0))
    assert out.interior_loss == pytest.approx(((1 - p) ** 2 * 2 + p**2 * 2) / 4)


def test_chain_merges_through_the_middle():
    # Slots cover {0,1,2}, {1,2,3}, {2,3,4} of 8 patches: neighbours share 2 of 4, the ends 1 of 5.
    d = np.full((1, 1, 3, 8), -1.0)
    d[0, 0, 0, 0:3], d[0, 0, 1, 1:4], d[0, 0, 2, 2:5] = 1, 2, 1.5
    out = naive_ssync(d, d, grid=(2, 4), merge_threshold=0.4)
    np.testing.assert_allclose(out.slot_iou[0], [[1, 0.5, 0.2], [0.5, 1, 0.5], [0.2, 0.5, 1]], atol=1e-6)
    # Areas: slot 0 wins patch 0 and the three ties on the rest, slot 1 patches 1 to 3, slot 2 patch 4.
    assert out.area[0].tolist() == [4, 3, 1]
    assert out.winners[0].tolist() == [0, 0, 0]
    assert out.merged_slots.tolist() == [2]
