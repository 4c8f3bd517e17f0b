"""Models of the hosts on GGUF blocks: the names of every architecture, the bytes of the file, and the
outputs of the same model with decoded weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightpack as wp
from weightpack import keymaps

from ..diffusion_models import CONFIGS, make
from ..language import models as language
from . import tiny_diffusers
from .test_diffusers_gguf import inputs, output, relative

PLAIN = ("F32", "F16", "BF16")


def packed_parameters(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.state_dict().items() if hasattr(value, "quant_type")}


def layers(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if hasattr(module, "quant_type")}


# Language models.


def decoded_model(peer: Any, folder: Path, path: Path, tmp: Path) -> Any:
    """transformers' own model of the decoded weights."""
    transformers, torch = peer("transformers"), peer("torch")
    out = tmp / "decoded"
    out.mkdir(exist_ok=True)
    wp.convert(path, out / "model.safetensors", "f32", names="host", overwrite=True)
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "to"), [*((name, "q8_0") for name in sorted(language.CONFIGS)), ("llama3", "q4_k_m"), ("gemma3", "q4_0")]
)
def test_language_models(peer, tmp_path, name, to):
    transformers, torch = peer("transformers"), peer("torch")
    folder = language.make_model(tmp_path / "model", name)
    path = tmp_path / "model.gguf"
    wp.convert(folder, path, to)
    config = wp.GGUFQuantizationConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, info = wp.from_pretrained(
            transformers.AutoModelForCausalLM, path, config=folder, quantization_config=config,
            torch_dtype="float32", output_loading_info=True,
        )  # fmt: skip
    assert not info.unexpected
    assert layers(model) >= {"GGUFLinear"}
    assert any("Embedding" in kind for kind in layers(model))
    with wp.gguf.open(path) as file:
        blocks = {tensor for tensor, row in file.tensors.items() if row.type not in PLAIN}
        stored = sum(file.tensors[tensor].nbytes for tensor in blocks)
    held = {id(value): value.nbytes for value in model.parameters() if hasattr(value, "quant_type")}
    assert len(held) == len(blocks)
    assert sum(held.values()) == stored
    ids = torch.arange(24).reshape(2, 12)
    expected = decoded_model(peer, folder, path, tmp_path)
    with torch.no_grad():
        logits = expected(ids).logits
        assert torch.equal(model(ids).logits, logits)
        model.hf_quantizer.dequantize(model)
        assert not layers(model)
        assert torch.equal(model(ids).logits, logits)


def test_generation_and_what_the_host_finds(peer, tmp_path):
    transformers, torch = peer("transformers"), peer("torch")
    folder = language.make_model(tmp_path / "model", "llama2")
    wp.convert(folder, tmp_path / "model.gguf", "q4_0")
    config = wp.GGUFQuantizationConfig(compute_dtype="bfloat16")
    model = wp.from_pretrained(
        transformers.LlamaForCausalLM, tmp_path / "model.gguf", config=folder, quantization_config=config,
        torch_dtype="bfloat16",
    )  # fmt: skip
    assert model.dtype == torch.bfloat16
    found = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert found.shape == (1, 7)
    # transformers' own objects: none has a config of the model that does not pass through JSON.
    assert model.config.quantization_config.quant_method == "gguf"
    assert "bfloat16" in model.config.to_json_string()
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_serializable()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma3"])
def test_without_a_config(peer, tmp_path, name):
    transformers, torch = peer("transformers"), peer("torch")
    folder = language.make_model(tmp_path / "model", name)
    path = tmp_path / "alone" / "model.gguf"
    path.parent.mkdir()
    wp.convert(folder, path, "q8_0")
    options = {"quantization_config": wp.GGUFQuantizationConfig(), "torch_dtype": "float32"}
    model = wp.from_pretrained(transformers.AutoModelForCausalLM, path, **options)
    other = wp.from_pretrained(transformers.AutoModelForCausalLM, path, config=folder, **options)
    assert type(model) is type(other)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_the_inner_model(peer, tmp_path):
    transformers = peer("transformers")
    folder = language.make_model(tmp_path / "model", "llama2")
    wp.convert(folder, tmp_path / "model.gguf", "q8_0")
    with pytest.warns(UserWarning, match=r"LlamaModel has no place for lm_head\.weight"):
        model = wp.from_pretrained(
            transformers.LlamaModel, tmp_path / "model.gguf", config=folder,
            quantization_config=wp.GGUFQuantizationConfig(),
        )  # fmt: skip
    assert len(packed_parameters(model)) == 15


def test_adapters_are_trained(peer, tmp_path):
    transformers, torch = peer("transformers"), peer("torch")
    folder = language.make_model(tmp_path / "model", "qwen2")
    wp.convert(folder, tmp_path / "model.gguf", "q4_k")
    model = wp.from_pretrained(
        transformers.AutoModelForCausalLM, tmp_path / "model.gguf", config=folder,
        quantization_config=wp.GGUFQuantizationConfig(), torch_dtype="float32",
    ).train()  # fmt: skip
    model.requires_grad_(False)
    adapters = []
    for module in model.modules():
        if type(module).__name__ == "GGUFLinear" and module is not model.lm_head:
            down = torch.nn.Parameter(torch.randn(4, module.in_features) * 0.02)
            up = torch.nn.Parameter(torch.zeros(module.out_features, 4))
            module.register_forward_hook(lambda m, given, out, d=down, u=up: out + given[0] @ d.T @ u.T)
            adapters += [down, up]
    optimizer = torch.optim.Adam(adapters, lr=0.02)
    ids = torch.arange(16)[None]
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Diffusion models.


@pytest.mark.parametrize(("name", "to"), [*((name, "q8_0") for name in sorted(CONFIGS)), ("sd3", "q4_k")])
def test_diffusion_models(peer, tmp_path, name, to):
    diffusers, torch = peer("diffusers"), peer("torch")
    source = make(name, diffusers)
    source.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.gguf"
    wp.convert(tmp_path / "model", path, to)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = wp.from_pretrained(
            type(source), path, config=tmp_path / "model", quantization_config=wp.GGUFQuantizationConfig()
        )
    assert layers(model) == {"GGUFLinear"}
    with wp.open_checkpoint(path) as stored:
        plan = keymaps.read_keymap(name).host_plan(list(stored.values()))
        state = model.state_dict()
        assert {tensor.name for tensor in plan.tensors} == set(state)
        expected = {}
        for tensor in plan.tensors:
            rows = [
                np.atleast_1d(stored.read(rows.name, "float32"))[rows.first :][: rows.count] for rows in tensor.sources
            ]
            expected[tensor.name] = torch.from_numpy(np.concatenate(rows)).reshape(
                source.state_dict()[tensor.name].shape
            )
    source.load_state_dict(expected)
    with torch.no_grad():
        assert torch.equal(output(model, name), output(source, name))
    # No state that only passes through diffusers' own config.
    assert '"compute_dtype": "float32"' in model.to_json_string()
    kept = model.config["quantization_config"]
    assert wp.AutoQuantizer.as_config(kept) == wp.GGUFQuantizationConfig()


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_the_bytes_that_diffusers_holds(peer, tmp_path, name):
    diffusers, torch = peer("diffusers"), peer("torch")
    peer("gguf")
    source = make(name, diffusers)
    source.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.gguf"
    wp.convert(tmp_path / "model", path, "q4_k")
    theirs = type(source).from_single_file(
        str(path), config=str(tmp_path / "model"), torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    # A config of diffusers is one of ours.
    model = wp.from_pretrained(
        type(source), path, config=tmp_path / "model",
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    state, other = model.state_dict(), theirs.state_dict()
    assert set(state) == set(other)
    for key, value in other.items():
        assert torch.equal(torch.Tensor.as_subclass(value, torch.Tensor), state[key].as_subclass(torch.Tensor)), key
    types = {key: value.quant_type.name for key, value in other.items() if hasattr(value, "quant_type")}
    assert types == {key: value.quant_type for key, value in packed_parameters(model).items()}
    # They compute with scales in half precision.
    assert relative(output(model, name), output(theirs, name)) < 0.01


def test_flux_as_diffusers_reads_it(peer, tmp_path):
    diffusers, torch = peer("diffusers"), peer("torch")
    peer("gguf")
    # diffusers cuts fused rows of a tiny flux at the width of FLUX.1; its own names it takes as they are.
    source = make("flux", diffusers, num_attention_heads=8)
    source.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.gguf"
    wp.convert(tmp_path / "model", path, "q4_k", arch="none")
    theirs = type(source).from_single_file(
        str(path), config=str(tmp_path / "model"), torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    model = wp.from_pretrained(
        type(source), path, config=tmp_path / "model", quantization_config=wp.GGUFQuantizationConfig()
    )
    for key, value in theirs.state_dict().items():
        assert torch.equal(value.as_subclass(torch.Tensor), model.state_dict()[key].as_subclass(torch.Tensor)), key
    assert {"GGUFLinear"} == layers(model)
    given = inputs("flux")
    with torch.no_grad():
        found = model(**given, return_dict=False)[0]
        assert relative(found, theirs(**given, return_dict=False)[0]) < 0.01


def test_a_unet_with_packed_kernels(peer, tmp_path):
    diffusers, torch = peer("diffusers"), peer("torch")
    source = tiny_diffusers.make("unet", diffusers)
    source.save_pretrained(tmp_path / "model")
    tensors, types, metadata = {}, {}, {"general.architecture": "sd1"}
    for key, value in source.state_dict().items():
        array, types[key] = value.numpy(), "F32"
        if array.ndim > 1 and array.size % 256 == 0:
            # As ComfyUI-GGUF's converter has it: rows of 256, and the shape beside them.
            metadata[f"comfy.gguf.orig_shape.{key}"] = np.array(array.shape, np.int32)
            array, types[key] = array.reshape(-1, 256), "Q5_K"
        tensors[key] = array
    wp.gguf.write(tmp_path / "unet.gguf", tensors, metadata, types=types)
    model = wp.from_pretrained(
        type(source), tmp_path / "unet.gguf", config=tmp_path / "model", quantization_config=wp.GGUFQuantizationConfig()
    )
    assert layers(model) == {"GGUFLinear", "GGUFConv2d"}
    for key, value in packed_parameters(model).items():
        assert value.quant_shape == tuple(source.state_dict()[key].shape)
        source.state_dict()[key].copy_(value.dequantize())
    assert torch.equal(tiny_diffusers.run("unet", model), tiny_diffusers.run("unet", source))
    half = sum(value.nbytes for value in model.parameters()) / sum(value.nbytes for value in source.parameters())
    assert half < 0.3


def test_a_model_is_packed_while_it_is_read(peer, tmp_path):
    diffusers, torch = peer("diffusers"), peer("torch")
    source = make(
        "sd3",
        diffusers,
    )
    source.save_pretrained(tmp_path / "model")
    model = wp.from_pretrained(
        type(source), tmp_path / "model", quantization_config=wp.GGUFQuantizationConfig(quant_type="q6_k")
    )
    found = packed_parameters(model)
    assert len(found) > 20
    for key, value in found.items():
        expected = wp.gguf.quantize(source.state_dict()[key], "q6_k")
        assert torch.equal(value.as_subclass(torch.Tensor), expected), key
    assert 0 < relative(output(model, "sd3"), output(source, "sd3")) < 0.05


@pytest.mark.cuda
def test_on_cuda(peer, tmp_path):
    diffusers, torch = peer("diffusers"), peer("torch")
    source = make("sd3", diffusers)
    source.save_pretrained(tmp_path / "model")
    wp.convert(tmp_path / "model", tmp_path / "model.gguf", "q4_k")
    config = wp.GGUFQuantizationConfig(compute_dtype="bfloat16")
    options = {"config": tmp_path / "model", "quantization_config": config}
    model = wp.from_pretrained(type(source), tmp_path / "model.gguf", device_map="cuda", **options)
    assert all(value.is_cuda for value in model.parameters())
    given = {key: value.to("cuda", torch.bfloat16) for key, value in inputs("sd3").items()}
    other = wp.from_pretrained(type(source), tmp_path / "model.gguf", **options)
    with torch.no_grad():
        found = model(**given, return_dict=False)[0].float().cpu()
        expected = other(**{key: value.cpu() for key, value in given.items()}, return_dict=False)[0].float()
    assert relative(found, expected) < 0.02
