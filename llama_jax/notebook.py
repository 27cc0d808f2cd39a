"""What a notebook needs beside the library: a place to work in, the configs wherever they lie, quiet logs, pictures shown.

    workdir = notebook.start(devices=8)
    values = notebook.config("sft.py:tiny", {"model": "nano", "loop": {"steps": 100}})
    llama_jax.train.run(values, notebook.fresh(workdir / "sft"))
"""

import importlib.metadata
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax import markdown
from llama_jax.evals.plots import Plot
from llama_jax.parallel.host import keep_heap
from llama_jax.steps import change, load_config

_MADE: list[Path] = []  # the directories that `start` has made in this process: all that `fresh` may remove anything from


def start(*, devices: int = 1) -> Path:
    """Readies this process and returns a new directory for what the notebook makes.

    Args:
      devices: of a CPU that plays a mesh, whatever else this machine has. Takes effect only before JAX is used.
    """
    keep_heap()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # a planning notebook may load libtpu: ask no cloud what this machine is
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and others tell of each file
    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", DeprecationWarning)
    _MADE.append(Path(tempfile.mkdtemp(prefix="llama_jax-")).resolve())
    return _MADE[-1]


def fresh(path: str | Path) -> Path:
    """`path` with nothing there: what a cell made at its last run is removed, so that it can be changed and run again.

    A stage refuses a workdir that was begun with another config, as a command should. In a notebook the cell is the record of
    what was done.

    Raises:
      ValueError: `path` is not inside a directory that `start` made in this process, whose content is the notebook's own.
    """
    found = Path(path).resolve()
    if not any(made in found.parents for made in _MADE):
        raise ValueError(f"path: expected a place inside the directory that notebook.start() returned, got {path}")
    if found.is_dir():
        shutil.rmtree(found)
    else:
        found.unlink(missing_ok=True)
    return Path(path)


def config(name: str, changes: Mapping[str, Any] | None = None) -> Any:
    """The config of a stage, `sft.py:tiny`, with `changes` (nested); ConfigError for a field that is not there."""
    values = load_config(config_directory(), name)
    change(values, changes or {}, where=name)
    return values


def config_directory() -> Path:
    """Where `configs/` lies: in the working directory or above it, beside the package in a checkout, or as it was installed.

    Raises:
      FileNotFoundError: nowhere.
    """
    beside = Path(__file__).parents[1]
    for place in (Path.cwd(), *Path.cwd().parents, beside):
        if (place / "configs" / "common.py").is_file() and (place / "configs" / "recipe.py").is_file():
            return place / "configs"
    try:
        installed = importlib.metadata.files("llama_jax") or ()
    except importlib.metadata.PackageNotFoundError:
        installed = ()
    for file in installed:
        if file.name == "common.py" and file.parent.name == "configs":
            return Path(file.locate()).resolve().parent
    raise FileNotFoundError("configs: expected them in the checkout or installed with llama_jax; found neither")


def show(plot: Plot, alt: str = "", *, width: int = 720) -> None:
    """Displays a plot; `alt` says more than its own text for those who cannot see it."""
    from IPython.display import Image, display  # notebooks have it; the library does not ask for it

    display(Image(fewer_colours(plot.png()), width=width, alt=alt or plot.alt))


def fewer_colours(png: bytes) -> bytes:
    """The picture with 128 colours: a third of the bytes, in files that are kept with their outputs."""
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Displays a table of Markdown cells; columns of numbers stand to the right."""
    from IPython.display import Markdown, display

    display(Markdown(markdown.markdown_table(head, rows)))


def verbatim(text: str) -> str:
    """Text of a model as a cell of one line: nothing in it is taken for Markdown or HTML."""
    return markdown.verbatim(" ".join(text.split()))
