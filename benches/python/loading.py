"""Loading a model packed, against transformers' and diffusers' own loaders, in one run.

    python benches/python/loading.py --megabytes 1024 --runs 3 --record benches/record/NAME.json

The sources are a made Llama and a made Flux transformer with random bf16 weights in shards, in the page
cache. Every load is a process of its own that imports the libraries first; timed is `from_pretrained`
alone. Peak memory is the process's `RssAnon` above what it was before the call, sampled every
millisecond. Loads of one row must give the same state dict (a digest of names and bytes), or the row
says that they differ: GGUF files are decoded by transformers, and diffusers holds bf16 tensors of them as
bytes. diffusers refuses bitsandbytes without a GPU: that one check is lifted for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 12,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 256,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
SHARDS = 6
SAMPLE_SECONDS = 0.001


def models() -> dict[str, Any]:
    """A class of each host, and how its model of one layer more or less is made."""
    from diffusers import FluxTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    return {
        "transformers": (LlamaForCausalLM, lambda n: LlamaForCausalLM(LlamaConfig(**LLAMA, num_hidden_layers=n))),
        "diffusers": (FluxTransformer2DModel, lambda n: FluxTransformer2DModel(**FLUX, num_single_layers=n)),
    }


def make(host: str, folder: Path, megabytes: int) -> None:
    """Writes a sharded bf16 folder of about `megabytes` as the host itself saves one."""
    import torch

    _, build = models()[host]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        sizes = [sum(p.numel() * 2 for p in build(n).parameters()) for n in (1, 2)]
    layers = max(1, round((megabytes * 1e6 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    with torch.device("meta"):
        model = build(layers)
    model = model.to_empty(device="cpu")
    pool = torch.randn(1 << 22, dtype=torch.float32).mul_(0.02).bfloat16()
    for number, parameter in enumerate(model.parameters()):
        flat, start = parameter.data.view(-1), number * 7919 % (1 << 20)
        for first in range(0, flat.numel(), 1 << 20):
            piece = flat[first : first + (1 << 20)]
            piece.copy_(pool[start : start + piece.numel()])
    size = sum(p.numel() * 2 for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // SHARDS)


def config_of(host: str, kind: str) -> Any:
    """The host's own quantization config."""
    import torch

    if kind in ("nf4", "int8"):
        library = __import__(host)
        if kind == "int8":
            return library.BitsAndBytesConfig(load_in_8bit=True)
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        return library.BitsAndBytesConfig(load_in_4bit=True, **options)
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return __import__(host).TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "quanto-int8":
        if host == "transformers":
            return __import__(host).QuantoConfig(weights="int8")
        return __import__(host).QuantoConfig(weights_dtype="int8")
    return None


def lift_gpu_check() -> None:
    """Lets diffusers pack for bitsandbytes on a machine without a GPU."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        quantizer = getattr(bnb_quantizer, name)
        quantizer.validate_environment = lambda self, *args, **kwargs: None
        quantizer.update_device_map = lambda self, device_map: device_map


def anonymous() -> int:
    """`RssAnon` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure(way: str, host: str, kind: str, folder: str) -> dict[str, Any]:
    """One load, in this process."""
    warnings.simplefilter("ignore")
    import torch

    model_class, _ = models()[host]
    config = None if kind.startswith("packed") else config_of(host, kind)
    options: dict[str, Any] = {"torch_dtype" if host == "diffusers" else "dtype": torch.bfloat16}
    if kind == "gguf":
        # The file lies in the folder of the config.
        file = Path(folder, "model.gguf")
        if way in ("weightpack", "mapped"):
            config = __import__("weightpack").GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
            options["config"], folder = folder, str(file)
        elif host == "diffusers":
            config = __import__(host).GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
            options["config"], folder = folder, str(file)
        else:
            options["gguf_file"] = file.name
    if config is not None:
        options["quantization_config"] = config
    if way == "host":
        if host == "diffusers":
            lift_gpu_check()
        load = model_class.from_single_file if kind == "gguf" and host == "diffusers" else model_class.from_pretrained
    elif way == "registered":
        import weightpack.integrations

        getattr(weightpack.integrations, host).register()
        load = model_class.from_pretrained
    else:
        import weightpack as wp

        options = {**options, "torch_dtype": torch.bfloat16}
        options.pop("dtype", None)
        if way == "mapped":
            options["mmap"] = True

        def load(path: str, **options: Any) -> Any:
            return wp.from_pretrained(model_class, path, **options)

    before, peak, stop = anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, anonymous())
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    started = time.perf_counter()
    model = load(folder, **options)
    seconds = time.perf_counter() - started
    stop.set()
    sampler.join()
    digest, size = hashlib.sha256(), 0
    for name, value in sorted(model.state_dict().items()):
        for inner in parts(value):
            digest.update(name.encode() + str(inner.dtype).encode())
            data = inner.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(data)
            size += data.nbytes
    return {
        "seconds": seconds,
        "peak_bytes": max(peak, anonymous()) - before,
        "model_bytes": size,
        "digest": digest.hexdigest()[:16],
    }


def parts(value: Any) -> list[Any]:
    """The plain tensors of a tensor, which may be a subclass that holds several."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [inner for name in names for inner in parts(getattr(value, name))]
    return [value]


def run(way: str, host: str, kind: str, folder: Path) -> dict[str, Any]:
    """One load in a fresh process."""
    command = [sys.executable, __file__, "--measure", way, host, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["?"]
        return {"failed": lines[-1][:300]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def row(host: str, kind: str, folder: Path, ways: list[str], runs: int) -> dict[str, Any]:
    """The same load in every way, in turns."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(runs):
        for way in ways:
            results[way].append(run(way, host, kind, folder))
    shown: dict[str, Any] = {"library": host, "kind": kind}
    digests = set()
    for way, found in results.items():
        good = [one for one in found if "failed" not in one]
        if not good:
            shown[way] = {"failed": found[0]["failed"]}
            continue
        digests |= {one["digest"] for one in good}
        shown[way] = {
            "seconds": statistics.median(one["seconds"] for one in good),
            "peak_bytes": statistics.median(one["peak_bytes"] for one in good),
            "model_bytes": good[0]["model_bytes"],
        }
    shown["same_bytes"] = len(digests) == 1
    own, theirs = shown.get("weightpack", {}), shown.get("host", {})
    if "seconds" in own and "seconds" in theirs:
        shown["times_as_fast"] = theirs["seconds"] / own["seconds"]
    print(json.dumps(shown), file=sys.stderr, flush=True)
    return shown


def main() -> None:
    """Runs the rows and prints or records them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs=4, metavar=("WAY", "HOST", "KIND", "FOLDER"))
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--hosts", default="transformers,diffusers")
    parser.add_argument("--kinds", default="none,nf4,int8,torchao-int8,quanto-int8,packed-nf4,gguf")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--folder", type=Path)
    choices = parser.parse_args()
    if choices.measure:
        print(json.dumps(measure(*choices.measure)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=choices.folder) as top:
        for host in choices.hosts.split(","):
            folder = Path(top, host)
            make(host, folder, choices.megabytes)
            for kind in choices.kinds.split(","):
                source, ways = folder, ["host", "registered", "weightpack"]
                if kind == "none":
                    ways = ["host", "weightpack", "mapped"]
                if kind == "packed-nf4":
                    ways.append("mapped")
                    source = Path(top, f"{host}-nf4")
                    convert = [sys.executable, "-m", "weightpack", "convert", str(folder), str(source), "--to", "nf4"]
                    subprocess.run([*convert, "--max-shard-size", "200MB"], check=True, capture_output=True)
                if kind == "gguf":
                    source, ways = Path(top, f"{host}-gguf"), ["host", "weightpack"]
                    source.mkdir()
                    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
                    # diffusers reads the reference names of FLUX.1 at its full width alone, its own at any.
                    names = ["--arch", "none"] if host == "diffusers" else []
                    convert = [sys.executable, "-m", "weightpack", "convert", str(folder), str(source / "model.gguf")]
                    subprocess.run([*convert, "--to", "q4_k", *names], check=True, capture_output=True)
                rows.append(row(host, kind, source, ways, choices.runs))
    record(choices, rows)
    broken = [
        f"{row['library']} {row['kind']}: {row['weightpack']['failed']}"
        for row in rows
        if "failed" in row["weightpack"]
    ]
    if broken:
        raise SystemExit("\n".join(broken))


def record(choices: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Prints what was measured and on what, and keeps it if asked to."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": os.cpu_count(),
        "megabytes": choices.megabytes,
        "runs": choices.runs,
        "versions": versions(),
        "rows": rows,
    }
    text = json.dumps(found, indent=2) + "\n"
    if choices.record:
        choices.record.write_text(text)
    print(text)


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    """The libraries that were compared."""
    from importlib import metadata

    import weightpack

    names = ["torch", "transformers", "diffusers", "accelerate", "bitsandbytes", "torchao"]
    found = {"weightpack": weightpack.__version__}
    for name in [*names, "optimum-quanto"]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
