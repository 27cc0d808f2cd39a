"""What a killed build leaves to the next one: products by name, each whole, checked by its sha256 before it is used again.

    .<output>.unfinished/fingerprint.json    what the products are of: settings, order of sources, inputs, code, packages
    .<output>.unfinished/work/               products: cleaned documents, comparisons, tokenizer, records of shards
    .<output>.unfinished/corpus/             the corpus itself, which takes the name of the output when it is whole

A product is a value of its inputs alone, so going on gives the same bytes as an undisturbed build. Under changed settings it
goes on with the products that do not read them.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import pickle
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llama_jax.config import describe
from llama_jax.corpus_build.manifest import file_sha256
from llama_jax.files import atomic_write, write_json

Value = TypeVar("Value")

# Kinds of products in the order in which they are made, and the settings that each is the first to read. All read the others.
_READ: dict[str, tuple[str, ...]] = {
    "cleaned": (),
    "refined": ("held_out", "deduplication", "whole"),
    "profile": ("analyses", "analysed_share", "identities", "toxicity_checkpoint"),
    "documents": ("shards",),  # Beam's first pipeline
    "tokenizer": ("vocab_size", "weights", "tokenizer_path", "tokenizer_bytes"),
    "files": ("block_length",),
}
_READ_LAST = ("total_tokens", "temperature", "max_epochs")  # by what every run makes anew


class SettingsError(ValueError):
    """Settings that the documents do not allow, as their cleaning showed. What was made of them is kept for other settings."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """Products below a directory; None keeps nothing."""

    directory: Path | None

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """The product of this name: that of an earlier run if it is whole, else what `make` returns, kept for the next."""
        if self.directory is None:
            return make()
        path = self.directory / f"{name}.pickle"
        with contextlib.suppress(FileNotFoundError):
            digest, payload = (data := path.read_bytes())[:32], data[32:]
            if hashlib.sha256(payload).digest() == digest:
                return pickle.loads(payload)
        value = make()
        payload = pickle.dumps(value)
        with atomic_write(path) as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
        return value

    def forget(self, name: str) -> None:
        """Takes a product away that turned out to be damaged."""
        if self.directory is not None:
            (self.directory / f"{name}.pickle").unlink(missing_ok=True)

    def file_once(self, path: Path, make: Callable[[], Value]) -> Value:
        """As `once`, for a `make` that also writes `path`: done again if that file is not what it was."""
        if self.directory is None:
            return make()
        name = f"files/{path.name}"
        value, digest = self.once(name, lambda: (make(), file_sha256(path)))
        if path.is_file() and file_sha256(path) == digest:
            return value
        self.forget(name)
        return self.once(name, lambda: (make(), file_sha256(path)))[0]


@contextlib.contextmanager
def unfinished(output: str | os.PathLike, fingerprint: Mapping[str, Any] | None) -> Iterator[tuple[Path, Stages]]:
    """A directory that becomes `output` when the block ends well, and the stages of an earlier run with this fingerprint.

    Wrong input (ValueError) leaves nothing behind; a kill, Ctrl-C, a full disk, a failed runner or a SettingsError leaves what
    the next run goes on with. Without a fingerprint nothing is kept and every run starts clean.

    Raises:
      FileExistsError: `output` is there already.
      ValueError: another process is building it.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output}: exists; a corpus is never changed in place")
    place = _place(output)
    place.mkdir(parents=True, exist_ok=True)
    with _held(place):
        stale = None if fingerprint is None else _stale(place, fingerprint)
        if stale is None:
            _empty(place)
        else:
            _prune(place, stale)
        done = False
        try:
            directory = place / "corpus"
            directory.mkdir(exist_ok=True)
            _sweep(directory)
            if fingerprint is not None:
                write_json(place / "fingerprint.json", dict(fingerprint))
            yield directory, Stages(None if fingerprint is None else place / "work")
            os.rename(directory, output)
            done = True
        except SettingsError as error:
            if fingerprint is None:
                raise
            raise SettingsError(f"{error}; {place} keeps what was made of the documents, for other settings") from None
        except ValueError:
            done = True
            raise
        finally:
            if done or fingerprint is None:
                shutil.rmtree(place, ignore_errors=True)


def discard(output: str | os.PathLike) -> None:
    """Takes away what a build of `output` left that was killed after its very end."""
    shutil.rmtree(_place(Path(output)), ignore_errors=True)


def _place(output: Path) -> Path:
    return output.with_name(f".{output.name}.unfinished")


@contextlib.contextmanager
def _held(place: Path) -> Iterator[None]:
    """Holds the kernel's lock on a directory, which goes when the process does; ValueError if another process has it."""
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{place}: another build is writing here; wait for it, or use another --output") from None
    else:
        yield
    finally:
        os.close(handle)


def _empty(place: Path) -> None:
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _stale(place: Path, fingerprint: Mapping[str, Any]) -> Sequence[str] | None:
    """Kinds of products of an earlier run that this fingerprint would make anew; None if that is all there is."""
    new = json.loads(json.dumps(fingerprint))
    try:
        old = json.loads((place / "fingerprint.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if old == new:
        return ()
    if not isinstance(old, dict) or any(old.get(key) != new.get(key) for key in {*old, *new} - {"settings"}):
        return None
    changed = {name for name, value in new.get("settings", {}).items() if old.get("settings", {}).get(name) != value}
    if changed - {*_READ_LAST, *(name for names in _READ.values() for name in names)}:
        return None
    return tuple(itertools.dropwhile(lambda kind: not changed & set(_READ[kind]), _READ))


def _prune(place: Path, kinds: Sequence[str]) -> None:
    """Takes these kinds of products away."""
    for kind in kinds:
        shutil.rmtree(place / "work" / kind, ignore_errors=True)
        (place / "work" / f"{kind}.pickle").unlink(missing_ok=True)
    if "files" in kinds:
        shutil.rmtree(place / "corpus", ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Leaves nothing but shards, which are checked before they are used; all else is quickly made again."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and (path.parent.name != "blocks" or path.suffix != ".array_record" or path.name.startswith(".")):
            path.unlink()


def fingerprint_of(settings: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result: settings, what is read, this package's code, Python and all installed packages."""
    places = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})  # not what lies in the current directory
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions(path=places)})
    return {
        "settings": _plain(settings),
        "order": list(settings.weights),  # of the sources, by which duplicates stay: objects of JSON have none
        "inputs": dict(inputs),
        "code": code_hash(),
        "packages": hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest(),
    }


def code_hash() -> str:
    """sha256 of the code of all parts of this package."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].glob("*/*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()


def _plain(value: Any) -> Any:
    """As `describe`, sets sorted."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return sorted(value) if isinstance(value, set | frozenset) else describe(value)
