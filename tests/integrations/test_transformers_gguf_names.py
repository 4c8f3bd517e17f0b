"""Text encoders of the T5 kind from GGUF files, which weightpack does not write."""

from __future__ import annotations

import pytest

import weightpack as wp
from weightpack.integrations.transformers.gguf_names import gguf_names

SIZES = {
    "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def stored(peer, model, arch):
    """The tensors of a model under gguf-py's names."""
    gguf = peer("gguf")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), 2)
    found = {}
    for name, value in model.state_dict().items():
        if name.endswith("embed_tokens.weight"):
            continue
        found[names.get_name(name, try_suffixes=(".weight",))] = value
    return found


@pytest.mark.parametrize(
    ("kind", "arch", "dtype", "options"),
    [
        ("T5EncoderModel", "T5ENCODER", "float32", {}),
        ("T5EncoderModel", "T5ENCODER", "bfloat16", {}),
        ("T5ForConditionalGeneration", "T5", "float32", {"tie_word_embeddings": False}),
        ("UMT5EncoderModel", "T5ENCODER", "float32", {}),
        ("T5EncoderModel", "T5ENCODER", "float32", {"feed_forward_proj": "relu"}),
    ],
)
def test_text_encoders(peer, tmp_path, kind, arch, dtype, options):
    transformers, torch = peer("transformers"), peer("torch")
    torch.manual_seed(2)
    cls = getattr(transformers, kind)
    source = cls(cls.config_class(**{**SIZES, **options})).eval()
    source.save_pretrained(tmp_path / "model")
    tensors = {name: value.numpy() for name, value in stored(peer, source, arch).items()}
    types = {
        name: "Q8_0" if array.ndim == 2 and array.shape[-1] % 32 == 0 else "F32" for name, array in tensors.items()
    }
    wp.gguf.write(tmp_path / "t5.gguf", tensors, {"general.architecture": arch.lower()}, types=types)
    model, info = wp.from_pretrained(
        cls, tmp_path / "t5.gguf", config=tmp_path / "model", torch_dtype=dtype, output_loading_info=True,
        quantization_config=wp.GGUFQuantizationConfig(compute_dtype=dtype),
    )  # fmt: skip
    assert not info.missing
    assert not info.unexpected
    packed = {name for name, value in model.state_dict().items() if hasattr(value, "quant_type")}
    assert "shared.weight" in packed
    assert "encoder.block.1.layer.0.SelfAttention.q.weight" in packed
    # transformers casts what goes into this layer to the type of its weight.
    assert "encoder.block.0.layer.1.DenseReluDense.wo.weight" not in packed
    for name in packed | {name for name in model.state_dict() if name.endswith("wo.weight")}:
        rows = wp.gguf.quantize(source.state_dict()[name], "Q8_0")
        source.state_dict()[name].copy_(wp.gguf.dequantize(rows, "Q8_0"))
    ids = torch.arange(20).reshape(2, 10)
    given = {"input_ids": ids, **({} if "Encoder" in kind else {"decoder_input_ids": ids})}
    with torch.no_grad():
        found, expected = model(**given)[0], source.to(getattr(torch, dtype))(**given)[0]
    assert torch.equal(found, expected)


def test_other_models_and_files(peer):
    transformers = peer("transformers")
    model = transformers.T5EncoderModel(transformers.T5Config(**SIZES))
    assert gguf_names(model, {"enc.blk.0.attn_mystery.weight": (4, 4)}) is None
    assert gguf_names(model, {"blk.0.attn_q.weight": (4, 4)}) is None
    assert gguf_names(object(), {"token_embd.weight": (4, 4)}) is None
