"""The models of the matrix, and what they make of fixed inputs. Knows nothing of weightpack.

Run as a program (`python -m tests.saving.matrix_models REQUEST.json RESULTS.pt`) it loads folders with the hosts
alone, and writes what the models gave, or why they did not load.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

HOSTS = {"llama": "transformers", "bert": "transformers", "flux": "diffusers"}
"""The host of each model that has one."""


def make_llama(folder: Path) -> Any:
    """A random Llama of two layers, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    return LlamaForCausalLM


def make_bert(folder: Path) -> Any:
    """A BERT that has learnt whether token 5 is in the text, in float32."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, num_labels=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        tokens = torch.randint(6, 32, (32, 8))
        labels = torch.randint(0, 2, (32,))
        places = torch.randint(0, 8, (32,))
        tokens[torch.arange(32), places] = torch.where(labels == 1, 5, tokens[torch.arange(32), places])
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return BertForSequenceClassification


def run(name: str, model: Any) -> Any:
    """What the model of a name makes of fixed inputs, in float32."""
    import torch

    with torch.no_grad():
        if name == "llama":
            return model(torch.arange(16)[None] * 5 % 128).logits.float()
        if name == "bert":
            torch.manual_seed(1)
            return model(torch.randint(0, 32, (16, 8))).logits.float()
    from tests.integrations import tiny_diffusers

    return tiny_diffusers.run(name, model).float()


def digests(model: Any) -> dict[str, str]:
    """A digest of the bytes of each tensor of the model's state; of what holds tensors, of each of these."""
    import torch

    found = {}

    def put(name: str, value: Any) -> None:
        if hasattr(value, "__tensor_flatten__") and type(value) not in (torch.Tensor, torch.nn.Parameter):
            for part in value.__tensor_flatten__()[0]:
                put(f"{name}.{part}", getattr(value, part))
        elif isinstance(value, torch.Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8)
            found[name] = hashlib.blake2b(data.numpy().tobytes(), digest_size=8).hexdigest()

    for name, value in model.state_dict().items():
        put(name, value)
    return found


def load(name: str, folder: str, dtype: str) -> Any:
    """With the host alone."""
    import torch

    if name == "flux":
        import diffusers

        return diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    import transformers

    kind = transformers.LlamaForCausalLM if name == "llama" else transformers.BertForSequenceClassification
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{len(info['missing_keys'])} weights were given new values")
    return model


def lift_gpu_check() -> None:
    """diffusers refuses bitsandbytes where there is no GPU; only that is lifted, for the rest of the process."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        kind.validate_environment = lambda self, *args, **options: None
        kind.update_device_map = lambda self, device_map: {"": "cpu"}


def main(request: str, results: str) -> None:
    """Loads what the request lists, and writes outputs and errors; what is in the results already, is done."""
    import torch

    warnings.simplefilter("ignore")
    found: dict[str, Any] = torch.load(results, weights_only=True) if Path(results).exists() else {}
    for key, (name, folder, dtype, lift) in json.loads(Path(request).read_text()).items():
        if key in found:
            continue
        torch.save({**found, key: {"error": "the process crashes"}}, results)
        found[key] = {}
        try:
            if lift:
                lift_gpu_check()
            model = load(name, folder, dtype).eval()
            found[key]["state"] = digests(model)
            torch.save({**found, key: {**found[key], "error": "the process crashes"}}, results)
            found[key]["outputs"] = run(name, model)
        except Exception as error:
            found[key]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    assert not any(module.partition(".")[0] == "weightpack" for module in sys.modules)
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
