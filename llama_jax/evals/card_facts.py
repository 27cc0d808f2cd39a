"""What files say of a checkpoint for its model card (Table 52): its runs with their data and devices, its results, a plan.

A checkpoint of ours is followed back through `start` of the runs' configs, as far as they are still there. Files of a workdir
that are missing or damaged say nothing; a file that the caller names is refused in a sentence. Of paths the last two parts are
kept: cards are published.
"""

import dataclasses
import datetime
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.corpus_build.manifest import read_manifest
from llama_jax.evals.groups import TITLES, families
from llama_jax.evals.origin import identity
from llama_jax.files import read_json
from llama_jax.interop.restore import base_of
from llama_jax.interop.source import Source
from llama_jax.parallel.hosts import file_fact
from llama_jax.paths import absolute, check_bucket, place
from llama_jax.training.fingerprint import CONVERTED, CheckpointError, open_meta
from llama_jax.training.goodput import ATTEMPTS
from llama_jax.training.saved import newest_step
from llama_jax.training.workdir import INPUTS

log = logging.getLogger(__name__)

NOT_SAID = "not said"
DRAWN, _UNKNOWN = "parameters drawn at random", f"weights whose origin is {NOT_SAID}"
_HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)  # of the hub's own cache: the name of the model is sure
_OTHER_MODELS = ("policy", "helpfulness", "safety")  # fields of configs that name workdirs beside `start`


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run on the way to a checkpoint, as its workdir tells it; files that are missing or damaged are empty."""

    step: Path
    meta: Mapping[str, Any]
    config: Mapping[str, Any]
    done: Mapping[str, Any]
    inputs: Mapping[str, Any]
    drawn: Mapping[str, Any]

    @property
    def name(self) -> str:
        """pretrain, sft, ..."""
        return str(self.meta.get("stage", NOT_SAID))

    @property
    def workdir(self) -> Path:
        """Where it lies."""
        return self.step.parent.parent

    def at_end(self, field: str) -> Any:
        """A field of `done`, which speaks of the checkpoint that the run ended with; None if this is another one."""
        best = self.done.get("best_step")  # of a run with early stopping
        ended = str(self.done.get("steps") if best is None else best) == self.step.name
        return self.done.get(field) if ended else None


@dataclasses.dataclass(frozen=True)
class Facts:
    """A checkpoint with the runs that led to it, the first one first, and what was before them, in words."""

    source: Source
    stages: tuple[Stage, ...]
    before: str

    @property
    def kind(self) -> str:
        """What model it is; of other formats than ours nothing says whether a language model is one for dialog."""
        if self.source.head == "reward_head":
            return "reward model"
        if self.source.chat:
            return "chat model"
        return "base model" if self.stages and self.stages[-1].name == "pretrain" else "language model"

    @property
    def trained(self) -> tuple[Stage, ...]:
        """The runs that trained; conversion says nothing of training."""
        return tuple(stage for stage in self.stages if stage.name != CONVERTED)

    @property
    def hub_model(self) -> str:
        """The hub's name of the model that it began with, "" if no path tells it."""
        origin = self.stages[0].meta.get("origin") or {} if self.stages else {"path": self.source.path}
        known = _HUB_CACHE.search(str(origin.get("path", "")))
        return f"{known[1]}/{known[2]}" if known else ""


# ---- the runs ----


def gather(source: Source) -> Facts:
    """Follows a checkpoint of ours back to where its parameters came from, as far as that is still there."""
    if source.format != "llama_jax":
        return Facts(source, (), f"weights in the format {source.format}, from {short(source.path)}")
    stages: list[Stage] = []
    path, before = str(source.path), ""
    while not before:
        try:
            check_bucket(path)
            stage = _stage(path)
        except (CheckpointError, ValueError, OSError, ImportError):  # what was before is the card's concern alone
            before = f"{short(path)}, which cannot be read here"
            break
        if stages and stage.meta.get("tokenizer") != stages[-1].meta.get("tokenizer"):
            before = f"{short(path)}, where a model with another tokenizer lies now"
        elif stage.step in [each.step for each in stages]:
            before = f"{short(path)}, which is that run itself"
        else:
            stages.append(stage)
            path, before = _start(stage)
    return Facts(source, tuple(reversed(stages)), before)


def _stage(path: str) -> Stage:
    step = absolute(newest_step(path))  # one name for each run, however it was called
    files = [_object(step.parent.parent / name) for name in ("config.json", "done.json", INPUTS, "drawn.json")]
    return Stage(step, open_meta(step), *files)


def _start(stage: Stage) -> tuple[str, str]:
    """Where the parameters of a run came from: (another run, ""), or ("", what it was, in words)."""
    if stage.name == CONVERTED:
        origin = stage.meta.get("origin") or {}
        known = origin.keys() >= {"format", "path"}
        return "", f"weights in the format {origin['format']}, from {short(origin['path'])}" if known else _UNKNOWN
    if "lora" in stage.meta:
        try:
            return str(base_of(f"{stage.workdir}@{stage.step.name}")), ""
        except (CheckpointError, OSError):  # not there, or other parameters than the adapters were trained on
            return "", f"{short(stage.meta['lora']['base']['workdir'])}, which cannot be read here"
    start = stage.config.get("start")
    if start in ("", "scratch"):
        return "", DRAWN
    return (start, "") if isinstance(start, str) else ("", _UNKNOWN)


def dates(facts: Facts) -> str:
    """From the first start of the runs to the last checkpoint."""
    if not facts.trained:
        return NOT_SAID
    first, last = facts.trained[0], facts.trained[-1]
    times = [_started(first), _object(last.step / "_CHECKPOINT_METADATA").get("commit_timestamp_nsecs")]
    days = [
        datetime.datetime.fromtimestamp(value / unit, datetime.UTC).date().isoformat() if is_number(value) else NOT_SAID
        for value, unit in zip(times, (1.0, 1e9))
    ]
    return " to ".join(days)


def _started(stage: Stage) -> Any:
    """When a run was first started, in seconds."""
    try:
        with (stage.workdir / ATTEMPTS).open("rb") as file:
            return json.loads(file.readline()).get("started")
    except (OSError, ValueError, AttributeError):
        return None


def devices(stage: Stage) -> str:
    """Over how many devices the parameters of a checkpoint were spread, as Orbax wrote it down."""
    try:
        layout = json.loads(next(iter(_object(stage.step / "params" / "_sharding").values())))
        sizes = dict(zip(layout["axis_names"], layout["shape"], strict=True))
        axes = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return f"{math.prod(sizes.values()):,}" + (f" ({', '.join(axes)})" if axes else "")
    except (StopIteration, ValueError, KeyError, TypeError):  # another version's, or converted
        return NOT_SAID


# ---- their data ----


def corpus(stage: Stage) -> tuple[int, dict[str, tuple[int, int, int, float]]] | None:
    """The corpus of pretraining as it was when the run began, None if that is not there: the length of its rows, and for each
    source documents, tokens, rows, and its share of what was read."""
    data = stage.config.get("data") or {}
    path = data.get("corpus")
    try:
        recorded = stage.inputs.get(f"data.corpus {path}")
        if not recorded or recorded != file_fact(path):
            raise ValueError("not the manifest that the run was begun with")
        manifest = read_manifest(path)
        shares = data.get("weights") or {name: source["share"] for name, source in manifest["sources"].items()}
        return manifest["block_length"], {
            name: (source["documents"], source["tokens"], source["blocks"], shares[name] / sum(shares.values()))
            for name, source in manifest["sources"].items() if name in shares
        }  # fmt: skip
    except (ValueError, OSError, ImportError, KeyError) as error:  # KeyError: of an older version
        log.warning("%s: left out of the model card: %s", path, error)
        return None


def files(stage: Stage) -> list[tuple[str, str, str]]:
    """What a later stage read, and what its samples were drawn from: field, file or model, fingerprint."""
    read = ((*entry.partition(" ")[::2], fact) for entry, fact in stage.inputs.items())
    drawn = (
        (f"{name}: {field}", _named(stage, field), fact)
        for name, noted in stage.drawn.items() for field, fact in noted.get("fingerprints", {}).items()
    )  # fmt: skip
    return [(field, short(path), str(fact)) for field, path, fact in (*read, *drawn)]


def _named(stage: Stage, field: str) -> str:
    """What the config of a run says under a name of `rlhf.drawn`: "policy", "prompts", or "prompts[1]" of several."""
    name, _, number = field.rstrip("]").partition("[")
    own = stage.config.get(stage.name) or {}
    value = stage.config.get(name, own.get(name))
    if number.isdecimal() and isinstance(value, list):
        value = value[int(number)] if int(number) < len(value) else None
    return value if isinstance(value, str) else NOT_SAID


def other_models(stage: Stage) -> dict[str, str]:
    """The models that took part beside the one that was trained, by the fields of the config."""
    return {name: short(str(stage.config[name])) for name in _OTHER_MODELS if stage.config.get(name)}


# ---- what other commands found ----


def evaluation(directory: str, checkpoint: str | os.PathLike) -> dict[str, Any]:
    """What an evaluation found of a checkpoint: {"suite", "limit", "rows"}, the last of them the paper's groups and safety
    benchmarks in the order of its tables.

    Raises:
      ValueError, FileNotFoundError: the directory holds no results of `llama_jax.evaluate`, or none of this checkpoint.
    """
    file = place(directory) / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the results of llama_jax.evaluate, found nothing")
    found = read_json(file)
    models = found.get("models") if isinstance(found, dict) and isinstance(found.get("models"), dict) else {}
    kinds = (isinstance(row, dict) and {"groups", "tasks"} <= row.keys() for row in models.values())
    if not models or not all(kinds):
        raise ValueError(f"{file}: models: expected {{name: groups and tasks}} of llama_jax.evaluate, got something else")
    own = identity(checkpoint)
    for name, model in models.items():
        theirs = _object(place(directory) / name / "model.json")
        if "weights" in own and theirs.get("weights") == own["weights"]:
            bold = {task: row for task, row in model["tasks"].items() if task.partition(":")[0] == "bold"}
            rows = {**model["groups"], **families(bold)}
            ordered = {name: rows[name] for name in TITLES if name in rows}
            return {"suite": found.get("suite"), "limit": found.get("limit"), "rows": ordered}
    raise ValueError(f"{file}: models: expected results of {checkpoint}, got those of other weights: {', '.join(models)}")


def plan(path: str, source: Source) -> dict[str, Any]:
    """A plan of this model for a number of tokens.

    Raises:
      ValueError, FileNotFoundError: naming the field that is not so.
    """
    if not place(path).is_file():
        raise FileNotFoundError(f"{path}: expected the JSON of llama_jax.plan --json, found nothing")
    found = read_json(path)
    if not isinstance(found, dict) or not {"model", "program", "topology", "chips", "run"} <= found.keys():
        raise ValueError(f"{path}: expected the JSON of one plan (llama_jax.plan --json without --search), got something else")
    if found["model"] != source.config.name:
        raise ValueError(f"{path}: model: expected {source.config.name!r}, that of the checkpoint, got {found['model']!r}")
    if not isinstance(found["run"], dict) or not {"tokens", "chip_hours"} <= found["run"].keys():
        raise ValueError(f"{path}: run: expected the hours of a whole run (llama_jax.plan --tokens=...), got {found['run']!r}")
    return found


# ---- small things ----


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a workdir, {} if there is none: a card needs none of them."""
    try:
        found = read_json(path) if path.exists() else {}
    except (ValueError, OSError) as error:
        log.warning("%s: left out of the model card: %s", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def short(path: str | os.PathLike) -> str:
    """The last two parts of a path: enough to know it by, and nothing of whose disk it lies on."""
    return "/".join([part for part in os.fspath(path).split("/") if part.strip(".")][-2:])


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
