from __future__ import annotations

import struct
from pathlib import Path

import pytest
from movi_records import frame_record, masked

from ssync_pl.data.convert.tfrecord import Record, index_records, read_record
from ssync_pl.errors import ShardError

_RECORDS = [b"first", b"", b"the third one", bytes(3000)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "movi_c-train.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(map(frame_record, _RECORDS)))
    return path


def test_records_are_found_and_read(path: Path) -> None:
    records = index_records(path)
    assert records == [Record(0, 5), Record(21, 0), Record(37, 13), Record(66, 3000)]
    assert [read_record(path, record) for record in records] == _RECORDS
    assert index_records(path, limit=2) == records[:2]


def test_a_file_cut_anywhere_is_refused_with_the_offset(path: Path) -> None:
    data = path.read_bytes()
    starts = [0, 21, 37, 66]
    for cut in [*range(1, 90), 1000, len(data) - 5, len(data) - 4, len(data) - 1]:
        path.write_bytes(data[:cut])
        if cut in starts:
            assert len(index_records(path)) == starts.index(cut)
            continue
        offset = max(start for start in starts if start < cut)
        with pytest.raises(ShardError, match=rf"record at byte {offset} of .* truncated"):
            index_records(path)


def test_a_file_that_was_cut_after_it_was_indexed_is_refused(path: Path) -> None:
    record = index_records(path)[3]
    data = path.read_bytes()
    for cut in (66, 70, 77, 78, 500, len(data) - 4, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ShardError, match=r"record at byte 66 of .* truncated"):
            read_record(path, record)


def test_a_damaged_length_is_refused(path: Path) -> None:
    record, data = index_records(path)[2], path.read_bytes()
    for at in range(37, 49):  # length and its checksum
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        for read in (lambda: index_records(path), lambda: read_record(path, record)):
            with pytest.raises(ShardError, match=r"length of the record of .* at byte 37 to have the checksum"):
                read()


def test_damaged_data_is_refused(path: Path) -> None:
    records, data = index_records(path), path.read_bytes()
    for at in [*range(49, 66), 66 + 12, 66 + 12 + 1500, len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        record = records[2] if at < 66 else records[3]
        assert index_records(path) == records
        with pytest.raises(ShardError, match=f"data of the record of .* at byte {record.offset} to have the checksum"):
            read_record(path, record)


def test_a_replaced_file_is_refused(path: Path) -> None:
    record = index_records(path)[0]
    path.write_bytes(frame_record(b"another one"))
    with pytest.raises(ShardError, match=r"to have 5 bytes, but it has 11.*replaced"):
        read_record(path, record)


def test_an_absurd_length_with_a_good_checksum_asks_for_no_memory(path: Path) -> None:
    length = struct.pack("<Q", 2**62)
    path.write_bytes(length + masked(length) + b"data")
    with pytest.raises(ShardError, match="truncated"):
        index_records(path)


def test_another_kind_of_file_is_refused(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08" + bytes(100))
    with pytest.raises(ShardError, match="compressed or no TFRecord file"):
        index_records(path)
