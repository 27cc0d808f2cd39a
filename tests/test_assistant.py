"""The documentation assistant's input: documents, objects and dialogs. (Refusals and annotator: test_annotator.py.)"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.assistant import dialogs, docstrings, documents, installation, objects, wording

REPOSITORY = Path(__file__).parents[1]
PACKAGE_SOURCE = '''"""Tools for small boats.

They float."""
import elsewhere_not_installed

def row(boat, /, *, speed: float = 1.0, oars=("left", "right", "and a spare one")) -> int:
    """Move the boat forward by one stroke.

    >>> row(dinghy, speed=2.0)
    7
    """

def _hidden():
    """Never to be seen in any document."""

class Boat:
    """A vessel of :class:`~boats.Wood` that ``floats`` on water."""

    def __init__(self, length, *names):
        pass

    @classmethod
    def build(cls, plan=None):
        """Build a boat from a plan. It takes long."""

    @property
    def weight(self):
        """The weight of the boat in kilograms."""

    @staticmethod
    def measure(first, second):
        """Return the distance between two boats, in metres
        """
'''


@pytest.fixture(scope="module")
def documented():
    """The stdlib part of the real thing, and enough packages to reach the number the issue asks for."""
    return objects.documented_objects(limit=4000)


@pytest.fixture(scope="module")
def dialog_rows(documented):
    return dialogs.dialogs(documented, seed=0)


@pytest.fixture
def tiny_package(tmp_path):
    package = tmp_path / "site" / "boats"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE_SOURCE)
    (package / "tests" / "test_row.py").write_text(PACKAGE_SOURCE)
    (package / "wire_pb2.py").write_text(PACKAGE_SOURCE)
    (package / "latin.py").write_bytes(PACKAGE_SOURCE.encode() + b"# caf\xe9\n")
    return tmp_path / "site"


# Documents


def test_files_of_a_package_leave_out_tests_and_generated_code(tiny_package):
    files = installation.package_files([tiny_package])
    assert [file.module for file in files] == ["boats", "boats.latin"]
    assert files[0].read() == PACKAGE_SOURCE
    assert files[1].read() is None  # not utf-8


def test_ast_extraction_imports_nothing():
    parsed = docstrings.parse_module("boats", PACKAGE_SOURCE)
    assert parsed.docstring == "Tools for small boats.\n\nThey float."
    assert [(item.name, item.kind, item.signature) for item in parsed.definitions] == [
        ("row", "function", "(boat, /, *, speed=1.0, oars=...)"),
        ("Boat", "class", "(length, *names)"),
        ("Boat.build", "method", "(plan=None)"),
        ("Boat.weight", "property", "()"),
        ("Boat.measure", "method", "(first, second)"),
    ]
    assert docstrings.parse_module("broken", "def (") is None


def test_module_text_is_a_readable_document():
    text = documents.module_text(docstrings.parse_module("boats", PACKAGE_SOURCE))
    assert text.startswith(
        "module boats\nTools for small boats.\n\nThey float.\n\nfunction boats.row(boat, /, *, speed"
    )
    assert "method boats.Boat.build(plan=None)\nBuild a boat from a plan. It takes long.\n" in text
    assert "hidden" not in text and "Never" not in text


@pytest.mark.parametrize("source", documents.SOURCES)
def test_documents_respect_budget_and_repeat(source):
    budget = 60_000
    first = list(documents.installation_documents(source, byte_budget=budget))
    assert first == list(documents.installation_documents(source, byte_budget=budget))
    sizes = [len(document.text.encode()) for document in first]
    assert 0.9 * budget < sum(sizes) <= budget
    assert len({document.id for document in first}) == len(first) > 2
    assert all(document.source == source and document.id.startswith(f"{source}/") for document in first)
    other = list(documents.installation_documents(source, byte_budget=budget, seed=1))
    assert [document.id for document in other] != [document.id for document in first]


def test_document_arguments_are_checked():
    with pytest.raises(ValueError, match="source: expected one of reference, .* got 'web'"):
        next(documents.installation_documents("web", byte_budget=1))
    with pytest.raises(ValueError, match="byte_budget"):
        next(documents.installation_documents("reference", byte_budget=0))


def test_another_process_reads_the_same():
    """Other hash salt, other import order: same documents, same objects, same dialogs."""
    code = (
        "import hashlib, json; from llama_jax.assistant import documents, objects, dialogs\n"
        "texts = [d.text for d in documents.installation_documents('package_docs', byte_budget=40000)]\n"
        "found = objects.documented_objects(limit=300)\n"
        "print(hashlib.sha256(json.dumps([texts, dialogs.dialogs(found, seed=3)]).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(REPOSITORY)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(seen) == 1


# Objects


def test_objects_of_a_parsed_package():
    found = list(objects.module_objects(docstrings.parse_module("boats", PACKAGE_SOURCE)))
    assert found == [
        objects.DocumentedObject(
            name="boats.row",
            module="boats",
            kind="function",
            signature="row(boat, /, *, speed=1.0, oars=...)",
            summary="Move the boat forward by one stroke.",
            example="row(dinghy, speed=2.0)",
        ),
        objects.DocumentedObject(
            "boats.Boat",
            "boats",
            "class",
            "Boat(length, *names)",
            "A vessel of `Wood` that `floats` on water.",
            None,
        ),
        objects.DocumentedObject(
            "boats.Boat.build", "boats", "method", "Boat.build(plan=None)", "Build a boat from a plan.", None
        ),
        objects.DocumentedObject(
            "boats.Boat.measure",
            "boats",
            "method",
            "Boat.measure(first, second)",
            "Return the distance between two boats, in metres.",
            None,
        ),
    ]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("pairs(x) -> list\n\nReturn all pairs of the input.", "Return all pairs of the input."),
        (
            "Return pairs, e.g. Two at a time, of the input. More.",
            "Return pairs, e.g. Two at a time, of the input.",
        ),
        ("Use the `manual <page>`_ for *all* the details.", "Use the manual for all the details."),
        ("return the second of two values", "Return the second of two values."),
        ("Return one of the following:\n\n- a\n- b", None),
        ("Too short.", None),
        ("See :ref:`above` <there> for what this does.", None),
        ("Return the caf\u00e9 of this very town.", None),
        ("Word " * 40 + ".", None),
        ("", None),
    ],
)
def test_summary_is_a_clean_sentence_or_none(docstring, expected):
    assert objects.summary_sentence(docstring, "pairs") == expected


def test_thousands_of_good_objects(documented):
    assert len(documented) >= 3000
    names = [item.name for item in documented]
    assert len(set(names)) == len(names)
    by_name = {item.name: item for item in documented}
    pairwise = by_name["itertools.pairwise"]
    assert pairwise.module == "itertools" and pairwise.signature == "pairwise(iterable, /)"
    assert by_name["math.sqrt"].summary == "Return the square root of x."
    assert by_name["list.append"].signature == "list.append(object, /)"  # builtins, without self
    for item in documented:
        assert 20 <= len(item.summary) <= 110 and item.summary.endswith(".") and item.summary.isascii()
        assert ":`" not in item.summary and "``" not in item.summary and "\n" not in item.summary
        assert item.kind in ("function", "class", "method")
        assert item.signature is None or item.signature.startswith(item.name.split(".")[-1 - (item.kind == "method")])


def test_wording():
    assert wording.is_balanced("f(a[0], `x`)") and not wording.is_balanced("f(a]") and not wording.is_balanced("`x")
    assert wording.first_sentence("One thing\nhere. Two things.") == "One thing here."


# Dialogs


def test_dialog_rows_follow_the_format(dialog_rows, documented):
    names = {item.name for item in documented}
    for row in dialog_rows:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and 1 <= len(turns) // 2 <= 3
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])
        assert len(row["messages"][-1]["content"].split()) <= 35
        assert all(len(message["content"].split()) <= 20 for message in row["messages"] if message["role"] == "user")
        assert row["kind"] in dialogs.KINDS and row["object"] in names and row["is_safety"] is False
    assert len(dialog_rows) > 2 * len(documented)
    texts = [json.dumps(row["messages"]) for row in dialog_rows]
    assert len(set(texts)) == len(texts)
    with_system = sum(row["messages"][0]["role"] == "system" for row in dialog_rows) / len(dialog_rows)
    several = sum(sum(m["role"] == "user" for m in row["messages"]) > 1 for row in dialog_rows) / len(dialog_rows)
    assert 0.25 < with_system < 0.35 and 0.2 < several < 0.4
    assert min(len(texts) for texts in dialogs.QUESTIONS.values()) >= 6


def test_answers_by_hand():
    item = objects.DocumentedObject("a.B.go", "a", "method", "B.go(x)", "Go to the place x.", "b.go(3)")
    assert dialogs.answer(item, "what") == "`go` is a method of `B`. Go to the place x."
    assert dialogs.answer(item, "signature") == "The signature is `B.go(x)`."
    assert dialogs.answer(item, "module") == "`go` is in the module `a`."
    assert dialogs.answer(item, "example") == "An example of `go`: `b.go(3)`."
    rows = dialogs.dialogs([item], seed=0, per_object=40)
    assert {row["kind"] for row in rows} == set(dialogs.KINDS)
    follow_ups = set(itertools.chain(*dialogs.FOLLOW_UPS.values()))
    for row in rows:
        questions = [message["content"] for message in row["messages"] if message["role"] == "user"]
        assert "`a.B.go`" in questions[0] and follow_ups.issuperset(questions[1:])


def test_split_by_name_is_disjoint_and_stable(documented):
    train, held_out = dialogs.split_by_name(documented, held_out_fraction=0.1)
    assert 0.07 * len(documented) < len(held_out) < 0.13 * len(documented)
    held_out_names = {item.name for item in held_out}
    assert held_out_names.isdisjoint(item.name for item in train)
    # Nor may a held-out answer stand in training under another name.
    assert {item.summary for item in held_out}.isdisjoint(item.summary for item in train)
    train_rows = dialogs.dialogs(train, seed=0)
    assert held_out_names.isdisjoint(row["object"] for row in train_rows)
    # No held-out qualified name is quoted in any message of the training rows' questions.
    asked = {
        part
        for row in train_rows
        for m in row["messages"]
        if m["role"] == "user"
        for part in m["content"].split("`")[1::2]
    }
    assert not {name for name in held_out_names if "." in name} & asked
    half, _ = dialogs.split_by_name(documented[::2], held_out_fraction=0.1)
    assert {item.name for item in half} <= {item.name for item in train}
    with pytest.raises(ValueError, match="held_out_fraction"):
        dialogs.split_by_name(documented, held_out_fraction=10)


def test_prompts_end_with_the_user(dialog_rows):
    rows = dialogs.prompts(dialog_rows[:500])
    for prompt, row in zip(rows, dialog_rows[:500], strict=True):
        assert prompt["messages"] == row["messages"][:-1] and prompt["messages"][-1]["role"] == "user"
        assert prompt["reference"] == row["messages"][-1]["content"]
        assert {"reference", "is_safety", "source", "kind", "object"} <= prompt.keys()


def test_max_characters_keeps_short_dialogs(documented):
    rows = dialogs.dialogs(documented[:500], seed=0, max_characters=150)
    assert rows and all(sum(len(m["content"]) for m in row["messages"]) <= 150 for row in rows)
