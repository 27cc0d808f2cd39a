"""Where files lie: on this machine, or in a bucket of Google Cloud Storage (`gs://bucket/...`).

`place` gives a path object for either, so that the code above it is the same. This module owns the differences: a bucket has
no locks (`training.lease`), no appending, no renaming of directories, and no files for a writer that needs a real one.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

GCS = "gs://"


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in a bucket."""
    return os.fspath(path).startswith(GCS)


def place(path: str | os.PathLike) -> Path:
    """A `pathlib.Path` (`~` is the home directory), or its counterpart `etils.epath.Path` for an address."""
    if not is_remote(path):
        return Path(os.path.expanduser(path))  # a shell leaves the ~ of --workdir=~/run alone, and so does a config
    _prepare()
    from etils import epath  # a command on local files need not load it

    text = os.fspath(path)
    return epath.Path(GCS + posixpath.normpath(text.removeprefix(GCS)))


@functools.cache
def _prepare() -> None:
    """Loads the client of buckets, and tells it to remember no listings: TensorStore writes behind its back."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 - etils asks fsspec for it
    except ModuleNotFoundError as error:
        problem = "gs:// addresses need the package gcsfs: pip install 'llama_jax[gcs]'"
        raise ModuleNotFoundError(problem, name=error.name) from None
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def check_bucket(path: str | os.PathLike) -> None:
    """OSError in one sentence if the bucket of an address does not exist or is closed to this process."""
    if not is_remote(path):
        return
    place(path)
    from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, Unauthorized
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    name = os.fspath(path).removeprefix(GCS).split("/")[0]
    try:
        storage.Client().get_bucket(name, timeout=30)  # what Orbax asks for first
    except NotFound:
        raise FileNotFoundError(f"{path}: the bucket {name!r} does not exist") from None
    except (Forbidden, Unauthorized) as error:
        raise PermissionError(f"{path}: no permission to use the bucket {name!r}: {error.message}") from None
    except (GoogleAuthError, GoogleAPIError, OSError) as error:
        raise OSError(f"{path}: the bucket {name!r} cannot be reached: {reason(error)}") from None


def reason(error: Exception) -> str:
    """What the system or the service said, as one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line of at most 300 characters: many go on with a stack."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    said = re.search(r"\[OS error \d+: ([^\]]*)\]", str(error))  # TensorStore tells what the system said after a long path
    return f"{said[1]}: {text}" if said else text


@contextlib.contextmanager
def may_fail(path: str | os.PathLike) -> Iterator[None]:
    """For writing what no run is worth losing for, as its statistics: an error is told, and nothing else comes of it."""
    try:
        yield
    except Exception as error:  # of the disk, or one of the many of a bucket's client
        log.warning("%s: could not be written to just now: %s", path, reason(error))


def absolute(path: str | os.PathLike) -> Path:
    """The whole path, without `..` and symbolic links; an address is whole."""
    return place(path) if is_remote(path) else place(path).resolve()


def store(directory: str | os.PathLike) -> dict[str, str]:
    """What TensorStore calls a directory, on a disk or in a bucket."""
    text = os.fspath(directory).rstrip("/") + "/"
    if not is_remote(text):
        return {"driver": "file", "path": text}
    bucket, _, path = text.removeprefix(GCS).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": path}


def relative(path: str | os.PathLike, start: str | os.PathLike) -> str:
    """`path` seen from the directory `start`, where both lie on one disk or in one bucket; else the whole path."""
    if _root(path) != _root(start):
        return str(absolute(path))
    return os.path.relpath(os.fspath(path).removeprefix(GCS), os.fspath(start).removeprefix(GCS))


def _root(path: str | os.PathLike) -> str:
    return os.fspath(path).removeprefix(GCS).split("/")[0] if is_remote(path) else ""


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file below a directory, by its path in there; of a bucket with one request for many."""
    if not is_remote(directory):
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    return {name: facts["size"] for name, facts in _objects(directory).items()}


def checksums(directory: Path) -> dict[str, str]:
    """What tells a file below a directory from any other, by its path in there: the sha256, or the checksum of the bucket."""
    if is_remote(directory):
        return {name: facts["crc32c"] for name, facts in _objects(directory).items()}
    found = {}
    for name in sorted(sizes(directory)):
        with open(directory / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _objects(directory: Path) -> dict[str, dict[str, Any]]:
    root = os.fspath(directory).removeprefix(GCS).rstrip("/") + "/"
    found = _filesystem().find(os.fspath(directory), detail=True)
    return {name.removeprefix(root): facts for name, facts in found.items()}


def upload(local: Path, path: str | os.PathLike) -> None:
    """Copies a file of this machine into a bucket, where it appears whole or not at all."""
    place(path)
    _filesystem().put_file(os.fspath(local), os.fspath(path))


def publish(directory: Path, target: Path, *, last: str) -> None:
    """Gives a finished directory its name. In a bucket objects are copied, and `last` after all others: see it, see all."""
    if not is_remote(target):
        os.rename(directory, target)
        return
    names = sizes(directory)
    try:
        for part in (names.keys() - {last}, names.keys() & {last}):
            pairs = [(os.fspath(directory / name), os.fspath(target / name)) for name in sorted(part)]
            _filesystem().copy([source for source, _ in pairs], [copy for _, copy in pairs])
    except BaseException:
        remove_tree(target)
        raise


def move(source: Path, target: Path) -> None:
    """Renames a file or directory. In a bucket objects are moved one by one: a kill in between leaves some in both places."""
    if is_remote(source):
        _filesystem().mv(os.fspath(source), os.fspath(target), recursive=True)
    else:
        os.replace(source, target)


def untaken(path: Path) -> Path:
    """`path`, or where there is something already `path` with a number: 8, 8.2, 8.3, ..."""
    names = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name)).exists())


def remove_tree(path: Path) -> None:
    """Removes a directory, if there is one, with all that is in it."""
    if is_remote(path):
        path.rmtree(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path)


def create(path: Path, text: str) -> None:
    """Writes a new object in a bucket; of several that try at once, all but one get FileExistsError."""
    _filesystem().pipe_file(os.fspath(path), text.encode(), mode="create")


def append(path: Path, text: str) -> None:
    """Adds lines to a short file, synced; in a bucket it is written anew."""
    if is_remote(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def seconds_between_writes(path: Path) -> float:
    """How often a small file may be written anew: each request to a bucket takes a tenth of a second and costs money."""
    return 30.0 if is_remote(path) else 1.0


def _filesystem():
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)  # the one that etils uses


class Mirror:
    """A directory for writers that need real files (logs, TensorBoard, profiles).

    Of a local one it is that directory itself. Of a remote one it is an empty local one, whose files `send` uploads if they
    have changed; `close` does so too and removes it.

    Attributes:
      local: where to write.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = place(directory)
        self.remote = is_remote(directory)
        self.local = Path(tempfile.mkdtemp(prefix="llama_jax_")) if self.remote else self.directory
        self.sent: dict[Path, tuple[int, int]] = {}
        self.due = time.monotonic() + seconds_between_writes(self.directory)

    def fetch(self, name: str) -> Path:
        """A file of the directory, to be read or appended to; it may not exist."""
        path = self.local / name
        if self.remote and not path.exists() and (self.directory / name).exists():
            path.write_bytes((self.directory / name).read_bytes())
        return path

    def fetch_all(self) -> None:
        """Copies all that the directory holds."""
        for name in sizes(self.directory) if self.remote else ():
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((self.directory / name).read_bytes())
            self.sent[path] = path.stat().st_size, path.stat().st_mtime_ns

    def send(self, *, but: str = "") -> None:
        """Uploads what has changed, but for files with `but` in their names and those that are being written (`files`)."""
        if not self.remote:
            return
        begun = time.monotonic()
        try:
            for path in sorted(self.local.rglob("*")):
                if (but and but in path.name) or (path.name.startswith(".") and path.name.endswith(".tmp")):
                    continue
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    facts = path.stat().st_size, path.stat().st_mtime_ns
                    if path.is_file() and self.sent.get(path) != facts:
                        (self.directory / path.relative_to(self.local).as_posix()).write_bytes(path.read_bytes())
                        self.sent[path] = facts
        finally:
            now = time.monotonic()
            self.due = now + max(seconds_between_writes(self.directory), 100 * (now - begun))  # at most 1 % of the time

    def send_if_due(self) -> None:
        """`send`, but only now and then."""
        if self.remote and time.monotonic() > self.due:
            self.send()

    def close(self) -> None:
        """Uploads for the last time."""
        try:
            self.send()
        finally:
            if self.remote:
                shutil.rmtree(self.local, ignore_errors=True)
