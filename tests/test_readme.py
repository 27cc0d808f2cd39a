"""The README lists every file with the first sentence of its docstring. `python tests/test_readme.py` writes the table anew."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where to start reading first; what is not named here follows in alphabetical order.
ORDER = (
    "parallel", "model", "interop", "data", "training", "sampling", "corpus_build", "assistant", "pretrain", "sft", "reward",
    "rlhf", "safety", "evals", "annotation", "planning",
)  # fmt: skip
HEADING, HEAD = "## The files", "| file | what |\n|---|---|\n"


def modules() -> list[Path]:
    """Commands, then the packages in the order of ORDER, then configs and launch scripts."""

    def rank(path: Path) -> tuple:
        parts = path.relative_to(ROOT).parts
        if parts[0] != "llama_jax":
            return (2, parts)
        package = parts[1] if len(parts) > 2 else ""
        return (0 if not package else 1, ORDER.index(package) if package in ORDER else len(ORDER), parts)

    found = [path for path in (ROOT / "llama_jax").rglob("*.py") if path.name != "__init__.py"]
    return sorted([*found, *(ROOT / "configs").glob("*.py"), *(ROOT / "launch").rglob("*.sh")], key=rank)


def first_sentence(path: Path) -> str:
    if path.suffix == ".sh":
        comments = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        text = comments[0]
    else:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
    text = " ".join(text.split("\n\n")[0].split())
    text = re.split(r': `python|(?<=[\w)`"])\. (?=[A-Z`{])', text)[0]
    return text.rstrip(".:").replace("|", "\\|")


def table() -> str:
    def shown(path: Path) -> str:
        return str(path.relative_to(ROOT)).removeprefix("llama_jax/")

    return HEAD + "".join(f"| `{shown(path)}` | {first_sentence(path)} |\n" for path in modules())


def test_the_readme_lists_every_file():
    text = (ROOT / "README.md").read_text()
    written = text[text.index(HEAD, text.index(HEADING)) :]
    assert written.startswith(table()), "the table of files is out of date: run python tests/test_readme.py"


if __name__ == "__main__":
    text = (ROOT / "README.md").read_text()
    begin = text.index(HEAD, text.index(HEADING))
    rest = re.search(r"\n\n|\Z", text[begin:])
    (ROOT / "README.md").write_text(text[:begin] + table() + text[begin + rest.end() :])
