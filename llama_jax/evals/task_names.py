"""Names of benchmarks, and which of them a run takes.

A task is named "hellaswag", or "mmlu:anatomy" within a family; "nq_open@1" is one with 1 example; any other name is the
harness's. A suite's tasks are chosen by name or by the groups of Table 3 (`groups.py`); `tasks.py` builds what was chosen.
"""

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.evals import long_context
from llama_jax.evals.groups import GROUPS, family_of, plain

CODE = ("humaneval", "mbpp")  # they run what the model writes
AGIEVAL = (
    "aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-en-without-passage", "sat-math",
)  # fmt: skip
_FILES = {
    "hellaswag": "hellaswag/hellaswag", "piqa": "piqa/piqa", "siqa": "siqa/siqa", "winogrande": "winogrande/default",
    "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "openbookqa": "openbookqa/openbookqa",
    "commonsense_qa": "commonsense_qa/default", "boolq": "super_glue/boolq/default", "nq_open": "nq_open/nq_open",
    "triviaqa": "triviaqa/default", "gsm8k": "gsm8k/gsm8k-cot",
}  # fmt: skip
_FOLDERS = {
    "mmlu": ("mmlu/default", "mmlu_"), "bbh": ("bbh/cot_fewshot", ""), "agieval": ("agieval", ""),
    "math": ("minerva_math", "minerva_math_"),
}  # fmt: skip
OURS = ("humaneval", "mbpp", "squad", "quac", *long_context.PARTS)
NAMES = (*_FILES, *_FOLDERS, *OURS)


def expand(name: str) -> list[str]:
    """A family as its tasks, any other task as itself.

    Raises:
      ValueError: a name that nobody knows, with the nearest ones.
    """
    task, at, shots = name.partition("@")
    if at and not shots.isdecimal():
        raise ValueError(f"task {name!r}: expected a number of examples behind the @")
    if task in _FILES or task in OURS or task.partition(":")[0] in _FOLDERS and ":" in task:
        return [name]
    if task == "agieval":
        return [f"agieval:{part}{at}{shots}" for part in AGIEVAL]
    if task in _FOLDERS:
        folder, prefix = _FOLDERS[task]
        files = (path.stem for path in (harness_folder() / folder).glob("*.yaml"))
        parts = [stem.removeprefix(prefix) for stem in sorted(files) if stem.startswith(prefix) and _is_task(stem)]
        return [f"{task}:{part}{at}{shots}" for part in parts]
    if task in _index():
        return [name]
    # Ours first: among the harness's there is always one that is alike.
    raise ValueError(f"task {name!r} is unknown{_did_you_mean(task, NAMES) or _did_you_mean(task, [*NAMES, *_index()])}")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def of_groups(choices: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of a suite's tasks that belong to the named groups of Table 3; without names all of them.

    Raises:
      ValueError: a group that nobody knows.
    """
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"groups: {name!r} is unknown; expected some of {', '.join(GROUPS)}")
    wanted = {family_of(task) for name in names for task in GROUPS[name]}
    return {name: how for name, how in choices.items() if not names or family_of(name) in wanted}


def choose(
    choices: Mapping[str, Any], safety: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Those of a suite's tasks that are named, or of which a part is (mmlu:anatomy), and those of its safety benchmarks;
    "nq_open@1" is nq_open with 1 example.

    Raises:
      ValueError: a name that is not in the suite, with what is and the nearest names.
    """
    chosen = {}
    for name in names:
        task, at, shots = name.partition("@")
        if name in safety:
            continue
        if family_of(name) in choices:
            chosen[name] = choices[family_of(name)]
        elif at and family_of(task) in choices:
            expand(name)  # says what is wrong with its number
            chosen[name] = {**choices[family_of(task)], "shots": int(shots)}
        else:
            kinds = (("the tasks", choices), ("the safety benchmarks", safety))
            has = " and ".join(f"{kind} {', '.join(members)}" for kind, members in kinds if members)
            raise ValueError(
                f"task {name!r} is not in this suite, which has {has or 'none'}{_did_you_mean(task, [*choices, *safety])}; "
                "`python -m llama_jax.harness` runs any task of the harness"
            )
    return chosen, tuple(name for name in safety if name in names)


def mmlu_parts() -> dict[str, list[str]]:
    """MMLU's four groups of Table 19, by the tags of the harness."""
    parts: dict[str, list[str]] = {}
    for task in expand("mmlu"):
        parts.setdefault(load_settings(file_of(task))["tag"].removesuffix("_tasks"), []).append(task)
    return parts


def sets_of(name: str) -> list[str]:
    """The larger sets of questions that a task is a part of: its family, and of MMLU the group of Table 19."""
    task = plain(name)
    if ":" not in task:
        return []
    return [family_of(task), *(part for part, members in _parts_of_mmlu().items() if task in members)]


@functools.cache
def _parts_of_mmlu() -> dict[str, list[str]]:
    return mmlu_parts()


# ---- files of the harness ----


def file_of(name: str) -> Path:
    """The harness's file of one of its tasks.

    Raises:
      ValueError: a part that its family does not have, with the nearest ones.
    """
    family, _, part = name.partition(":")
    if family not in _FOLDERS:
        return harness_folder() / f"{_FILES[name]}.yaml" if name in _FILES else _index()[name]
    folder, prefix = _FOLDERS[family]
    path = harness_folder() / folder / f"{prefix}{part}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, expand(family), n=3, cutoff=0.3)
        raise ValueError(f"task {name!r} is unknown; did you mean {' or '.join(near) or family}?")
    return path


def load_settings(path: Path) -> dict[str, Any]:
    """A YAML file of the harness, with the functions that it names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(path))


def harness_folder() -> Path:
    """Where the harness keeps its tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@functools.cache
def _index() -> Mapping[str, Path]:
    """{name: file} of every single task of the harness. Its own index parses some ten thousand files, for a quarter minute."""
    named = re.compile(rb"^['\"]?task['\"]?:[ \t]*['\"]?([^\s'\"#]+)['\"]?[ \t]*(?:#.*)?$", re.MULTILINE)
    found = ((named.search(path.read_bytes()), path) for path in sorted(harness_folder().rglob("*.yaml")))
    return {match[1].decode(): path for match, path in found if match}


def _is_task(stem: str) -> bool:
    return not stem.startswith("_") and not stem.endswith("500")
