"""Makes the golden vectors of the formats from the peer libraries.

    python tests/vectors/make.py

writes `tests/vectors/formats/<peer>.json`: the peer, its version, and cases. A case holds source
weights, format and parameters, the stored arrays as the peer makes them and the weights they
decode to, as hexadecimal bytes, little-endian. Both test runners read them, without the peers.

Two values are not the peer's: the nested offset (its own depends on the number of threads), which is
the float64 mean of its absmax, all that follows being the peer's, given that offset; and the decoded
weights of bitsandbytes 4-bit, which are the rule evaluated in numpy (its own decoder is wrong for
some shapes on AVX-512; `tests/oracles` compares the two where it is right).
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "formats"


def normal(count, seed=0, scale=0.02):
    return (np.random.default_rng(seed).standard_normal(count) * scale).astype(np.float32)


def special(count):
    """Zeros of both signs, subnormal and large numbers among ordinary ones."""
    weights = normal(count, seed=9, scale=1)
    weights[::7] = 0
    weights[3::11] = -0.0
    weights[5::13] = 1e-40
    weights[6::17] = -60000
    return weights


def stored(array):
    """dtype, shape and bytes of a numpy array or a tensor."""
    if not isinstance(array, np.ndarray):
        array = array.numpy()
    names = {"uint8": "U8", "int8": "I8", "float32": "F32", "float16": "F16"}
    return {"dtype": names[array.dtype.name], "shape": list(array.shape), "data": array.tobytes().hex()}


def case(note, form, dtype, shape, source, components, decoded, **params):
    return {
        "note": note,
        "format": form,
        "params": params,
        "dtype": dtype,
        "shape": list(shape),
        "source": source.hex(),
        "components": {name: array if isinstance(array, dict) else stored(array) for name, array in components.items()},
        "decoded": np.ascontiguousarray(decoded, np.float32).tobytes().hex(),
    }


def bitsandbytes():
    import torch
    from bitsandbytes import functional

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def source(weights, shape, dtype):
        tensor = torch.from_numpy(weights).reshape(shape).to(names[dtype])
        return tensor, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    def four_bits(note, code, weights, shape, dtype, block_size=64, double_quant=False):
        tensor, data = source(weights, shape, dtype)
        packed, state = functional.quantize_4bit(tensor, blocksize=block_size, quant_type=code)
        absmax = state.absmax
        params = {"block_size": block_size}
        if double_quant:
            offset = torch.tensor(np.float32(np.cumsum(absmax.numpy(), dtype=np.float64)[-1] / absmax.numel()))
            state.absmax, state.state2 = functional.quantize_blockwise(absmax - offset, blocksize=256)
            state.offset, state.nested = offset, True
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + offset
            params["double_quant"] = True
        codes = packed.numpy().reshape(-1)
        codes = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[: tensor.numel()]
        scale = np.repeat(absmax.numpy(), block_size)[: tensor.numel()]
        decoded = state.code.numpy()[codes] * scale
        parts = {"": packed, **state.as_dict(packed=True)}
        return case(note, f"bitsandbytes:{code}", dtype, shape, data, parts, decoded, **params)

    def eight_bits(note, weights, shape, dtype):
        tensor, data = source(weights, shape, dtype)
        codes, scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
        parts = {"": codes, "SCB": scales, "weight_format": np.zeros((), np.uint8)}
        decoded = functional.int8_vectorwise_dequant(codes, scales)
        return case(note, "bitsandbytes:int8", dtype, shape, data, parts, decoded)

    for code in ("nf4", "fp4"):
        values = np.sort(functional.get_4bit_type(code, device="cpu").numpy())
        middles = (values[:-1] + values[1:]) / 2
        ties = np.concatenate([[1], middles, np.nextafter(middles, 2), np.nextafter(middles, -2)]).astype(np.float32)
        for dtype in ("F32", "BF16", "F16"):
            yield four_bits("whole blocks", code, normal(256), (4, 64), dtype)
        yield four_bits("blocks across rows, short last block", code, normal(240, 1), (5, 48), "F32")
        yield four_bits("odd number", code, normal(33, 2), (33,), "F32", block_size=32)
        yield four_bits("one weight", code, normal(1, 3), (), "F32")
        yield four_bits("exactly between two values, and next to it", code, np.resize(ties, 64), (64,), "F32")
        yield four_bits("zeros, short last block of zeros", code, np.zeros(70, np.float32), (70,), "BF16")
        yield four_bits("special numbers", code, special(300), (3, 100), "F32", block_size=128)
        yield four_bits("long block", code, normal(300, 4), (300,), "F16", block_size=4096)
    yield four_bits("double quantization", "nf4", normal(8300, 5), (83, 100), "BF16", block_size=32, double_quant=True)
    yield four_bits("double quantization of zeros", "nf4", np.zeros(128, np.float32), (2, 64), "F32", double_quant=True)
    for dtype in ("F32", "BF16", "F16"):
        yield eight_bits("rows", normal(200, 6), (4, 50), dtype)
    yield eight_bits("row of zeros, special numbers", np.append(np.zeros(60, np.float32), special(60)), (2, 60), "F32")
    yield eight_bits("ties", np.arange(-127, 128, dtype=np.float32) / 2, (1, 255), "F32")


def gguf():
    from gguf import GGMLQuantizationType, quants

    def blocks(note, name, weights, shape):
        weights = weights.reshape(shape)
        data = quants.quantize(weights, GGMLQuantizationType[name])
        decoded = quants.dequantize(data, GGMLQuantizationType[name])
        return case(note, f"gguf:{name.lower()}", "F32", shape, weights.tobytes(), {"": data}, decoded)

    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        yield blocks("rows of blocks", name, normal(192), (2, 96))
        yield blocks("zeros", name, np.zeros(32, np.float32), (1, 32))
        yield blocks("constant", name, np.full(32, -0.3, np.float32), (1, 32))
        steps = np.arange(-127, 129, dtype=np.float32).reshape(8, 32) / 2
        steps[:, 0], steps[:, 31] = 127, -127
        yield blocks("multiples of half a step", name, steps, (2, 128))
        scales = np.repeat(10.0 ** np.arange(-4, 4), 32).astype(np.float32)
        yield blocks("scales from tiny to large", name, normal(256, 7) * scales, (256,))


def casts():
    import ml_dtypes

    weights = np.concatenate([normal(50, 8), special(50), np.float32([65504, 65519, 65520, 3e38, 2.0**-25, 2.0**-24])])
    for form, dtype in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16), ("f32", np.float32)):
        with np.errstate(over="ignore"):
            rounded = weights.astype(dtype)
        part = {"dtype": form.upper(), "shape": [weights.size], "data": rounded.tobytes().hex()}
        decoded = rounded.astype(np.float32)
        yield case("rounding", form, "F32", weights.shape, weights.tobytes(), {"": part}, decoded)
    # A hair above a tie between two halves: rounding twice misses it.
    double = 1 + 2.0**-11 + 2.0 ** -np.arange(30, 50)
    part = {"dtype": "F16", "shape": [20], "data": double.astype(np.float16).tobytes().hex()}
    decoded = double.astype(np.float16).astype(np.float32)
    yield case("64 bits to 16 in one rounding", "f16", "F64", (20,), double.tobytes(), {"": part}, decoded)


def write(peer, cases):
    text = {"peer": peer, "version": version(peer), "recipe": "tests/vectors/make.py", "cases": list(cases)}
    (HERE / f"{peer}.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    write("bitsandbytes", bitsandbytes())
    write("gguf", gguf())
    write("ml_dtypes", casts())
