"""CRC-32C (Castagnoli), the checksum of TFRecord files, fast enough for megabytes without compiled code.

The checksum is linear over GF(2), so blocks of one message can be worked on side by side, one NumPy lane a block, and
their remainders joined in a tree: the left half is moved over the length of the right half and added (XOR).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["crc32c", "mask_crc", "masked_crc32c"]

_POLYNOMIAL = 0x82F63B78  # RFC 3720, appendix B.4, bits reversed
_BLOCK = 256  # bytes a lane
_SMALL = 1024  # below, the byte by byte loop is as fast

_Words = npt.NDArray[np.uint32]


def crc32c(data: bytes | memoryview) -> int:
    """Compute the CRC-32C of some bytes.

    Args:
        data: The message.

    Returns:
        The checksum, 32 bits.

    Example:
        >>> hex(crc32c(b"123456789"))  # the check value of the catalogue of CRC algorithms
        '0xe3069283'
    """
    if len(data) < _SMALL:
        return _by_bytes(bytes(data))
    # Zeros in front of the message do not change a remainder that starts at zero, so the message is padded there. The
    # start value of all ones is put on its first four bytes instead.
    blocks = -(-len(data) // _BLOCK)
    padded = np.zeros(blocks * _BLOCK, np.uint8)
    message = padded[len(padded) - len(data) :]
    message[:] = np.frombuffer(data, np.uint8)
    message[:4] ^= 0xFF
    table = _word_table()
    remainders = np.zeros(blocks, np.uint32)
    # Two bytes a step, one lane a block; each row of the transposed copy lies in one piece.
    for words in np.ascontiguousarray(padded.view("<u2").reshape(blocks, _BLOCK // 2).T):
        remainders = table.take((remainders ^ words) & 0xFFFF) ^ (remainders >> np.uint32(16))
    length = _BLOCK
    while len(remainders) > 1:
        if len(remainders) % 2:
            remainders = np.concatenate([np.zeros(1, np.uint32), remainders])
        remainders = _move(remainders[0::2], length) ^ remainders[1::2]
        length *= 2
    return int(remainders[0]) ^ 0xFFFFFFFF


def mask_crc(crc: int) -> int:
    """Mask a checksum as TFRecord files store it.

    Args:
        crc: The checksum.

    Returns:
        It, rotated right by 15 bits, plus a constant.

    Example:
        >>> hex(mask_crc(0))
        '0xa282ead8'
    """
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """Compute the masked checksum of some bytes.

    Args:
        data: The message.

    Returns:
        What a TFRecord file stores behind the message.

    Example:
        >>> masked_crc32c(b"123456789") == mask_crc(0xE3069283)
        True
    """
    return mask_crc(crc32c(data))


@lru_cache(maxsize=1)
def _byte_table() -> tuple[int, ...]:
    entries = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


@lru_cache(maxsize=1)
def _word_table() -> _Words:
    """Remainders of all two-byte messages."""
    table = np.array(_byte_table(), np.uint32)
    words = np.arange(1 << 16, dtype=np.uint32)
    first = table[words & 0xFF] ^ (words >> np.uint32(8))
    return table[first & 0xFF] ^ (first >> np.uint32(8))


def _by_bytes(data: bytes) -> int:
    table = _byte_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _move(remainders: _Words, length: int) -> _Words:
    """Move remainders over `length` zero bytes, a power of two."""
    low, high = _move_tables(length)
    return low[remainders & 0xFFFF] ^ high[remainders >> np.uint32(16)]


@lru_cache(maxsize=64)
def _move_tables(length: int) -> tuple[_Words, _Words]:
    """What moving does to the lower and to the upper two bytes of a remainder."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    low, high = halves, halves << np.uint32(16)
    if length > _BLOCK:
        half = length // 2
        return _move(_move(low, half), half), _move(_move(high, half), half)
    table = np.array(_byte_table(), np.uint32)
    for _ in range(length):
        low = table[low & 0xFF] ^ (low >> np.uint32(8))
        high = table[high & 0xFF] ^ (high >> np.uint32(8))
    return low, high
