"""What a killed build leaves to the next one: products by name, each whole, checked by its sha256 before it is used again.

    .<output>.unfinished/fingerprint.json    what the products are of: settings, order of sources, inputs, code, packages
    .<output>.unfinished/work/               products: cleaned documents, comparisons, tokenizer, records of shards
    .<output>.unfinished/corpus/             the corpus itself, which takes the name of the output when it is whole

All of it may lie in a bucket. There the name is given object by object, the manifest last, without which it is no corpus.

A product is a value of its inputs alone, so going on gives the same bytes as an undisturbed build. Under changed settings it
goes on with the products that do not read them, and where a source reads other files with the cleaned documents of the others.
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
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llama_jax.config import describe
from llama_jax.corpus_build.manifest import NAME, file_sha256
from llama_jax.files import atomic_write, write_json
from llama_jax.paths import GCS, is_remote, place, publish, remove_tree, sizes
from llama_jax.training.lease import Lease

Value = TypeVar("Value")

# Kinds of products in the order in which they are made, and the settings that each is the first to read, `evaluation` being the
# facts of those files. All read the others.
_READ: dict[str, tuple[str, ...]] = {
    "cleaned": (),
    "refined": ("held_out", "deduplication", "evaluation", "whole"),
    "profile": ("analyses", "analysed_share", "identities", "toxicity_checkpoint"),
    "documents": ("shards",),  # Beam's first pipeline
    "tokenizer": ("vocab_size", "weights", "temperature", "tokenizer_path", "tokenizer_bytes"),
    "files": ("block_length",),
}
# By what every run makes anew, and limits that every run compares with what the products have counted.
_READ_LAST = ("total_tokens", "max_epochs", "max_bad_rows", "max_bad_files")


class SettingsError(ValueError):
    """Settings or sources that make no corpus, as their cleaning showed. What was made of them is kept for others."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """Products below a directory; None keeps nothing."""

    directory: Path | None

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """The product of this name: that of an earlier run if it is whole, else what `make` returns, kept for the next."""
        if self.directory is None:
            return make()
        path = place(self.directory) / f"{name}.pickle"
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
            (place(self.directory) / f"{name}.pickle").unlink(missing_ok=True)

    def file_once(self, path: Path, make: Callable[[], Value]) -> tuple[Value, str]:
        """As `once`, for a `make` that also writes `path`, and that file's sha256: done again if it is not what it was."""
        fresh = []

        def made() -> tuple[Value, str]:
            fresh.append(path)
            return make(), file_sha256(path)

        name = f"files/{path.name}"
        value, digest = self.once(name, made)
        if fresh or (place(path).exists() and file_sha256(path) == digest):
            return value, digest
        self.forget(name)
        return self.once(name, made)


@contextlib.contextmanager
def unfinished(output: str | os.PathLike, fingerprint: Mapping[str, Any] | None) -> Iterator[tuple[Path, Stages]]:
    """A directory that becomes `output` when the block ends well, and the stages of an earlier run with this fingerprint.

    Where `output` is in a bucket, so is the directory.

    A kill, Ctrl-C, a full disk, a failed runner, wrong settings or wrong input leave what the next run goes on with, if there
    is anything. Without a fingerprint nothing is kept and every run starts clean.

    Raises:
      FileExistsError: `output` is there already.
      ValueError: another process is building it.
    """
    output = place(output)
    home = _home(output)
    _check_free(output, home)
    with _held(output, home):
        _check_free(output, home)  # while this one waited, another build may have ended
        if is_remote(output):
            remove_tree(output)  # a part of a corpus whose build was killed while it got its name
        stale = None if fingerprint is None else _stale(home, fingerprint)
        if stale is None:
            _empty(home)
        else:
            _prune(home, stale)
        done = False
        try:
            directory = home / "corpus"
            directory.mkdir(exist_ok=True)
            _sweep(directory)
            if fingerprint is not None:
                write_json(home / "fingerprint.json", dict(fingerprint))
            yield directory, Stages(None if fingerprint is None else home / "work")
            publish(directory, output, last=NAME)
            done = True
        except SettingsError as error:
            if fingerprint is None or not sizes(home / "work"):
                raise
            kept = f"{home} keeps what was made of the documents, for other settings or files"
            raise SettingsError(f"{error}; {kept}") from None
        finally:
            with contextlib.suppress(OSError):
                if done or fingerprint is None or not sizes(home / "work"):
                    remove_tree(home)


def discard(output: str | os.PathLike) -> None:
    """Takes away what a build of `output` left that was killed after its very end."""
    with contextlib.suppress(OSError):
        remove_tree(_home(place(output)))


def _home(output: Path) -> Path:
    """Where the build of `output` keeps everything until it is done."""
    if os.fspath(output.parent) == GCS:
        raise ValueError(f"{output}: expected a directory in the bucket, as gs://bucket/corpus")
    return output.with_name(f".{output.name}.unfinished")


def _check_free(output: Path, home: Path) -> None:
    if output.exists() and not (is_remote(output) and _is_part(output, home / "corpus")):
        raise FileExistsError(f"{output}: exists; a corpus is never changed in place")


def _is_part(output: Path, corpus: Path) -> bool:
    """Whether all that lies in `output` was copied from a corpus whose build was killed while it got its name."""
    there = sizes(output)
    return NAME not in there and there.items() <= sizes(corpus).items()


@contextlib.contextmanager
def _held(output: Path, home: Path) -> Iterator[None]:
    """Makes this build the only one of `output`; ValueError if another process has it.

    On a disk the kernel locks `home`, until the process ends; in a bucket a lease does, beside it, as `home` is emptied.
    """
    if is_remote(output):
        lease = Lease(output.with_name(f".{output.name}.lock"))
        if owner := lease.take():
            raise ValueError(f"{output}: another build is writing here ({owner}); wait for it, or use another --output")
        try:
            yield
        finally:
            lease.release()
        return
    home.mkdir(parents=True, exist_ok=True)
    handle = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{home}: another build is writing here; wait for it, or use another --output") from None
    else:
        yield
    finally:
        os.close(handle)


def _empty(home: Path) -> None:
    for path in home.iterdir() if home.exists() else ():
        if path.is_dir() and not os.path.islink(path):
            remove_tree(path)
        else:
            path.unlink()


def _stale(home: Path, fingerprint: Mapping[str, Any]) -> Sequence[str] | None:
    """Names of products of an earlier run that this fingerprint would make anew, and kinds of them; None if those are all."""
    new = json.loads(json.dumps(fingerprint))
    try:
        old = json.loads((home / "fingerprint.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if old == new:
        return ()
    if not isinstance(old, dict) or any(old.get(key) != new.get(key) for key in {*old, *new} - {"settings", "sources"}):
        return None
    changed = {name for name, value in new.get("settings", {}).items() if old.get("settings", {}).get(name) != value}
    if changed - {*_READ_LAST, *(name for names in _READ.values() for name in names)}:
        return None
    was, now = old.get("sources", {}), new.get("sources", {})
    if other := sorted(name for name in {*was, *now} if was.get(name) != now.get(name)):
        return [*(f"cleaned/{name}" for name in other), *itertools.dropwhile(lambda kind: kind != "refined", _READ)]
    return tuple(itertools.dropwhile(lambda kind: not changed & set(_READ[kind]), _READ))


def _prune(home: Path, names: Sequence[str]) -> None:
    """Takes these products, or kinds of them, away."""
    stale = "|".join(map(re.escape, names))
    for found in sizes(home / "work"):
        if re.fullmatch(rf"(?:{stale})(?:/.*|(?:-\d{{5,}})?\.pickle)", found):  # of a source Beam has one for each file
            (home / "work" / found).unlink()
    if "files" in names:
        remove_tree(home / "corpus")


def _sweep(directory: Path) -> None:
    """Leaves nothing but shards, which are checked before they are used; all else is quickly made again."""
    for path in [directory / name for name in sizes(directory)]:
        if path.parent.name != "blocks" or path.suffix != ".array_record" or path.name.startswith("."):
            path.unlink()


def fingerprint_of(settings: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result: settings, what is read, this package's code, Python and all installed packages."""
    places = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})  # not what lies in the current directory
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions(path=places)})
    rest = dict(inputs)
    by_source = [rest.pop(name) for name in ("sources", "budgets") if isinstance(rest.get(name), Mapping)]
    return {
        "settings": {**_plain(settings), "evaluation": rest.pop("evaluation", None)},
        "order": list(settings.weights),  # of the sources, by which duplicates stay: objects of JSON have none
        "sources": {name: [part.get(name) for part in by_source] for name in settings.weights},  # what each reads
        "inputs": rest,
        "code": code_hash(),
        "packages": hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest(),
    }


def code_hash() -> str:
    """sha256 of the code of this package, commands too: what they read documents with is part of a corpus."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()


def _plain(value: Any) -> Any:
    """As `describe`, sets sorted."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return sorted(value) if isinstance(value, set | frozenset) else describe(value)
