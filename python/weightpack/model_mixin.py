"""The base class for a person's own modules."""

from __future__ import annotations

import os
from typing import Any

from .errors import ConfigError


class ModelMixin:
    """Gives a person's own `torch.nn.Module` `from_pretrained`, `save_pretrained` and `dequantize`.

    ```python
    class Net(weightpack.ModelMixin, torch.nn.Module):
        def __init__(self, width: int): ...

    net = Net.from_pretrained("folder", quantization_config=weightpack.BitsAndBytesConfig(load_in_4bit=True))
    ```

    The keys of the folder's `config.json` are the arguments of `__init__`; `config` is set to them.
    """

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> Any:
        """As `weightpack.from_pretrained(cls, path, ...)`."""
        from .loading.load import from_pretrained

        return from_pretrained(cls, path, **options)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """As `weightpack.save_pretrained(self, path, ...)`."""
        from .saving.save import save_pretrained

        save_pretrained(self, path, **options)

    def dequantize(self, dtype: Any = None) -> Any:
        """Puts ordinary layers with decoded weights in place of packed ones; gives the model.

        `dtype` is their type, by default the one that the weights were packed from. Raises `ConfigError`
        for a model that is not packed.
        """
        from .quantizers.base import quantizer_of

        quantizer = quantizer_of(self)
        if quantizer is None:
            raise ConfigError("the model is not packed")
        model = quantizer.dequantize(self, dtype=dtype)
        del model.hf_quantizer
        model.is_quantized = False
        if isinstance(model.config, dict):
            model.config.pop("quantization_config", None)
        return model
