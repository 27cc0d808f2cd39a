"""The notebooks, read and not run (.ci/run runs them): library calls only, whole, and fit to be browsed with their outputs."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTERS = ("model", "pretraining", "sft", "reward", "rlhf", "ghost", "planning", "real_model")
COMMON = {"dataclasses", "jax", "numpy", "IPython", "collections", "sys", "json", "pathlib", "importlib", "llama_jax", "time"}
LARGEST = 300 * 1024  # bytes of a file, outputs included


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code(path: Path) -> ast.Module:
    """The code cells as one program; magics are left out."""
    cells = ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(cells), flags=re.MULTILINE))


def test_there_is_one_notebook_a_chapter():
    assert [path.stem for path in NOTEBOOKS] == [f"{n}_{name}" for n, name in enumerate(CHAPTERS, start=1)]


def test_it_is_a_valid_notebook_with_a_title_and_stable_ids(path):
    nbformat = pytest.importorskip("nbformat", reason="the extra [notebooks]")
    nbformat.validate(nbformat.from_dict(read(path)))
    cells, number = read(path)["cells"], path.stem.split("_")[0]
    title = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown" and title.startswith(f"# {number}. ")
    assert re.search(r"\*Llama 2, section", title), "the first cell names the section of the paper"
    assert all(re.fullmatch(rf"{number}-[\w-]+", cell["id"]) for cell in cells)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_it_installs_on_colab_alone(path):
    first = next("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code")
    assert 'if "google.colab" in sys.modules:' in first and "%pip install" in first
    outside = [line for line in first.split("\n") if line and not line.startswith((" ", "#", "if", "import"))]
    assert not outside


def test_it_calls_the_library_and_defines_nothing(path):
    program = code(path)
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node.lineno for node in ast.walk(program) if isinstance(node, defined)]
    imported = {alias.name for node in ast.walk(program) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(program) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= COMMON


def test_a_cell_that_trains_or_builds_can_be_changed_and_run_again(path):
    for call in (node for node in ast.walk(code(path)) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) in ("run", "corpus.run", "convert.run"):
            assert ast.unparse(call.args[1]).startswith("notebook.fresh(workdir / "), ast.unparse(call)


def test_its_outputs_are_fit_to_be_read(path):
    assert path.stat().st_size < LARGEST
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["execution_count"] for cell in cells), "it was saved without having been run whole"
    assert not [output for output in outputs if output["output_type"] == "error"]
    shown = json.dumps([{k: v for k, v in output.get("data", output).items() if k != "image/png"} for output in outputs])
    assert not re.search(r"/(tmp|home|root|work|usr|opt|Users|content)/", shown), "a path of the machine it ran on"
    assert not re.search(r"warning|Traceback|deprecat", shown, re.IGNORECASE)


def test_every_picture_has_a_text_for_those_who_cannot_see_it(path):
    outputs = [output for cell in read(path)["cells"] for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(output["metadata"]["image/png"]["alt"] for output in pictures)


def test_the_readme_lists_it(path):
    assert f"notebooks/{path.name}" in (ROOT / "README.md").read_text()
