"""Which Python files of this installation the assistant reads: the standard library and the installed
packages.

Left out: tests, bundled third-party code, generated tables, graphical demos, and files too small or too large
to be prose.
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# A directory of this name is never entered.
SKIPPED_DIRECTORIES = frozenset(
    "test tests testdata test_data idlelib lib2to3 turtledemo tkinter ensurepip pydoc_data encodings "
    "site-packages dist-packages _vendor vendor vendored _vendored third_party thirdparty extern "
    "externals node_modules __pycache__ benchmarks".split()
)
# `llama_jax` would make the corpus change with every edit of this repository; `pip` comes and goes with the
# installer.
SKIPPED_PACKAGES = frozenset({"llama_jax", "pip"})
GENERATED_SUFFIXES = ("_pb2.py", "_pb2_grpc.py", "_parsetab.py", "_lextab.py")
SMALLEST_FILE = 400  # bytes: licence headers and re-export stubs lie below
LARGEST_FILE = 200_000  # bytes: hand-written modules lie below, data tables above


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One module's file: `module` is its dotted import name, `size` its length in bytes."""

    module: str
    path: Path
    size: int

    def read(self) -> str | None:
        """The text, or None if the file is not utf-8 or is not text."""
        try:
            text = self.path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            return None
        return None if "\x00" in text else text.replace("\r\n", "\n")


def stdlib_files() -> list[SourceFile]:
    """The modules of the standard library, private helpers included, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(_python_files(root), key=lambda file: file.module)


def package_files(roots: list[Path] | None = None) -> list[SourceFile]:
    """The modules of the packages installed in the running environment (or below `roots`), sorted by name."""
    if roots is None:
        paths = sysconfig.get_paths()
        roots = [Path(paths["purelib"]), Path(paths["platlib"])]
    by_module: dict[str, SourceFile] = {}
    for root in roots:
        for file in _python_files(root):
            if file.module.partition(".")[0] not in SKIPPED_PACKAGES:
                by_module.setdefault(file.module, file)
    return [by_module[module] for module in sorted(by_module)]


def _python_files(root: Path) -> Iterator[SourceFile]:
    for directory, children, names in os.walk(root):
        # A directory that is no identifier (`foo-1.0.dist-info`, `config-3.11-...`) cannot be imported
        # either.
        children[:] = sorted(
            child for child in children if child.isidentifier() and child not in SKIPPED_DIRECTORIES
        )
        package = Path(directory).relative_to(root).parts
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension != ".py" or not stem.isidentifier() or _is_test_or_generated(name):
                continue
            path = Path(directory, name)
            size = path.stat().st_size
            parts = package if stem == "__init__" else (*package, stem)
            if parts and SMALLEST_FILE <= size <= LARGEST_FILE:
                yield SourceFile(".".join(parts), path, size)


def _is_test_or_generated(name: str) -> bool:
    is_test = name.startswith("test_") or name.endswith(("_test.py", "_tests.py")) or name == "conftest.py"
    return is_test or name.endswith(GENERATED_SUFFIXES) or name.startswith("_sysconfigdata")
