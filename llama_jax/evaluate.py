"""The paper's evaluation of any checkpoint: `python -m llama_jax.evaluate --config=configs/evaluate.py:academic ...`.

    python -m llama_jax.evaluate --config=configs/evaluate.py:commonsense --checkpoint=runs/base --output=/tmp/evaluation \\
        --tokenizer=runs/corpus/tokenizer.model
    python -m llama_jax.evaluate --config=configs/evaluate.py:academic --output=/tmp/two \\
        --checkpoint=llama=Llama-2-7b-hf,mpt=hf:mosaicml/mpt-7b --data_dir=eval --limit=100

`--checkpoint` lists models side by side: whatever `llama_jax.load` opens, or after `hf:` a model in the harness's own class for
Hugging Face's; `--tokenizer` is for those beside whose weights none lies, as in the workdir of a run. Data come from the hub,
or from `--data_dir` (`evals/local_tasks.py` lists the files). The output has `results.json`, `report.md`, `report.html` and the
plots; a run that was killed goes on where it stopped, and further models and tasks may be added. `NAME/samples/TASK.jsonl`
holds what each question says and scored, for `llama_jax.contamination`, and the answer, or the choices' log-likelihoods.
`--dry_run` only reads and checks data and says what would be asked. A name stands for one model, and a task for one set of
questions: results of others are refused. A model that one device cannot hold is split over several (`--config.mesh_tensor`),
and a pod evaluates it together: the same command on every host, the first one reads and writes.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from llama_jax import command
from llama_jax.config import parse
from llama_jax.evals import benchmarks, evaluation_report, held, sandbox
from llama_jax.evals.groups import GROUPS, family_of, groups, plain, weights
from llama_jax.evals.hugging_face import HuggingFace, check_model, open_model
from llama_jax.evals.lazy import Lazy
from llama_jax.evals.likelihood import ScoringConfig
from llama_jax.evals.origin import claim
from llama_jax.evals.safety import BENCHMARKS, Decoding, Judge, items, part_of, vader
from llama_jax.evals.task_names import CODE, choose, expand, mmlu_parts, of_groups
from llama_jax.evals.tasks import TaskChoice
from llama_jax.evals.words import tokenizer_of
from llama_jax.interop.formats import open_source
from llama_jax.parallel.host import device_memory, keep_heap
from llama_jax.parallel.hosts import first_problem, from_host_0, on_host_0
from llama_jax.parallel.mesh import start_distributed
from llama_jax.parallel.output import worked_in
from llama_jax.pretrained import load

_HF, _OURS = "hf:", "ours="


@dataclasses.dataclass(frozen=True)
class Judges:
    """Where the safety benchmarks' judges lie; "" for none. `ours=PATH` is a reward model, else a transformers classifier:
    `PATH#LABEL` names the label that is read (`data/classifier.py`).

    As judge of toxicity, a safety reward model: toxic is what it calls unsafe, 1 - sigmoid(score).
    """

    truth: str = ""
    informativeness: str = ""
    toxicity: str = ""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated, and how.

    tasks: {task or family: how}; safety: of BENCHMARKS. models: "name=path" each.
    bootstrap: resamples of intervals of differences. paper: models of the paper's tables to stand beside ours.
    tokenizer: of models and judges of ours beside whose weights none lies. mesh_tensor: devices that share each matrix; 0: as
    few as hold a model. slots: answers drawn together; 0: as many as fit, at most 16 on each shard of the batch. int8_cache:
    keys and values in 8 bits. hf: how Hugging Face models are run.
    """

    suite: str
    tasks: dict[str, TaskChoice]
    models: tuple[str, ...]
    safety: tuple[str, ...] = ()
    data_dir: str = ""
    tokenizer: str = ""
    limit: int = 0
    run_code: bool = False
    seed: int = 0
    bootstrap: int = 10_000
    paper: tuple[str, ...] = ()
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    judges: Judges = dataclasses.field(default_factory=Judges)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    mesh_tensor: int = 0
    slots: int = 0
    int8_cache: bool = False
    hf: HuggingFace = dataclasses.field(default_factory=HuggingFace)

    def __post_init__(self):
        if not self.models:
            raise ValueError("models: expected at least one: --checkpoint=PATH, or name=PATH for several")
        if self.mesh_tensor < 0 or self.slots < 0:
            raise ValueError(f"expected mesh_tensor and slots of at least 0, got {self.mesh_tensor}, {self.slots}")
        if self.limit < 0 or self.bootstrap < 1:
            raise ValueError(f"expected limit of at least 0 and bootstrap of at least 1, got {self.limit}, {self.bootstrap}")
        unknown = [name for name in self.safety if name not in BENCHMARKS]
        if unknown:
            raise ValueError(f"safety: {unknown[0]!r} is unknown; expected one of {', '.join(BENCHMARKS)}")


def run(config: EvaluateConfig, output: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Evaluates all models on all tasks, writes the report into `output`, and returns the values of results.json.

    Raises:
      ValueError, FileNotFoundError, ModuleNotFoundError: one sentence; before a model is loaded wherever that can be.
    """
    output, models = Path(output), _named(config.models)
    _check_hosts(config, models)
    tasks, notes = _alike(lambda: _build(config))
    _alike(lambda: _check_models(config, models, output))
    from_host_0(lambda: held.check(output, config, tasks, models))
    for name, path in models.items():
        from_host_0(lambda name=name, path=path: claim(output / name / "model.json", path))
    records: dict[str, dict[str, Any]] = {}
    answers: dict[str, dict[str, Any]] = {}
    for name, path in models.items():
        records[name], answers[name] = _run_model(path, config, tasks, output / name, quiet=quiet)
    # Judges come when the models have gone; a reward model of ours judges on all hosts together.
    judges = _alike(lambda: _judges(config)) if config.safety else {}
    for name, drawn in answers.items():
        said = _judge(name, records[name], drawn, judges) + _lost(name, records[name], drawn)
        notes.extend(note for note in said if note not in notes)
    values: dict[str, Any] = {}
    on_host_0(lambda: values.update(_report(config, models, records, notes, output)))
    return from_host_0(lambda: values)


def dry_run(config: EvaluateConfig, output: str | Path) -> str:
    """Reads and checks all data, and looks at the files of models and judges; says what would be asked, without a model.

    Raises:
      ValueError, FileNotFoundError, ModuleNotFoundError: as `run`, before a model is loaded.
    """
    limit, models = config.limit or None, _named(config.models)
    tasks, notes = _build(config)
    _check_models(config, models, Path(output))
    prompts = {name: len(items(name, data_dir=config.data_dir, limit=limit)) for name in config.safety}
    return "\n".join([benchmarks.overview(tasks, prompts, limit=limit), f"models: {', '.join(models)}", *notes]) + "\n"


def _check_hosts(config: EvaluateConfig, models: Mapping[str, str]) -> None:
    """What runs in one process only is refused on several hosts."""
    if (hosts := jax.process_count()) == 1:
        return
    for path in models.values():
        if path.startswith(_HF):
            raise ValueError(f"{path}: the harness's own class runs in one process, and there are {hosts}: evaluate it alone")


def _named(models: Sequence[str]) -> dict[str, str]:
    """{name: path}; a path without a name is called by its last part."""
    named: dict[str, str] = {}
    for entry in models:
        name, found, path = entry.partition("=")
        if not found:
            name, path = Path(entry.removeprefix(_HF).rstrip("/")).name, entry
        if name in named or not name or not path:
            raise ValueError(f"models: {entry!r}: expected name=path with a name of its own")
        named[name] = path
    return named


def _build(config: EvaluateConfig) -> tuple[dict[str, benchmarks.Built], list[str]]:
    """The tasks by name, in the order of the config, and notes on what is left out."""
    from llama_jax.evals import tasks as table

    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"benchmarks need the package {error.name}: pip install 'llama_jax[eval]'") from None

    benchmarks.quiet_harness()
    names = {task: choice for name, choice in config.tasks.items() for task in expand(name)}
    if config.run_code and any(plain(name) in CODE for name in names):
        sandbox.require()
    built, notes = {}, []
    for name, choice in names.items():
        try:
            task = table.build(name, choice, data_dir=config.data_dir, run_code=config.run_code)
            built[name] = benchmarks.prepare(name, task, choice, limit=config.limit or None)
            if plain(name) in CODE and not config.run_code:
                notes.append(
                    f"{name}: not judged: that runs code which the model wrote. The answers are kept: the same command with "
                    "--run_code judges them in a sandbox, without the model"
                )
        except FileNotFoundError as error:
            notes.append(f"{name}: not run: {error}")
    if not built and not config.safety:
        raise ValueError("; ".join(notes))
    notes += table.notes({name: each.task for name, each in built.items()})
    for name in config.safety:  # sets are read before a model is loaded; the hub's by the host that needs them
        if config.data_dir or jax.process_index() == 0:
            items(name, data_dir=config.data_dir, limit=1)
        if part := part_of(name, config.data_dir):
            notes.append(table.part_note(name, part))
    return built, notes


def _alike(make: Callable[[], Any]) -> Any:
    """What `make` gives, on each host, since it holds functions; where it fails on one, all end."""
    failed: Exception | None = None
    try:
        made = make()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        failed = error
    problem = first_problem(str(failed) if failed else "")
    if failed or problem:
        raise failed or ValueError(problem)
    return made


def _check_models(config: EvaluateConfig, models: Mapping[str, str], output: Path) -> None:
    """Looks at the files of models and judges before the first model runs for hours. One that has results may have gone."""
    from llama_jax.evals.text_judges import check_classifier

    for name, path in models.items():
        if (output / name / "model.json").exists():
            continue
        if path.startswith(_HF):
            check_model(path.removeprefix(_HF), config.hf)
        else:
            tokenizer_of(path, config.tokenizer)
    if "bold" in config.safety:
        vader()
    for name, path in dataclasses.asdict(config.judges).items():
        if config.safety and path.startswith(_OURS):
            place = path.removeprefix(_OURS)
            tokenizer_of(place, config.tokenizer)
            if open_source(place).head != "reward_head":
                raise ValueError(f"judges.{name}: {place}: expected a reward model, found a language model")
        elif config.safety and path and jax.process_index() == 0:  # which alone asks it
            check_classifier(name, path)


def _run_model(
    path: str, config: EvaluateConfig, tasks: Mapping[str, benchmarks.Built], output: Path, *, quiet: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records of one model, {task: record}, and its answers to the safety benchmarks, {benchmark: `benchmarks.Drawn`}.

    It is loaded if something is left to do, and dropped afterwards.
    """
    from llama_jax.evals import code_answers

    limit, records, answers = config.limit or None, {}, {}
    with Lazy(lambda: benchmarks.with_cache(_open(path, config, quiet=quiet), output / "requests.db")) as model:
        for task, built in tasks.items():
            file, lm, keeping = held.record_file(output, task), None, contextlib.nullcontext()
            samples = output / "samples" / f"{file.stem}.jsonl"
            if plain(task) in CODE:
                lm = code_answers.KeptAnswers(model, output / "answers" / file.name)
                if not config.run_code:
                    code_answers.draw(lm, built.task, limit=limit)
                    continue
                keeping = code_answers.kept_outcomes(built.task, output / "requests.db")

            def run_task(task=task, built=built, lm=lm, samples=samples):
                record = benchmarks.run_task(lm or model.get(), task, built.task, built.choice, limit=limit, samples=samples)
                return record | {"questions": built.questions}

            with keeping:
                records[task] = benchmarks.kept(file, run_task)
        for name in config.safety:
            answers[name] = benchmarks.draw_safety(
                model, name, config.decoding, data_dir=config.data_dir, limit=limit, answers=output / "safety" / f"{name}.json"
            )
    return records, answers


def _judge(model: str, records: dict[str, Any], answers: Mapping[str, Any], judges: Mapping[str, Judge]) -> list[str]:
    """Adds a model's records of the safety benchmarks; notes on what could not be judged."""
    notes = []
    for name, drawn in answers.items():
        found, said = benchmarks.judge_safety(name, drawn, judges, model=model)
        records |= found
        notes += said
    return notes


def _lost(name: str, records: Mapping[str, Any], answers: Mapping[str, Any]) -> list[str]:
    """A note on what did not fit a model's context, if anything did not."""
    said = []
    for how, words in (("cut", "requests lost their beginning"), ("less_room", "answers had less room than was asked for")):
        counts = {benchmark: drawn.lost[how] for benchmark, drawn in answers.items() if drawn.lost[how]}
        for task, record in records.items():
            if record.get(how):  # families have up to 57 tasks; results.json has each one's
                counts[family_of(task)] = counts.get(family_of(task), 0) + record[how]
        if counts:
            said.append(f"{words}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    return [f"{name}: longer than the context: {'; '.join(said)}"] if said else []


def _open(path: str, config: EvaluateConfig, *, quiet: bool) -> Any:
    if path.startswith(_HF):
        return open_model(
            path.removeprefix(_HF), config.hf, chat=config.decoding.chat, seed=config.seed, quiet=quiet
        )
    from llama_jax.evals.harness import HarnessModel

    # The type of the products is all that is used of the weights, and nobody else holds them.
    return HarnessModel(
        load(path, dtype="compute", tokenizer=tokenizer_of(path, config.tokenizer), mesh_tensor=config.mesh_tensor),
        scoring=config.scoring, slots=config.slots, int8_cache=config.int8_cache, memory=device_memory(),
        chat=config.decoding.chat, seed=config.seed, quiet=quiet,
    )  # fmt: skip


def _judges(config: EvaluateConfig) -> dict[str, Judge]:
    """The judges that are named."""
    from llama_jax.evals import text_judges

    found = {}
    for name, path in dataclasses.asdict(config.judges).items():
        if path.startswith(_OURS):
            place = path.removeprefix(_OURS)
            found[name] = text_judges.reward_model(load(place, tokenizer=tokenizer_of(place, config.tokenizer)))
            if name == "toxicity":  # a safety reward model: its high scores are safe
                found[name] = text_judges.opposite(found[name])
        elif path:
            judge = text_judges.of_host_0(text_judges.classifier(path) if jax.process_index() == 0 else None)
            found[name] = judge if name == "toxicity" else text_judges.with_question(judge)
    return found


def _report(
    config: EvaluateConfig, models: Mapping[str, str], records: Mapping[str, Mapping[str, Any]], notes: Sequence[str],
    output: Path,
) -> dict[str, Any]:  # fmt: skip
    families = {plain(family_of(task)) for found in records.values() for task in found if ":" in task}
    parts = mmlu_parts() if "mmlu" in families else {}
    whole = {name: expand(name) for name in families & {*itertools.chain(*GROUPS.values())}}
    judges = {name: path for name, path in dataclasses.asdict(config.judges).items() if path and config.safety}
    if judges:
        notes = [*notes, f"judges of the safety benchmarks: {', '.join(f'{name} by {path}' for name, path in judges.items())}"]
    values: dict[str, Any] = {
        "suite": config.suite, "limit": config.limit, "judges": judges, "notes": list(notes), "models": {}
    }  # fmt: skip
    for name, found in records.items():
        values["models"][name] = {
            "path": models[name],
            "tasks": {task: {k: v for k, v in record.items() if k != "scores"} for task, record in found.items()},
            "groups": groups(found, extra=parts, whole=whole),
        }
    first, *others = models
    # The first model's results also stand at the top, where one model is all there is.
    values |= {"tasks": values["models"][first]["tasks"], "groups": values["models"][first]["groups"], "differences": {}}
    for other in others:
        both = benchmarks.comparable(records[first], records[other])
        shares = {
            "groups": {name: weights(name, both, extra=parts) for name in groups(both, extra=parts)},
            "tasks": {name: {name: 1.0} for name in both},
        }
        values["differences"][other] = {"to": first} | {
            kind: {
                name: benchmarks.difference(both, records[other], of_tasks, resamples=config.bootstrap, seed=config.seed)
                for name, of_tasks in named.items()
            }
            for kind, named in shares.items()
        }
    evaluation_report.write(values, output, paper=config.paper)
    return values


def main() -> None:
    """Flags to call."""
    keep_heap()
    start_distributed()
    given = flags.FLAGS
    values = given.config.to_dict()
    values |= {
        "models": (*values["models"], *given.checkpoint), "limit": given.limit, "run_code": given.run_code,
        "data_dir": given.data_dir or values["data_dir"], "tokenizer": given.tokenizer or values["tokenizer"],
    }  # fmt: skip
    values["tasks"] = of_groups(values["tasks"], values.pop("groups"))
    if given.tasks:
        values["tasks"], values["safety"] = choose(values["tasks"], values["safety"], given.tasks)
    config = parse(EvaluateConfig, values)
    if given.dry_run:
        print(dry_run(config, given.output), end="")
        return
    with worked_in(given.output) as output:
        run(config, output)
        if jax.process_index() == 0:
            print((output / "report.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    results = "directory of the results, gs://bucket/... too; an unfinished one is continued"
    command.define("configs/evaluate.py:SUITE", buckets=True, output=results)
    flags.DEFINE_list("checkpoint", [], "models, each PATH or name=PATH; hf:PATH is a Hugging Face model")
    flags.DEFINE_list("tasks", [], "these tasks and safety benchmarks of the suite only; a part is mmlu:anatomy")
    flags.DEFINE_string("data_dir", "", "local files in place of the hub's data sets")
    flags.DEFINE_string("tokenizer", "", "the tokenizer of models and judges of ours beside whose weights none lies")
    flags.DEFINE_integer("limit", 0, "the first N rows of each task; 0: all")
    flags.DEFINE_bool("dry_run", False, "only read and check data and names of models, and say what would be asked")
    flags.DEFINE_bool("run_code", False, "judge HumanEval and MBPP: runs the code that models wrote, in a sandbox")
    command.launch(main)
