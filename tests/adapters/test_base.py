from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssync_pl.adapters import (
    Capture,
    HostAdapter,
    adapter_names,
    base,
    find_adapter,
    frame_size,
    locate,
    maps_on_common_grid,
    register_adapter,
    resolve_grid,
    stack_frames,
)
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.method.maps import SSyncMaps


class _Marked(HostAdapter):
    name = "marked"

    def match(self, host: nn.Module) -> bool:
        return hasattr(host, "marked")

    def attach(self, host: nn.Module) -> Capture:
        return Capture()

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        raise HostError("nothing to collect")


class _MarkedToo(_Marked):
    name = "marked-too"


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def _marked() -> nn.Module:
    host = nn.Identity()
    host.marked = True
    return host


def test_a_registered_adapter_is_found_and_named() -> None:
    assert register_adapter(_Marked) is _Marked
    assert "marked" in adapter_names()
    assert adapter_names() == sorted(adapter_names())
    assert isinstance(find_adapter(_marked()), _Marked)
    assert isinstance(locate("auto", _marked()).adapter, _Marked)
    assert isinstance(locate("marked", _marked()).adapter, _Marked)
    own = _MarkedToo()
    assert locate(own, nn.Identity()).adapter is own


def test_two_adapters_for_one_host_are_refused() -> None:
    register_adapter(_Marked)
    register_adapter(_MarkedToo)
    places = r"marked \(at the host\), marked-too \(at the host\) all do"
    with pytest.raises(HostError, match=f"one adapter to know Identity, but {places}"):
        find_adapter(_marked())


def test_unknown_host_lists_candidates() -> None:
    host = nn.ModuleDict({"slot_attention": nn.Identity(), "body": nn.Identity()})
    with pytest.raises(HostError, match=r"ModuleDict is none.*Candidates: slot_attention\."):
        find_adapter(host)
    with pytest.raises(HostError, match="Candidates: none found by name"):
        find_adapter(nn.Identity())


def test_named_adapter_must_exist_and_fit() -> None:
    with pytest.raises(ConfigError, match=r"`adapter` to be 'auto' or one of .*savi.*, but got 'savy'"):
        locate("savy", nn.Identity())
    with pytest.raises(HostError, match="'savi' knows, but Identity lacks"):
        locate("savi", nn.Identity())


def test_stack_frames() -> None:
    frames = [torch.full((2, 3), float(t)) for t in range(4)]
    stacked = stack_frames(frames, "corrector")
    assert stacked.shape == (2, 4, 3)
    assert torch.equal(stacked[1, :, 0], torch.arange(4.0))
    with pytest.raises(HostError, match=r"one shape for all frames, but got \[\(2, 3\), \(2, 4\)\]"):
        stack_frames([torch.zeros(2, 3), torch.zeros(2, 4)], "corrector")
    with pytest.raises(HostError, match="'corrector' to run inside the training step"):
        stack_frames([], "corrector")


@pytest.mark.parametrize(
    ("patches", "options", "grid"),
    [
        (48, {"explicit": (4, 12), "patch_size": 14, "frame": (84, 112)}, (4, 12)),
        (48, {"patch_size": 14, "frame": (84, 112)}, (6, 8)),
        (48, {"patch_size": 14, "frame": (90, 119)}, (6, 8)),
        (48, {"patch_size": (14, 7), "frame": (84, 56)}, (6, 8)),
        (36, {"patch_size": 14, "frame": (224, 224)}, (6, 6)),
        (144, {"frame": (112, 252)}, (8, 18)),
        (864, {"frame": (336, 504)}, (24, 36)),
        (864, {"frame": (340, 517)}, (24, 36)),
        (49, {}, (7, 7)),
    ],
)
def test_grid(patches: int, options: dict[str, Any], grid: tuple[int, int]) -> None:
    assert resolve_grid(patches, **options) == grid


def test_grid_is_found_for_every_patch_size() -> None:
    for frame in ((96, 128), (100, 37), (31, 400)):
        for size in range(1, 30):
            rows, columns = frame[0] // size, frame[1] // size
            assert resolve_grid(rows * columns, frame=frame) == (rows, columns)


@pytest.mark.parametrize(
    ("patches", "options", "message"),
    [
        (48, {"explicit": (6, 7)}, r"`grid` to have 48 patches, but got \(6, 7\)"),
        (48, {}, r"48 patches, which is no square. Pass grid=\(H, W\)"),
        (48, {"frame": (224, 224)}, "no square"),
        (144, {"frame": (120, 180)}, r"Expected square patches, but none cut .* Pass grid"),
    ],
)
def test_grid_errors(patches: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HostError, match=message):
        resolve_grid(patches, **options)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"video": torch.zeros(1, 2, 3, 8, 12)}, (8, 12)),
        ({"image": torch.zeros(1, 3, 8, 12)}, (8, 12)),
        ({"video": torch.zeros(1, 2, 8, 12, 3)}, (8, 12)),
        ({"video": torch.zeros(1, 2, 3, 8, 4)}, (8, 4)),
        ({"video": [1, 2]}, None),
        ([torch.zeros(1, 3, 8, 12)], (8, 12)),
        ({"frames": torch.zeros(1, 2, 3, 8, 12), "label": torch.zeros(4)}, (8, 12)),
        (torch.zeros(1, 2, 3, 8, 12), (8, 12)),
        ([torch.zeros(2, 7, 8, 12)], None),
        ({"features": torch.zeros(2, 3, 16, 40)}, None),
        ({"features": torch.zeros(2, 3, 16, 40), "video": torch.zeros(1, 2, 3, 8, 12)}, (8, 12)),
        (None, None),
    ],
)
def test_frame_size(batch: Any, size: tuple[int, int] | None) -> None:
    assert frame_size(batch) == size


def test_common_grid_equal() -> None:
    attention, masks = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 2, 3)
    maps = maps_on_common_grid(attention, (2, 3), masks)
    assert maps.attention_logits is attention
    assert torch.equal(maps.mask_logits, masks.flatten(3))
    assert maps.attention_probs is None
    assert maps.mask_probs is None
    assert maps.grid == (2, 3)


def test_finer_decoder_is_averaged_as_probabilities() -> None:
    attention = torch.randn(1, 2, 3, 4)
    masks = torch.randn(1, 2, 3, 4, 6, requires_grad=True)
    maps = maps_on_common_grid(attention, (2, 2), masks)
    probs = masks.softmax(2)
    expected = torch.stack(
        [probs[..., 2 * r : 2 * r + 2, 3 * c : 3 * c + 3].mean((-1, -2)) for r in (0, 1) for c in (0, 1)]
    )
    torch.testing.assert_close(maps.mask_probs, expected.movedim(0, -1))
    torch.testing.assert_close(maps.mask_probs.sum(2), torch.ones(1, 2, 4))
    assert maps.mask_logits is None
    assert maps.attention_logits is attention
    assert maps.masks.requires_grad


def test_coarser_decoder_pools_the_attention() -> None:
    attention, masks = torch.randn(1, 2, 3, 16, requires_grad=True), torch.randn(1, 2, 3, 2, 2)
    maps = maps_on_common_grid(attention, (4, 4), masks)
    grid = attention.unflatten(3, (4, 4))
    for value, mine in ((grid.softmax(2), maps.attention_probs), (grid, maps.attention_logits)):
        torch.testing.assert_close(mine.unflatten(3, (2, 2))[..., 1, 0], value[..., 2:, :2].mean((-1, -2)))
    assert maps.grid == (2, 2)
    assert maps.attention is maps.attention_probs
    assert maps.attention.requires_grad


@pytest.mark.parametrize(
    ("dtype", "pooled"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_pooling_loses_no_precision(dtype: torch.dtype, pooled: torch.dtype) -> None:
    finer = maps_on_common_grid(torch.zeros(1, 1, 2, 4, dtype=dtype), (2, 2), torch.zeros(1, 1, 2, 4, 4, dtype=dtype))
    coarser = maps_on_common_grid(
        torch.zeros(1, 1, 2, 16, dtype=dtype), (4, 4), torch.zeros(1, 1, 2, 2, 2, dtype=dtype)
    )
    assert finer.masks.dtype == coarser.attention.dtype == pooled


@pytest.mark.parametrize("size", [(3, 4), (4, 1), (5, 5)])
def test_grids_that_do_not_divide_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(HostError, match="to divide each other"):
        maps_on_common_grid(torch.zeros(1, 1, 2, 4), (2, 2), torch.zeros(1, 1, 2, *size))


def test_verify_has_nothing_to_say_by_default() -> None:
    maps = SSyncMaps(attention_logits=torch.zeros(1, 1, 2, 4), mask_logits=torch.zeros(1, 1, 2, 4), grid=(2, 2))
    capture = Capture()
    _Marked().verify(capture, maps)
    assert capture.silent == []
    assert not capture.is_open


def test_a_grid_reaches_adapters_that_take_one_and_is_refused_elsewhere():
    from ssync_pl.adapters import PathAdapter
    from ssync_pl.hosts import SAVi

    small = {"encoder_channels": (8,), "encoder_strides": (2,), "decoder_channels": (8,), "decoder_strides": (2,)}
    with pytest.raises(ConfigError, match="reads it off the host"):
        locate("auto", SAVi(num_slots=2, **small), grid=(4, 4))
    with pytest.raises(ConfigError, match="Give it to the adapter"):
        locate(PathAdapter("a", "b"), nn.Identity(), grid=(4, 4))
