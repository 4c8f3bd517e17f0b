"""The command line: exit codes, what goes where, and that it says what is wrong in one line."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from weightpack.targets import format_table

from .conftest import interrupt_at_work, write_safetensors


def test_version_and_help(command_line):
    import weightpack

    assert command_line("--version").stdout == f"weightpack {weightpack.__version__}\n"
    done = command_line("--help")
    assert done.returncode == 0
    for verb in ("convert", "inspect", "diff", "formats", "demo"):
        assert verb in done.stdout
        assert command_line(verb, "--help").returncode == 0


def test_help_is_quick(command_line):
    took = []
    for _ in range(5):
        began = time.perf_counter()
        command_line("convert", "--help")
        took.append(time.perf_counter() - began)
    # The bar is 0.3 s on a quiet machine; this one may be busy.
    assert min(took) < 0.6


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nothing"],
        ["convert"],
        ["convert", "a", "b", "--nothing"],
        ["convert", "a", "b", "--threads", "x"],
        ["convert", "{model}", "{new}", "--to", "nf5"],
        ["convert", "{model}", "{new}", "--to", "int8"],
        ["convert", "{model}", "{new}", "--max-shard-size", "big"],
        ["convert", "{model}", "{new}", "--keep", "("],
        ["convert", "{model}", "{new}", "--assign", "x"],
        ["convert", "{model}", "{new}", "--recipe", "none.toml"],
        ["convert", "{model}", "{new}", "--threads", "0"],
        ["convert", "{model}", "{new}", "--to", "bf16", "--double-quant"],
        ["convert", "{model}", "{new}", "--group-size", "32"],
        ["convert", "{model}", "{new}", "--block-size", "17"],
        ["convert", "{model}", "{new}", "--compute-dtype", "int8"],
        ["convert", "{model}", "{new}", "--components", "x"],
        ["convert", "{model}", "{new}", "--no-verify", "--min-snr", "3"],
        ["convert", "{model}", "{model}"],
        ["convert", "{model}", "{model}/inside"],
        ["convert", "{model}", "{new}", "--to", "q8_0"],
        ["convert", "{model}", "{new}.gguf", "--to", "nf4"],
        ["convert", "{model}", "{new}.safetensors", "--to", "q8_0"],
    ],
)
def test_wrong_usage_is_exit_code_2(command_line, llama_folder, tmp_path, words):
    done = command_line(*(word.format(model=llama_folder, new=tmp_path / "new") for word in words))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("new*"))


def test_an_error_is_one_line_and_the_hint_another(command_line, llama_folder, tmp_path):
    done = command_line("convert", llama_folder, tmp_path / "new", "--to", "nf5")
    lines = done.stderr.splitlines()
    assert lines == ['error: unknown format "nf5"', lines[1]]
    assert lines[1].startswith("hint: did you mean ")


def test_debug_shows_the_place(command_line, tmp_path):
    done = command_line("inspect", tmp_path / "absent", "--debug")
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert "Traceback" not in command_line("inspect", tmp_path / "absent").stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, 'packed by "aqlm"'),
        ({"quantization_config": {"quant_method": "gptq"}}, "packed by gptq, and no such weight is found"),
    ],
)
def test_sources_packed_by_others_are_exit_code_3(command_line, llama_folder, tmp_path, config, message):
    path = llama_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    done = command_line("convert", llama_folder, tmp_path / "new", "--layers", "names")
    assert done.returncode == 3
    assert message in done.stderr
    assert not (tmp_path / "new").exists()


def test_nothing_to_pack_is_refused(command_line, tmp_path):
    source = write_safetensors(tmp_path / "x.safetensors", {"norm.weight": ("F32", [64], bytes(256))})
    done = command_line("convert", source, tmp_path / "new")
    assert done.returncode == 3
    assert "would pack none of 1 tensors: 1 x norm, bias or other vector" in done.stderr


def test_the_plan(command_line, llama_folder, tmp_path):
    done = command_line("convert", llama_folder, tmp_path / "new", "--dry-run", "--layers", "names")
    assert done.returncode == 0
    assert not (tmp_path / "new").exists()
    rows = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    assert ["lm_head.weight", "1024 x 256", "bf16", "=", "524288", "output layer"] in rows
    packed = next(row for row in rows if row[0] == "model.layers.3.mlp.down_proj.weight")
    assert packed[2:4] == ["bf16", "bitsandbytes:nf4"]
    assert packed[5] == "linear layer"
    assert "layers           told by names" in done.stdout


def test_a_conversion(command_line, llama_folder, tmp_path):
    done = command_line("convert", llama_folder, tmp_path / "new", "--layers", "names")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert re.split(r"\s{2,}", lines[0].strip())[0] == "tensor"
    snr = [float(re.split(r"\s{2,}", line.strip())[4]) for line in lines[1:11]]
    assert snr == sorted(snr)
    for word in ("bits per weight", "SNR", "size", "time", "written"):
        assert re.search(rf"^{word}\s", done.stdout, re.M)


def test_json_is_one_object(command_line, llama_folder, tmp_path):
    report = command_line.json("convert", llama_folder, tmp_path / "new", "--layers", "names")
    assert report["to"] == "bitsandbytes:nf4"
    assert report["dry_run"] is False
    assert report["error"]["snr_db"] == pytest.approx(20.7, abs=0.3)
    worst = report["tensors"][1]
    assert {"name", "as", "shape", "from", "to", "why", "bits_per_weight", "error"} <= set(worst)
    plan = command_line.json("convert", llama_folder, tmp_path / "other", "--layers", "names", "--dry-run")
    assert plan["dry_run"] is True
    assert plan["plan_id"]
    assert plan["output_bytes"] >= sum(file["bytes"] or 0 for file in plan["files"])
    info = command_line.json("inspect", tmp_path / "new")
    assert info["method"] == "bitsandbytes"
    assert info["problems"] == []
    assert set(info["formats"]) == {"bitsandbytes:nf4", "bf16"}
    difference = command_line.json("diff", llama_folder, tmp_path / "new")
    assert difference["is_complete"]
    assert difference["error"]["cosine"] == pytest.approx(0.9985, abs=0.001)
    rows = command_line.json("formats")["formats"]
    assert [row["name"] for row in rows] == [row.name for row in format_table()]


def test_thresholds_are_exit_code_4(command_line, llama_folder, tmp_path):
    words = ["convert", llama_folder, tmp_path / "new", "--layers", "names"]
    done = command_line(*words, "--min-snr", "40")
    assert done.returncode == 4
    assert "tensors fall below the threshold (SNR 40.0 dB)" in done.stderr
    assert command_line(*words, "--overwrite", "--min-snr", "15", "--max-error", "0.12").returncode == 0
    assert command_line("diff", llama_folder, tmp_path / "new", "--max-error", "0.01").returncode == 4
    assert command_line("diff", llama_folder, tmp_path / "new", "--max-error", "0.12").returncode == 0
    assert command_line("diff", llama_folder, tmp_path / "new").returncode == 0


def test_a_difference_in_names_is_below_any_threshold(command_line, tmp_path):
    values = bytes(range(64)) * 4
    zeros = ("F32", [64], bytes(256))
    a = write_safetensors(tmp_path / "a.safetensors", {"x": zeros, "ids": ("U8", [256], values)})
    b = write_safetensors(tmp_path / "b.safetensors", {"x": zeros, "ids": ("U8", [256], bytes(256))})
    report = command_line.json("diff", a, b)
    assert report["unequal"] == ["ids"]
    assert command_line("diff", a, b, "--min-snr", "10").returncode == 4
    c = write_safetensors(tmp_path / "c.safetensors", {"x": ("F32", [8, 8], bytes(256)), "new": ("F32", [1], bytes(4))})
    report = command_line.json("diff", a, c)
    assert report["only_in_a"] == ["ids"]
    assert report["only_in_b"] == ["new"]
    assert report["mismatched"] == {"x": "[64] and [8, 8]"}


def test_names_from_files_do_not_drive_the_terminal(command_line, tmp_path):
    source = write_safetensors(tmp_path / "x.safetensors", {"evil\x1b[2J[red]": ("F32", [1], bytes(4))})
    done = command_line("inspect", source)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "evil\\x1b[2J[red]" in done.stdout


def test_an_interruption_is_exit_code_130_and_leaves_no_result(tmp_path):
    source = write_safetensors(
        tmp_path / "x.safetensors", {f"l.{i}.weight": ("F32", [4096, 1024], bytes(16 << 20)) for i in range(24)}
    )
    words = [sys.executable, "-m", "weightpack", "convert", str(source), str(tmp_path / "new"), "--threads", "1"]
    returncode, told = interrupt_at_work(words, tmp_path / "new")
    assert returncode == 130, told
    assert told.splitlines() == ["error: interrupted", "hint: the same command with --resume goes on from here"]
    assert not (tmp_path / "new").exists()


def test_a_terminal_gets_a_bar_and_colour_unless_it_does_not_want_it(llama_folder, tmp_path):
    def run(name: str, **environment: str) -> str:
        master, slave = pty.openpty()
        words = [sys.executable, "-m", "weightpack", "convert", str(llama_folder), str(tmp_path / name)]
        env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        process = subprocess.Popen(
            [*words, "--layers", "names"], stdout=slave, stderr=slave, env={**env, "TERM": "xterm", **environment}
        )
        os.close(slave)
        seen = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            seen += piece
        os.close(master)
        assert process.wait(30) == 0
        return seen.decode()

    coloured = run("one")
    assert "converting" in coloured
    assert "\x1b[1m" in coloured
    plain = run("two", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)


def test_a_reader_that_goes_away_is_no_traceback(llama_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "weightpack", "inspect", str(llama_folder), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait(30)


def test_lines_of_progress_where_there_is_no_terminal():
    import io

    from weightpack.progress import ProgressLines

    stream = io.StringIO()
    shown = ProgressLines("converting", stream, every=0.0)
    shown(500_000_000, 1_000_000_000, 100_000_000, "x")
    assert re.fullmatch(
        r"converting: 50 %, 500 MB of 1\.00 GB, reading [\d.]+ [KMGT]?B/s, writing [\d.]+ [KMGT]?B/s, .* left\n",
        stream.getvalue(),
    )
    silent = io.StringIO()
    ProgressLines("converting", silent)(1, 2, 3, "x")
    assert silent.getvalue() == ""


def test_the_demo(command_line, tmp_path):
    done = command_line("demo", "--keep", tmp_path / "demo", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] is True
    assert {step["format"] for step in found["steps"]} >= {"bitsandbytes:nf4", "gguf:q8_0"}
    assert (tmp_path / "demo" / "model-nf4" / "config.json").is_file()
    again = command_line("demo", "--keep", tmp_path / "demo")
    assert again.returncode == 2
    shown = command_line("demo")
    assert shown.returncode == 0
    assert "FAILED" not in shown.stdout
    assert shown.stdout.count("passed") == sum(len(step["checks"]) for step in found["steps"])


def test_inspect_shows_what_a_gguf_file_says_of_itself(tmp_path, command_line):
    import numpy as np

    import weightpack as wp

    path = tmp_path / "model.gguf"
    tokens = [f"t{index}" for index in range(100)]
    template = "{% for message in messages %}" * 10
    metadata = {"general.architecture": "llama", "llama.block_count": 2, "tokens": tokens, "template": template}
    wp.gguf.write(path, {"w": np.zeros((2, 256), np.float32)}, metadata, types="Q4_K")
    text = command_line("inspect", path).stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "architecture llama" in lines
    assert "llama.block_count 2" in lines
    assert "tokens [str], 100 items" in lines
    assert max(map(len, lines)) < 120
    info = command_line.json("inspect", path)
    assert (info["architecture"], info["metadata"]["llama.block_count"]) == ("llama", 2)
