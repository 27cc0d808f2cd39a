"""Pretraining documents from any Python installation: its language reference, docstrings and source code
(paper section 2.1).

Docstrings are read by parsing, never by importing third-party code. Documents come in an order given by the
hash of their name, and a byte budget ends each source, so that a small run reads a small, fixed sample and
stops early.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

from llama_jax.assistant import docstrings, installation
from llama_jax.assistant.stable import stable_order
from llama_jax.corpus_build.document import Document

SOURCES = ("reference", "stdlib_docs", "package_docs", "source_code")
SHORTEST_DOCUMENT = 200  # characters: less is a heading without a text
LONGEST_DOCUMENT = 200_000  # characters
# Compiled modules of the standard library are documented only once imported; these have no effect on import.
COMPILED_MODULES = tuple(
    "array atexit audioop binascii builtins cmath errno faulthandler fcntl gc grp itertools marshal math "
    "mmap posix pwd pyexpat resource select spwd sys syslog termios time unicodedata zlib _codecs "
    "_collections _csv _datetime _functools _heapq _io _json _operator _random _socket _sqlite3 _ssl "
    "_struct _thread".split()
)


def installation_documents(source: str, *, byte_budget: int, seed: int = 0) -> Iterator[Document]:
    """Yields the documents of one source, at most `byte_budget` bytes (utf-8) in all; the same files give the
    same documents.

    A document that does not fit in what is left is passed over; the source ends when less than 1 % of its
    budget is left. Raises ValueError for an unknown source, ModuleNotFoundError if this Python comes without
    its language reference.
    """
    makers = {
        "reference": _reference,
        "stdlib_docs": _stdlib_docs,
        "package_docs": _package_docs,
        "source_code": _source_code,
    }
    if source not in makers:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}; got {source!r}")
    if byte_budget <= 0:
        raise ValueError(f"byte_budget: expected a positive number of bytes, got {byte_budget}")
    left = byte_budget
    for document in makers[source](seed):
        size = len(document.text.encode())
        if size <= left and SHORTEST_DOCUMENT <= len(document.text) <= LONGEST_DOCUMENT:
            yield document
            left -= size
        if left < byte_budget / 100:
            return


def module_text(documentation: docstrings.ModuleDocumentation) -> str:
    """One module's documentation as running text: its docstring, then every definition under its full name
    and signature."""
    parts = [f"module {documentation.module}\n{documentation.docstring}".rstrip()]
    for item in documentation.definitions:
        parts.append(
            f"{item.kind} {documentation.module}.{item.name}{item.signature or ''}\n{item.docstring}".rstrip()
        )
    return "\n\n".join(parts) + "\n"


def _reference(seed: int) -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "source 'reference': this Python has no module pydoc_data.topics (the language reference); "
            "install the full standard library"
        ) from error
    for name in stable_order(topics, "reference", seed):
        yield Document(
            f"reference/{name}", topics[name].strip() + "\n", "reference", metadata={"topic": name}
        )


def _stdlib_docs(seed: int) -> Iterator[Document]:
    files = {file.module: file for file in installation.stdlib_files()}
    compiled = {name for name in COMPILED_MODULES if name not in files and name in sys.stdlib_module_names}
    for module in stable_order({*files, *compiled}, "stdlib_docs", seed):
        if module in compiled:
            documentation = docstrings.inspect_module(module)
        else:
            documentation = _parse(files[module])
        if documentation is not None:
            yield _documentation_document(documentation, "stdlib_docs")


def _package_docs(seed: int) -> Iterator[Document]:
    for file in stable_order(
        installation.package_files(), "package_docs", seed, key=lambda file: file.module
    ):
        documentation = _parse(file)
        if documentation is not None:
            yield _documentation_document(documentation, "package_docs")


def _source_code(seed: int) -> Iterator[Document]:
    """Standard library first, as every installation has it; packages follow if the budget asks for more."""
    files = installation.stdlib_files(), installation.package_files()
    for group in files:
        for file in stable_order(group, "source_code", seed, key=lambda file: file.module):
            text = file.read()
            if text is not None and not _looks_generated(text):
                yield Document(
                    f"source_code/{file.module}",
                    text.strip() + "\n",
                    "source_code",
                    metadata={"module": file.module},
                )


def _parse(file: installation.SourceFile) -> docstrings.ModuleDocumentation | None:
    text = file.read()
    if text is None or ('"""' not in text and "'''" not in text):  # parsing costs far more than this look
        return None
    return docstrings.parse_module(file.module, text)


def _documentation_document(documentation: docstrings.ModuleDocumentation, source: str) -> Document:
    module = documentation.module
    return Document(f"{source}/{module}", module_text(documentation), source, metadata={"module": module})


def _looks_generated(text: str) -> bool:
    """Tables rather than programs: a note at the top that says so, very long lines, or mostly digits and
    punctuation."""
    head = text[:600].lower()
    if "generated by" in head or "do not edit" in head or "auto-generated" in head or "autogenerated" in head:
        return True
    lines = text.splitlines()
    letters = sum(map(str.isalpha, text[:20_000]))
    return max(map(len, lines)) > 1000 or letters < 0.4 * min(len(text), 20_000)
