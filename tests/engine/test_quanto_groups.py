"""quanto's 4-bit and 2-bit weights as sources: their arrays do not tell the shape of the weight."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import weightpack as wp
from tests.conftest import write_safetensors
from weightpack.checkpoint import native_checkpoint
from weightpack.errors import CheckpointError, UnsupportedError, WeightpackError

FORMS = ("int4", "int2")
TYPES = {"uint8": "U8", "float32": "F32"}


def weights(shape):
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def part(array):
    array = np.ascontiguousarray(array)
    return TYPES[str(array.dtype)], list(array.shape), array.tobytes()


def packed(form, array):
    parts = wp.quantize(array, f"quanto:{form}")
    names = {"input_scale": "layer.input_scale", "output_scale": "layer.output_scale"}
    return {names.get(name, f"layer.weight.{name}"): value for name, value in parts.items()}, parts


def folder(tmp_path, form, arrays, shapes=None):
    place = tmp_path / "model"
    place.mkdir()
    section = {"quant_method": "quanto", "weights_dtype": form, "modules_to_not_convert": None}
    (place / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": section}))
    metadata = {} if shapes is None else {"weightpack.shapes": json.dumps(shapes)}
    tensors = {name: part(array) for name, array in arrays.items()} | {"norm.weight": part(np.ones(4, np.float32))}
    write_safetensors(place / "model.safetensors", tensors, metadata=metadata)
    return place


def known(tmp_path, form, shape, how):
    """A folder with one packed layer whose shape is told in a certain way, and its weights decoded."""
    arrays, parts = packed(form, weights(shape))
    if how == "bias":
        arrays["layer.bias"] = np.zeros(shape[0], np.float32)
    shapes = {"layer.weight": list(shape)} if how == "told" else None
    decoded = wp.dequantize(parts, f"quanto:{form}", shape=shape)
    return folder(tmp_path, form, arrays, shapes), decoded


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((16, 256), "told"), ((16, 256), "bias"), ((3, 160), "told"), ((7, 160), "bias"), ((8, 48), "rows"),
        ((5, 40), "rows"), ((1, 24), "rows"), ((6, 128), "told"), ((4, 3, 5, 5), "rows"),
    ],
)  # fmt: skip
def test_weights_are_read_in_order(tmp_path, form, shape, how):
    place, expected = known(tmp_path, form, shape, how)
    with wp.open_checkpoint(place) as checkpoint:
        entry = checkpoint["layer.weight"]
        assert (entry.format, entry.shape, entry.dtype) == (f"quanto:{form}", shape, "F32")
        np.testing.assert_array_equal(checkpoint.read("layer.weight", dtype="float32"), expected)
        native = native_checkpoint(checkpoint)
        columns = expected[0].size
        for first in range(shape[0]):
            found = np.empty((shape[0] - first) * columns, np.float32)
            bounds = (first, shape[0]) if len(shape) == 2 else None
            if bounds is None and first:
                break
            native.read("layer.weight", found.view(np.uint8), "F32", 1, bounds)
            np.testing.assert_array_equal(found, expected[first:].reshape(-1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("to", "name", "far"), [("f32", "out", 1e-7), ("nf4", "out", 0.2), ("q8_0", "out.gguf", 0.02)])
def test_they_become_anything(tmp_path, form, to, name, far):
    place, expected = known(tmp_path, form, (24, 256), "told")
    wp.convert(place, tmp_path / name, to=to, arch="none" if to == "q8_0" else None, layers="names")
    with wp.open_checkpoint(tmp_path / name) as checkpoint:
        assert set(checkpoint) == {"layer.weight", "norm.weight"}
        found = checkpoint.read("layer.weight", dtype="float32")
        assert np.linalg.norm(found - expected) <= far * np.linalg.norm(expected)


@pytest.mark.parametrize("form", FORMS)
def test_they_are_copied(tmp_path, form):
    place, expected = known(tmp_path, form, (7, 160), "told")
    wp.convert(place, tmp_path / "out", to=f"quanto:{form}", layers="names")
    with wp.open_checkpoint(place) as source, wp.open_checkpoint(tmp_path / "out") as copy:
        assert copy["layer.weight"] == replace(source["layer.weight"], file=copy["layer.weight"].file)
        np.testing.assert_array_equal(copy.read("layer.weight", dtype="float32"), expected)
    # Packed anew from decoded rows, in another number of bits.
    other = FORMS[1 - FORMS.index(form)]
    wp.convert(place, tmp_path / "other", to=f"quanto:{other}", layers="names")
    with wp.open_checkpoint(tmp_path / "other") as checkpoint:
        again = wp.dequantize(wp.quantize(expected, f"quanto:{other}"), f"quanto:{other}", shape=expected.shape)
        np.testing.assert_array_equal(checkpoint.read("layer.weight", dtype="float32"), again)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_that_nothing_tells_are_not_guessed(tmp_path, form):
    place, _ = known(tmp_path, form, (16, 256), "nothing")
    assert any("of quanto without a packed weight" in problem for problem in wp.inspect(place).problems)
    with pytest.raises(UnsupportedError, match=r'packed by "quanto".*layer\.weight\._data\._data'):
        wp.convert(place, tmp_path / "out", to="bf16", layers="names")


def broken(form, what):
    arrays, _ = packed(form, weights((16, 256)))
    shapes = {"layer.weight": [16, 256]}
    if what == "scales":
        for name in ("_scale", "_shift"):
            arrays[f"layer.weight.{name}"] = arrays[f"layer.weight.{name}"][:-7]
    elif what == "bias":
        shapes, arrays["layer.bias"] = None, np.zeros(15, np.float32)
    elif what == "shape":
        shapes = {"layer.weight": [16, 512]}
    elif what == "huge":
        shapes = {"layer.weight": [2**63, 2**62]}
    elif what == "empty":
        shapes = {"layer.weight": [16, 0]}
    elif what == "scalar":
        shapes = {"layer.weight": []}
    return arrays, shapes


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("scales", "are neither 4 nor 2 bits each"),
        ("bias", "32 groups do not make the 15 rows"),
        ("shape", r"but a weight of shape \[16, 512\]"),
        ("huge", "layer.weight"),
        ("empty", "takes rows of weights"),
        ("scalar", "takes rows of weights"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_arrays_that_do_not_fit_are_refused(tmp_path, form, what, said):
    arrays, shapes = broken(form, what)
    place = folder(tmp_path, form, arrays, shapes)
    kind = CheckpointError if what in ("scales", "bias", "shape") else WeightpackError
    with pytest.raises(kind, match=said):
        wp.open_checkpoint(place)


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_not_finite_are_named(tmp_path, form):
    array = weights((16, 256))
    array[9, 131] = np.inf
    write_safetensors(tmp_path / "model.safetensors", {"layer.weight": part(array)})
    with pytest.raises(WeightpackError, match=f"weight {9 * 256 + 131} is inf"):
        wp.convert(tmp_path / "model.safetensors", tmp_path / "out.safetensors", to=f"quanto:{form}", layers="names")
