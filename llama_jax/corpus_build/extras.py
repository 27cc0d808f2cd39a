"""Packages of the extra `[data]`, imported where they are used."""

import importlib
from types import ModuleType


def extra(name: str) -> ModuleType:
    """The module `name`; ModuleNotFoundError that names the extra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # it is there, something that it needs is not
        raise ModuleNotFoundError(f"the corpus needs the package {name}: pip install 'llama_jax[data]'", name=name) from None
