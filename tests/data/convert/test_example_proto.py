from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from movi_records import example, feature, field, varint

from ssync_pl.data.convert.example_proto import parse_example
from ssync_pl.errors import ShardError

_FEATURES: dict[str, Any] = {
    "bytes": [b"", b"one", bytes(300)],
    "floats": np.array([0.0, -1.5, 3e38, np.inf], np.float32),
    "integers": np.array([0, 1, 127, 128, 65535, -1, 2**63 - 1, -(2**63)]),
    "no bytes": [],
    "dépth/€": np.arange(1000),
}


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return bool(found == expected)
    return found.dtype == expected.dtype and np.array_equal(found, expected)


@pytest.mark.parametrize("packed", [True, False])
def test_round_trip(packed: bool) -> None:
    found = parse_example(example(_FEATURES, packed))
    assert list(found) == list(_FEATURES)
    for name, expected in _FEATURES.items():
        assert _same(found[name], expected), name


def test_skipped_features_are_left_out() -> None:
    assert list(parse_example(example(_FEATURES), skip={"floats", "bytes"})) == ["integers", "no bytes", "dépth/€"]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_integers_of_any_length(values: list[int], packed: bool) -> None:
    found = parse_example(example({"a": np.array(values, np.int64)}, packed))["a"]
    assert list(found) == values


def test_unknown_fields_are_passed_over() -> None:
    unknown = (
        varint(9 * 8) + varint(300) + varint(10 * 8 + 1) + bytes(8) + varint(11 * 8 + 5) + bytes(4) + field(12, b"x")
    )
    entry = unknown + field(1, b"a") + unknown + field(2, unknown + feature(np.array([7, 8])) + unknown) + unknown
    message = unknown + field(1, unknown + field(1, entry) + unknown) + unknown
    assert parse_example(message)["a"].tolist() == [7, 8]


def test_merging_follows_the_wire_format() -> None:
    # Several Features messages add up, the last entry of a name counts, pieces of one list add up, and another kind of
    # list replaces what came before.
    first = field(1, field(1, field(1, b"a") + field(2, feature(np.array([1])))))
    second = field(1, field(1, field(1, b"b") + field(2, feature(np.array([2])) + feature(np.array([3, 4]), False))))
    third = field(1, field(1, field(1, b"a") + field(2, feature([b"x"]) + feature(np.array([5.0])))))
    found = parse_example(first + second + third)
    assert found["b"].tolist() == [2, 3, 4]
    assert found["a"].tolist() == [5.0]
    mixed = field(3, varint(8) + varint(1) + field(1, varint(2) + varint(300)) + varint(8) + varint(4))
    assert parse_example(field(1, field(1, field(1, b"m") + field(2, mixed))))["m"].tolist() == [1, 2, 300, 4]
    assert parse_example(field(1, field(1, field(1, b"e")))) == {"e": []}
    assert parse_example(b"") == {}


def _in_feature(content: bytes) -> bytes:
    return field(1, field(1, field(1, b"a") + field(2, content)))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"\x0a", "ends within a number"),
        (b"\x0a\x05abc", "5 bytes expected where 3 are left"),
        (b"\x0b", "wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\x80" * 11, "more than 10 bytes"),
        (b"\x08\x01", "wire type 0 where a message"),
        (field(1, field(1, field(1, b"\xff\xfe"))), "not UTF-8"),
        (_in_feature(field(2, field(1, b"abc"))), "no multiple of 4"),
        (_in_feature(field(2, varint(8) + varint(1))), "no multiple of 4"),
        (_in_feature(field(3, field(1, b"\x80"))), "ends within a number"),
        (_in_feature(field(3, field(1, b"\x80" * 10 + b"\x01"))), "more than 10 bytes"),
        (_in_feature(field(3, varint(8 + 5) + bytes(4))), "wire type 5 in a list of integers"),
        (_in_feature(field(1, varint(8) + varint(1))), "wire type 0 where a message or bytes"),
        (_in_feature(varint(8) + varint(1)), "wire type 0 where a message"),
    ],
)
def test_malformed_messages_are_refused(message: bytes, expected: str) -> None:
    with pytest.raises(ShardError, match=f"record 7 to be a tf.train.Example, but got a malformed message.*{expected}"):
        parse_example(message, "record 7")


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_only_ever_raise_shard_error(data: bytes) -> None:
    with contextlib.suppress(ShardError):
        parse_example(data)


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_damaged_messages_only_ever_raise_shard_error(seed: int, changes: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(example({name: values for name, values in _FEATURES.items() if len(values) < 100}))
    for at in rng.integers(0, len(data), changes):
        data[at] = rng.integers(256)
    with contextlib.suppress(ShardError):
        parse_example(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]))


def _protobuf_example() -> Any:
    """The message class of the protobuf package, from a description in code."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="movi_test.proto", package="movi_test", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, bool, str]) -> Any:
        made = file.message_type.add(name=name)
        for title, number, kind, repeated, type_name in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made.field.add(name=title, number=number, type=kind, label=label, type_name=type_name or None)
        return made

    message("BytesList", ("value", 1, kinds.TYPE_BYTES, True, ""))
    message("FloatList", ("value", 1, kinds.TYPE_FLOAT, True, ""))
    message("Int64List", ("value", 1, kinds.TYPE_INT64, True, ""))
    lists = [("bytes_list", ".movi_test.BytesList"), ("float_list", ".movi_test.FloatList")]
    lists.append(("int64_list", ".movi_test.Int64List"))
    message("Feature", *((n, i + 1, kinds.TYPE_MESSAGE, False, t) for i, (n, t) in enumerate(lists)))
    message(
        "Entry", ("key", 1, kinds.TYPE_STRING, False, ""), ("value", 2, kinds.TYPE_MESSAGE, False, ".movi_test.Feature")
    )
    message("Features", ("feature", 1, kinds.TYPE_MESSAGE, True, ".movi_test.Entry"))
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, False, ".movi_test.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("movi_test.Example"))


def test_reads_what_the_protobuf_package_writes() -> None:
    made = _protobuf_example()()
    for name, values in _FEATURES.items():
        entry = made.features.feature.add(key=name)
        kind = "bytes_list" if isinstance(values, list) else "float_list" if values.dtype.kind == "f" else "int64_list"
        getattr(entry.value, kind).value.extend(list(values))
    found = parse_example(made.SerializeToString())
    for name, expected in _FEATURES.items():
        assert _same(found[name], expected), name
