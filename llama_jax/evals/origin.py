"""Whose results lie in a directory: said beside them and compared before any is read, since models may share a name."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ConfigError, differences
from llama_jax.files import write_json
from llama_jax.interop.formats import PACKAGED, packaged
from llama_jax.interop.restore import fingerprint
from llama_jax.paths import check_bucket, is_remote, place
from llama_jax.training.saved import named, newest_step

_HUB = "hf:"
# What a model in files is made of: weights, and the settings, tokenizer and code beside them.
_PARTS = (".safetensors", ".gguf", ".pth", ".bin", ".json", ".model", ".jinja", ".py")
_BLOCKS, _BYTES = 256, 4096  # of a file, read for its digest


def origin(path: str | os.PathLike) -> dict[str, Any]:
    """What tells a model from another: where it lies, and a digest of its weights; of ours also its newest step.

    Of a model of the hub (`hf:OWNER/NAME`) the digest is the commit in the local cache, if it is there.
    """
    check_bucket(path)
    name = str(path).removeprefix(_HUB)
    said, found = {"path": str(path)}, place(name)
    if (named(found)[0] / "checkpoints").is_dir():
        return said | {"step": int(newest_step(found).name), "weights": fingerprint(found)}
    if is_remote(found):
        return said  # weights of other formats are not read from there
    if found.exists() or name in PACKAGED:
        weights = _digest(found if found.exists() else packaged(name))
    else:
        weights = _commit(name) if name != str(path) else ""
    return said | ({"weights": weights} if weights else {})


def identity(path: str | os.PathLike) -> dict[str, Any]:
    """What the judgements of a model depend on: its weights, wherever they lie; where nothing is known of them, its name."""
    found = origin(path)
    return {"weights": found["weights"]} if "weights" in found else found


def _digest(path: Path) -> str:
    """One value for the files of a model, wherever they lie, at the price of 1 MiB of each.

    Names and sizes do not tell a better model of the same shape, times change with a copy, and all bytes of 70B parameters take
    minutes. So of each file its size and 256 blocks of 4 KiB count, spread from its first byte (the header of safetensors and
    GGUF) to its last: training moves nearly every value of every large matrix, and each block has 2,000 of them.
    """
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _PARTS and file.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(json.dumps([size, "" if file == path else file.name]).encode())
        last = max(size - _BYTES, 0)
        with open(file, "rb") as opened:
            for start in dict.fromkeys(last * block // (_BLOCKS - 1) for block in range(_BLOCKS)):
                opened.seek(start)
                digest.update(opened.read(_BYTES))
    return digest.hexdigest()[:32] if files else ""


def _commit(name: str) -> str:
    """The commit of a model of the hub, as it was downloaded last; "" if it was not."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        return ""
    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a directory, which is not there any more
        return ""
    return Path(file).parent.name if isinstance(file, str) else ""


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
    # Weights may move with their directory. Where they are no longer there, what they gave is known by where they were.
    left_out = {"path"} if "weights" in held and "weights" in asked else {"step", "weights"}
    if changed := differences(_without(held, left_out), _without(asked, left_out)):
        raise ConfigError(
            f"{file}: results under this name are of another model, or of other settings: {'; '.join(changed)}; "
            "give this one a name of its own, or another --output"
        )
    if "weights" in asked and "weights" not in held:  # the first run downloaded them
        write_json(file, asked)


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
