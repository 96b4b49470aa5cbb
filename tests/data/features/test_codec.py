"""What storing features costs in precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ssync_pl.data.features.codec import (
    array_to_tensor,
    decode_features,
    encode_features,
    stored_dtype,
    tensor_to_array,
)
from ssync_pl.errors import ConfigError, ShapeError

floats = arrays(np.float32, (2, 3, 4), elements=st.floats(-(2.0**99), 2.0**99, width=32))


def through_disk(stored):
    return {name: array_to_tensor(tensor_to_array(tensor).copy()) for name, tensor in stored.items()}


def test_every_bfloat16_survives():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    back = through_disk({"features": values})["features"]
    assert torch.equal(back.view(torch.int16), bits)


@given(floats)
@settings(max_examples=50, deadline=None)
def test_bf16_is_the_rounding_of_torch(values):
    x = torch.from_numpy(values)
    assert torch.equal(decode_features(through_disk(encode_features(x, "bf16"))), x.bfloat16().float())


@given(floats)
@settings(max_examples=50, deadline=None)
def test_int8_is_off_by_half_a_step_at_most(values):
    x = torch.from_numpy(values)
    stored = encode_features(x, "int8")
    assert stored["features"].shape == (2, 3, 4)
    assert stored["features_scale"].shape == (2, 4)
    back = decode_features(through_disk(stored))
    step = x.abs().amax(1, keepdim=True).double() / 127
    assert bool(((back.double() - x.double()).abs() <= step * 0.5 * (1 + 1e-5) + 1e-36).all())


def test_int8_keeps_small_channels_beside_large_ones():
    x = torch.randn(1, 50, 2) * torch.tensor([1e3, 1e-3])
    back = decode_features(encode_features(x, "int8"))
    assert ((back - x).norm(dim=1) / x.norm(dim=1)).max() < 0.02


def test_int8_of_zeros_is_zero():
    assert not decode_features(encode_features(torch.zeros(1, 3, 2), "int8")).any()


def test_int8_by_hand():
    stored = encode_features(torch.tensor([[[127.0, 1.0], [-63.4, -0.5]]]), "int8")
    assert stored["features"].tolist() == [[[127, 127], [-63, -64]]]
    assert stored["features_scale"][0].tolist() == pytest.approx([1.0, 1 / 127])


def test_batches_decode_in_the_asked_type():
    x = torch.randn(2, 3, 4, 5)
    for dtype in ("bf16", "int8"):
        stored = encode_features(x, dtype)
        exact = decode_features(stored)
        assert exact.dtype == torch.float32
        assert torch.equal(decode_features(stored, torch.bfloat16), exact.bfloat16())


def test_what_is_no_stored_feature_is_refused():
    with pytest.raises(ShapeError, match="holds video"):
        decode_features({"video": 1})
    with pytest.raises(ShapeError, match="without a scale"):
        decode_features({"features": torch.zeros(2, 3, dtype=torch.int8)})
    with pytest.raises(ShapeError, match="float32"):
        decode_features({"features": torch.zeros(2, 3)})
    with pytest.raises(ConfigError, match="bf16, int8, but got 'fp8'"):
        encode_features(torch.zeros(1, 1), "fp8")
    assert stored_dtype("int8") == np.int8
