"""Which of two models answers better, as reward models or a language model judge (paper 3.4.1): `python -m llama_jax.compare`.

    python -m llama_jax.compare --first=v2=runs/v2 --second=v1=runs/v1 --prompts=validation.jsonl --output=runs/compare \\
        --helpfulness=runs/helpfulness --safety=runs/safety

A model is `name=checkpoint`, or `name=answers.jsonl` with its answers (`evals/answer_files.py`). The judge is one or two reward
models (with both, the combined reward of 3.2.3), or `--judge=checkpoint` of a language model, or `--judge=http://host/v1`, an
OpenAI-compatible endpoint (`--judge_model` names the model there, OPENAI_API_KEY the key). `results.json` has wins, ties,
losses, garbage and what the judge refused, over all prompts and on the paper's two axes, with ties dropped (Fig. 2) and as one
half; `report.html` shows them. Answers and verdicts are kept in the output as they come: a run that is stopped goes on with the
same command. Answers that another checkpoint gave under this name, or this one under other settings, are refused. A model that
one device cannot hold is split over several (`--mesh_tensor`). On a pod the same command runs on every host; the first one
reads and writes.
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
from llama_jax.chat import open_engine
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
from llama_jax.evals.words import tokenizer_of
from llama_jax.files import write_json
from llama_jax.parallel.axes import batch_shards
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.hosts import from_host_0, on_host_0
from llama_jax.parallel.mesh import start_distributed
from llama_jax.pretrained import Model, load
from llama_jax.reward.held_out import sigmoid
from llama_jax.reward.score import SAFETY_THRESHOLD
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine, EngineConfig
from llama_jax.sampling.request import Request
from llama_jax.training.metrics import Progress

Open = Callable[[str], tuple[Engine, Model]]  # a language model's place -> its engine, and the model without parameters


class Kept:
    """The rows of a file that host 0 appends to, known on every host."""

    def __init__(self, path: Path):
        self.path = path
        self._file: RowFile | None = None
        self.rows: list[dict[str, Any]] = from_host_0(self._open)

    def _open(self) -> list[dict[str, Any]]:
        self._file = RowFile(self.path)
        return self._file.rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; on host 0 it is on the disk when this returns."""
        if self._file is not None:
            self._file.append(row)
        if jax.process_count() > 1:  # else they are the file's own
            self.rows.append(dict(row))

    def close(self) -> None:
        """Lets others write."""
        if self._file is not None:
            self._file.close()


def collect(
    name: str, place: str, prompts: Sequence[dict[str, Any]], directory: Path, *, open_model: Open, choice: Choice,
    max_tokens: int, seed: int, int8_cache: bool = False,
) -> list[Answered]:  # fmt: skip
    """A model's answers: read from a file, or drawn by a checkpoint (see `draw_answers`) and kept in `answers_<name>.jsonl`.

    Prompts that do not fit a checkpoint's context get no answer; nothing is cut.

    Raises:
      ConfigError: what is kept was drawn by another checkpoint, or otherwise.
    """
    if _is_file(place):
        return _read_alike(place)
    if not prompts:
        raise ValueError("--prompts: missing; a checkpoint needs prompts to answer")
    from_host_0(lambda: check_kept(
        name, place, directory, choice=choice, max_tokens=max_tokens, seed=seed, int8_cache=int8_cache
    ))  # fmt: skip
    kept = Kept(directory / f"answers_{name}.jsonl")
    try:
        if missing := _unanswered(prompts, kept):
            draw_answers(*open_model(place), missing, kept, name=name, choice=choice, max_tokens=max_tokens, seed=seed)
    finally:
        kept.close()
    wanted = {prompt_key(row["messages"]) for row in prompts}
    answers = _read_alike(kept.path) if kept.rows else []
    return [answer for answer in answers if prompt_key(answer.messages) in wanted]


def check_kept(
    name: str, place: str, directory: Path, *, choice: Choice, max_tokens: int, seed: int, int8_cache: bool = False
) -> None:
    """Refuses to go on with answers that another checkpoint gave under this name, or this one under other settings."""
    if not _is_file(place):
        claim(
            directory / f"model_{name}.json", place, temperature=choice.temperature, top_p=choice.top_p,
            max_tokens=max_tokens, seed=seed, int8_cache=int8_cache,
        )  # fmt: skip


def _read_alike(path: str | Path) -> list[Answered]:
    """The answers of a file as host 0 has it."""
    rows = from_host_0(lambda: [dataclasses.asdict(answer) for answer in read_answers(path)])
    return [Answered(**{**row, "messages": tuple(row["messages"])}) for row in rows]


def _is_file(place: str) -> bool:
    return place.endswith((".jsonl", ".jsonl.gz"))


def _unanswered(prompts: Sequence[dict[str, Any]], kept: Kept) -> list[tuple[int, dict[str, Any]]]:
    done = {prompt_key(row["messages"]) for row in kept.rows}
    return [(number, row) for number, row in enumerate(prompts) if prompt_key(row["messages"]) not in done]


def settings_of(model: Model, *, slots: int, int8_cache: bool) -> EngineConfig:
    """The shapes of a model's engine: its context, and at least so many slots as the mesh divides."""
    shards = batch_shards(model.mesh)
    return EngineConfig(slots=-(-slots // shards) * shards, max_length=model.config.max_length, int8_cache=int8_cache)


def define_engines(slots: str = "answers drawn together") -> None:
    """Defines the flags by which a command opens the models that answer."""
    flags.DEFINE_string("tokenizer", None, "the tokenizer, where none lies beside the weights")
    flags.DEFINE_integer("slots", 16, slots)
    flags.DEFINE_integer("mesh_tensor", 0, "devices that share each matrix; 0: as few as hold the model")


def opener(*, int8_cache: bool = False) -> Open:
    """How models are opened, by the flags of `define_engines`."""
    values = flags.FLAGS
    settings = functools.partial(settings_of, slots=values.slots, int8_cache=int8_cache)
    return lambda place: open_engine(
        place, settings, tokenizer=tokenizer_of(place, values.tokenizer), mesh_tensor=values.mesh_tensor
    )


def draw_answers(
    engine: Engine, model: Model, prompts: Sequence[tuple[int, dict[str, Any]]], kept: Kept, *, name: str, choice: Choice,
    max_tokens: int, seed: int,
) -> None:  # fmt: skip
    """Appends the answer to each (number, prompt), many drawn together; what a prompt draws depends on (seed, number) alone."""
    encoded = [(number, row, encode_chat(row["messages"], model.tokenizer)) for number, row in prompts]
    quiet = jax.process_index() > 0
    with jax.set_mesh(model.mesh), Progress(len(encoded), f"answers of {name}", "answer", quiet=quiet) as progress:

        def finished(row: dict[str, Any], request: Request, token: int) -> None:
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
                ids, max_tokens=min(max_tokens, room), choice=choice, seed=seed, index=number,
                stop_ids=model.tokenizer.stop_ids, on_token=functools.partial(finished, row),
            )  # fmt: skip
        while engine.step():
            pass


def reward_outcomes(
    pairs: Sequence[judges.Pair], helpfulness: Model | None, safety: Model | None
) -> tuple[list[str], list[dict[str, float]]]:
    """The outcome of each pair by one reward model's score, or by the combined reward of both; and the scores."""

    def scores(model: Model, side: int) -> np.ndarray:
        dialogs = [[*pair[side].messages, {"role": "assistant", "content": pair[side].answer}] for pair in pairs]
        with Progress(len(dialogs), "scores", "answer", quiet=jax.process_index() > 0) as progress:
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


def model_as_judge(engine: Engine, model: Model, *, max_tokens: int) -> judges.Ask:
    """A language model of ours as a judge; it refuses a prompt that does not fit its context."""

    def ask(dialogs: Sequence[list[Message]]) -> Iterator[tuple[int, str | None]]:
        prompts = [encode_chat(dialog, model.tokenizer) for dialog in dialogs]
        fit = [i for i, ids in enumerate(prompts) if len(ids) + max_tokens <= engine.settings.max_length]
        yield from ((i, None) for i in range(len(prompts)) if i not in set(fit))
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
    (first, one), (second, two) = named(values.first, "first"), named(values.second, "second")
    if first == second:
        raise ValueError(f"--second: named {second!r} like the first; name them: --first=new=... --second=old=...")
    start_distributed()
    prompts = from_host_0(lambda: read_prompt_list(values.prompts)) if values.prompts else []
    how = {"choice": Choice(values.temperature, top_p=values.top_p).check(), "max_tokens": values.max_tokens,
           "seed": values.seed, "int8_cache": values.int8_cache}  # fmt: skip
    for name, place in ((first, one), (second, two)):  # before the first one answers
        from_host_0(lambda name=name, place=place: check_kept(name, place, directory, **how))
    open_model = opener(int8_cache=values.int8_cache)
    answers = [
        collect(name, place, prompts, directory, open_model=open_model, **how) for name, place in ((first, one), (second, two))
    ]
    shared = set.intersection(*({prompt_key(answer.messages) for answer in some} for some in answers))
    asked = len(prompts) if prompts else len(shared)
    if prompts:  # what one of them could not answer is left out, and counted
        answers = [[answer for answer in some if prompt_key(answer.messages) in shared] for some in answers]
    pairs = pair_up(*answers, (first, second))
    if not pairs:
        raise ValueError(f"{values.prompts or one}: no prompt that both models answered")
    outcomes = _judge(pairs, directory, values, open_model)

    def finish() -> None:
        results = {"first": first, "second": second, "judge": values.judge or " and ".join(rewards),
                   "too_long": asked - len(pairs), "axes": judges.by_axis(pairs, outcomes)}  # fmt: skip
        report(results, directory)
        print(directory / "report.html")

    on_host_0(finish)


def _judge(pairs: Sequence[judges.Pair], directory: Path, values: Any, open_model: Open) -> list[str]:
    if not values.judge:
        helpful, safe = (
            load_judge(place, values.tokenizer) if place else None for place in (values.helpfulness, values.safety)
        )
        outcomes, rows = reward_outcomes(pairs, helpful, safe)
        on_host_0(write_json, directory / "scores.json", [judges.finite(row) for row in rows])
        return outcomes
    if values.judge.startswith(("http://", "https://")):
        ask = Endpoint(
            values.judge, model=values.judge_model or "default", api_key=os.environ.get("OPENAI_API_KEY", ""),
            max_tokens=values.judge_tokens,
        )  # fmt: skip
        found: list[str] = []
        on_host_0(lambda: found.extend(_verdicts(pairs, ask, directory, values, values.judge_model)))
        return found
    weights = from_host_0(lambda: origin(values.judge).get("weights", ""))
    ask = model_as_judge(*open_model(values.judge), max_tokens=values.judge_tokens)
    return _verdicts(pairs, ask, directory, values, values.judge_model or weights, file=Kept)


def _verdicts(
    pairs: Sequence[judges.Pair], ask: judges.Ask, directory: Path, values: Any, version: str, *, file: Callable = RowFile
) -> list[str]:
    """The outcomes by a judge, whose verdicts are kept under its place and version."""
    kept = file(directory / "verdicts.jsonl")
    try:
        with Progress(len(pairs), "verdicts", "pair", quiet=jax.process_index() > 0) as progress:
            name = f"{values.judge} {version}".strip()
            return judges.ask_judge(pairs, ask, kept, name=name, seed=values.seed, done=progress.update)
    finally:
        kept.close()


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
    flags.DEFINE_string("output", None, "directory for answers, verdicts and the report")
    flags.DEFINE_string("helpfulness", "", "reward model")
    flags.DEFINE_string("safety", "", "reward model; with both, the combined reward judges")
    flags.DEFINE_string("judge", "", "a language model, or the address of an OpenAI-compatible endpoint")
    flags.DEFINE_string("judge_model", "", "the model's name at the endpoint")
    flags.DEFINE_integer("judge_tokens", 512, "longest reply of the judge")
    define_engines("answers drawn together, or verdicts")
    flags.DEFINE_float("temperature", 0.6, "of the answers; 0 is greedy")
    flags.DEFINE_float("top_p", 0.9, "nucleus")
    flags.DEFINE_integer("max_tokens", 512, "longest answer")
    flags.DEFINE_bool("int8_cache", False, "keep keys and values in 8 bits")
    flags.DEFINE_integer("seed", 0, "of the answers and of the order in which a judge sees them")
    flags.mark_flags_as_required(["first", "second", "output"])
    command.launch(main)
