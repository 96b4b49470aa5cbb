from __future__ import annotations

import numpy as np
import pytest
from movi_records import bitwise_crc32c

from ssync_pl.data.convert.crc32c import crc32c, masked_crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_published_values(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 1279, 1280, 1281, 2047, 4096, 5000, 20_001])
def test_equals_the_bitwise_definition(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == bitwise_crc32c(data)
    assert crc32c(memoryview(data)) == bitwise_crc32c(data)


def test_each_bit_counts() -> None:
    data = bytearray(np.random.default_rng(0).bytes(3000))
    plain, seen = crc32c(bytes(data)), set()
    for bit in range(0, 8 * len(data), 101):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(crc32c(bytes(data)))
        data[bit // 8] ^= 1 << bit % 8
    assert plain not in seen
    assert len(seen) == len(range(0, 8 * len(data), 101))


def test_masked_as_another_implementation_does() -> None:
    other = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow")
    for size in (0, 8, 2000):
        data = np.random.default_rng(size).bytes(size)
        assert masked_crc32c(data) == other.masked_crc32c(data)
