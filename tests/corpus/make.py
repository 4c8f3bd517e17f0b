"""Builds the corpus: small files, nearly all of them broken on purpose.

`python tests/corpus/make.py` writes them beside this file. What each must lead to stands in `cases.json`: the text
of the error, or that it opens. A test fails when a file has no row, a row has no file, or a file is not what is built
here.

Nothing here uses a library that knows the containers: broken files need control over every byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILES: dict[str, bytes] = {}


# -- safetensors ------------------------------------------------------------------------------------------------------


def framed(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A header's text behind its length, and the data."""
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(name: str = "w", dtype: str = "U8", shape: str = "[4]", offsets: str = "[0,4]", extra: str = "") -> str:
    """One tensor of a header, every part of it as text."""
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{extra}}}'


def safetensors(name: str, *parts: str, data: bytes = b"\0\1\2\3") -> None:
    """A file with these parts in its header."""
    FILES[f"safetensors/{name}.safetensors"] = framed("{" + ",".join(parts) + "}", data)


def safetensors_raw(name: str, content: bytes) -> None:
    FILES[f"safetensors/{name}.safetensors"] = content


def make_safetensors() -> None:
    good = "{" + tensor() + "}"
    # The length in front.
    safetensors_raw("empty", b"")
    safetensors_raw("seven_bytes", bytes(7))
    safetensors_raw("length_zero", bytes(64))
    safetensors_raw("length_only", struct.pack("<Q", 16))
    safetensors_raw("length_past_end", framed(good, length=len(good) + 1))
    safetensors_raw("length_above_limit", framed(good, length=100_000_001))
    safetensors_raw("length_huge", framed(good, length=2**64 - 1))
    safetensors_raw("length_wraps", framed(good, length=2**64 - 8))
    safetensors_raw("length_short", framed(good, b"\0\1\2\3", length=len(good) - 1))
    safetensors_raw("limit_header_sparse", framed("{", length=99_999_992))
    safetensors_raw("git_lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    safetensors_raw("zip", b"PK\3\4" + bytes(60))
    # JSON.
    safetensors_raw("leading_space", framed(" " + good, b"\0\1\2\3"))
    safetensors_raw("leading_byte_order_mark", framed("\ufeff" + good, b"\0\1\2\3"))
    safetensors_raw("a_list", framed("[]"))
    safetensors_raw("text_cut", framed(good[:-1], b"\0\1\2\3"))
    safetensors_raw("text_in_the_middle_of_a_name", framed('{"w'))
    safetensors_raw("trailing_text", framed(good + "x", b"\0\1\2\3"))
    safetensors_raw("trailing_object", framed(good + "{}", b"\0\1\2\3"))
    safetensors_raw("padded_with_zeros", framed(good.encode() + bytes(3), b"\0\1\2\3"))
    safetensors_raw("padded_with_blanks", framed(good + " \n\t\r ", b"\0\1\2\3"))
    safetensors_raw("trailing_comma", framed(good[:-1] + ",}", b"\0\1\2\3"))
    safetensors_raw("comment", framed("{/**/" + good[1:], b"\0\1\2\3"))
    safetensors_raw("single_quotes", framed(good.replace('"', "'"), b"\0\1\2\3"))
    safetensors_raw("not_utf8", framed(good.replace('"w"', '"\0"').encode().replace(b"\0", b"\xff"), b"\0\1\2\3"))
    safetensors_raw(
        "not_utf8_in_unknown_field", framed(good.encode().replace(b"]}", b'],"x":"\xc0\x80"}'), b"\0\1\2\3")
    )
    safetensors("control_character", tensor("a\nb"))
    safetensors("lone_surrogate", tensor("\\ud800"))
    safetensors("lone_surrogate_in_metadata", '"__metadata__":{"a":"\\udc00"}', tensor())
    safetensors("nested_deep", '"w":' + "[" * 20_000 + "]" * 20_000)
    safetensors("nested_deep_in_metadata", '"__metadata__":{"a":' + "[" * 20_000 + "]" * 20_000 + "}", tensor())
    safetensors("nested_deep_in_unknown_field", tensor(extra=',"x":' + "[" * 20_000 + "]" * 20_000))
    # Doubles.
    safetensors("tensor_twice", tensor("w"), tensor("w"))
    safetensors("tensor_twice_elsewhere", tensor("w"), tensor("w", offsets="[4,8]"), data=bytes(8))
    safetensors("tensor_twice_escaped", tensor("w"), tensor("\\u0077"))
    safetensors("tensor_twice_empty", tensor("w", shape="[0]", offsets="[0,0]"), tensor("w"))
    safetensors("dtype_twice", tensor(extra=',"dtype":"U8"'))
    safetensors("shape_twice_escaped", tensor(extra=',"sh\\u0061pe":[4]'))
    safetensors("offsets_twice", tensor(extra=',"data_offsets":[0,4]'))
    safetensors("unknown_field_twice", tensor(extra=',"x":1,"x":1'))
    safetensors("metadata_twice", '"__metadata__":{}', tensor(), '"__metadata__":{}')
    safetensors("metadata_twice_null", '"__metadata__":null', tensor(), '"__metadata__":null')
    safetensors("metadata_key_twice", '"__metadata__":{"a":"1","a":"1"}', tensor())
    safetensors("metadata_key_twice_escaped", '"__metadata__":{"a":"1","\\u0061":"2"}', tensor())
    # Metadata.
    safetensors("metadata_number", '"__metadata__":{"a":1}', tensor())
    safetensors("metadata_null_value", '"__metadata__":{"a":null}', tensor())
    safetensors("metadata_list_value", '"__metadata__":{"a":["b"]}', tensor())
    safetensors("metadata_nested", '"__metadata__":{"a":{"b":"c"}}', tensor())
    safetensors("metadata_list", '"__metadata__":["a"]', tensor())
    safetensors("metadata_text", '"__metadata__":"a"', tensor())
    safetensors("metadata_is_a_tensor", tensor("__metadata__"))
    safetensors("metadata_null", '"__metadata__":null', tensor())
    safetensors("metadata_empty", '"__metadata__":{}', tensor())
    safetensors("metadata_last", tensor(), '"__metadata__":{"format":"pt","é":"\\ud83d\\ude00"}')
    # Fields.
    safetensors("tensor_is_a_list", '"w":["U8",[4],[0,4]]')
    safetensors("tensor_is_null", '"w":null')
    safetensors("dtype_missing", '"w":{"shape":[4],"data_offsets":[0,4]}')
    safetensors("shape_missing", '"w":{"dtype":"U8","data_offsets":[0,4]}')
    safetensors("offsets_missing", '"w":{"dtype":"U8","shape":[4]}')
    safetensors("dtype_unknown", tensor(dtype="Q7"))
    safetensors("dtype_lower_case", tensor(dtype="u8"))
    safetensors("dtype_of_gguf", tensor(dtype="Q4_0", shape="[32]", offsets="[0,18]"), data=bytes(18))
    safetensors("dtype_number", '"w":{"dtype":1,"shape":[4],"data_offsets":[0,4]}')
    safetensors("unknown_field", tensor(extra=',"quantized":{"by":[1,2]}'))
    safetensors("unknown_field_with_lone_surrogate", tensor(extra=',"x":"\\ud800"'))
    # Shapes.
    safetensors("shape_negative", tensor(shape="[-4]"))
    safetensors("shape_fraction", tensor(shape="[4.0]"))
    safetensors("shape_exponent", tensor(shape="[4e0]"))
    safetensors("shape_text", tensor(shape='["4"]'))
    safetensors("shape_null", tensor(shape="null"))
    safetensors("shape_number", tensor(shape="4"))
    safetensors("shape_nested", tensor(shape="[[4]]"))
    safetensors("shape_above_64_bits", tensor(shape="[18446744073709551616]"))
    safetensors("shape_product_overflows", tensor(shape="[4294967296,4294967296]"))
    safetensors("shape_bytes_overflow", tensor(dtype="F32", shape="[4611686018427387904]"))
    safetensors("shape_65_dimensions", tensor(shape="[4" + ",1" * 64 + "]"))
    safetensors("shape_million_dimensions", tensor(shape="[4" + ",1" * 100_000 + "]"))
    safetensors("shape_64_dimensions", tensor(shape="[4" + ",1" * 63 + "]"))
    safetensors("shape_zero_times_huge", tensor(shape="[0,18446744073709551615,2]", offsets="[0,0]"), data=b"")
    safetensors("half_a_byte", tensor(dtype="F4", shape="[7]"))
    safetensors("six_bits", tensor(dtype="F6_E2M3", shape="[5]"))
    # Offsets.
    safetensors("offsets_one", tensor(offsets="[0]"))
    safetensors("offsets_three", tensor(offsets="[0,4,4]"))
    safetensors("offsets_reversed", tensor(offsets="[4,0]"))
    safetensors("offsets_negative", tensor(offsets="[-4,0]"))
    safetensors("offsets_fraction", tensor(offsets="[0,4.0]"))
    safetensors("offsets_exponent", tensor(offsets="[0,0.4e1]"))
    safetensors("offsets_text", tensor(offsets='["0","4"]'))
    safetensors("offsets_object", tensor(offsets='{"0":4}'))
    safetensors("offsets_past_end", tensor(shape="[5]", offsets="[0,5]"))
    safetensors("offsets_far_past_end", tensor(shape="[9000000000000000000]", offsets="[0,9000000000000000000]"))
    safetensors("offsets_wrap", tensor(offsets="[18446744073709551612,18446744073709551616]"))
    safetensors("offsets_wrap_with_header", tensor(offsets="[18446744073709551611,18446744073709551615]"))
    safetensors("bytes_too_few", tensor(dtype="F32", shape="[2]"))
    safetensors("bytes_too_many", tensor(shape="[3]"))
    safetensors("bytes_of_a_scalar", tensor(shape="[]"))
    safetensors("hole_in_front", tensor(shape="[3]", offsets="[1,4]"))
    safetensors("hole_between", tensor("a", shape="[1]", offsets="[0,1]"), tensor("b", shape="[2]", offsets="[2,4]"))
    safetensors("overlap", tensor("a", shape="[3]", offsets="[0,3]"), tensor("b", shape="[2]", offsets="[2,4]"))
    safetensors("overlap_whole", tensor("a"), tensor("b"))
    safetensors("overlap_empty_inside", tensor("a"), tensor("b", shape="[0]", offsets="[2,2]"))
    safetensors("trailing_byte", tensor(), data=bytes(5))
    safetensors("trailing_zip", tensor(), data=bytes(4) + b"PK\3\4" + bytes(26))
    safetensors("data_cut", tensor(), data=bytes(3))
    safetensors("no_tensor_but_data", data=bytes(4))
    # Good ones.
    safetensors("good", tensor())
    safetensors("good_nothing", data=b"")
    safetensors("good_out_of_order", tensor("b", offsets="[4,8]"), tensor("a"), data=bytes(8))
    safetensors(
        "good_not_aligned", tensor("a", shape="[1]", offsets="[0,1]"), tensor("b", "F64", "[]", "[1,9]"), data=bytes(9)
    )
    safetensors(
        "good_empty_tensors",
        tensor("b", "F32", "[0]", "[4,4]"),
        tensor("w"),
        tensor("a", "F16", "[3,0]", "[0,0]"),
        tensor("c", "BOOL", "[0]", "[4,4]"),
    )
    safetensors(
        "good_names",
        tensor("", shape="[1]", offsets="[0,1]"),
        tensor("é/\\u0000\\\\\\ud83d\\ude00", shape="[3]", offsets="[1,4]"),
    )
    safetensors("good_64_gib_sparse", tensor(shape="[68719476736]", offsets="[0,68719476736]"), data=b"")
    widths = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8}
    widths |= {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
    widths |= {"I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}
    parts, end = [], 0
    for dtype, bits in widths.items():
        parts.append(tensor(dtype, dtype, "[2,4]", f"[{end},{end + bits}]"))
        end += bits
    safetensors("good_every_dtype", *parts, data=bytes(end))


# -- GGUF -------------------------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, TEXT, ARRAY, U64, I64, F64 = range(13)
ORDER = "<"


def u32(value: int) -> bytes:
    return struct.pack(ORDER + "I", value)


def u64(value: int) -> bytes:
    return struct.pack(ORDER + "Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return u64(len(value) if length is None else length) + value


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + items


def described(
    name: str | bytes = "w", dims: list[int] | None = None, kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    """A tensor's description; dimensions fastest first."""
    dims = [8] if dims is None else dims
    return (
        text(name) + u32(len(dims) if n_dims is None else n_dims) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)
    )


def gguf_bytes(
    *pairs: bytes,
    tensors: list[bytes] | None = None,
    data: bytes = bytes(32),
    version: int = 3,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    align: int = 32,
) -> bytes:
    tensors = [] if tensors is None else tensors
    head = b"GGUF" + u32(version) + u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(pairs) if n_pairs is None else n_pairs) + b"".join(pairs) + b"".join(tensors)
    if not tensors:
        return head
    return head + bytes(-len(head) % align) + data


def gguf(name: str, *pairs: bytes, **options: Any) -> None:
    FILES[f"gguf/{name}.gguf"] = gguf_bytes(*pairs, **options)


def gguf_raw(name: str, content: bytes) -> None:
    FILES[f"gguf/{name}.gguf"] = content


def nested(depth: int) -> bytes:
    """`depth` arrays inside each other, the innermost empty."""
    return array(ARRAY, 1) * (depth - 1) + array(U8, 0)


def make_gguf() -> None:
    global ORDER
    one = [described()]
    # The first bytes.
    gguf_raw("empty", b"")
    gguf_raw("three_bytes", b"GGU")
    gguf_raw("four_bytes", b"GGUF")
    gguf_raw("seven_bytes", b"GGUF\3\0\0")
    gguf_raw("version_only", b"GGUF" + u32(3))
    gguf_raw("one_count", b"GGUF" + u32(3) + u64(0))
    gguf_raw("zeros", bytes(64))
    gguf_raw("magic_reversed", b"FUGG" + gguf_bytes()[4:])
    gguf_raw("older_format", b"ggjt" + u32(3) + bytes(56))
    gguf_raw("git_lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    gguf("version_0", version=0)
    gguf("version_1", version=1)
    gguf("version_4", version=4)
    gguf("version_4_big_endian", version=4 << 24)
    # Counts.
    gguf("pairs_2_to_64", n_pairs=2**64 - 1)
    gguf("pairs_one_too_many", pair("a", U8, b"\1"), n_pairs=2)
    gguf("pairs_2_to_40_sparse", n_pairs=2**40)
    gguf("tensors_2_to_64", n_tensors=2**64 - 1)
    gguf("tensors_2_to_63", tensors=one, n_tensors=2**63)
    gguf("tensors_one_too_many", tensors=one, n_tensors=2)
    gguf("tensors_2_to_40_sparse", n_tensors=2**40)
    # Keys.
    gguf("key_empty", pair("", U64, u64(1)))
    gguf("key_2_to_63", text("a", 2**63) + u32(U8) + b"\1", n_pairs=1)
    gguf("key_2_to_64", text("a", 2**64 - 1) + u32(U8) + b"\1", n_pairs=1)
    gguf("key_past_end", text("a", 100) + u32(U8) + b"\1", n_pairs=1)
    gguf("key_too_long", pair("a" * 65_536, U8, b"\1"))
    gguf("key_not_utf8", pair(b"a\xff", U8, b"\1"))
    gguf("key_twice", pair("a", U8, b"\1"), pair("a", U8, b"\1"))
    gguf("key_twice_of_two_types", pair("a", U8, b"\1"), pair("b", U8, b"\1"), pair("a", TEXT, text("x")))
    # Values.
    gguf("value_type_13", pair("a", 13, bytes(8)))
    gguf("value_type_2_to_32", pair("a", 2**32 - 1, bytes(8)))
    gguf("value_cut", pair("a", U64, bytes(4)))
    gguf("bool_7", pair("a", BOOL, b"\7"))
    gguf("text_2_to_63", pair("a", TEXT, text("x", 2**63)))
    gguf("text_2_to_64", pair("a", TEXT, text("x", 2**64 - 1)))
    gguf("text_1_gib", pair("a", TEXT, text("x", 2**30)))
    gguf("text_one_too_long", pair("a", TEXT, text("x", 2)))
    gguf("array_type_13", pair("a", ARRAY, array(13, 1, bytes(8))))
    gguf("array_u8_2_to_63", pair("a", ARRAY, array(U8, 2**63)))
    gguf("array_u8_10_to_8", pair("a", ARRAY, array(U8, 10**8, bytes(30))))
    gguf("array_u64_2_to_61", pair("a", ARRAY, array(U64, 2**61, bytes(16))))
    gguf("array_u64_2_to_64", pair("a", ARRAY, array(U64, 2**64 - 1, bytes(16))))
    gguf("array_one_too_many", pair("a", ARRAY, array(U16, 2, bytes(3))))
    gguf("array_of_texts_2_to_60", pair("a", ARRAY, array(TEXT, 2**60, text("x"))))
    gguf("array_of_texts_one_too_long", pair("a", ARRAY, array(TEXT, 2, text("x") + text("y", 9))))
    gguf("array_of_texts_wraps", pair("a", ARRAY, array(TEXT, 2, text("x") + text("y", 2**64 - 9))))
    gguf("array_of_arrays_2_to_60", pair("a", ARRAY, array(ARRAY, 2**60, array(U8, 0))))
    gguf("array_5_deep", pair("a", ARRAY, nested(5)))
    gguf("array_5000_deep", pair("a", ARRAY, nested(5000)))
    # Alignment.
    for alignment in (0, 3, 4, 24, 2**21, 2**31):
        gguf(f"alignment_{alignment}", pair("general.alignment", U32, u32(alignment)), tensors=one)
    gguf("alignment_u64", pair("general.alignment", U64, u64(32)), tensors=one)
    gguf("alignment_text", pair("general.alignment", TEXT, text("32")), tensors=one)
    gguf("alignment_array", pair("general.alignment", ARRAY, array(U32, 1, u32(32))), tensors=one)
    # Tensors.
    gguf("tensor_cut", tensors=[described()[:-1]], data=b"", align=1)
    gguf("tensor_name_empty", tensors=[described("")])
    gguf("tensor_name_not_utf8", tensors=[described(b"a\xff")])
    gguf("tensor_name_2_to_63", tensors=[text("w", 2**63) + described()[9:]])
    gguf("tensor_twice", tensors=[described(), described(offset=32)], data=bytes(64))
    gguf("dimensions_9", tensors=[described(dims=[1] * 9)])
    gguf("dimensions_2_to_32", tensors=[described(n_dims=2**32 - 1)])
    gguf("dimensions_product_overflows", tensors=[described(dims=[2**32, 2**32])])
    gguf("dimensions_bytes_overflow", tensors=[described(dims=[2**62])])
    gguf("dimensions_bytes_overflow_when_padded", tensors=[described(dims=[2**61 - 1], kind=24)])
    gguf("dimensions_end_wraps", tensors=[described(dims=[2**61 - 32], kind=24, offset=2**64 - 2**61)])
    gguf("dimensions_product_overflows_unknown_type", tensors=[described(dims=[2**32, 2**32], kind=4096)])
    gguf("row_not_divisible", tensors=[described(dims=[33, 32], kind=2)], data=bytes(32 * 33))
    gguf("scalar_of_a_block_type", tensors=[described(dims=[], kind=2)])
    gguf("offset_not_aligned", tensors=[described(offset=16)], data=bytes(64))
    gguf("offset_wraps_into_header", tensors=[described(offset=2**64 - 64)])
    gguf("offset_past_end", tensors=[described(offset=64)])
    gguf("offset_past_end_unknown_type", tensors=[described(kind=4096, offset=64)])
    gguf("offset_past_end_empty", tensors=[described(dims=[0], offset=64)])
    gguf("data_one_byte_short", tensors=one, data=bytes(31))
    gguf("data_missing", tensors=one, data=b"")
    gguf("data_far_past_end", tensors=[described(dims=[2**40])])
    gguf("overlap_whole", tensors=[described("a"), described("b")])
    gguf("overlap_in_part", tensors=[described("a", [16]), described("b", [16], offset=32)], data=bytes(96))
    gguf("overlap_unknown_type", tensors=[described("a", [16]), described("b", kind=4096, offset=32)], data=bytes(96))
    # Good ones.
    every = [pair("u8", U8, b"\xff"), pair("i8", I8, b"\xff"), pair("u16", U16, b"\1\0"), pair("i16", I16, b"\xff\xff")]
    every += [pair("u32", U32, u32(7)), pair("i32", I32, b"\xff" * 4), pair("f32", F32, struct.pack("<f", 0.5))]
    every += [pair("bool", BOOL, b"\1"), pair("text", TEXT, text("é")), pair("u64", U64, u64(2**64 - 1))]
    every += [pair("i64", I64, b"\xff" * 8), pair("f64", F64, struct.pack("<d", -0.25))]
    every += [pair("array", ARRAY, array(TEXT, 2, text("a") + text(""))), pair("nested", ARRAY, nested(4))]
    gguf("good", *every, tensors=one)
    gguf("good_nothing")
    gguf("good_version_2", pair("a", U8, b"\1"), tensors=one, version=2)
    gguf("good_no_dimensions", tensors=[described(dims=[])], data=bytes(4))
    gguf("good_five_dimensions", tensors=[described(dims=[2, 1, 2, 1, 2])])
    gguf("good_empty_tensor", tensors=[described(dims=[8, 0]), described("v")])
    gguf("good_final_padding_missing", tensors=[described(dims=[3])], data=bytes(12))
    gguf(
        "good_alignment_8",
        pair("general.alignment", U32, u32(8)),
        tensors=[described(), described("v", [1], offset=32)],
        data=bytes(36),
        align=8,
    )
    gguf("good_out_of_order", tensors=[described("b", offset=32), described("a")], data=bytes(64))
    gguf("good_gap", tensors=[described("a"), described("b", offset=64)], data=bytes(96))
    gguf("good_trailing_bytes", tensors=one, data=bytes(100))
    gguf("good_long_name", tensors=[described("w" * 64)])
    gguf("good_empty_tensor_of_huge_rows", tensors=[described(dims=[2**63, 0, 2**63]), described("v")])
    gguf("good_architecture_is_a_number", pair("general.architecture", U32, u32(1)), tensors=one)
    gguf("good_text_not_utf8", pair("a", TEXT, text(b"\xff")), tensors=one)
    gguf("good_unknown_type", tensors=[described("a", kind=4096), described("b", offset=64)], data=bytes(96))
    gguf("good_removed_type_last", tensors=[described("a", kind=4)], data=bytes(50))
    gguf("good_64_gib_sparse", tensors=[described(dims=[2**34])], data=b"")
    ORDER = ">"
    big = [pair("general.alignment", U32, u32(64)), pair("a", ARRAY, array(TEXT, 1, text("é")))]
    gguf("good_big_endian", *big, tensors=[described(dims=[4, 2])], align=64)
    gguf("big_endian_array_2_to_60", pair("a", ARRAY, array(U64, 2**60)), tensors=one)
    ORDER = "<"


# -- split models -----------------------------------------------------------------------------------------------------


def part(
    folder: str, name: str, number: int | None, count: int | None, total: int | None, tensor: str, order: str = "<"
) -> None:
    """One part with one tensor; pairs that are None are left out."""
    global ORDER
    ORDER = order
    pairs = []
    for key, kind, code, value in (
        ("split.no", U16, "H", number),
        ("split.count", U16, "H", count),
        ("split.tensors.count", I32, "i", total),
    ):
        if value is not None:
            pairs.append(pair(key, kind, struct.pack(order + code, value)))
    FILES[f"split/{folder}/{name}.gguf"] = gguf_bytes(*pairs, tensors=[described(tensor)])
    ORDER = "<"


def make_split() -> None:
    first, second = "m-00001-of-00002", "m-00002-of-00002"
    part("good", first, 0, 2, 2, "a")
    part("good", second, 1, 2, 2, "b")
    part("part_missing", first, 0, 2, 2, "a")
    part("first_missing", second, 1, 2, 2, "b")
    part("number_wrong", first, 0, 2, 2, "a")
    part("number_wrong", second, 0, 2, 2, "b")
    part("count_wrong", first, 0, 2, 2, "a")
    part("count_wrong", second, 1, 3, 2, "b")
    part("count_missing_in_second", first, 0, 2, 2, "a")
    part("count_missing_in_second", second, None, None, None, "b")
    part("count_against_name", first, 0, 3, 2, "a")
    part("tensor_twice", first, 0, 2, 2, "a")
    part("tensor_twice", second, 1, 2, 2, "a")
    part("tensors_missing", first, 0, 2, 3, "a")
    part("tensors_missing", second, 1, 2, 3, "b")
    part("byte_order", first, 0, 2, 2, "a")
    part("byte_order", second, 1, 2, 2, "b", order=">")
    part("name_without_number", "m", 0, 2, 2, "a")
    part("number_above_count", "m-00003-of-00002", 2, 2, 2, "a")
    part("number_zero", "m-00000-of-00002", 0, 2, 2, "a")
    part("good_only_named", first, None, None, None, "a")
    part("good_single", "m-00001-of-00001", 0, 1, 1, "a")


# -- indexes ----------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def index(folder: str, content: str | bytes, shards: dict[str, list[str]] | None = None, name: str = INDEX) -> None:
    """An index and its shards, each with tensors of four bytes."""
    FILES[f"index/{folder}/{name}"] = content.encode() if isinstance(content, str) else content
    for shard, names in ({"m.safetensors": ["w"]} if shards is None else shards).items():
        parts = [tensor(name, offsets=f"[{4 * i},{4 * i + 4}]") for i, name in enumerate(names)]
        FILES[f"index/{folder}/{shard}"] = framed("{" + ",".join(parts) + "}", bytes(4 * len(names)))


def mapped(weight_map: dict[str, str], metadata: str = '{"total_size":4}') -> str:
    return f'{{"metadata":{metadata},"weight_map":{json.dumps(weight_map)}}}'


def make_index() -> None:
    w = {"w": "m.safetensors"}
    two = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    # The file.
    index("empty", "")
    index("not_json", "w: m.safetensors")
    index("a_list", "[]")
    index("text_cut", mapped(w)[:-1])
    index("trailing_text", mapped(w) + "x")
    index("not_utf8", b'{"weight_map":{"\xff":"m.safetensors"}}')
    index("byte_order_mark", "\ufeff" + mapped(w))
    index("git_lfs_pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    index("nested_deep", '{"metadata":{"a":' + "[" * 20_000 + "]" * 20_000 + '},"weight_map":{"w":"m.safetensors"}}')
    index("above_limit_sparse", mapped(w))
    # Its parts.
    index("weight_map_missing", '{"metadata":{}}')
    index("weight_map_empty", mapped({}))
    index("weight_map_null", '{"weight_map":null}')
    index("weight_map_list", '{"weight_map":["w"]}')
    index("weight_map_number", '{"weight_map":{"w":1}}')
    index("weight_map_nested", '{"weight_map":{"w":{"file":"m.safetensors"}}}')
    index("weight_map_twice", '{"weight_map":{"w":"m.safetensors"},"weight_map":{"w":"m.safetensors"}}')
    index("tensor_twice", '{"weight_map":{"w":"m.safetensors","w":"m.safetensors"}}')
    index("tensor_twice_escaped", '{"weight_map":{"w":"m.safetensors","\\u0077":"m.safetensors"}}')
    index("metadata_list", mapped(w, "[1]"))
    index("metadata_key_twice", mapped(w, '{"a":1,"a":2}'))
    # Names that must not be followed.
    outside = {
        "parent": "../m.safetensors",
        "parent_from_inside": "x/../m.safetensors",
        "absolute": "/m.safetensors",
        "subfolder": "sub/m.safetensors",
        "backslash": "..\\m.safetensors",
        "drive": "C:m.safetensors",
        "network": "\\\\host\\share\\m.safetensors",
        "dots": "..",
        "nothing": "",
        "zero_byte": "m.safetensors\0.safetensors",
        "newline": "m\n.safetensors",
        "pickle": "m.bin",
        "no_extension": "m",
    }
    for folder, name in outside.items():
        index(f"name_{folder}", mapped({"w": name}), {"m.safetensors": ["w"]})
    # What the shards hold.
    index("shard_missing", mapped(two), {"m-1.safetensors": ["a"]})
    index("tensor_missing", mapped(two), {"m-1.safetensors": ["a"], "m-2.safetensors": []})
    index("tensor_not_listed", mapped(two), {"m-1.safetensors": ["a"], "m-2.safetensors": ["b", "c"]})
    index("tensor_in_wrong_shard", mapped(two), {"m-1.safetensors": ["b"], "m-2.safetensors": ["a"]})
    index("tensor_in_two_shards", mapped(two), {"m-1.safetensors": ["a"], "m-2.safetensors": ["b", "a"]})
    index("shard_broken", mapped(two), {"m-1.safetensors": ["a"], "m-2.safetensors": ["b", "b"]})
    # Good ones.
    index("good", mapped(two), {"m-1.safetensors": ["a"], "m-2.safetensors": ["b"]})
    index("good_no_metadata", '{"weight_map":{"w":"m.safetensors"}}')
    index("good_null_metadata", mapped(w, "null"))
    index("good_unknown_key", '{"version":{"a":1},' + mapped(w)[1:])
    index("good_variant", mapped(w), name="diffusion_pytorch_model.safetensors.index.fp16.json")
    index("good_mixture", mapped(w, '{"weightpack.plan":"0123"}'))


# -- all --------------------------------------------------------------------------------------------------------------


def build() -> dict[str, bytes]:
    """Path below this folder to content. Some stand for longer, sparse files: see `length` in `cases.json`."""
    FILES.clear()
    makers: list[Callable[[], None]] = [make_safetensors, make_gguf, make_split, make_index]
    for make in makers:
        make()
    return dict(FILES)


def committed(folder: Path) -> Iterator[str]:
    """Paths of the corpus files that are there."""
    for path in sorted(folder.glob("*/**/*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix()


if __name__ == "__main__":
    here = Path(__file__).parent
    built = build()
    for old in committed(here):
        if old not in built:
            (here / old).unlink()
    for name, content in built.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
