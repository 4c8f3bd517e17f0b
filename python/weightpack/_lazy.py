"""Optional packages: looked up without being imported, imported on first use.

A package that is missing gives one message: what is missing, what it is for, and which extra of
weightpack installs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from .errors import BackendError

EXTRAS = {
    "accelerate": "torch",
    "bitsandbytes": "bitsandbytes",
    "diffusers": "diffusers",
    "gguf": "gguf",
    "modelopt": "modelopt",
    "optimum.quanto": "quanto",
    "safetensors": "torch",
    "torch": "torch",
    "torchao": "torchao",
    "transformers": "transformers",
}
"""Import name of each optional package, and the extra that installs it."""
_DISTRIBUTIONS = {"optimum.quanto": "optimum-quanto"}
"""What to call a package that shares its first name with others."""


def is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    if package in sys.modules:
        return sys.modules[package] is not None
    above = package.rpartition(".")[0]
    return (not above or is_installed(above)) and importlib.util.find_spec(package) is not None


def require(package: str, purpose: str) -> ModuleType:
    """Imports `package`, or says what it is needed for and how to get it.

    `package` may be a module inside a package, as in "transformers.pytorch_utils". `purpose`
    completes the sentence "`package` is needed to ...". Only the absence of the package itself is
    translated: an error from inside it passes through.
    """
    name = package if package in EXTRAS else package.partition(".")[0]
    if not is_installed(name):
        raise missing(name, purpose)
    return importlib.import_module(package)


def distribution(package: str) -> str:
    """What `pip` calls an optional package: `optimum-quanto` for `optimum.quanto`."""
    return _DISTRIBUTIONS.get(package, package)


def missing(package: str, purpose: str) -> BackendError:
    """The error for an optional package that is not installed."""
    extra = EXTRAS.get(package)
    package = distribution(package)
    install = f"pip install 'weightpack[{extra}]'" if extra else f"pip install {package}"
    return BackendError(f"{package} is needed to {purpose}, and is not installed", hint=install)
