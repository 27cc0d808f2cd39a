"""Tools and time in chat models (paper section 5.1, Table 15, Figs. 22, 23): `python -m llama_jax.tool_use`.

    python -m llama_jax.tool_use --checkpoint=ours=runs/chat,other=runs/v5 --output=runs/tools \\
        --data=asdiv=asdiv.parquet,svamp=SVAMP.json,mawps=mawps.jsonl [--search=documents.jsonl]

Word problems (`evals/word_problems.py`) are answered greedily with a calculator, of which a system message tells, and without:
accuracy with Wilson's 95 % intervals and what the calculator adds, beside the paper's Table 15 for the sets of its names; how
many answers call it, and how many calls are malformed or fail. Questions on events under several dates are Fig. 22, questions
for a search in `--search` (JSONL of `title`, `text`; extra `[tools]`) and then the calculator Fig. 23; nobody judges these.

The paper prints neither prompt nor size. The prompts are ours (`evals/tool_prompts.py`), and the report shows them.

`results.json`, `report.md`, `report.html` and `figures/`. Answers are kept in `MODEL/answers.jsonl` as they come, by all that
they depend on: a run that is stopped goes on with the same command, and what was asked before is not asked again when sets or
problems are added. Those of another checkpoint under this name, or with another `--max_tokens`, are refused. On a pod the same
command runs on every host; the first one reads and writes.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from llama_jax import command
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import Message
from llama_jax.data.sources import read_jsonl
from llama_jax.evals import tool_prompts, tool_report, tool_scores
from llama_jax.evals.origin import claim
from llama_jax.evals.tool_answers import Answer, answer_all
from llama_jax.evals.tool_calls import Call, Search, Tool, calculator
from llama_jax.evals.word_problems import Problem, Problems, read
from llama_jax.interop.formats import open_source
from llama_jax.interop.source import require_language_model
from llama_jax.kept_answers import Kept, Open, check_prompts, define_engines, opener
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.hosts import from_host_0, on_host_0
from llama_jax.parallel.mesh import start_distributed
from llama_jax.parallel.output import worked_in
from llama_jax.recall import digest
from llama_jax.training.metrics import Progress


@dataclasses.dataclass(frozen=True)
class Asked:
    """A dialog to be answered with some tools, and a key of all that the answer depends on beside model and settings."""

    key: str
    where: str  # for errors
    messages: Sequence[Message]
    tools: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a model is asked: {set: its problems with the calculator, and without}, Fig. 22 and Fig. 23."""

    problems: Mapping[str, tuple[Sequence[Asked], Sequence[Asked]]]
    times: Sequence[Asked]
    chains: Sequence[Asked]

    def __iter__(self) -> Iterator[Asked]:
        for with_it, without in self.problems.values():
            yield from (*with_it, *without)
        yield from (*self.times, *self.chains)


def plan(sets: Mapping[str, Problems], documents: Sequence[Mapping[str, str]], *, max_calls: int) -> Plan:
    """What is asked of each set, and of documents, if there are any."""
    searched = digest(list(documents))

    def asked(where: str, messages: Sequence[Message], *tools: str) -> Asked:
        depends = [messages, tools, max_calls if tools else 0, searched if "search" in tools else ""]
        return Asked(digest(depends), where, messages, tools)

    def problems(name: str, *tools: str) -> list[Asked]:
        return [
            asked(f"{name}: problem {number}", tool_prompts.problem(problem.question, calculator=bool(tools)), *tools)
            for number, problem in enumerate(sets[name].asked, start=1)
        ]

    return Plan(
        {name: (problems(name, "calculator"), problems(name)) for name in sets},
        [asked("Fig. 22", tool_prompts.at_time(one["question"], one["said"])) for one in tool_prompts.times()],
        [asked("Fig. 23", tool_prompts.chain(question), "search", "calculator")
         for question in tool_prompts.CHAIN_QUESTIONS if documents],
    )  # fmt: skip


def run(
    checkpoints: Mapping[str, str], data: Mapping[str, str], output: Path, *, open_model: Open, max_tokens: int,
    max_calls: int, limit: int = 0, search: str = "", int8_cache: bool = False,
    check: Callable[[str, list[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answers what is not answered yet and writes the report of {name: checkpoint} and {name: file}; returns its values.

    Args:
      limit: problems of each set, the first ones; 0: all.
      search: file of documents; "": Fig. 23 is left out.
      check: looks whether a checkpoint takes all prompts (`kept_answers.check_prompts`).

    Raises:
      ValueError, FileNotFoundError, ModuleNotFoundError, ConfigError: wrong data or settings, no package to search with, or
        answers of another model in `output`; before a model is loaded.
    """
    if not checkpoints or not data:
        raise ValueError("expected at least one --checkpoint=name=checkpoint and one --data=name=file")
    for flag, names in (("checkpoint", checkpoints), ("data", data)):
        command.check_directories(flag, names)
    sets = {name: _problems(path, limit) for name, path in data.items()}
    documents = from_host_0(lambda: read_documents(search)) if search else []
    tools: dict[str, Tool] = {"calculator": calculator, **({"search": Search(documents)} if search else {})}
    asked = plan(sets, documents, max_calls=max_calls)

    def claim_all() -> None:
        for name, place in checkpoints.items():
            if check is not None:
                check(place, [{"messages": one.messages, "where": one.where} for one in asked])
            claim(output / name / "model.json", place, max_tokens=max_tokens, int8_cache=int8_cache)

    from_host_0(claim_all)
    how = {"tools": tools, "open_model": open_model, "max_tokens": max_tokens, "max_calls": max_calls}
    found = {name: collect(name, place, list(asked), output, **how) for name, place in checkpoints.items()}

    def of(some: Sequence[Asked]) -> dict[str, list[Answer]]:
        return {name: [answers[one.key] for one in some] for name, answers in found.items()}

    solved = {
        name: [tool_scores.Solved(some.asked, *both) for both in zip(*(of(way).values() for way in asked.problems[name]))]
        for name, some in sets.items()
    }
    values = {
        "checkpoints": dict(checkpoints), "max_tokens": max_tokens, "max_calls": max_calls,
        "data": {
            name: {"file": str(data[name]), "problems": some.found, "not_numeric": some.not_numeric, "asked": len(some.asked)}
            for name, some in sets.items()
        },
        "search": {"file": search, "documents": len(documents)} if search else None,
        **tool_scores.values_of({name: dict(zip(checkpoints, some)) for name, some in solved.items()}),
        "times": tool_scores.times(of(asked.times)), "chains": tool_scores.chains(of(asked.chains)),
    }  # fmt: skip
    on_host_0(tool_report.write, values, output)
    return values


def _problems(path: str, limit: int) -> Problems:
    """`word_problems.read`, of host 0, on every host."""
    asked, found, not_numeric = from_host_0(lambda: list(dataclasses.asdict(read(path, limit=limit)).values()))
    return Problems(tuple(Problem(**problem) for problem in asked), found, not_numeric)


def read_documents(path: str) -> list[dict[str, str]]:
    """The title and text of each document of a JSONL file. ValueError naming line and field."""
    documents = []
    for where, row in read_jsonl(path):
        for field in ("title", "text"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"{where}: {field}: expected a text, got {row.get(field)!r}; documents have title and text")
        documents.append({"title": row["title"].strip(), "text": row["text"].strip()})
    if not documents:
        raise ValueError(f"{path}: no documents in it")
    return documents


def collect(
    name: str, place: str, asked: Sequence[Asked], output: Path, *, tools: Mapping[str, Tool], open_model: Open,
    max_tokens: int, max_calls: int,
) -> dict[str, Answer]:  # fmt: skip
    """A model's answers by key; those that `MODEL/answers.jsonl` does not have are drawn, and kept there as they come."""
    kept = Kept(output / name / "answers.jsonl")
    try:
        found = {row["key"]: _answer(row) for row in kept.rows}
        if missing := list({one.key: one for one in asked if one.key not in found}.values()):
            engine, model = open_model(place)
            prompts = [encode_chat(one.messages, model.tokenizer, where=one.where) for one in missing]
            quiet = jax.process_index() > 0
            with jax.set_mesh(model.mesh), Progress(len(missing), f"answers of {name}", "answer", quiet=quiet) as progress:

                def done(i: int, answer: Answer) -> None:
                    found[missing[i].key] = answer
                    kept.append({"key": missing[i].key, **dataclasses.asdict(answer)})
                    progress.update()

                answer_all(
                    engine, model.tokenizer, prompts, [{tool: tools[tool] for tool in one.tools} for one in missing],
                    max_tokens=max_tokens, max_calls=max_calls, done=done,
                )  # fmt: skip
    finally:
        kept.close()
    return found


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(row["text"], tuple(Call(**call) for call in row["calls"]), row["unended"], row["end"])


def main() -> None:
    """Flags to call."""
    values = flags.FLAGS
    checkpoints = command.named("checkpoint", values.checkpoint, "checkpoint")
    data = command.named("data", values.data)
    keep_heap()
    start_distributed()
    for place in checkpoints.values():  # before a model is loaded
        require_language_model(open_source(place))
    with worked_in(values.output) as output:
        run(
            checkpoints, data, output, open_model=opener(int8_cache=values.int8_cache), max_tokens=values.max_tokens,
            max_calls=values.max_calls, limit=values.limit, search=values.search, int8_cache=values.int8_cache,
            check=functools.partial(check_prompts, tokenizer=values.tokenizer),
        )  # fmt: skip
        on_host_0(print, os.path.join(values.output, "report.html"))


if __name__ == "__main__":
    flags.DEFINE_list("checkpoint", None, "name=checkpoint of each chat model")
    flags.DEFINE_list("data", None, "name=file of each set of word problems; asdiv, svamp and mawps stand beside the paper's")
    flags.DEFINE_string("output", None, "directory of answers and report, gs://bucket/... too; an unfinished one is continued")
    flags.DEFINE_string("search", "", "JSONL file of documents with title and text, for Fig. 23")
    flags.DEFINE_integer("limit", 0, "problems of each set, the first ones; 0: all", lower_bound=0)
    flags.DEFINE_integer("max_calls", 8, "calls of an answer", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 512, "longest answer, without the results of its calls", lower_bound=1)
    flags.DEFINE_bool("int8_cache", False, "keep keys and values in 8 bits")
    define_engines()
    flags.mark_flags_as_required(["checkpoint", "data", "output"])
    command.launch(main)
