"""The house rules, in both languages: who may import whom, what an import costs, where `unsafe` stands."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / "python" / "weightpack"
RUST = ROOT / "rust"

ORDER = [
    "errors", "_rust", "_lazy", "terminal", "entry", "sizes", "targets", "_arrays", "formats_", "gguf",
    "mapping", "overrides", "keymaps", "language", "architectures", "recipes",
    "matcher", "placement", "skip_list", "layers", "decision", "gguf_rules", "packings", "rules", "folder",
    "model_config", "report", "checkpoint", "streaming", "importance", "gguf_metadata", "assembly", "gguf_target",
    "host_target", "convert_", "inspect_", "diff_", "progress", "demo", "tables", "cli", "__main__",
]  # fmt: skip
"""Each module may import those that stand before it."""

WITH_TORCH = {"_arrays", "stored", "model_mixin"}
FOLDERS_WITH_TORCH = {"quantizers", "loading", "saving", "pipelines", "integrations"}
ABOVE = ["quantizers", "stored", "loading", "saving", "model_mixin", "pipelines", "integrations"]
"""The layers that use torch, each above those before it and above `ORDER`."""
MODULES_OF_ALL = 60
LINES_OF_A_FILE = 700


def python_files() -> list[Path]:
    return sorted(PYTHON.rglob("*.py"))


def imports(path: Path, *, typing_too: bool = True) -> set[str]:
    """Dotted names that a file imports anywhere in it; `weightpack.x` for its own modules."""
    tree = ast.parse(path.read_text("utf-8"))
    package = ".".join(("weightpack", *path.relative_to(PYTHON).parent.parts))
    found = set()
    skipped = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            if base == package and not node.module:
                found |= {f"{base}.{alias.name}" for alias in node.names}
            else:
                found.add(base)
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PYTHON)))
def test_a_module_imports_only_those_below_it(path):
    parts = path.relative_to(PYTHON).with_suffix("").parts
    name = parts[0]
    if name == "__init__":
        assert not {n for n in imports(path, typing_too=False) if n.startswith("weightpack")}
        return
    if name in ABOVE:
        below = {*ORDER, *ABOVE[: ABOVE.index(name) + 1]} - {"convert_", "cli"}
        assert not {n for n in imports(path) if n.startswith("weightpack.") and n.split(".")[1] not in below}
        return
    assert name in ORDER, f"{name} has no place in the order"
    below = set(ORDER[: ORDER.index(name)])
    if len(parts) > 1:
        # The modules of a package may import each other.
        below.add(name)
    for imported in imports(path):
        if imported.startswith("weightpack."):
            assert imported.split(".")[1] in below, f"{name} imports {imported}"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PYTHON)))
def test_torch_and_hosts_stay_in_their_modules(path):
    parts = path.relative_to(PYTHON).with_suffix("").parts
    used = {name.split(".")[0] for name in imports(path)}
    required = set(re.findall(r'require\(\s*"(\w+)', path.read_text("utf-8")))
    with_torch = parts[0] in WITH_TORCH or parts[0] in FOLDERS_WITH_TORCH
    if not with_torch:
        assert "torch" not in used | required
    for host in ("transformers", "diffusers"):
        if parts[:2] != ("integrations", host):
            assert host not in used | required
    if parts[0] not in ("integrations", "cli", "__main__"):
        typing_too = parts[0] != "__init__"
        assert not any(name.startswith("weightpack.integrations") for name in imports(path, typing_too=typing_too))
    if parts[0] != "__main__":
        assert "weightpack.cli" not in imports(path)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_cheap():
    loaded = loaded_by("import weightpack")
    assert len(loaded) <= MODULES_OF_ALL, sorted(loaded)
    assert not {"torch", "numpy", "click", "rich", "weightpack._rust"} & loaded


def test_the_adapters_load_neither_torch_nor_a_host():
    loaded = loaded_by("import weightpack\nweightpack.integrations.transformers, weightpack.integrations.diffusers")
    assert {"weightpack.integrations.transformers.host", "weightpack.integrations.diffusers.host"} <= loaded
    assert not {"torch", "numpy", "transformers", "diffusers"} & loaded


def test_help_loads_nothing_heavy():
    statement = "import weightpack.cli, contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):"
    loaded = loaded_by(f"{statement}\n    assert weightpack.cli.run(['convert', '--help']) == 0")
    assert not {"torch", "numpy", "rich", "weightpack._rust", "asyncio"} & loaded


def test_conversion_loads_neither_torch_nor_a_host():
    loaded = loaded_by("import weightpack\nweightpack.convert, weightpack.inspect, weightpack.diff")
    assert not {"torch", "transformers", "diffusers", "rich"} & loaded


def test_every_public_name_is_there():
    import weightpack

    for name in weightpack.__all__:
        assert getattr(weightpack, name) is not None
        assert name in dir(weightpack)
    assert sorted(weightpack.__all__) == weightpack.__all__
    assert set(weightpack.__all__) == set(weightpack._NAMES)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        weightpack.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["convert", "diff", "inspect", "formats"])
def test_a_function_is_not_hidden_by_a_module_of_its_name(name):
    # A submodule called `convert` would take the function's place once it is imported.
    assert not (PYTHON / f"{name}.py").exists()


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PYTHON)))
def test_every_public_function_is_documented(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), f"{path.name} does not say what it is for"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def source_files() -> list[Path]:
    return [*python_files(), *sorted(RUST.rglob("*.rs"))]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small_and_finished(path):
    text = path.read_text("utf-8")
    own = re.split(r"^#\[cfg\(test\)\]\nmod tests \{", text, maxsplit=1, flags=re.M)[0]
    assert len(own.splitlines()) <= LINES_OF_A_FILE
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert path.stem not in ("utils", "util", "helpers", "common", "manager", "misc")


def rust_files() -> list[Path]:
    return sorted(RUST.rglob("*.rs"))


def without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


@pytest.mark.parametrize("path", rust_files(), ids=lambda path: str(path.relative_to(RUST)))
def test_unsafe_stands_where_it_may(path):
    relative = path.relative_to(RUST).as_posix()
    text = path.read_text("utf-8")
    code = re.sub(r'"(\\.|[^"\\])*"', '""', without_comments(text))
    uses = re.findall(r"\bunsafe\b(?!_)", code)
    allowed = relative.startswith("kernels/") or relative in ("io/file.rs", "py/buffers.rs")
    if not allowed:
        assert not uses
        return
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.search(r"\bunsafe\s*\{", without_comments(line)):
            near = "\n".join(lines[max(0, number - 8) : number + 1])
            assert "SAFETY:" in near, f"{relative}:{number + 1} has no SAFETY comment"


FORBIDDEN_EDGES = {
    "error.rs": ("dtype", "shape", "float", "bits", "codebook", "kernels", "formats", "io", "engine", "py"),
    "shape.rs": ("float", "bits", "codebook", "kernels", "formats", "io", "engine", "py"),
    "dtype.rs": ("float", "bits", "codebook", "kernels", "formats", "io", "engine", "py"),
    "kernels": ("io", "engine", "py"),
    "formats": ("io", "engine", "py"),
    "io": ("kernels", "formats", "engine", "py"),
    "engine": ("py",),
}


@pytest.mark.parametrize("path", rust_files(), ids=lambda path: str(path.relative_to(RUST)))
def test_rust_modules_use_only_those_below(path):
    top = path.relative_to(RUST).parts[0]
    text = re.split(r"^#\[cfg\(test\)\]\nmod tests \{", path.read_text("utf-8"), maxsplit=1, flags=re.M)[0]
    used = set(re.findall(r"\bcrate::(\w+)", without_comments(text)))
    assert not used & set(FORBIDDEN_EDGES.get(top, ())), f"{path.relative_to(RUST)} uses {sorted(used)}"
    if top != "py" and path.name != "lib.rs":
        assert "pyo3" not in without_comments(text)


def test_every_class_that_rust_raises_exists():
    from weightpack import errors

    text = (RUST / "py" / "errors.rs").read_text("utf-8")
    named = set(re.findall(r'"(\w+Error)"', text))
    assert {"CheckpointError", "FormatError", "ConfigError", "UnsupportedError"} <= named
    for name in named:
        assert issubclass(getattr(errors, name), errors.WeightpackError)


def stub() -> ast.Module:
    return ast.parse((PYTHON / "_rust.pyi").read_text("utf-8"))


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg != "self"]


def test_the_stub_is_the_module():
    from weightpack import _rust

    declared = {}
    for node in stub().body:
        if isinstance(node, ast.FunctionDef):
            declared[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef):
            declared[node.name] = None
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    declared[f"{node.name}.{inner.name}"] = parameters(inner)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared[node.target.id] = None
    for name, names in declared.items():
        built = _rust
        for part in name.split("."):
            assert hasattr(built, part), f"the module has no {name}"
            built = getattr(built, part)
        if names is not None:
            own = [p for p in inspect.signature(built).parameters if p != "self"]
            assert own == names, name
    public = {name for name in dir(_rust) if not name.startswith("_")}
    assert public <= set(declared), f"not in the stub: {public - set(declared)}"


def test_every_option_of_convert_is_a_keyword_of_convert():
    import weightpack
    from weightpack.cli import cli

    keywords = set(inspect.signature(weightpack.convert).parameters)
    options = {parameter.name for parameter in cli.commands["convert"].params}
    of_the_command_line = {"as_json", "debug", "min_snr", "max_error"}
    assert options - of_the_command_line == keywords - {"on_progress"}
