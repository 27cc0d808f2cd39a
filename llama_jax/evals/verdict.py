"""Answers of a checkpoint to held-out prompts, judged by the simulated annotator's true utility (paper section 3.4)."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.assistant.annotator import SimulatedAnnotator, well_formed
from llama_jax.data.dialog import decode_response, encode_prompt
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.statistics import mean_interval
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.sampling.answers import Answerer
from llama_jax.sampling.choose import Choice
from llama_jax.training.metrics import Progress

Prompt = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are drawn; the reference's defaults are temperature 0.6 and top-p 0.9."""

    temperature: float
    top_p: float
    prompt_length: int
    new_tokens: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer: its ids as sampled, its text, and whether the model stopped by itself."""

    ids: list[int]
    text: str
    ended: bool


def answer_prompts(
    workdir: str, prompts: Sequence[list[int]], model: ModelConfig, tokenizer: Tokenizer, *, compute: Compute,
    decoding: Decoding, mesh: Mesh, seed: int, label: str,
) -> list[list[int]]:  # fmt: skip
    """Sampled ids for each prompt from the newest checkpoint of a stage."""
    with jax.set_mesh(mesh), Progress(len(prompts), label, "answer") as progress:
        answerer = Answerer(
            restore_model(workdir, table.table(model, head="lm_head"), mesh), model, compute=compute,
            prompt_length=decoding.prompt_length, new_tokens=decoding.new_tokens, eos_id=tokenizer.eos_id,
            slots=decoding.batch_size,
        )  # fmt: skip
        choice = Choice(temperature=decoding.temperature, top_p=decoding.top_p)
        answers = answerer(prompts, choice=choice, seed=seed, progress=progress.update)
        return [answer.tokens for answer in answers]


def fitting(rows: Iterable[Prompt], tokenizer: Tokenizer, *, length: int) -> list[Prompt]:
    """The prompts of at most `length` tokens."""
    return [row for row in rows if len(encode_prompt(row["messages"], tokenizer)) <= length]


def chat_answers(workdir: str, rows: Sequence[Prompt], model: ModelConfig, tokenizer: Tokenizer, **how) -> list[Answer]:
    """Answers of a chat model to prompt rows; see `answer_prompts` for the keywords."""
    prompts = [encode_prompt(row["messages"], tokenizer) for row in rows]
    answers = answer_prompts(workdir, prompts, model, tokenizer, **how)
    return [Answer(ids, *decode_response(ids, tokenizer)) for ids in answers]


def base_answers(
    workdir: str, rows: Sequence[Prompt], examples: Sequence[Prompt], model: ModelConfig, tokenizer: Tokenizer, *,
    decoding: Decoding, **how,
) -> list[Answer]:  # fmt: skip
    """Answers of a base model that is shown solved examples as plain text; a line break ends its answer."""
    decoding = dataclasses.replace(decoding, prompt_length=model.max_length - decoding.new_tokens)
    prompts = [few_shot_prompt(row, examples, tokenizer, limit=decoding.prompt_length) for row in rows]
    answers = []
    for ids in answer_prompts(workdir, prompts, model, tokenizer, decoding=decoding, **how):
        text, ended = decode_response(ids, tokenizer)
        line, newline, _ = text.partition("\n")
        answers.append(Answer(ids, line.strip(), ended or bool(newline)))
    return answers


def few_shot_prompt(row: Prompt, examples: Sequence[Prompt], tokenizer: Tokenizer, *, limit: int) -> list[int]:
    """Ids of BOS, as many of the examples as there is room for, the first ones before the others, and the question.

    Nothing is cut: without its BOS or the beginning of an example a base model answers worse than it can.
    """
    shots = [f"{_as_text(example['messages'])} {example['reference']}\n\n" for example in examples]
    for count in range(len(shots), -1, -1):
        ids = tokenizer.encode("".join(shots[:count]) + _as_text(row["messages"]), bos=True)
        if len(ids) <= limit:
            return ids
    raise ValueError(f"a prompt of {len(ids)} tokens, without any example, does not fit into {limit}")


def short_examples(rows: Sequence[Prompt]) -> list[Prompt]:
    """The shortest solved prompt of each kind, for a base model: safety prompts, then the kinds that are asked most."""
    by_kind: dict[str, list[Prompt]] = {}
    for row in rows:
        if len(row["messages"]) == 1:
            by_kind.setdefault(row.get("kind") or "", []).append(row)
    kinds = sorted(by_kind, key=lambda kind: (not by_kind[kind][0]["is_safety"], -len(by_kind[kind]), kind))
    return [min(by_kind[kind], key=lambda row: len(row["messages"][0]["content"] + row["reference"])) for kind in kinds]


def _as_text(messages: Sequence[dict[str, str]]) -> str:
    """A conversation that ends with a question, as plain text that an answer would go on with."""
    labels = {"system": "", "user": "Question: ", "assistant": "Answer: "}
    return "\n".join([*(f"{labels[message['role']]}{message['content']}" for message in messages), "Answer:"])


def judge(rows: Sequence[Prompt], answers: Sequence[Answer], annotator: SimulatedAnnotator) -> dict[str, Any]:
    """True utility (mean with 95 % interval), violations on safety prompts, stop and format rates of one model."""
    utilities = utility(rows, answers, annotator)
    safety = [i for i, row in enumerate(rows) if row["is_safety"]]
    violations = [annotator.violates(rows[i], answers[i].text) for i in safety]
    return {
        "true_utility": dataclasses.asdict(mean_interval(utilities)),
        "safety_violations": float(np.mean(violations)) if violations else 0.0,
        "stop_rate": float(np.mean([answer.ended for answer in answers])),
        "format_rate": float(np.mean([well_formed(answer.text) == 1.0 for answer in answers])),
    }


def utility(rows: Sequence[Prompt], answers: Sequence[Answer], annotator: SimulatedAnnotator) -> np.ndarray:
    """The true utility of each answer. # -> float [n]"""
    return np.array(
        [annotator.true_utility(row, a.text, ended=a.ended) for row, a in zip(rows, answers, strict=True)], np.float64
    )
