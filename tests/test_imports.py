"""Holds the direction of imports (design, section 3) against the code: read from the files, not run.

Levels, each importing those below it only: 0 parallel and the modules of BASE; 1 model, data, training; 2 sampling, interop,
corpus_build, assistant; 3 the stages in the paper's order; 4 planning, annotation; 5 commands.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llama_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

BASE = ("config", "paths", "files", "palette", "markdown")  # each may import those before it
LOW = (*BASE, "parallel")
SIBLINGS = ("model", "data", "training")
SERVICES = ("sampling", "interop", "corpus_build", "assistant")
STAGES = ("pretrain", "sft", "reward", "rlhf", "safety", "evals")
TOOLS = ("planning", "annotation")  # they look at the stages from outside
# One module of plain data that another package of its level may read.
EXCEPTIONS = {("assistant", "llama_jax.corpus_build.document")}


def allowed(part: str) -> set[str]:
    """The parts of llama_jax that `part` (a package, or a module at the top) may import, itself included."""
    if part in BASE:
        return set(BASE[: BASE.index(part) + 1])
    if part in LOW:
        return {part, *BASE}
    if part in SIBLINGS:
        return {part, *LOW}
    if part in SERVICES:
        return {part, *LOW, *SIBLINGS}
    if part in STAGES:
        return {*LOW, *SIBLINGS, *SERVICES, *STAGES[: STAGES.index(part) + 1]}
    if part in TOOLS:
        return {part, *LOW, *SIBLINGS, *SERVICES, *STAGES}
    # A command: it may use everything, other commands too (the recipe runs the trainer).
    return {*LOW, *SIBLINGS, *SERVICES, *STAGES, *TOOLS, *(path.stem for path in PACKAGE.glob("*.py"))}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, inside functions too; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole module name instead of dots"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_imports_point_downwards(path):
    part = part_of(path)
    for line, name in imports(path):
        if not name.startswith("llama_jax."):
            continue
        if any(part == who and name.startswith(what) for who, what in EXCEPTIONS):
            continue
        target = name.split(".")[1]
        assert part != "__init__", f"{path}:{line}: importing llama_jax must stay free, got {name}"
        assert target in allowed(part), f"{path}:{line}: llama_jax.{part} may not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_no_module_imports_the_configs_or_the_tests(path):
    for line, name in imports(path):
        assert name.split(".")[0] not in ("configs", "tests"), f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", CONFIGS, ids=ids(CONFIGS))
def test_configs_import_ml_collections_and_configs_common_alone(path):
    for line, name in imports(path):
        fine = name.split(".")[0] == "ml_collections" or name.startswith("configs.common")
        assert fine, f"{path}:{line}: a config may import ml_collections and configs.common, got {name}"


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_only_parallel_names_mesh_axes(path):
    if part_of(path) == "parallel":
        return
    # "data" is a mesh axis too, but also an everyday word.
    for node in ast.walk(ast.parse(path.read_text())):
        named = isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor", "sequence")
        assert not named, f"{path}:{node.lineno}: names the mesh axis {node.value!r}; use logical axes"


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path}: has no docstring"


IMPORT_ALL = """
import importlib, os, sys
from absl import flags
import llama_jax
assert "jax" not in sys.modules, "import llama_jax imports jax"
import jax  # sets variables of its own while it is imported
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import initialises a jax backend"
assert dict(os.environ) == before, f"an import changes the environment: {set(os.environ.items()) ^ set(before.items())}"
own = [module for module in flags.FLAGS.flags_by_module_dict() if module.startswith("llama_jax")]
assert not own, f"an import defines flags: {own}"
"""


def test_importing_every_module_does_nothing():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    names = [name for name in names if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_value_that_does_not_stand_behind_its_flag_is_refused():
    """`--int8_weights false` would else be on: the word is no value to absl, which hands it over as an argument."""
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.chat", "--checkpoint=none", "--int8_weights", "false"], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: unexpected argument 'false'; expected flags alone, with a value behind '=': --flag=value\n"


def test_help_shows_the_flags_that_commands_share():
    for name, shared in (("train", ("--workdir", "--coordinator")), ("recall", ("--slots", "--mesh_tensor", "--tokenizer"))):
        done = subprocess.run(
            [sys.executable, "-m", f"llama_jax.{name}", "--help"], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert all(f"\n  {flag}:" in done.stdout for flag in shared), done.stdout
