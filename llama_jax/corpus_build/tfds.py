"""Data sets of TFDS by name, read without TensorFlow: `tfds://name:version?split=train&text=field&dir=data_dir`."""

from typing import Any
from urllib.parse import parse_qs, urlsplit

from llama_jax.corpus_build.damage import Rows, SourceError, not_utf8

_SCHEME = "tfds://"
_SAID = 200  # characters of what TFDS says of an error


def is_name(path: str) -> bool:
    """Whether a path is the name of a data set of TFDS."""
    return path.startswith(_SCHEME)


def rows(name: str) -> Rows:
    """The examples of a split, each with its text, and with its id, url and metadata if it has them."""
    examples, field = _examples(name)
    for number, example in enumerate(examples, start=1):
        where = f"{name}:{number}"
        known = {key: example[key] for key in ("id", "url", "metadata") if key in example}
        try:
            yield where, _plain({**known, "text": example.get(field)})
        except UnicodeDecodeError as error:
            yield where, not_utf8(where, error)


def _plain(value: Any) -> Any:
    """A feature as a row of JSON has it: bytes are text, arrays are lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value


def size(name: str) -> int:
    """How many examples the split of a TFDS data set has."""
    return len(_examples(name)[0])


def _examples(name: str) -> tuple[Any, str]:
    import tensorflow_datasets as tfds

    parts = urlsplit(name.replace(_SCHEME, "tfds:///", 1))
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    split, directory = options.get("split", "train"), options.get("dir")
    try:
        examples = tfds.data_source(parts.path[1:], split=split, data_dir=directory)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # TFDS has many, some of which list all that it knows
        said = str(error).strip().partition("\n")[0][:_SAID]
        raise SourceError(f"TFDS gives no split {split!r} of this data set ({type(error).__name__}: {said})") from None
    return examples, options.get("text", "text")
