"""Asking hosts, and doing without them."""

from __future__ import annotations

import sys

import pytest

from weightpack import layers
from weightpack.entry import Entry
from weightpack.errors import BackendError, ConfigError

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
WEIGHT = Entry("model.layers.0.mlp.up_proj.weight", (64, 64), "BF16", "bf16", 8192, 4096)


def test_a_mode_that_does_not_exist():
    with pytest.raises(ConfigError, match='layers "guess" is none of auto, host, names'):
        layers.find_layers([(LLAMA, [])], "guess")


def test_names_never_asks(monkeypatch):
    monkeypatch.setattr(layers, "_run", lambda *_: pytest.fail("a host was asked"))
    (found,) = layers.find_layers([(LLAMA, [WEIGHT])], "names")
    assert found.source == "names"
    assert found.tensors[WEIGHT.name].kind == "linear"


def test_without_the_host_names_decide_and_host_is_refused(monkeypatch):
    monkeypatch.setattr(layers, "is_installed", lambda package: False)
    (found,) = layers.find_layers([(LLAMA, [WEIGHT])], "auto")
    assert (found.source, found.warnings) == ("names", ())
    with pytest.raises(BackendError) as caught:
        layers.find_layers([(LLAMA, [WEIGHT])], "host")
    assert caught.value.message == (
        "transformers is needed to ask the model class for its linear layers, and is not installed"
    )
    assert caught.value.hint == "pip install 'weightpack[transformers]'"


def test_without_a_config_no_host_can_be_asked():
    with pytest.raises(BackendError, match=r"no config\.json that names a model class"):
        layers.find_layers([(None, [WEIGHT])], "host")
    (found,) = layers.find_layers([(None, [WEIGHT])], "auto")
    assert (found.source, found.host) == ("names", None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no such thing')", "no such thing"),
        ("print('hello')", "gave no readable description"),
        ("print('{}')", "gave no readable description"),
        ("import time; time.sleep(60)", "did not describe the model within"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_a_host_that_fails_is_named(monkeypatch, tmp_path, code, message):
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(layers, "is_installed", lambda package: True)
    monkeypatch.setattr(layers, "TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(sys, "executable", str(fake))
    (found,) = layers.find_layers([(LLAMA, [WEIGHT])], "auto")
    assert found.source == "names"
    assert message in found.warnings[0]
    with pytest.raises(BackendError, match=message):
        layers.find_layers([(LLAMA, [WEIGHT])], "host")
