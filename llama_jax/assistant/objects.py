"""The documented objects that the assistant is asked about: name, module, signature, one-sentence summary,
one example.

From the standard library by importing a list of public modules (compiled functions have no source to parse),
and from the installed packages by parsing, in the order in which `documents` reads them: what is asked about
was, as far as possible, read.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

from llama_jax.assistant import docstrings, installation, wording
from llama_jax.assistant.stable import stable_order

# Public modules that can be imported anywhere without a visible effect: no window, no terminal, no thread.
STDLIB_MODULES = tuple(
    "builtins abc argparse array ast asyncio base64 bdb binascii bisect bz2 calendar cmath code codecs "
    "codeop collections collections.abc colorsys compileall concurrent.futures configparser contextlib "
    "contextvars copy copyreg csv ctypes dataclasses datetime dbm decimal difflib dis doctest "
    "email.charset email.encoders email.generator email.header email.headerregistry email.message "
    "email.mime.text email.parser email.policy email.utils enum errno faulthandler fcntl filecmp "
    "fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib grp gzip "
    "hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib "
    "importlib importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util "
    "inspect io ipaddress itertools json keyword linecache locale logging logging.config logging.handlers "
    "lzma mailbox marshal math mimetypes mmap modulefinder multiprocessing multiprocessing.pool "
    "multiprocessing.shared_memory netrc numbers operator optparse os os.path pathlib pickle pickletools "
    "pkgutil platform plistlib poplib posixpath pprint profile pstats pty pwd py_compile pyclbr queue "
    "quopri random re reprlib resource runpy sched secrets select selectors shelve shlex shutil signal "
    "smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable "
    "sys sysconfig syslog tabnanny tarfile tempfile termios textwrap threading time timeit token tokenize "
    "trace traceback tracemalloc tty types typing unicodedata unittest unittest.mock urllib.error "
    "urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser "
    "wsgiref.handlers wsgiref.headers wsgiref.util xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree "
    "xml.sax xml.sax.handler xml.sax.saxutils xmlrpc.client zipapp zipfile zipimport zlib zoneinfo".split()
)
SHORTEST_SUMMARY, LONGEST_SUMMARY = 20, 110  # characters
LONGEST_NAME = 60
LONGEST_SIGNATURE = 72
LONGEST_EXAMPLE = 60
PACKAGE_FILES = 6000  # files parsed at most, so that a large environment costs no more than a small one


@dataclasses.dataclass(frozen=True)
class DocumentedObject:
    """`name` is fully qualified except for builtins; `signature` starts with the short name; `summary` is one
    sentence."""

    name: str
    module: str
    kind: str  # function | class | method
    signature: str | None
    summary: str
    example: str | None

    @property
    def short(self) -> str:
        """The last component of the name: `pairwise`."""
        return self.name.rpartition(".")[2]


def documented_objects(*, seed: int = 0, limit: int | None = 6000) -> list[DocumentedObject]:
    """The well-documented public objects of this installation, the standard library's first if `limit` cuts;
    unique names.

    `limit=None` reads up to `PACKAGE_FILES` files of the installed packages. The result is in an order given
    by the hash of the names, the same for the same files.
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"limit: expected a positive number or None, got {limit}")
    found: dict[str, DocumentedObject] = {}
    summaries: set[str] = set()  # each once: a second object could carry a held-out answer into training
    for documentation in _documentation(seed):
        for item in module_objects(documentation):
            if item.name not in found and item.summary not in summaries:
                found[item.name] = item
                summaries.add(item.summary)
                if limit is not None and len(found) == limit:
                    return stable_order(found.values(), "objects", seed, key=lambda item: item.name)
    return stable_order(found.values(), "objects", seed, key=lambda item: item.name)


def module_objects(documentation: docstrings.ModuleDocumentation) -> Iterator[DocumentedObject]:
    """The objects of one module whose documentation passes the filters."""
    for item in documentation.definitions:
        short = item.name.rpartition(".")[2]
        name = item.name if documentation.module == "builtins" else f"{documentation.module}.{item.name}"
        if item.kind == "property" or not name.isascii() or len(name) > LONGEST_NAME:
            continue
        summary = summary_sentence(item.docstring, short)
        if summary is None:
            continue
        signature = _signature(item.name, item.signature)
        yield DocumentedObject(
            name, documentation.module, item.kind, signature, summary, _example(item.docstring, short)
        )


def summary_sentence(docstring: str, short: str) -> str | None:
    """The first sentence of a docstring in plain words with a full stop, or None if it is not a clean
    sentence."""
    paragraphs = re.split(r"\n[ \t]*\n", docstring.strip())
    lines = paragraphs[0].splitlines()
    while lines and _is_signature_line(lines[0], short):
        lines = lines[1:]
        if not lines and len(paragraphs) > 1:
            paragraphs = paragraphs[1:]
            lines = paragraphs[0].splitlines()
    sentence = wording.first_sentence(wording.plain_markup("\n".join(lines)))
    if sentence[-1:].isalnum() or sentence[-1:] in ("`", ")"):
        sentence += (
            "."  # a whole paragraph that forgot its full stop; a cut one would end in a comma or colon
        )
    sentence = sentence[:1].upper() + sentence[1:]
    return sentence if _is_clean(sentence) else None


# What is left of markup, tables, links, code and notes to maintainers after the markup was reduced.
_UNCLEAN = re.compile(
    r"::|[<>|{}\\$%@~^=\"\[\]]|\*|://|__|>>>|\.\.|--|:\w+:|"
    r"\b(?:TODO|FIXME|XXX|deprecated|internal use|self\.|cls\.)|"
    r"[Ss]ee (?:help|the|above|below|also|`)|"
    r"^(?:Same as|Alias|Helper for|Args|Arguments|Returns:|Parameters|Note|Warning|Usage|Example)\b|"
    r"(?:following|as follows|follows|e\.g|i\.e)\.$|^Like .{0,30}\.$|\s[,.;)]|\bhttp"
)


def _is_clean(sentence: str) -> bool:
    if (
        not SHORTEST_SUMMARY <= len(sentence) <= LONGEST_SUMMARY
        or not sentence.isascii()
        or not sentence.endswith(".")
    ):
        return False
    if not sentence[0].isalpha() or len(sentence.split()) < 4 or _UNCLEAN.search(sentence):
        return False
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return letters >= 0.85 * len(sentence) and wording.is_balanced(sentence) and sentence.count("'") % 2 == 0


def _is_signature_line(line: str, short: str) -> bool:
    line = line.strip()
    return "->" in line or bool(re.match(rf"(?:[\w.]+\.)?{re.escape(short)}\s*\(", line))


def _signature(name: str, arguments: str | None) -> str | None:
    if arguments is None:
        return None
    text = name + arguments
    # Addresses and paths differ from machine to machine, bare (*args, **kwargs) says nothing.
    is_odd = bool(re.search(r"<|0x|[`\n\\]|'[^']*/", text)) or arguments in (
        "(*args, **kwargs)",
        "(*args, **kwds)",
    )
    is_fit = len(text) <= LONGEST_SIGNATURE and text.isascii() and wording.is_balanced(text)
    return text if is_fit and not is_odd else None


def _example(docstring: str, short: str) -> str | None:
    """The first one-line doctest input that calls the object by its short name."""
    for line in docstring.splitlines():
        line = line.strip()
        if not line.startswith(">>> ") or not re.search(rf"\b{re.escape(short)}\(", line):
            continue
        code = line[4:].partition(" #")[0].strip()
        if (
            len(code) <= LONGEST_EXAMPLE
            and code.isascii()
            and "`" not in code
            and wording.is_balanced(code)
            and _parses(code)
        ):
            return code
    return None


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return not code.startswith(("import ", "from ", "def ", "class "))


def _documentation(seed: int) -> Iterator[docstrings.ModuleDocumentation]:
    for module in STDLIB_MODULES:
        documentation = docstrings.inspect_module(module)
        if documentation is not None:
            yield documentation
    files = [file for file in installation.package_files() if "._" not in f".{file.module}"]
    for file in stable_order(files, "package_docs", seed, key=lambda file: file.module)[:PACKAGE_FILES]:
        text = file.read()
        documentation = docstrings.parse_module(file.module, text) if text and '"""' in text else None
        if documentation is not None:
            yield documentation
