"""Makes the golden vectors of the GGUF types from ggml's own C.

    python tests/vectors/make_ggml.py

writes `tests/vectors/formats/ggml.json` as `make.py` writes its files, with the library that is
inside llama-cpp-python 0.3.36. Every type that is decoded has a case whose `source` is null:
blocks of random bytes with an ordinary, a subnormal and a large negative scale, and the weights
they decode to (of Q8_1, for which ggml has no function, the product evaluated in numpy). Types that
are encoded in one way from weights alone also have cases with a source; types whose search takes
importance have more of them, some with an `importance` (hexadecimal, one float32 per column).
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.oracles.ggml import (  # noqa: E402
    BLOCK_TYPES,
    ENCODED_BY_IMPORTANCE,
    ENCODED_ON_GRIDS,
    ENCODED_SIMPLY,
    NEED_IMPORTANCE,
    SEARCHED_BY_IMPORTANCE,
    block_of,
    open_ggml,
    put_scales,
)

SCALES = [0.0123, 3e-6, -31000.0]


def hexadecimal(array):
    return np.ascontiguousarray(array).tobytes().hex()


def case(note, name, weights, source, blocks, decoded, **more):
    return {
        "note": note,
        "format": f"gguf:{name.lower()}",
        "params": {},
        "dtype": "F32",
        "shape": list(weights),
        "source": source,
        "components": {"": {"dtype": "U8", "shape": list(blocks.shape), "data": hexadecimal(blocks)}},
        "decoded": hexadecimal(decoded),
        **more,
    }


def decoded(ggml, name):
    weights, size = block_of(name)
    blocks = np.random.default_rng(size).integers(0, 256, (3, size), dtype=np.uint8)
    put_scales(name, blocks, np.array(SCALES, np.float16))
    if name == "Q8_1":
        values = blocks[:, 4:].view(np.int8) * np.array(SCALES, np.float16).astype(np.float32)[:, None]
    else:
        values = ggml.dequantize(name, blocks)
    return case("any codes", name, (3, weights), None, blocks, values)


def encoded(ggml, name):
    block, _ = block_of(name)
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((2, block)).astype(np.float32) * np.float32(0.02)
    steps = rng.integers(-13, 14, (1, block)).astype(np.float32) / 2
    zeros = np.where(np.arange(block) % 3 == 0, np.float32(-0.0), np.float32(0))[None]
    for note, weights in (("rows", normal), ("multiples of half a step", steps), ("zeros of both signs", zeros)):
        blocks = ggml.quantize(name, weights)
        yield case(note, name, weights.shape, hexadecimal(weights), blocks, ggml.dequantize(name, blocks))


def searched(ggml, name):
    rng = np.random.default_rng(11)
    normal = (rng.standard_normal((1, 256)) * 0.02).astype(np.float32)
    heavy = rng.standard_t(2, (2, 256)).astype(np.float32)
    steps = rng.integers(-13, 14, (1, 256)).astype(np.float32) / 2
    # Runs of zeros, and runs whose scales are nothing beside that of the others. What ggml makes of
    # runs of zeros in IQ3_S is wrong (`tests/oracles/test_ggml_iq.py`).
    scales = np.repeat(rng.choice([1e-6 if name == "IQ3_S" else 0, 1, 1e-3, 1e-6], 16), 16)
    uneven = (rng.standard_normal((1, 256)) * scales).astype(np.float32)
    skewed = (10.0 ** rng.uniform(-4, 4, 256)).astype(np.float32)
    gaps = np.where(rng.random(256) < 0.5, 0, rng.random(256)).astype(np.float32)
    for note, weights, importance in (
        ("normal", normal, None),
        ("heavy tails", heavy, None),
        ("multiples of half a step", steps, None),
        ("uneven runs", uneven, None),
        ("zeros", np.zeros((1, 256), np.float32), None),
        ("normal, skewed importance", normal, skewed),
        ("heavy tails, importance with zeros", heavy, gaps),
        ("uneven runs, importance of zero", uneven, np.zeros(256, np.float32)),
        ("multiples of half a step, importance of one", steps, np.ones(256, np.float32)),
    ):
        if importance is None and name in (*NEED_IMPORTANCE, *SEARCHED_BY_IMPORTANCE):
            continue
        blocks = ggml.quantize(name, weights, importance)
        more = {} if importance is None else {"importance": hexadecimal(importance)}
        decoded = ggml.dequantize(name, blocks)
        yield case(note, name, weights.shape, hexadecimal(weights), blocks, decoded, **more)


if __name__ == "__main__":
    ggml = open_ggml()
    cases = [decoded(ggml, name) for name in BLOCK_TYPES]
    for name in ENCODED_SIMPLY:
        cases.extend(encoded(ggml, name))
    for name in (*ENCODED_BY_IMPORTANCE, *ENCODED_ON_GRIDS):
        cases.extend(searched(ggml, name))
    text = {
        "peer": "ggml",
        "version": "0.25.3 (llama-cpp-python 0.3.36)",
        "recipe": "tests/vectors/make_ggml.py",
        "cases": cases,
    }
    (HERE / "formats" / "ggml.json").write_text(json.dumps(text, indent=1) + "\n")
