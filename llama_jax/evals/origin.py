"""Whose results lie in a directory: said beside them and compared before any is read, since models may share a name."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ConfigError, differences
from llama_jax.files import write_json
from llama_jax.interop.restore import fingerprint
from llama_jax.paths import check_bucket, place
from llama_jax.training.checkpoint import newest_step


def origin(path: str | os.PathLike) -> dict[str, Any]:
    """What tells a model from another: where it lies; of ours also its newest step and the fingerprint of its weights."""
    check_bucket(path)
    workdir = place(path)
    if not (workdir / "checkpoints").is_dir():
        return {"path": str(path)}
    return {"path": str(path), "step": int(newest_step(workdir).name), "weights": fingerprint(workdir)}


def claim(file: Path, path: str | os.PathLike, **settings: Any) -> None:
    """Writes to `file` that the results beside it are those of the model at `path` under these settings.

    Raises:
      ConfigError: they are another model's, or were made under other settings.
    """
    asked = origin(path) | settings
    if not file.exists():
        write_json(file, asked)
        return
    held = json.loads(file.read_text(encoding="utf-8"))
    # Weights may move with their workdir. Where they are no longer there, what they gave is known by where they were.
    left_out = {"path"} if "weights" in held and "weights" in asked else {"step", "weights"}
    if changed := differences(_without(held, left_out), _without(asked, left_out)):
        raise ConfigError(
            f"{file}: results under this name are of another model, or of other settings: {'; '.join(changed)}; "
            "give this one a name of its own, or another --output"
        )


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
