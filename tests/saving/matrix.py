"""Saved by weightpack, loaded by others: every backend and every kind of model, and the README's table of it.

`python -m tests.saving.matrix` runs it and prints the table; with `--write` it goes into the README.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN, END = "<!-- saved by, loaded by -->", "<!-- end -->"
MODELS = ("llama", "bert", "flux", "plain")
TITLES = {"llama": "Llama (transformers)", "bert": "BERT (transformers)", "flux": "Flux (diffusers)"}

NOTES = {
    "gpu": "diffusers wants a GPU for bitsandbytes; with that one check lifted it loads the same weights",
    "compiler": "diffusers loads the same weights; quanto compiles C++ before these run, which was not done",
    "ignored": "transformers passes over quanto's arrays and gives the layers new weights; it loads them after "
    "`register()`",
    "no modelopt": "neither host loads these by itself: transformers knows no ModelOpt and takes codes for weights "
    "(saving warns of it), and diffusers 0.42 cannot make its config with ModelOpt 0.44 or later; `form=` writes what "
    "ModelOpt and engines read",
    "own blocks": "GGUF blocks in safetensors are weightpack's own; as a `.gguf` they are read by llama.cpp (Llama, "
    "identical logits) and by diffusers' `from_single_file` (Flux, equal outputs)",
}
"""Why a host does not load something, by a short name."""
FLOAT32 = ("quanto int8", "quanto int4")
"""What is tried in float32 under diffusers: torch's int8 kernel crashes on mapped weights in bfloat16."""


def backends() -> dict[str, Any]:
    """What is tried: what needs a library, and how its config is made, by name. Q4_K packs nothing so narrow."""
    from tests.quantizers.test_contract import BACKENDS

    return {name: row for name, row in BACKENDS.items() if name != "gguf q4_k"}


def outcomes() -> dict[tuple[str, str], str]:
    """What is expected of the host alone: "equal", or a key of `NOTES`."""
    expected = {}
    for backend in (None, *backends()):
        for model in ("llama", "bert", "flux"):
            expected[str(backend or "plain"), model] = _outcome(backend, model)
    return expected


def _outcome(backend: str | None, model: str) -> str:
    if backend is None or backend.startswith("torchao"):
        return "equal"
    if backend.startswith("gguf"):
        return "own blocks"
    if backend.startswith("modelopt"):
        return "no modelopt"
    if backend.startswith("quanto"):
        if model != "flux":
            return "ignored"
        return "compiler" if backend == "quanto int4" else "equal"
    return "gpu" if model == "flux" else "equal"


def run(place: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Packs, saves and loads everything below `place`. For each backend and model: whether weightpack gets the
    same bits and outputs back, and what the host alone says."""
    import torch

    import weightpack as wp
    from tests.integrations import tiny_diffusers
    from tests.loading import nets
    from tests.quantizers.test_contract import storage
    from tests.saving import matrix_models

    warnings.simplefilter("ignore")
    import diffusers

    classes = {
        "llama": matrix_models.make_llama(place / "llama"),
        "bert": matrix_models.make_bert(place / "bert"),
        "flux": tiny_diffusers.save("flux", diffusers, place / "flux", dtype=torch.bfloat16),
        "plain": nets.Net,
    }
    nets.save(place / "plain", nets.make(dtype=torch.bfloat16, width=64), width=64)

    def outputs(model: str, loaded: Any) -> Any:
        with torch.no_grad():
            return loaded(nets.TOKENS).float() if model == "plain" else matrix_models.run(model, loaded)

    found: dict[tuple[str, str], dict[str, Any]] = {}
    requests: dict[str, dict[str, Any]] = {"transformers": {}, "diffusers": {}}
    for backend, make in (("plain", lambda: None), *((name, make) for name, (_, make) in backends().items())):
        for model in MODELS:
            dtype = "float32" if model == "bert" or (model == "flux" and backend in FLOAT32) else "bfloat16"
            if backend == "torchao nvfp4":
                dtype = "bfloat16"
            loaded = wp.from_pretrained(classes[model], place / model, quantization_config=make(), torch_dtype=dtype)
            given = outputs(model, loaded)
            folder = place / f"{model}, {backend}"
            wp.save_pretrained(loaded, folder, max_shard_size="60KB")
            again = wp.from_pretrained(classes[model], folder, torch_dtype=dtype)
            same = storage(again) == storage(loaded) and torch.equal(outputs(model, again), given)
            state = matrix_models.digests(loaded)
            found[backend, model] = {"own": same, "outputs": given, "state": state}
            if model in matrix_models.HOSTS:
                lift = model == "flux" and backend in ("nf4", "double quant", "int8")
                request = requests[matrix_models.HOSTS[model]]
                request[json.dumps([backend, model])] = (model, str(folder), dtype, False)
                if lift:
                    request[json.dumps([backend, model, "lifted"])] = (model, str(folder), dtype, True)
    for host, request in requests.items():
        for key, result in _by_the_host(host, request, place).items():
            backend, model, *lifted = json.loads(key)
            found[backend, model]["lifted" if lifted else "host"] = result
    return found


def _by_the_host(host: str, request: dict[str, Any], place: Path) -> dict[str, Any]:
    """What another process, without weightpack, makes of the folders."""
    import torch

    asked, answered = place / f"{host}.json", place / f"{host}.pt"
    # What is lifted stays so for the rest of the process.
    asked.write_text(json.dumps(dict(sorted(request.items(), key=lambda item: item[1][3]))))
    command = [sys.executable, "-m", "tests.saving.matrix_models", str(asked), str(answered)]
    while subprocess.run(command, cwd=ROOT, capture_output=True).returncode < 0:
        pass
    results: dict[str, Any] = torch.load(answered, weights_only=True)
    return results


def judge(one: dict[str, Any], result: dict[str, Any]) -> str:
    """ "equal" for the same weights and outputs, "equal, X %" where the host computes otherwise with the same
    weights, else what the host said."""
    import torch

    if result.get("state") is not None and result["state"] != one["state"]:
        differing = [name for name, digest in one["state"].items() if result["state"].get(name) != digest]
        return f"other weights: {len(differing)}, {differing[:1]}"
    if "outputs" not in result:
        return f"{'equal weights, ' if 'state' in result else ''}{result['error']}"
    if torch.equal(one["outputs"], result["outputs"]):
        return "equal"
    distance = float((result["outputs"] - one["outputs"]).norm() / one["outputs"].norm())
    return f"equal, {100 * distance:.1g} %" if distance < 0.03 else f"other outputs: {distance:.1e}"


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The README's table."""
    expected = outcomes()
    used = [note for note in NOTES if note in expected.values()]
    lines = [
        "| Saved by weightpack | weightpack: bits and outputs | " + " | ".join(TITLES.values()) + " |",
        "|---|---|" + "---|" * len(TITLES),
    ]
    for backend in ("plain", *backends()):
        own = "equal" if all(found[backend, model]["own"] for model in MODELS) else "differs"
        cells = [_cell(expected[backend, model], found[backend, model], used) for model in TITLES]
        lines.append(f"| {backend} | {own} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {NOTES[note]}" for number, note in enumerate(used, 1))]
    return "\n".join(lines)


def _cell(expected: str, found: dict[str, Any], used: list[str]) -> str:
    if expected in NOTES:
        return f"({used.index(expected) + 1})"
    return judge(found, found["host"])


def written() -> str:
    """The table that the README has."""
    text = README.read_text("utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END, text.index(BEGIN))].strip()


def shape_of(table: str) -> str:
    """The table without the percentages, which depend on the machine's kernels."""
    return re.sub(r"equal(, [0-9.e-]+ %)?", "equal", table)


def main() -> None:
    """Runs it all and prints or writes the table."""
    with tempfile.TemporaryDirectory() as place:
        found = run(Path(place))
    for (backend, model), one in found.items():
        print(
            f"{backend:14} {model:6} {one['own']!s:6}",
            *(judge(one, one[k]) for k in ("host", "lifted") if k in one),
            file=sys.stderr,
        )
    new = table(found)
    print(new)
    if "--write" in sys.argv:
        text = README.read_text("utf-8")
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END, text.index(BEGIN))
        README.write_text(f"{text[:start]}\n{new}\n{text[end:]}", "utf-8")


if __name__ == "__main__":
    main()
