"""Which of two models answers better, as reward models or a language model judge (paper 3.4.1): `python -m llama_jax.compare`.

    python -m llama_jax.compare --first=v2=runs/v2 --second=v1=runs/v1 --prompts=validation.jsonl --output=runs/compare \\
        --helpfulness=runs/helpfulness --safety=runs/safety

A model is `name=checkpoint`, or `name=answers.jsonl` with its answers (`evals/answer_files.py`). The judge is one or two reward
models (with both, the combined reward of 3.2.3), or `--judge=checkpoint` of a language model, or `--judge=http://host/v1`, an
OpenAI-compatible endpoint (`--judge_model` names the model there, OPENAI_API_KEY the key). `results.json` has wins, ties,
losses, garbage and what the judge refused, over all prompts and on the paper's two axes, with ties dropped (Fig. 2) and as one
half, and both reward models' scores (`scores.json` of each prompt); `report.html` shows them. With `--system=v2=v2.txt,v1=...`
a checkpoint answers under the system message in that file (as in 3.4.2, Table 31); the judge sees the prompts without it.

Several opponents or versions (Figs. 2 and 11 whole) are as many runs over the same prompts, by the same judge, whose results

    python -m llama_jax.compare --results=ChatGPT=runs/compare,PaLM=runs/compare_palm --output=runs/opponents

shows in one figure and table beside the paper's points (`evals/comparisons.py`).

Answers, scores and verdicts are kept in the output as they come: a run that is stopped goes on with the same command. Answers
that another checkpoint gave under this name, or this one under other settings, are refused; a judge that has changed, or that
may say more, is asked again. A model that one device cannot hold is split over several (`--mesh_tensor`). On a pod the same
command runs on every host; the first one reads and writes.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.annotation.tasks import read_prompt_list
from llama_jax.convert import one_process
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import Message, decode_response, prompt_key
from llama_jax.data.row_file import RowFile
from llama_jax.evals import comparison_report, comparisons, judges
from llama_jax.evals.answer_files import Answered, pair_up
from llama_jax.evals.endpoint import Endpoint
from llama_jax.evals.origin import identity
from llama_jax.evals.reward_scores import combined, kept_scores
from llama_jax.evals.words import tokenizer_of
from llama_jax.interop.formats import open_source
from llama_jax.kept_answers import (
    Kept,
    Open,
    check_kept,
    check_prompts,
    check_systems,
    collect,
    define_engines,
    is_file,
    opener,
    read_systems,
)
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.hosts import from_host_0, on_host_0
from llama_jax.parallel.mesh import start_distributed
from llama_jax.parallel.output import worked_in
from llama_jax.pretrained import Model, load
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import Request
from llama_jax.training.metrics import Progress

_OF_ONE = ("first", "second", "prompts", "system", "helpfulness", "safety", "judge")  # flags of a new comparison


def reward_outcomes(
    pairs: Sequence[judges.Pair], places: Mapping[str, str], kept: Any, *, tokenizer: str | None
) -> tuple[list[str], comparison_report.Scores]:
    """The outcome of each pair by a reward model's score, or by the combined reward of both, and the scores of each model.

    Args:
      places: {"helpfulness", "safety" or both: where the reward model lies}; one is loaded at a time, if scores are missing.
      kept: the file of scores, see `reward_scores.kept_scores`.
    """
    sides = [[[*pair[side].messages, {"role": "assistant", "content": pair[side].answer}] for pair in pairs] for side in (0, 1)]
    scores = {}
    for track, place in places.items():
        with Progress(2 * len(pairs), f"{track} scores", "answer", quiet=jax.process_index() > 0) as progress:
            both = kept_scores(
                sides[0] + sides[1], kept, judge=from_host_0(functools.partial(identity, place)),
                open_model=functools.partial(load_judge, place, tokenizer), done=progress.update,
            )  # fmt: skip
        scores[track] = both[: len(pairs)], both[len(pairs) :]
    if len(scores) == 1:
        return judges.compare_scores(*scores[track]), scores
    is_safety = np.array([pair[0].is_safety for pair in pairs], bool)
    rewards = [combined(scores["helpfulness"][side], scores["safety"][side], is_safety) for side in (0, 1)]
    return judges.compare_scores(*rewards), scores


def model_as_judge(engine: Engine, model: Model, *, max_tokens: int) -> judges.Ask:
    """A language model of ours as a judge; it refuses a prompt that does not fit its context, or names its control pieces."""

    def encode(dialog: list[Message]) -> list[int] | None:
        try:
            return encode_chat(dialog, model.tokenizer)
        except ValueError:
            # A template that takes no such roles is wrong with all prompts: that ends the run.
            encode_chat([{**message, "content": "Say yes."} for message in dialog], model.tokenizer)
            return None

    def ask(dialogs: Sequence[list[Message]]) -> Iterator[tuple[int, str | None]]:
        prompts = list(map(encode, dialogs))
        fit = [i for i, ids in enumerate(prompts) if ids and len(ids) + max_tokens <= engine.settings.max_length]
        yield from ((i, None) for i in sorted({*range(len(prompts))} - {*fit}))
        finished: list[tuple[int, str]] = []

        def take(i: int, request: Request, token: int) -> None:
            del token
            if request.finish:
                finished.append((i, decode_response(request.tokens, model.tokenizer)[0]))

        for i in sorted(fit, key=lambda i: prompts[i]):  # what begins alike, side by side
            engine.submit(
                prompts[i], max_tokens=max_tokens, choice=Choice(0.0), stop_ids=model.tokenizer.stop_ids,
                on_token=functools.partial(take, i),
            )  # fmt: skip
        while True:
            with jax.set_mesh(model.mesh):
                busy = engine.step()
            yield from finished
            finished.clear()
            if not busy:
                return

    return ask


def main() -> None:
    """Flags to calls."""
    values = flags.FLAGS
    if values.results:
        show_together(values)
        return
    for flag in ("first", "second"):
        if not values[flag].value:
            raise ValueError(f"--{flag}: missing; expected name=checkpoint or name=answers.jsonl (or --results alone)")
    keep_heap()
    rewards = {track: getattr(values, track) for track in comparison_report.TRACKS if getattr(values, track)}
    if bool(rewards) == bool(values.judge):
        raise ValueError("expected a judge: --helpfulness or --safety (reward models), else --judge (a model or an address)")
    places = dict(named(getattr(values, flag), flag) for flag in ("first", "second"))
    if len(places) == 1:
        (name,) = places
        raise ValueError(f"--second: named {name!r} like the first; name them: --first=new=... --second=old=...")
    start_distributed()
    systems = from_host_0(lambda: read_systems(values.system, places))
    with worked_in(values.output) as directory:
        _compare(values, places, systems, rewards, directory)


def show_together(values: Any) -> None:
    """The figure and table of several finished comparisons, by the flags' `values`."""
    one_process("compare --results")
    if given := [flag for flag in _OF_ONE if values[flag].value]:
        raise ValueError(f"--{given[0]}: is of a new comparison; expected --results and --output alone")
    places = command.named("results", values.results, "directory of a finished comparison")
    if os.path.abspath(values.output) in map(os.path.abspath, places.values()):
        raise ValueError(f"--output: {values.output} holds one of --results; expected a directory of its own")
    found = comparisons.read(places)
    with worked_in(values.output) as directory:
        comparisons.write(found, places, directory)
    print(os.path.join(values.output, "report.html"))


def _compare(
    values: Any, places: Mapping[str, str], systems: Mapping[str, str], rewards: Mapping[str, str], directory: Path
) -> None:
    """Answers, verdicts and the report, by the flags' `values`; `systems` has the messages that some models answer under."""
    prompts = from_host_0(lambda: read_prompt_list(values.prompts)) if values.prompts else []
    how = {"choice": Choice(values.temperature, top_p=values.top_p).check(), "max_tokens": values.max_tokens,
           "seed": values.seed, "int8_cache": values.int8_cache}  # fmt: skip
    how = {name: {**how, "system": systems.get(name, "")} for name in places}
    check_systems(systems, prompts)
    for place in rewards.values():  # before the first model answers
        check_judge(place, values.tokenizer)
    for name, place in places.items():
        from_host_0(lambda name=name, place=place: check_kept(name, place, directory, **how[name]))
        if not is_file(place):
            from_host_0(lambda name=name, place=place: _check_prompts(
                name, place, prompts, directory, tokenizer=values.tokenizer, system=how[name]["system"]
            ))  # fmt: skip
    open_model = opener(int8_cache=values.int8_cache)
    answers = {
        name: collect(name, place, prompts, directory, open_model=open_model, **how[name]) for name, place in places.items()
    }
    missing = dict.fromkeys(places, 0)
    if prompts:  # what one of them could not answer is left out, and counted
        had = {name: {prompt_key(answer.messages) for answer in some} for name, some in answers.items()}
        asked = {prompt_key(row["messages"]) for row in prompts}
        missing = {name: len(asked - keys) for name, keys in had.items()}
        shared = asked.intersection(*had.values())
        answers = {name: [a for a in some if prompt_key(a.messages) in shared] for name, some in answers.items()}
    answers = alike_in_safety(answers, prompts)
    pairs = pair_up(*answers.values(), tuple(places))
    if not pairs:
        raise ValueError(f"{values.prompts or values.first}: no prompt that both models answered")
    judged_by = judge_of(values, rewards)
    outcomes, scores = _judge(pairs, directory, values, judged_by, rewards, open_model)

    def finish() -> None:
        first, second = places
        judge = f"{values.judge} {values.judge_model}".strip() or " and ".join(rewards.values())
        counts = {name: count(place, [pair[side] for pair in pairs], missing=missing[name])
                  for side, (name, place) in enumerate(places.items())}  # fmt: skip
        results = {"first": first, "second": second, "judge": judge, "judged_by": judged_by,
                   "prompts": comparison_report.prompt_set(pairs, prompts), "answers": counts,
                   "system": dict(systems)}  # fmt: skip
        comparison_report.write(results, pairs, outcomes, scores, directory)
        print(os.path.join(values.output, "report.html"))

    on_host_0(finish)


def _check_prompts(name: str, place: str, prompts: Sequence[dict[str, Any]], directory: Path, **how: Any) -> None:
    """`check_prompts` of a model that has answered nothing yet: of one that has, the weights may be gone."""
    if not (directory / f"answers_{name}.jsonl").exists():
        check_prompts(place, prompts, **how)


def alike_in_safety(
    answers: Mapping[str, Sequence[Answered]], prompts: Sequence[Mapping[str, Any]]
) -> dict[str, list[Answered]]:
    """Both models' answers with one word on what a prompt is: what the prompts' file says of it, or else any of the answers.
    They were written at other times, or by other programs, and the axes are those of the prompt."""
    said: dict[str, dict[str, Any]] = {}
    for answer in (answer for some in answers.values() for answer in some):
        of = said.setdefault(prompt_key(answer.messages), {"is_safety": False, "category": "", "risk": ""})
        for name in of:
            of[name] = of[name] or getattr(answer, name)
    for row in prompts:
        of = said.setdefault(prompt_key(row["messages"]), {})
        of |= {name: row[name] for name in ("is_safety", "category", "risk") if row.get(name)}
    return {
        name: [dataclasses.replace(answer, **said[prompt_key(answer.messages)]) for answer in some]
        for name, some in answers.items()
    }  # fmt: skip


def count(place: str, judged: Sequence[Answered], *, missing: int) -> dict[str, int]:
    """How many of a model's answers are judged, were not finished, or had less room than was asked for; why others miss."""
    of_file = is_file(place)
    return {
        "judged": len(judged), "unfinished": sum(not answer.ended for answer in judged),
        "less_room": sum(answer.less_room for answer in judged),
        "too_long": 0 if of_file else missing, "not_in_file": missing if of_file else 0,
    }  # fmt: skip


def judge_of(values: Any, rewards: Mapping[str, str]) -> dict[str, Any]:
    """What verdicts depend on beside what is judged: {track: a reward model}, or a language model and its settings."""
    if rewards:
        return {track: from_host_0(functools.partial(identity, place)) for track, place in rewards.items()}
    judge = {"max_tokens": values.judge_tokens}
    if _is_address(values.judge):
        return judge | {"url": values.judge, "model": values.judge_model or "default"}
    return judge | from_host_0(lambda: identity(values.judge)) | {"int8_cache": values.int8_cache}


def _is_address(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def _judge(
    pairs: Sequence[judges.Pair], directory: Path, values: Any, judge: Mapping[str, Any], rewards: Mapping[str, str],
    open_model: Open,
) -> tuple[list[str], comparison_report.Scores]:  # fmt: skip
    """The outcomes, and the scores of reward models; what a judge (`judge_of`) said of a pair before is not asked for again."""
    if rewards:
        kept = Kept(directory / "reward_scores.jsonl")
        try:
            return reward_outcomes(pairs, rewards, kept, tokenizer=values.tokenizer)
        finally:
            kept.close()
    if _is_address(values.judge):
        key = os.environ.get("OPENAI_API_KEY", "")
        ask = Endpoint(values.judge, model=judge["model"], api_key=key, max_tokens=values.judge_tokens)
        found: list[str] = []
        on_host_0(lambda: found.extend(_verdicts(pairs, ask, directory, judge, values.seed)))
        return found, {}
    ask = model_as_judge(*open_model(values.judge), max_tokens=values.judge_tokens)
    return _verdicts(pairs, ask, directory, judge, values.seed, file=Kept), {}


def _verdicts(
    pairs: Sequence[judges.Pair], ask: judges.Ask, directory: Path, judge: Mapping[str, Any], seed: int, *,
    file: Callable = RowFile,
) -> list[str]:  # fmt: skip
    """The outcomes by a judge, whose verdicts are kept."""
    kept = file(directory / "verdicts.jsonl")
    try:
        with Progress(len(pairs), "verdicts", "pair", quiet=jax.process_index() > 0) as progress:
            return judges.ask_judge(pairs, ask, kept, judge=judge, seed=seed, done=progress.update)
    finally:
        kept.close()


def check_judge(place: str, tokenizer: str | None) -> None:
    """Looks at the files of a reward model; raises like `tokenizer_of`, or ValueError if it is none."""
    tokenizer_of(place, tokenizer)
    if open_source(place).head != "reward_head":
        raise ValueError(f"{place}: expected a reward model, found a language model")


def load_judge(place: str, tokenizer: str | None) -> Model:
    """A reward model with its tokenizer; raises like `tokenizer_of`."""
    return load(place, tokenizer=tokenizer_of(place, tokenizer))


def named(item: str, flag: str) -> tuple[str, str]:
    """(name, place) of a flag `--flag=name=place`."""
    name, found, place = item.partition("=")
    if not found:
        raise ValueError(f"--{flag}: expected name=checkpoint or name=answers.jsonl, got {item!r}")
    return name, place


if __name__ == "__main__":
    flags.DEFINE_string("first", None, "name=checkpoint, or name=answers.jsonl: the model whose wins are counted")
    flags.DEFINE_string("second", None, "the same of the other model")
    flags.DEFINE_string("prompts", "", "JSONL file of prompts, where a checkpoint answers")
    flags.DEFINE_list("system", [], "name=file of the system message that a checkpoint answers under (3.4.2, Table 31)")
    flags.DEFINE_list("results", [], "name=directory of each finished comparison, to show them together; with --output alone")
    flags.DEFINE_string("output", None, "directory for answers, verdicts and the report; gs://bucket/... too")
    flags.DEFINE_string("helpfulness", "", "reward model")
    flags.DEFINE_string("safety", "", "reward model; with both, the combined reward judges")
    flags.DEFINE_string("judge", "", "a language model, or the address of an OpenAI-compatible endpoint")
    flags.DEFINE_string("judge_model", "", "the model's name at the endpoint")
    flags.DEFINE_integer("judge_tokens", 512, "longest reply of the judge", lower_bound=1)
    define_engines("answers drawn together, or verdicts")
    flags.DEFINE_float("temperature", 0.6, "of the answers; 0 is greedy")
    flags.DEFINE_float("top_p", 0.9, "nucleus")
    flags.DEFINE_integer("max_tokens", 512, "longest answer", lower_bound=1)
    flags.DEFINE_bool("int8_cache", False, "keep keys and values in 8 bits")
    flags.DEFINE_integer("seed", 0, "of the answers and of the order in which a judge sees them")
    flags.mark_flags_as_required(["output"])
    command.launch(main)
