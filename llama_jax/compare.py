"""Which of two models answers better, as reward models or a language model judge (paper 3.4.1): `python -m llama_jax.compare`.

    python -m llama_jax.compare --first=v2=runs/v2 --second=v1=runs/v1 --prompts=validation.jsonl --output=runs/compare \\
        --helpfulness=runs/helpfulness --safety=runs/safety

A model is `name=checkpoint`, or `name=answers.jsonl` with its answers (`evals/answer_files.py`). The judge is one or two reward
models (with both, the combined reward of 3.2.3), or `--judge=checkpoint` of a language model, or `--judge=http://host/v1`, an
OpenAI-compatible endpoint (`--judge_model` names the model there, OPENAI_API_KEY the key). `results.json` has wins, ties,
losses, garbage and what the judge refused, over all prompts and on the paper's two axes, with ties dropped (Fig. 2) and as one
half; `report.html` shows them. Answers and verdicts are kept in the output as they come: a run that is stopped goes on with the
same command. Answers that another checkpoint gave under this name, or this one under other settings, are refused.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.annotation.tasks import read_prompt_list
from llama_jax.chat import make_engine
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import Message, decode_response
from llama_jax.data.row_file import RowFile
from llama_jax.evals import judges, plots
from llama_jax.evals.answer_files import Answered, pair_up, prompt_key, read_answers
from llama_jax.evals.endpoint import Endpoint
from llama_jax.evals.model_figures import win_rate_axes
from llama_jax.evals.origin import claim, origin
from llama_jax.evals.page import Chapter, page
from llama_jax.evals.report_sections import Table
from llama_jax.evals.reward_scores import score_dialogs
from llama_jax.files import write_json
from llama_jax.parallel.host import keep_heap
from llama_jax.pretrained import Model, load
from llama_jax.reward.held_out import sigmoid
from llama_jax.reward.score import SAFETY_THRESHOLD
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import EngineConfig
from llama_jax.training.metrics import Progress

Load = Callable[[str], Model]


def collect(
    name: str, place: str, prompts: Sequence[dict[str, Any]], directory: Path, *, load_model: Load, **how: Any
) -> list[Answered]:
    """A model's answers: read from a file, or drawn by a checkpoint (see `draw_answers`) and kept in `answers_<name>.jsonl`.

    Prompts that do not fit a checkpoint's context get no answer; nothing is cut.

    Raises:
      ConfigError: what is kept was drawn by another checkpoint, or otherwise.
    """
    if _is_file(place):
        return read_answers(place)
    if not prompts:
        raise ValueError("--prompts: missing; a checkpoint needs prompts to answer")
    check_kept(name, place, directory, **how)
    kept = RowFile(directory / f"answers_{name}.jsonl")
    try:
        if missing := _unanswered(prompts, kept):
            draw_answers(load_model(place), missing, kept, name=name, **how)
    finally:
        kept.close()
    wanted = {prompt_key(row["messages"]) for row in prompts}
    answers = read_answers(kept.path) if kept.rows else []
    return [answer for answer in answers if prompt_key(answer.messages) in wanted]


def check_kept(name: str, place: str, directory: Path, *, choice: Choice, max_tokens: int, seed: int, **how: Any) -> None:
    """Refuses to go on with answers that another checkpoint gave under this name, or this one under other settings."""
    del how  # the slots: what is drawn together changes no answer
    if not _is_file(place):
        claim(
            directory / f"model_{name}.json", place, temperature=choice.temperature, top_p=choice.top_p,
            max_tokens=max_tokens, seed=seed,
        )  # fmt: skip


def _is_file(place: str) -> bool:
    return place.endswith((".jsonl", ".jsonl.gz"))


def _unanswered(prompts: Sequence[dict[str, Any]], kept: RowFile) -> list[tuple[int, dict[str, Any]]]:
    done = {prompt_key(row["messages"]) for row in kept.rows}
    return [(number, row) for number, row in enumerate(prompts) if prompt_key(row["messages"]) not in done]


def draw_answers(
    model: Model, prompts: Sequence[tuple[int, dict[str, Any]]], kept: RowFile, *, name: str, choice: Choice, max_tokens: int,
    slots: int, seed: int,
) -> None:  # fmt: skip
    """Appends the answer to each (number, prompt), many drawn together; what a prompt draws depends on (seed, number) alone."""
    encoded = [(number, row, encode_chat(row["messages"], model.tokenizer)) for number, row in prompts]
    eos = model.tokenizer.eos_id
    with jax.set_mesh(model.mesh), Progress(len(encoded), f"answers of {name}", "answer") as progress:
        engine = make_engine(model, EngineConfig(slots=slots, max_length=model.config.max_length))

        def finished(row: dict[str, Any], request: Any, token: int) -> None:
            del token
            if request.finish:
                text, _ = decode_response(request.tokens, model.tokenizer)
                known = {field: row[field] for field in ("is_safety", "category", "risk")}
                kept.append({"messages": row["messages"], "answer": text, **known})
                progress.update()

        for number, row, ids in encoded:
            room = engine.settings.max_length - len(ids)
            if room < 1:
                continue  # counted by `run`, which finds no answer
            engine.submit(
                ids, max_tokens=min(max_tokens, room), choice=choice, seed=seed, index=number, stop_ids=(eos,),
                on_token=functools.partial(finished, row),
            )  # fmt: skip
        while engine.step():
            pass


def reward_outcomes(
    pairs: Sequence[judges.Pair], helpfulness: Model | None, safety: Model | None
) -> tuple[list[str], list[dict[str, float]]]:
    """The outcome of each pair by one reward model's score, or by the combined reward of both; and the scores."""

    def scores(model: Model, side: int) -> np.ndarray:
        dialogs = [[*pair[side].messages, {"role": "assistant", "content": pair[side].answer}] for pair in pairs]
        with Progress(len(dialogs), "scores", "answer") as progress:
            logits = score_dialogs(
                model.params, model.config, model.tokenizer, dialogs, compute=model.compute, mesh=model.mesh,
                done=progress.update,
            )  # fmt: skip
        return sigmoid(logits)

    is_safety = np.array([pair[0].is_safety for pair in pairs])
    found = []
    for side in (0, 1):
        helpful, safe = (None if model is None else scores(model, side) for model in (helpfulness, safety))
        if helpful is None or safe is None:
            found.append(helpful if safe is None else safe)
        else:  # R_c of 3.2.3
            found.append(np.where(is_safety | (safe < SAFETY_THRESHOLD), safe, np.where(np.isnan(safe), safe, helpful)))
    rows = [{"first": a, "second": b} for a, b in zip(found[0].tolist(), found[1].tolist())]
    return judges.compare_scores(*found), rows


def model_as_judge(model: Model, *, max_tokens: int, rows: int = 16) -> judges.Ask:
    """A language model of ours as a judge; a prompt that does not fit its context is refused."""

    def ask(dialogs: Sequence[list[Message]]) -> Iterator[tuple[int, str | None]]:
        prompts = [encode_chat(dialog, model.tokenizer) for dialog in dialogs]
        fit = [i for i, ids in enumerate(prompts) if len(ids) + max_tokens <= model.config.max_length]
        yield from ((i, None) for i in range(len(prompts)) if i not in set(fit))
        for start in range(0, len(fit), rows):
            some = fit[start : start + rows]
            replies = model.respond([prompts[i] for i in some], Choice(0.0), max_tokens=max_tokens)
            yield from ((i, decode_response(reply, model.tokenizer)[0]) for i, reply in zip(some, replies))

    return ask


def report(results: dict[str, Any], directory: Path) -> None:
    """`results.json`, `report.html` and the figure, where both axes have prompts."""
    axes, name = results["axes"], f"{results['first']} against {results['second']}"
    both = {"helpfulness", "safety"} <= axes.keys() and all(
        axes[axis]["without_ties"]["count"] for axis in ("helpfulness", "safety")
    )
    drawn = [win_rate_axes({name: {axis: axes[axis]["without_ties"] for axis in axes}})] if both else []
    plots.save(drawn, directory / "figures")
    results["figures"] = {plot.name: {"title": plot.title, "alt": plot.alt} for plot in drawn}
    write_json(directory / "results.json", judges.finite(results))
    rows = [
        [axis, *(f"{values[key]:,}" for key in judges.OUTCOMES), _interval(values["without_ties"], "share"),
         _interval(values["ties_half"], "mean")]
        for axis, values in axes.items()
    ]  # fmt: skip
    columns = ["prompts", *judges.OUTCOMES, "win / (win + loss) %", "ties as half %"]
    notes = [f"Judge: {results['judge']}. Garbage: no verdict that can be read. Refused: the judge did not take it, as too "
             "long or for another reason. Both are in no rate.",
             f"Prompts without an answer, too long for a context: {results['too_long']:,}."]  # fmt: skip
    text = page(name, "Win rates by a model's judgement (3.4.1).", [Chapter("Win rates", notes, [Table(columns, rows)], drawn)])
    (directory / "report.html").write_text(text, encoding="utf-8")


def _interval(values: dict[str, float], name: str) -> str:
    return f"{100 * values[name]:.1f} ({100 * values['low']:.1f} to {100 * values['high']:.1f})"


def main() -> None:
    """Flags to calls."""
    values = flags.FLAGS
    keep_heap()
    rewards = [place for place in (values.helpfulness, values.safety) if place]
    if bool(rewards) == bool(values.judge):
        raise ValueError("expected a judge: --helpfulness or --safety (reward models), else --judge (a model or an address)")
    directory = Path(values.output)
    load_model = functools.lru_cache(maxsize=1)(functools.partial(_load, tokenizer=values.tokenizer))
    prompts = read_prompt_list(values.prompts) if values.prompts else []
    (first, one), (second, two) = _named(values.first, "first"), _named(values.second, "second")
    if first == second:
        raise ValueError(f"--second: named {second!r} like the first; name them: --first=new=... --second=old=...")
    how = {"load_model": load_model, "choice": Choice(values.temperature, top_p=values.top_p).check(), "slots": values.slots,
           "max_tokens": values.max_tokens, "seed": values.seed}  # fmt: skip
    for name, place in ((first, one), (second, two)):  # before the first one answers
        check_kept(name, place, directory, **how)
    answers = [collect(name, place, prompts, directory, **how) for name, place in ((first, one), (second, two))]
    shared = set.intersection(*({prompt_key(answer.messages) for answer in some} for some in answers))
    asked = len(prompts) if prompts else len(shared)
    if prompts:  # what one of them could not answer is left out, and counted
        answers = [[answer for answer in some if prompt_key(answer.messages) in shared] for some in answers]
    pairs = pair_up(*answers, (first, second))
    if not pairs:
        raise ValueError(f"{values.prompts or one}: no prompt that both models answered")
    outcomes = _judge(pairs, directory, values, load_model)
    results = {"first": first, "second": second, "judge": values.judge or " and ".join(rewards), "too_long": asked - len(pairs),
               "axes": judges.by_axis(pairs, outcomes)}  # fmt: skip
    report(results, directory)
    print(directory / "report.html")


def _judge(pairs: Sequence[judges.Pair], directory: Path, values: Any, load_model: Load) -> list[str]:
    if not values.judge:
        helpful, safe = (None if not place else load_model(place) for place in (values.helpfulness, values.safety))
        outcomes, rows = reward_outcomes(pairs, helpful, safe)
        write_json(directory / "scores.json", [judges.finite(row) for row in rows])
        return outcomes
    if values.judge.startswith(("http://", "https://")):
        key, weights = os.environ.get("OPENAI_API_KEY", ""), ""
        ask = Endpoint(values.judge, model=values.judge_model or "default", api_key=key, max_tokens=values.judge_tokens)
    else:
        ask = model_as_judge(load_model(values.judge), max_tokens=values.judge_tokens)
        weights = origin(values.judge).get("weights", "")
    kept = RowFile(directory / "verdicts.jsonl")
    try:
        with Progress(len(pairs), "verdicts", "pair") as progress:
            name = f"{values.judge} {values.judge_model or weights}".strip()
            return judges.ask_judge(pairs, ask, kept, name=name, seed=values.seed, done=progress.update)
    finally:
        kept.close()


def _load(place: str, tokenizer: str | None) -> Model:
    model = load(place, tokenizer=tokenizer)
    if model.tokenizer is None:
        raise ValueError(f"{place}: missing tokenizer: --tokenizer names one")
    return model


def _named(item: str, flag: str) -> tuple[str, str]:
    name, found, place = item.partition("=")
    if not found:
        raise ValueError(f"--{flag}: expected name=checkpoint or name=answers.jsonl, got {item!r}")
    return name, place


if __name__ == "__main__":
    flags.DEFINE_string("first", None, "name=checkpoint, or name=answers.jsonl: the model whose wins are counted")
    flags.DEFINE_string("second", None, "the same of the other model")
    flags.DEFINE_string("prompts", "", "JSONL file of prompts, where a checkpoint answers")
    flags.DEFINE_string("output", None, "directory for answers, verdicts and the report")
    flags.DEFINE_string("helpfulness", "", "reward model")
    flags.DEFINE_string("safety", "", "reward model; with both, the combined reward judges")
    flags.DEFINE_string("judge", "", "a language model, or the address of an OpenAI-compatible endpoint")
    flags.DEFINE_string("judge_model", "", "the model's name at the endpoint")
    flags.DEFINE_integer("judge_tokens", 512, "longest reply of the judge")
    flags.DEFINE_string("tokenizer", None, "the tokenizer, where none lies beside the weights")
    flags.DEFINE_float("temperature", 0.6, "of the answers; 0 is greedy")
    flags.DEFINE_float("top_p", 0.9, "nucleus")
    flags.DEFINE_integer("max_tokens", 512, "longest answer")
    flags.DEFINE_integer("slots", 16, "answers drawn together")
    flags.DEFINE_integer("seed", 0, "of the answers and of the order in which a judge sees them")
    flags.mark_flags_as_required(["first", "second", "output"])
    command.launch(main)
