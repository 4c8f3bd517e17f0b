"""Saving a packed model, against a plain copy of its bytes to a file and against the hosts' own ways.

    python benches/python/saving.py --megabytes 1100 --runs 5 --record benches/record/NAME.json
    python benches/python/saving.py --smoke

The models are a made Llama and a made Flux transformer, random weights packed to NF4 while they were loaded;
`--megabytes` is their packed size. Every save is a process of its own that loads the packed model first;
timed is the save alone, until the bytes are on the disk:

| way | what is timed |
|---|---|
| `weightpack` | `weightpack.save_pretrained`, which forces everything to the disk by itself |
| `copy` | the tensors' memory written to one file, one after the other, and `fsync` |
| `safetensors` | `safetensors.torch.save_file` of the same tensors, and `fsync` |
| `host` | the host's own `save_pretrained` of the model as the host itself loads it, and `fsync` of each file |

`unsynced_seconds` is the same without the `fsync` behind it. Peak memory is the process's `RssAnon` above
what it was before the save, sampled every millisecond. The tensors written must be the same, name for name
and byte for byte (a digest). diffusers refuses bitsandbytes without a GPU: that one check is lifted for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loading import SAMPLE_SECONDS, anonymous, config_of, lift_gpu_check, make, models, record

WAYS = ["weightpack", "copy", "safetensors", "host"]
PACKED_SHARE = 0.27
"""Packed bytes for each byte of bf16, about."""


def load(host: str, folder: str, by_host: bool) -> Any:
    """The packed model."""
    import torch

    model_class, _ = models()[host]
    if by_host:
        if host == "diffusers":
            lift_gpu_check()
        return model_class.from_pretrained(
            folder, **{"torch_dtype" if host == "diffusers" else "dtype": torch.bfloat16}
        )
    import weightpack as wp

    return wp.from_pretrained(model_class, folder, torch_dtype=torch.bfloat16)


def tensors_of(model: Any) -> dict[str, Any]:
    """What is stored of it."""
    from weightpack.saving.parts import part_of

    return {stored.name: stored.tensor.detach() for stored in part_of(model).tensors}


def copy(tensors: dict[str, Any], file: Path) -> None:
    """Writes memory to a file, one tensor after the other."""
    import torch

    with open(file, "wb", buffering=0) as out:
        for tensor in tensors.values():
            data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            while data:
                data = data[out.write(data) :]


def saver(way: str, model: Any, place: Path) -> Callable[[], None]:
    """The save, without what it does not have to do."""
    if way == "weightpack":
        import weightpack as wp

        return lambda: wp.save_pretrained(model, place)
    if way == "host":
        return lambda: model.save_pretrained(place)
    tensors = tensors_of(model)
    place.mkdir()
    if way == "copy":
        return lambda: copy(tensors, place / "bytes")
    from safetensors.torch import save_file

    return lambda: save_file(tensors, place / "model.safetensors", {"format": "pt"})


def measure(way: str, host: str, folder: str, place: str) -> dict[str, Any]:
    """One save, in this process."""
    warnings.simplefilter("ignore")
    save = saver(way, load(host, folder, way == "host"), Path(place))
    # What earlier processes left to write is not this one's.
    os.sync()
    before, peak, over = anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, anonymous())
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        started = time.perf_counter()
        save()
        unsynced = time.perf_counter() - started
        if way != "weightpack":
            for file in Path(place).iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        seconds = time.perf_counter() - started
    finally:
        over.set()
        sampler.join()
    files = list(Path(place).iterdir())
    return {
        "seconds": seconds,
        "unsynced_seconds": unsynced,
        "peak_bytes": max(0, peak - before),
        "written_bytes": sum(file.stat().st_size for file in files),
        "digest": None if way == "copy" else digest(files),
    }


def digest(files: list[Path]) -> str:
    """Hash of all tensors in safetensors files, by name."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as held:
                for name in held.keys():  # noqa: SIM118
                    data = held.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()
                    found[name] = hashlib.sha256(data).hexdigest()
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def run(way: str, host: str, folder: Path) -> dict[str, Any]:
    """One save in a fresh process, to a place beside the source that is empty again afterwards."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as top:
        command = [sys.executable, __file__, "--measure", way, host, str(folder), str(Path(top, "out"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["?"]
        return {"failed": lines[-1][:300]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def row(host: str, folder: Path, runs: int) -> dict[str, Any]:
    """The same model saved in every way, in turns."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way in WAYS:
            results[way].append(run(way, host, folder))
    shown: dict[str, Any] = {"library": host, "kind": "packed-nf4"}
    digests = set()
    for way, found in results.items():
        good = [one for one in found if "failed" not in one]
        if not good:
            shown[way] = {"failed": found[0]["failed"]}
            continue
        digests |= {one["digest"] for one in good} - {None}
        shown[way] = {
            key: statistics.median(one[key] for one in good)
            for key in ("seconds", "unsynced_seconds", "peak_bytes", "written_bytes")
        }
    shown["same_bytes"] = len(digests) == 1
    own = shown["weightpack"].get("seconds")
    for way in WAYS[1:]:
        if own and "seconds" in shown[way]:
            shown[f"times_of_{way}"] = own / shown[way]["seconds"]
    print(json.dumps(shown), file=sys.stderr, flush=True)
    return shown


def prepare(host: str, top: Path, megabytes: int) -> Path:
    """Makes the packed model that is saved."""
    source, packed = top / f"{host}-bf16", top / f"{host}-nf4"
    make(host, source, round(megabytes / PACKED_SHARE))
    import weightpack as wp

    model_class, _ = models()[host]
    model = wp.from_pretrained(model_class, source, quantization_config=config_of(host, "nf4"))
    wp.save_pretrained(model, packed)
    for file in source.iterdir():
        file.unlink()
    return packed


def main() -> None:
    """Runs the rows and prints or records them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs=4, metavar=("WAY", "HOST", "FOLDER", "PLACE"))
    parser.add_argument("--prepare", nargs=3, metavar=("HOST", "TOP", "MEGABYTES"))
    parser.add_argument("--megabytes", type=int, default=1100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hosts", default="transformers,diffusers")
    parser.add_argument("--smoke", action="store_true", help="one small run of each, to see that all of it works")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--folder", type=Path)
    choices = parser.parse_args()
    if choices.measure:
        print(json.dumps(measure(*choices.measure)))
        return
    if choices.prepare:
        host, top, megabytes = choices.prepare
        prepare(host, Path(top), int(megabytes))
        return
    if choices.smoke:
        choices.megabytes, choices.runs = 20, 1
    rows = []
    with tempfile.TemporaryDirectory(dir=choices.folder) as top:
        for host in choices.hosts.split(","):
            command = [sys.executable, __file__, "--prepare", host, top, str(choices.megabytes)]
            prepared = subprocess.run(command, capture_output=True, text=True)
            if prepared.returncode != 0:
                raise SystemExit(prepared.stderr)
            rows.append(row(host, Path(top, f"{host}-nf4"), choices.runs))
    record(choices, rows)
    broken = [f"{row['library']}: {row['weightpack']['failed']}" for row in rows if "failed" in row["weightpack"]]
    broken += [f"{row['library']}: other tensors were written" for row in rows if not row["same_bytes"]]
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
