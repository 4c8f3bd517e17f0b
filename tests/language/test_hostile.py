"""Files of a model folder with one value replaced: a result or a refusal, never another error."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weightpack.errors import WeightpackError
from weightpack.language.families import detect_family, find_family
from weightpack.language.hyperparameters import read_hyperparameters
from weightpack.language.sampling import sampling_metadata
from weightpack.language.tokenizer import read_tokenizer

from .models import CONFIGS, TOKENS, VECTORS

STRANGE: list[Any] = [
    float("inf"),
    None,
    True,
    -1,
    1.5,
    2**70,
    "",
    "text",
    [],
    [1],
    [["a"]],
    {},
    {"a": 1},
    {"id": [], "content": 3},
]


def places(value: Any, path: tuple[Any, ...] = (), most: int = 4) -> Iterator[tuple[Any, ...]]:
    """Where a document holds a value: of long lists and objects, the first few."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[: 40 if len(path) == 0 else most]:
            yield from places(value[key], (*path, key), most)
    elif isinstance(value, list):
        for number in range(min(len(value), 3)):
            yield from places(value[number], (*path, number), most)


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(document)
    changed[path[0]] = replaced(document[path[0]], path[1:], value)
    return changed


def tolerates(act: Any) -> None:
    with contextlib.suppress(WeightpackError):
        act()


@pytest.mark.parametrize(
    ("tokenizer", "file"),
    [
        ("llama-bpe", "tokenizer.json"),
        ("llama-bpe", "tokenizer_config.json"),
        ("qwen2", "tokenizer.json"),
        ("pieces", "tokenizer_config.json"),
        ("pieces", "added_tokens.json"),
        ("pieces", "chat_template.json"),
        ("pieces-json", "tokenizer.json"),
    ],
)
def test_tokenizers(tmp_path: Path, tokenizer: str, file: str) -> None:
    for source in (VECTORS / tokenizer).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    path, family = tmp_path / file, find_family("llama")
    assert family is not None
    document = json.loads(path.read_text("utf-8")) if path.exists() else {"<x>": 3, "chat_template": "text"}
    tried = 0
    for place in places(document):
        for value in STRANGE:
            path.write_text(json.dumps(replaced(document, place, value)))
            tolerates(lambda: read_tokenizer(tmp_path, {}, family, TOKENS))
            tried += 1
    assert tried > len(STRANGE)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str) -> None:
    config = {**CONFIGS[name], "layer_types": ["full_attention"], "partial_rotary_factor": 1.0}
    both = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}
    for document in (config, {**config, "rope_parameters": both}):
        for place in places(document):
            for value in STRANGE:
                changed = replaced(document, place, value)
                if isinstance(changed, dict):
                    tolerates(lambda changed=changed: use(changed))


def use(config: dict[str, Any]) -> None:
    family = detect_family(config)
    if family is None:
        return
    numbers = read_hyperparameters(config, family)
    assert json.dumps(numbers.metadata(family), allow_nan=False)
    assert json.dumps(numbers.rotation.factors(numbers.head_size), allow_nan=False)


@pytest.mark.parametrize("value", STRANGE)
def test_sampling(tmp_path: Path, value: Any) -> None:
    for key in ("top_k", "top_p", "temperature"):
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
        tolerates(lambda: sampling_metadata(tmp_path))


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"a": NaN}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_that_are_no_json(tmp_path: Path, file: str, data: bytes) -> None:
    for source in (VECTORS / "llama-bpe").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).write_bytes(data)
    family = find_family("llama")
    assert family is not None
    tolerates(lambda: (read_tokenizer(tmp_path, {}, family, TOKENS), sampling_metadata(tmp_path)))
