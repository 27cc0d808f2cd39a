"""The benchmarks of Tables 3 and 16 to 25 as tasks of the harness: its own prompts and metrics, with the paper's shots.

HumanEval, MBPP, SQuAD, QuAC and SCROLLS (`long_context.py`) are task settings of ours: the harness has them otherwise (code
would run outside a sandbox; a script of the hub would score), or not at all. No example is a row that is scored.
Where the paper's own prompts differ is unknown; they were never published (fact sheet 2.3). Names: `task_names.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.evals import local_rows, local_tasks, long_context, quac, spans
from llama_jax.evals.code_judge import CodeJudge
from llama_jax.evals.groups import BY_QUESTION, family_of, plain
from llama_jax.evals.task_names import CODE, NAMES, OURS, file_of, load_settings

Settings = dict[str, Any]
# With how many examples AGIEval's own prompts come; the paper says 3 to 5.
_AGIEVAL_SHOTS = {"aqua-rat": 5, "sat-math": 5}


@dataclasses.dataclass(frozen=True)
class TaskChoice:
    """How a task is run: examples before each question, the metric that is reported, and the filter of answers it needs.

    For code: samples for each problem, their temperature and top-p, and the k of pass@k beside the metric's.
    """

    shots: int
    metric: str
    filter: str = "none"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    k: tuple[int, ...] = (1,)

    def __post_init__(self):
        if self.shots < 0 or self.samples < max(self.k, default=1) or not 0 < self.top_p <= 1 or self.temperature < 0:
            raise ValueError(f"expected shots of at least 0, samples for every k, sensible sampling, got {self}")


def build_settings(name: str, choice: TaskChoice = TaskChoice(0, "acc")) -> Settings:  # noqa: B008
    """The settings of a task, from the harness's own or ours, with what is changed of them."""
    task = plain(name)
    settings = _OWN[task](choice) if task in OURS else _stock(task)
    settings |= _CHANGES.get(family_of(task), {})
    if longest := _LONGEST.get(family_of(task)):
        settings["generation_kwargs"] = {**settings["generation_kwargs"], "max_gen_toks": longest}
    return settings


def build(name: str, choice: TaskChoice, *, data_dir: str = "", run_code: bool = False) -> Any:
    """The harness's task object, from the hub or, with `data_dir`, from local files. Without `run_code` no program is judged.

    Raises:
      ValueError, FileNotFoundError: local files that lack rows or columns.
      ConnectionError: a data set that is not in the cache, and no hub.
    """
    task, at, shots = name.partition("@")
    if at and shots != str(choice.shots):
        raise ValueError(f"{name}: expected shots={shots}, as it is named, got {choice.shots}")
    settings = build_settings(name, choice)
    if task in CODE:
        settings["process_results"] = dataclasses.replace(settings["process_results"], name=name, allowed=run_code)
    settings |= {"task": name.replace(":", "_"), "num_fewshot": choice.shots}
    if choice.metric in ("acc", "acc_norm", "acc_mutual_info"):
        settings["metric_list"] = [{"metric": choice.metric, "aggregation": "mean", "higher_is_better": True}]
    if choice.temperature and settings.get("output_type", "generate_until") == "generate_until":
        sampling = {"do_sample": True, "temperature": choice.temperature, "top_p": choice.top_p}
        settings["generation_kwargs"] = {**(settings.get("generation_kwargs") or {}), **sampling}
    layout = local_tasks.layout(name)
    held_out, part = False, ""
    if data_dir:
        if layout is None:
            raise ValueError(f"{name}: has no layout of local files; leave --data_dir out to read the hub's data set")
        settings |= local_tasks.settings(data_dir, layout, choice.shots)
        file = local_tasks.pick(data_dir, layout.test)
        part = file.name if file.part else ""
        held_out = bool(choice.shots and layout.unit is not None)
        if choice.shots and not settings["fewshot_split"] and "samples" not in (settings.get("fewshot_config") or {}):
            raise ValueError(f"{name}: {choice.shots} shots, but its local files have no examples; expected shots=0")
    elif choice.shots and family_of(task) == "agieval":
        settings |= _first_rows_as_examples(settings, min(choice.shots, _AGIEVAL_SHOTS.get(task.partition(":")[2], 3)))
        held_out = True
    if choice.shots:
        _check_examples(name, settings)
    for key in ("tag", "group", "class", "task_alias"):
        settings.pop(key, None)
    made = _make(name, settings)
    made.held_out, made.part = held_out, part
    return made


def notes(built: Mapping[str, Any]) -> list[str]:
    """What a report has to say of how tasks were built. # {name: what `build` gave}"""
    said = [
        part_note(family, part)
        for family, part in dict.fromkeys((plain(family_of(name)), task.part) for name, task in built.items() if task.part)
    ]
    if held_out := dict.fromkeys(family_of(name) for name, task in built.items() if task.held_out):
        words = "the examples are the first rows of the set that is scored, and are left out of the score"
        said.append(f"{', '.join(held_out)}: {words}")
    return said


def part_note(family: str, file: str) -> str:
    """What a report has to say where a task was read from a part of its set."""
    evenly = "; its tasks may be of one size in it, while the paper's average is over all questions"
    words = f"{family}: read from {file}, which holds a part of the set, so not the questions of the paper's number"
    return words + (evenly if family in BY_QUESTION else "")


def _first_rows_as_examples(settings: Settings, count: int) -> Settings:
    """Settings of a hub's set that has no rows but the scored ones: the first of them become a split of examples."""
    scored = settings["test_split"]

    def load(**_: Any) -> dict[str, Any]:
        from datasets import load_dataset  # an extra

        rows = load_dataset(settings["dataset_path"], settings.get("dataset_name"), split=scored)
        return {"examples": rows.select(range(count)), scored: rows.select(range(count, len(rows)))}

    few = {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": count}
    return {"custom_dataset": load, **few}


def _check_examples(name: str, settings: Settings) -> None:
    """Refuses examples that would be drawn from the rows that are scored, and more of them than a prompt's own list has."""
    config, split = settings.get("fewshot_config") or {}, settings.get("fewshot_split")
    shots, samples = settings["num_fewshot"], config.get("samples")
    split = split or config.get("split")
    if split is None and samples is not None:
        count = len(samples() if callable(samples) else samples)
        if count < shots:
            raise ValueError(f"{name}: expected at most {count} shots, which its own prompt has, got {shots}")
        return
    # The harness's order.
    split = split or settings.get("training_split") or settings.get("validation_split") or settings.get("test_split")
    if split == (settings.get("test_split") or settings.get("validation_split")):
        raise ValueError(f"{name}: {shots} shots, but its set has no rows but those that are scored; expected shots=0")


def _make(name: str, settings: Settings) -> Any:
    from lm_eval.api.task import ConfigurableTask

    class Task(ConfigurableTask):
        """The harness's, but programs of all problems are run together before they are asked about one by one, and what a
        choice's likelihood is divided by is that behind "Answer:", as for Llama 1; the harness has it behind nothing."""

        def construct_requests(self, doc, ctx, **kwargs):
            made = super().construct_requests(doc, ctx, **kwargs)
            if isinstance(made, list) and "acc_mutual_info" in self.higher_is_better():
                for request in made[len(made) // 2 :]:
                    request.arguments = ("Answer:", *request.arguments[1:])
            return made

        def apply_filters(self):
            super().apply_filters()
            if isinstance(judge := self.config.process_results, CodeJudge):
                judge.run([(request.doc, request.filtered_resps["none"]) for request in self.instances])

    try:
        task = Task(config=settings)
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: the hub's data set {settings['dataset_path']!r} is not in the cache, and the hub was not reached; "
            "expected a network, or local files by --data_dir"
            if "://" not in settings["dataset_path"] else f"{name}: {error}; expected a network, or local files by --data_dir"
        ) from error
    task.set_fewshot_seed(1234)  # the harness's own
    return task


def _stock(name: str) -> Settings:
    """The settings of a task of the harness, functions resolved."""
    path = file_of(name)
    try:
        settings = load_settings(path)
    except (ModuleNotFoundError, AssertionError) as error:  # an assertion: in another version. The harness's words name others.
        missing = getattr(error.__cause__ or error, "name", None) or str(error)
        extra = "'llama_jax[eval]'" if family_of(name) in NAMES else missing
        raise ModuleNotFoundError(f"{name}: needs the package {missing}: pip install {extra}", name=missing) from error
    if "class" in settings or settings.get("output_type") is None and not isinstance(settings.get("task"), str):
        raise ValueError(f"task {name!r}: expected a single task of the harness with settings in YAML")
    return settings


# ---- task settings of ours ----


def _humaneval(choice: TaskChoice) -> Settings:
    def programs(doc, texts):
        return [f"{doc['prompt']}{text}\n{doc['test']}\ncheck({doc['entry_point']})\n" for text in texts]

    return _code(
        choice, programs, dataset_path="openai/openai_humaneval", test_split="test", doc_to_text="{{prompt}}",
        doc_to_target="{{canonical_solution}}", until=["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
    )  # fmt: skip


def _mbpp(choice: TaskChoice) -> Settings:
    def programs(doc, texts):
        tests = "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]])
        return [f"{text}\n{tests}\n" for text in texts]

    prompt = (
        "You are an expert Python programmer, and here is your task: {{text}} Your code should pass these tests:\n\n"
        "{{test_list | join('\n')}}\n[BEGIN]\n"
    )
    return _code(
        choice, programs, dataset_path="google-research-datasets/mbpp", dataset_name="full", test_split="test",
        doc_to_text=prompt, doc_to_target="{{code}}\n[DONE]", target_delimiter="", until=["[DONE]"], fewshot_split="prompt",
        fewshot_config={"sampler": "first_n", "process_docs": _for_prompts},
    )  # fmt: skip


def _for_prompts(dataset: Any) -> Any:
    """The tasks of MBPP that examples are taken from."""
    return dataset.filter(lambda row: row["task_id"] >= local_rows.MBPP_FIRST)


def _code(choice: TaskChoice, programs: Callable, *, until: list[str], **settings: Any) -> Settings:
    """A task whose answers are run; its metrics are pass@k."""
    return {
        "output_type": "generate_until", "repeats": choice.samples, "process_results": CodeJudge(programs, choice.k),
        "generation_kwargs": {"until": until, "max_gen_toks": 512, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": choice.samples}]}],
        "metric_list": [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in choice.k],
        **settings,
    }  # fmt: skip


def _squad(choice: TaskChoice) -> Settings:
    """SQuAD 2.0 with the prompt of GPT-3's paper; what the background does not answer is to be called unanswerable."""

    def flat(dataset):
        return dataset.map(lambda row: {"answers": row["answers"]["text"]}, remove_columns=["answers"])

    def judge(doc, results):
        references = doc["answers"] or ["unanswerable"]
        return {"exact_match": spans.exact(results[0], references), "f1": spans.f1(results[0], references)}

    return _reading(
        judge, dataset_path="rajpurkar/squad_v2", test_split="validation", fewshot_split="train", process_docs=flat,
        description="Answer from the background. If it holds no answer, answer: unanswerable\n\n",
        doc_to_text="Title: {{title}}\n\nBackground: {{context}}\n\nQ: {{question}}\n\nA:",
        doc_to_target="{{answers[0] if answers else 'unanswerable'}}",
    )  # fmt: skip


def _quac(choice: TaskChoice) -> Settings:
    """QuAC with the prompt of GPT-3's paper: the dialog so far with its true answers; an example is a whole dialog."""

    def judge(doc, results):
        text, references = results[0], doc["answers"]
        return {"exact_match": spans.exact(text, spans.that_agree(references)), "f1": spans.f1_of_raters(text, references)}

    return _reading(
        judge, dataset_path=quac.ADDRESS.format(split="val"), custom_dataset=lambda **_: quac.download(shots=choice.shots),
        test_split="validation", fewshot_split="train" if choice.shots else None, fewshot_config={"sampler": "first_n"},
        doc_to_text="Title: {{title}}\n\nBackground: {{context}}\n\n{{dialog}}", doc_to_target="{{answers[0]}}",
    )  # fmt: skip


def _reading(judge: Callable, **settings: Any) -> Settings:
    return {
        "output_type": "generate_until", "process_results": judge,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("exact_match", "f1")
        ],
        **settings,
    }  # fmt: skip


_OWN: dict[str, Callable[[TaskChoice], Settings]] = {
    "humaneval": _humaneval, "mbpp": _mbpp, "squad": _squad, "quac": _quac,
    **{part: lambda choice, part=part: long_context.settings(part) for part in long_context.PARTS},
}  # fmt: skip
def _answer_first(dataset: Any) -> Any:
    """TriviaQA's answer as the first of its aliases: it is what an example shows. The others may be of another town or year.
    And the question with one mark at its end: the harness's prompt puts a second one behind that of the row."""

    def sorted_row(row: dict[str, Any]) -> dict[str, Any]:
        answer = {**row["answer"], "aliases": local_rows.aliases(row["answer"]["value"], row["answer"]["aliases"])}
        return {**row, "question": local_rows.asked(row["question"]), "answer": answer}

    return dataset.map(sorted_row)


# An answer ends with its line, and a dot or comma at its end does not count, as for Llama 1 (fact sheet 2.3). The harness cuts
# at the first one, which no "January 31, 2018", "10,605" or "Dr. Jesse Bennett" survives.
_LINE = {"until": ["\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 64}
# What is changed of the harness's own tasks.
_CHANGES: dict[str, Settings] = {
    "nq_open": {"generation_kwargs": _LINE},
    # The filtered questions with Wikipedia's pages, as the paper has them; the harness takes those of the web too. Articles do
    # not count, as in the harness's NaturalQuestions.
    "triviaqa": {
        "dataset_name": "rc.wikipedia.nocontext", "process_docs": _answer_first, "generation_kwargs": _LINE,
        "metric_list": [{
            "metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
            "ignore_punctuation": True, "regexes_to_ignore": [r"\b(?:The |the |An |A |The |a |an )"],
        }],
    },
    # The target is a list of one, which the harness cannot write into an example.
    "agieval": {"doc_to_target": "{{gold[0]}}"},
}
# Tokens of the longest answer, where that is a whole solution: with a token for each digit many have more than the usual 256.
_LONGEST = {"math": 1024, "gsm8k": 512}
