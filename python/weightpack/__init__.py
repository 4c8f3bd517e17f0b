"""weightpack packs model weights on any CPU, in the exact bytes that the backend libraries read.

Importing this package loads neither torch nor numpy: every name below is looked up in its module
when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import gguf, integrations
    from .checkpoint import Checkpoint, open_checkpoint
    from .convert_ import ConvertReport, convert
    from .diff_ import DiffReport, diff
    from .errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        FormatError,
        UnsupportedError,
        WeightpackError,
    )
    from .formats_ import dequantize, formats, pack_int4, quantize, unpack_int4
    from .inspect_ import CheckpointInfo, inspect
    from .loading.load import from_pretrained
    from .model_mixin import ModelMixin
    from .pipelines.config import PipelineQuantizationConfig
    from .pipelines.load import load_pipeline
    from .pipelines.save import save_pipeline
    from .quantizers.auto import AutoQuantizer, register_quantizer
    from .quantizers.base import Quantizer, quantizer_of
    from .quantizers.bitsandbytes import BitsAndBytesConfig
    from .quantizers.config import QuantizationConfig, QuantizationMethod
    from .quantizers.gguf import GGUFQuantizationConfig
    from .quantizers.modelopt import NVIDIAModelOptConfig
    from .quantizers.quanto import QuantoConfig
    from .quantizers.torchao import TorchAoConfig
    from .saving.save import save_pretrained
    from .targets import FormatInfo

    __version__: str

_NAMES = {
    "AutoQuantizer": "quantizers.auto",
    "BackendError": "errors",
    "BitsAndBytesConfig": "quantizers.bitsandbytes",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "CheckpointInfo": "inspect_",
    "ConfigError": "errors",
    "ConvertReport": "convert_",
    "DiffReport": "diff_",
    "FormatError": "errors",
    "FormatInfo": "targets",
    "GGUFQuantizationConfig": "quantizers.gguf",
    "ModelMixin": "model_mixin",
    "NVIDIAModelOptConfig": "quantizers.modelopt",
    "PipelineQuantizationConfig": "pipelines.config",
    "QuantizationConfig": "quantizers.config",
    "QuantizationMethod": "quantizers.config",
    "Quantizer": "quantizers.base",
    "QuantoConfig": "quantizers.quanto",
    "TorchAoConfig": "quantizers.torchao",
    "UnsupportedError": "errors",
    "WeightpackError": "errors",
    "__version__": "_rust",
    "convert": "convert_",
    "dequantize": "formats_",
    "diff": "diff_",
    "formats": "formats_",
    "from_pretrained": "loading.load",
    "gguf": "gguf",
    "inspect": "inspect_",
    "integrations": "integrations",
    "load_pipeline": "pipelines.load",
    "open_checkpoint": "checkpoint",
    "pack_int4": "formats_",
    "quantize": "formats_",
    "quantizer_of": "quantizers.base",
    "register_quantizer": "quantizers.auto",
    "save_pipeline": "pipelines.save",
    "save_pretrained": "saving.save",
    "unpack_int4": "formats_",
}

__all__ = [
    "AutoQuantizer",
    "BackendError",
    "BitsAndBytesConfig",
    "Checkpoint",
    "CheckpointError",
    "CheckpointInfo",
    "ConfigError",
    "ConvertReport",
    "DiffReport",
    "FormatError",
    "FormatInfo",
    "GGUFQuantizationConfig",
    "ModelMixin",
    "NVIDIAModelOptConfig",
    "PipelineQuantizationConfig",
    "QuantizationConfig",
    "QuantizationMethod",
    "Quantizer",
    "QuantoConfig",
    "TorchAoConfig",
    "UnsupportedError",
    "WeightpackError",
    "__version__",
    "convert",
    "dequantize",
    "diff",
    "formats",
    "from_pretrained",
    "gguf",
    "inspect",
    "integrations",
    "load_pipeline",
    "open_checkpoint",
    "pack_int4",
    "quantize",
    "quantizer_of",
    "register_quantizer",
    "save_pipeline",
    "save_pretrained",
    "unpack_int4",
]


def __getattr__(name: str) -> Any:
    module = _NAMES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: Any = import_module(f"{__name__}.{module}")
    if module != name:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
