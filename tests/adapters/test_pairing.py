from __future__ import annotations

import pytest
import torch

from ssync_pl.adapters.pairing import Seen, find_pair, join_maps, layouts


def seen(shape: tuple[int, ...], axis: int, calls: int = 1, name: str = "a", heads: bool = True) -> Seen:
    return Seen([torch.randn(shape) for _ in range(calls)], axis, "logits", name, heads)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((2, 3, 16), 1, [(2, None, 1, (16,))]),
        ((2, 16, 3), 2, [(2, None, 1, (16,))]),
        ((2, 3, 4, 5), 1, [(2, None, 1, (4, 5))]),
        ((2, 3, 1, 4, 5), 1, [(2, None, 1, (4, 5))]),
        ((2, 3, 4, 5, 1), 1, [(2, None, 1, (4, 5))]),
        ((2, 7, 3, 16), 2, [(2, 7, 1, (16,)), (2, None, 7, (16,))]),
        ((2, 7, 3, 4, 5), 2, [(2, 7, 1, (4, 5)), (2, None, 7, (4, 5))]),
        ((2, 7, 6, 3, 16), 3, [(2, 7, 6, (16,))]),
        ((2, 4, 5, 3), 3, [(2, 4, 1, (5,)), (2, None, 4, (5,)), (2, None, 1, (4, 5))]),
        ((2, 3, 4, 5, 6), 1, []),  # three axes of patches
        ((3, 16), 0, []),
    ],
)
def test_ways_to_read_one_call(shape: tuple[int, ...], axis: int, expected: list[object]) -> None:
    found = [(one.batch, one.frames, one.heads, one.patches) for one in layouts(shape, axis, False)]
    assert found == expected


def test_ways_to_read_several_calls() -> None:
    assert [(one.frames, one.heads) for one in layouts((2, 4, 3, 16), 2, True)] == [(4, 1)]
    assert [(one.frames, one.heads) for one in layouts((2, 4, 7, 3, 16), 3, True)] == [(4, 7)]
    assert layouts((4, 3, 16), 1, True) == ()


@pytest.mark.parametrize(
    ("attention", "masks", "sizes"),
    [
        (seen((2, 3, 16), 1, 4), seen((8, 3, 16), 1), (2, 4)),
        (seen((2, 3, 16), 1, 4), seen((2, 4, 3, 16), 2), (2, 4)),
        (seen((2, 3, 16), 1, 4), seen((2, 3, 16), 1, 4), (2, 4)),
        (seen((8, 3, 16), 1), seen((2, 3, 16), 1, 4), (2, 4)),
        (seen((8, 3, 16), 1), seen((8, 16, 3), 2), (8, 1)),
        (seen((2, 5, 3, 16), 2), seen((2, 3, 16), 1), (2, 1)),  # five heads
        (seen((2, 5, 3, 16), 2), seen((10, 3, 16), 1), (2, 5)),  # five frames
        (seen((2, 3, 16), 1, 3), seen((8, 3, 16), 1), None),  # other frames
        (seen((2, 3, 16), 1, 4), seen((8, 4, 16), 1), None),  # other slots
        (seen((2, 3, 16), 1, 4), seen((8, 3, 24), 1), None),  # patches that do not fit
        (seen((2, 5, 3, 16), 2, heads=False), seen((2, 3, 16), 1), None),
        (seen((3, 16), 0), seen((3, 16), 0), None),
    ],
)
def test_what_belongs_together(attention: Seen, masks: Seen, sizes: tuple[int, int] | None) -> None:
    pair = find_pair([attention], [masks._replace(name="b")])
    assert (None if pair is None else pair[-2:]) == sizes


def test_the_likelier_pair_wins() -> None:
    slots_of_slots, real = seen((2, 3, 3), 2, 4), seen((2, 3, 16), 1, 4)
    cross, early, last = seen((8, 2, 16, 3), 3), seen((8, 3, 16), 1), seen((8, 16, 3), 2)
    pair = find_pair([real, slots_of_slots], [cross, early, last, cross._replace(name="c")])
    assert pair is not None
    assert pair.attention is real
    assert pair.masks is last  # as late as can be, but not the heads of a cross-attention


def test_one_softmax_is_not_both_maps() -> None:
    one = seen((2, 3, 16), 1)
    assert find_pair([one], [one]) is None
    assert find_pair([one], [one._replace(name="b")]) is not None


def test_values_go_where_they_belong() -> None:
    attention, masks = seen((2, 16, 3), 2, 4), seen((8, 3, 1, 4, 4), 1, name="b")
    pair = find_pair([attention], [masks])
    assert pair is not None
    maps = join_maps(pair)
    assert maps.attention_logits is not None
    assert maps.mask_logits is not None
    for b, t, s, n in ((0, 0, 0, 0), (1, 3, 2, 15), (1, 2, 0, 7), (0, 1, 1, 9)):
        assert maps.attention_logits[b, t, s, n] == attention.values[t][b, n, s]
        assert maps.mask_logits[b, t, s, n] == masks.values[0][4 * b + t, s, 0, n // 4, n % 4]


def test_heads_of_the_decoder_count_as_their_mean() -> None:
    pair = find_pair([seen((2, 3, 16), 1, 4)], [seen((8, 2, 16, 3), 3, name="b")])
    assert pair is not None
    maps = join_maps(pair)
    expected = pair.masks.values[0].softmax(3).mean(1).transpose(1, 2).reshape(2, 4, 3, 16)
    assert maps.mask_logits is None
    torch.testing.assert_close(maps.mask_probs, expected)


def test_heads_in_front_of_patches_are_not_rows_where_the_grids_would_not_fit() -> None:
    # STEVE: slot attention on 64 x 64 pixels once a frame, cross-attention of 4 heads from 16 x 16 tokens to slots.
    attention = Seen([torch.randn(2, 4096, 5) for _ in range(3)], 2, "logits", "slot_attention")
    cross = torch.randn(6, 4, 256, 5)
    pair = find_pair([attention], [Seen([cross], 3, "logits", "decoder")])
    assert (pair.batch, pair.frames) == (2, 3)
    assert (pair.layouts[1].heads, pair.layouts[1].count) == (4, 256)
    maps = join_maps(pair)
    assert maps.grid == (16, 16)
    expected = cross.softmax(3).mean(1).mT.unflatten(0, (2, 3))
    torch.testing.assert_close(maps.masks, expected)
    # Rows and columns behind one another stay rows and columns where they fit.
    pixels = find_pair([attention], [Seen([torch.randn(6, 64, 64, 5)], 3, "logits", "decoder")])
    assert (pixels.layouts[1].heads, pixels.layouts[1].patches) == (1, (64, 64))
