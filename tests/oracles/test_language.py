"""Converted language models in llama.cpp (llama-cpp-python 0.3.36): it loads them, computes what
transformers computes, finds the tokens that the tokenizer's own library finds, and its quantizer
makes the same file of our plain one.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import weightpack as wp

from ..language.models import CONFIGS, VECTORS, make_model

pytestmark = pytest.mark.llama

TEXTS = [
    "the quick brown fox",
    "Hello  World 12 日本語 I'll don't",
    "  café naïve\n\n ==> {x} Ünknown 🦙",
    "3.14 333 4444\t\ttabs \r\n  lines",
    "",
    " ",
]
SPECIAL = "two words <tool> x <|end|> y <|begin|>"
IDS = [1, *np.random.RandomState(3).randint(4, 390, 40).tolist()]
FILE_TYPES = {
    "q4_0_mix": 2,
    "q8_0_mix": 7,
    "q2_k_mix": 10,
    "q3_k_l": 13,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q6_k_mix": 18,
    "iq4_xs_mix": 30,
}
"""Recipes, and llama.cpp's number of each."""


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    if importlib.util.find_spec("llama_cpp") is None:
        if os.environ.get("CI"):
            pytest.fail("peer library llama_cpp is not installed")
        pytest.skip("peer library llama_cpp is not installed")
    return importlib.import_module("llama_cpp")


def logits_of(llama_cpp: Any, path: Path, ids: Sequence[int] = IDS) -> NDArray[np.float32]:
    model = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=2)
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)], np.float32)


def reference(peer: Any, folder: Path) -> NDArray[np.float32]:
    torch, transformers = peer("torch"), peer("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return found


def relative(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(llama_cpp: Any, peer: Any, tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / name, name)
    expected = reference(peer, folder)
    # llama.cpp keeps keys and values as f16, and adds up in another order.
    for to, most in (("f32", 1e-3), ("bf16", 1e-2), ("q8_0", 5e-2), ("q4_k_m", 0.5)):
        target = tmp_path / f"{to}.gguf"
        wp.convert(folder, target, to=to)
        assert relative(logits_of(llama_cpp, target), expected) < most, to


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_tokens_of_byte_pairs(llama_cpp: Any, peer: Any, tmp_path: Path, name: str) -> None:
    folder, target = make_model(tmp_path / name, name), tmp_path / "out.gguf"
    wp.convert(folder, target, to="f16")
    theirs = peer("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = llama_cpp.Llama(str(target), vocab_only=True, verbose=False)
    for text in [*TEXTS, SPECIAL]:
        for added in (True, False):
            expected = theirs.encode(text, add_special_tokens=added).ids
            assert model.tokenize(text.encode(), add_bos=added, special=True) == expected, text


@pytest.mark.parametrize("tokenizer", ["pieces", "pieces-json"])
def test_tokens_of_pieces(llama_cpp: Any, peer: Any, tmp_path: Path, tokenizer: str) -> None:
    folder, target = make_model(tmp_path / "model", "llama2", tokenizer=tokenizer), tmp_path / "out.gguf"
    wp.convert(folder, target, to="f16")
    theirs = peer("sentencepiece").SentencePieceProcessor(model_file=str(VECTORS / "pieces" / "tokenizer.model"))
    model = llama_cpp.Llama(str(target), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False, special=False) == theirs.encode(text), text
    assert model.tokenize(b"the", add_bos=True) == [1, *theirs.encode("the")]


@pytest.mark.parametrize("to", FILE_TYPES)
def test_its_quantizer_makes_the_same_file(llama_cpp: Any, peer: Any, tmp_path: Path, to: str) -> None:
    gguf = peer("gguf")
    folder = make_model(tmp_path / "model", "llama2", num_hidden_layers=8)
    plain, mine, theirs = (tmp_path / f"{name}.gguf" for name in ("plain", "mine", "theirs"))
    wp.convert(folder, plain, to="f32")
    wp.convert(folder, mine, to=to)
    choices = llama_cpp.llama_model_quantize_default_params()
    choices.ftype, choices.nthread = FILE_TYPES[to], 2
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(theirs).encode(), choices) == 0
    found, expected = gguf.GGUFReader(mine), gguf.GGUFReader(theirs)
    own = {tensor.name: tensor for tensor in found.tensors}
    assert own.keys() == {tensor.name for tensor in expected.tensors}
    for tensor in expected.tensors:
        assert own[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert np.array_equal(own[tensor.name].data, tensor.data), tensor.name
    for key in ("general.file_type", "general.quantization_version"):
        assert found.fields[key].contents() == expected.fields[key].contents()


def test_a_folder_without_a_tokenizer(llama_cpp: Any, tmp_path: Path) -> None:
    folder, target = make_model(tmp_path / "model", "qwen2", with_tokenizer=False), tmp_path / "out.gguf"
    report = wp.convert(folder, target, to="q8_0")
    assert any("holds no tokenizer" in warning for warning in report.warnings)
    assert np.isfinite(logits_of(llama_cpp, target)).all()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
