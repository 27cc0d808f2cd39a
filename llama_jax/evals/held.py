"""What the output of an evaluation holds of earlier commands: compared with a further one before any model is loaded.

    OUTPUT/config.json            what all results share, and how each task was run by the commands so far
    OUTPUT/NAME/tasks/TASK.json   what a model scored, with a digest of the questions it was asked
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ConfigError, describe, differences
from llama_jax.evals.benchmarks import Built
from llama_jax.files import read_json, write_json

# What costs no model anything, how many devices, answers and rows a model takes at once, and which safety benchmarks are run.
_FREE = ("models", "judges", "paper", "bootstrap", "run_code", "mesh_tensor", "slots", "tokenizer", "safety")


def record_file(model: Path, task: str) -> Path:
    """Where a model's record of a task lies."""
    return model / "tasks" / f"{task.replace(':', '.')}.json"


def check(output: Path, config: Any, tasks: Mapping[str, Built], models: Iterable[str]) -> None:
    """Keeps the config in the output, and adds the tasks of this command to it.

    Raises:
      ConfigError: the results there were made under another config, or a task in another way or on other questions.
    """
    path, new = output / "config.json", _shared(describe(config))
    new["hf"] = {key: value for key, value in new["hf"].items() if key != "batch_size"}
    new["tasks"] = {task: describe(built.choice) for task, built in tasks.items()}
    if path.exists():
        held = _shared(read_json(path))
        both = held["tasks"].keys() & new["tasks"].keys()
        if changed := differences(*({**each, "tasks": {task: each["tasks"][task] for task in both}} for each in (held, new))):
            raise ConfigError(f"{output}: holds an evaluation under another config: {'; '.join(changed)}")
        new["tasks"] = held["tasks"] | new["tasks"]
    _check_questions(output, tasks, models)
    write_json(path, new)


def _check_questions(output: Path, tasks: Mapping[str, Built], models: Iterable[str]) -> None:
    """Differences between models are of pairs of scores, and notes on the data are of what is scored."""
    files = ((record_file(output / name, task), built.questions) for name in models for task, built in tasks.items())
    others = [
        file for file, questions in files
        if file.exists() and read_json(file).get("questions") != questions
    ]  # fmt: skip
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise ConfigError(
            f"{others[0]}{more}: scores of other questions, examples or prompts than the data and the harness have now; remove "
            "them to score these (what a model was asked before is not asked again), bring the former ones back, or give "
            "another --output"
        )


def _shared(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _FREE}
