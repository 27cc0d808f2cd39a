"""Data sets of TFDS by name, read without TensorFlow: `tfds://name:version?split=train&text=field&dir=data_dir`."""

from typing import Any
from urllib.parse import parse_qs, urlsplit

from llama_jax.corpus_build.damage import Rows

_SCHEME = "tfds://"


def is_name(path: str) -> bool:
    """Whether a path is the name of a data set of TFDS."""
    return path.startswith(_SCHEME)


def rows(name: str) -> Rows:
    """The examples of a split, each with its text."""
    examples, field = _examples(name)
    for number, example in enumerate(examples, start=1):
        value = example.get(field)
        yield f"{name}:{number}", {"text": value.decode() if isinstance(value, bytes) else value}


def size(name: str) -> int:
    """How many examples the split of a TFDS data set has."""
    return len(_examples(name)[0])


def _examples(name: str) -> tuple[Any, str]:
    import tensorflow_datasets as tfds

    parts = urlsplit(name.replace(_SCHEME, "tfds:///", 1))
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    examples = tfds.data_source(parts.path[1:], split=options.get("split", "train"), data_dir=options.get("dir"))
    return examples, options.get("text", "text")
