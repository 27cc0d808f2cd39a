"""The recipe of the Llama 2 paper in pure-functional JAX, from raw text to an aligned chat model.

    model = llama_jax.load(path)        # see llama_jax/pretrained.py

Importing this package imports nothing else; the README lists every file with one line and says where to start
reading.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]

_LAZY = {"load": "llama_jax.pretrained"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
