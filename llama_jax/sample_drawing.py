"""Draws and scores the samples that `sample_figures` shows (paper sections 3.2.3, 3.4.1, 5.1; Figs. 7, 8, 20, 21, 29).

Every checkpoint answers every prompt K times at every temperature, and when they have gone, one or two reward models score what
was said; both reward models also score answers that people have rated. Below an output directory stand

    NAME/answers.jsonl       {"prompt": number, "messages", "is_safety", "kind", "temperature", "response", "ended"}
    NAME/samples.jsonl       the same with "helpfulness", "safety" and "reward", the R_c of both
    calibration_TRACK.jsonl  {"score": logit, "ratings"}

Scores are null where an answer does not fit the reward model's context, or holds a chat tag.

The first two are drawn in portions and written whole: a run that is stopped goes on with the same command, and what another
checkpoint, other prompts or other settings gave is refused. What a prompt draws depends on its place, its temperature's and
the seed alone. On a pod the same command runs on every host; the first one reads and writes.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import command
from llama_jax.chat import open_engine
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import decode_response
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.answer_files import answered
from llama_jax.evals.origin import claim, origin
from llama_jax.evals.reward_scores import combined, score_dialogs
from llama_jax.evals.samples import ratings_of
from llama_jax.evals.words import tokenizer_of, words_of
from llama_jax.interop.formats import open_source
from llama_jax.interop.source import require_language_model
from llama_jax.parallel.hosts import exist, from_host_0, on_host_0
from llama_jax.pretrained import Model, load
from llama_jax.recall import digest
from llama_jax.reward.held_out import sigmoid
from llama_jax.rlhf.respond import Tell, write_in_portions
from llama_jax.sampling.answers import answering
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.keys import key_data

TRACKS = ("helpfulness", "safety")
_PORTION = 2000  # answers that are drawn, or scored, and written together

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How often each prompt is answered at each temperature, and how."""

    temperatures: tuple[float, ...]
    answers: int
    max_tokens: int
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.answers < 1 or self.max_tokens < 1:
            raise ValueError(f"expected --answers and --max_tokens of at least 1, got {self.answers} and {self.max_tokens}")
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"--temperatures: expected different numbers, got {self.temperatures}")
        for temperature in self.temperatures:
            Choice(temperature=temperature, top_p=self.top_p).check()
            if temperature == 0 and self.answers > 1:
                raise ValueError("--temperatures: expected numbers above 0: the most likely answer is always the same")


@dataclasses.dataclass(frozen=True)
class Models:
    """Where checkpoints and reward models lie, by name and by track, and how they are opened."""

    checkpoints: Mapping[str, str]
    rewards: Mapping[str, str]
    tokenizer: str | None = None
    slots: int = 16
    mesh_tensor: int = 0

    def words(self, place: str) -> Tokenizer:
        """A model's tokenizer."""
        return words_of(place, self.tokenizer)


def draw(
    models: Models, prompts: Sequence[Row], how: Drawing, output: Path, *, rated: Mapping[str, str | os.PathLike] | None = None
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Draws and scores what is not there yet: {checkpoint: its samples}, {track: its scored answers of the files `rated`}.

    Raises:
      ValueError, FileNotFoundError, ConfigError: wrong prompts, models or files, or samples of others in `output`; before a
        model is loaded.
    """
    rows = {track: from_host_0(lambda path=path: read_rated(path)) for track, path in (rated or {}).items()}
    longest = _check(models, prompts, how)
    from_host_0(lambda: _claim(models, prompts, how, output))
    for name, place in models.checkpoints.items():
        _answer(place, models, prompts, how, output / name / "answers.jsonl", longest=longest[name], label=f"answers of {name}")
    if not models.rewards:
        return {name: output / name / "answers.jsonl" for name in models.checkpoints}, {}
    files = {name: output / name / "samples.jsonl" for name in models.checkpoints}
    if rows or not all(exist(list(files.values()))):
        judges = {
            track: load(place, tokenizer=tokenizer_of(place, models.tokenizer)) for track, place in models.rewards.items()
        }
        for name, file in files.items():
            _score(judges, file, label=f"scores of {name}")
        for track, some in rows.items():
            on_host_0(write_jsonl, output / f"calibration_{track}.jsonl", _rate(judges[track], some))
    return files, {track: output / f"calibration_{track}.jsonl" for track in rows}


def read_rated(path: str | os.PathLike) -> list[Row]:
    """Answers as `evals/answer_files.py` has them, each with the `ratings` that people gave it. ValueError naming the line."""
    rows = []
    for where, row in read_jsonl(path):
        ratings = ratings_of(row, where)
        rows.append({**dataclasses.asdict(answered(row, where)), "ratings": ratings})
    if not rows:
        raise ValueError(f"{path}: no answers in it")
    return rows


def _check(models: Models, prompts: Sequence[Row], how: Drawing) -> dict[str, int]:
    """Looks at the files of all models, and whether each prompt fits with its answer: {checkpoint: tokens of the longest}."""
    if models.checkpoints and not models.rewards and (len(how.temperatures) == 1 or how.answers == 1):
        raise ValueError("expected a reward model (--helpfulness, --safety), or several --temperatures and --answers (Fig. 21)")
    for track, place in models.rewards.items():
        tokenizer_of(place, models.tokenizer)
        if open_source(place).head != "reward_head":
            raise ValueError(f"--{track}: {place}: expected a reward model, found a language model")
    longest = {}
    command.check_directories("checkpoint", models.checkpoints)
    for name, place in models.checkpoints.items():
        source, words = open_source(place), models.words(place)
        require_language_model(source)
        lengths = [len(encode_chat(row["messages"], words)) for row in prompts]
        longest[name], room = max(lengths), source.config.max_length - how.max_tokens
        if longest[name] > room:
            raise ValueError(
                f"--prompts: prompt {lengths.index(longest[name]) + 1} has {longest[name]} tokens for {name}; expected at most "
                f"{max(room, 0)}, since its context of {source.config.max_length} also holds --max_tokens={how.max_tokens}"
            )
    return longest


def _claim(models: Models, prompts: Sequence[Row], how: Drawing, output: Path) -> None:
    asked = digest([[row["messages"], row["is_safety"], row["kind"]] for row in prompts])
    judges = {track: origin(place).get("weights", place) for track, place in models.rewards.items()}
    settings = {**dataclasses.asdict(how), "temperatures": list(how.temperatures)}
    for name, place in models.checkpoints.items():
        claim(output / name / "model.json", place, prompts=asked, **settings)
        if judges:
            claim(output / name / "scored.json", place, **judges)


def _answer(
    place: str, models: Models, prompts: Sequence[Row], how: Drawing, file: Path, *, longest: int, label: str
) -> None:  # fmt: skip
    """Writes K answers to each prompt at each temperature, unless they are there."""
    if all(exist([file])):
        return
    engine, model = open_engine(
        place,
        lambda model: answering(
            longest, how.max_tokens, slots=models.slots, mesh=model.mesh, stops=len(model.tokenizer.stop_ids)
        ),
        tokenizer=tokenizer_of(place, models.tokenizer), mesh_tensor=models.mesh_tensor,
    )  # fmt: skip
    words, K = model.tokenizer, how.answers
    encoded = [encode_chat(row["messages"], words) for row in prompts]

    def drawn(some: Sequence[tuple[float, int]], first: int, progress: Tell) -> list[Row]:
        keys = key_data(how.seed, range(first * K, (first + len(some)) * K))  # together: one by one is 0.6 ms each
        requests = [
            engine.submit(
                encoded[number], max_tokens=how.max_tokens, choice=Choice(temperature=temperature, top_p=how.top_p),
                key=keys[i * K + k], stop_ids=words.stop_ids,
            )
            for i, (temperature, number) in enumerate(some) for k in range(K)
        ]  # fmt: skip
        engine.run(requests, progress=progress)
        rows = []
        for i, request in enumerate(requests):
            temperature, number = some[i // K]
            known = {name: prompts[number][name] for name in ("messages", "is_safety", "kind")}
            text, ended = decode_response(request.tokens, words)
            rows.append({"prompt": number, **known, "temperature": temperature, "response": text, "ended": ended})
        return rows

    asked = [(temperature, number) for temperature in how.temperatures for number in range(len(prompts))]
    with jax.set_mesh(model.mesh):
        write_in_portions(file, asked, drawn, answers=lambda _: K, label=label, size=max(_PORTION // K, 1))


def _score(judges: Mapping[str, Model], file: Path, *, label: str) -> None:
    """Writes the answers beside `file` with what reward models say of them, unless that is there."""
    if all(exist([file])):
        return
    rows = from_host_0(lambda: [row for _, row in read_jsonl(file.with_name("answers.jsonl"))])

    def scored(some: Sequence[Row], first: int, progress: Tell) -> list[Row]:
        del first
        found = {track: sigmoid(_logits(judge, some)) for track, judge in judges.items()}
        if len(found) == 1:
            (reward,) = found.values()
        else:
            reward = combined(found["helpfulness"], found["safety"], np.array([row["is_safety"] for row in some], bool))
        found["reward"] = np.where(np.isnan(sum(found.values())), math.nan, reward)
        progress(len(some))
        return [
            {**row, **{name: None if math.isnan(values[i]) else float(values[i]) for name, values in found.items()}}
            for i, row in enumerate(some)
        ]

    write_in_portions(file, rows, scored, answers=lambda _: 1, label=label, size=_PORTION)


def _rate(judge: Model, rows: Sequence[Row]) -> list[Row]:
    """The logit of each rated answer beside its ratings."""
    logits = _logits(judge, [{**row, "response": row["answer"]} for row in rows])
    return [
        {"score": float(logit) if math.isfinite(logit) else None, "ratings": row["ratings"]}
        for logit, row in zip(logits, rows, strict=True)
    ]


def _logits(judge: Model, rows: Sequence[Row]) -> np.ndarray:
    dialogs = [[*row["messages"], {"role": "assistant", "content": row["response"]}] for row in rows]
    return score_dialogs(judge.params, judge.config, judge.tokenizer, dialogs, compute=judge.compute, mesh=judge.mesh)
