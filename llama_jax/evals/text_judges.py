"""Judges of single answers for the safety benchmarks: a `transformers` classifier, or a reward model of ours."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_jax.data.classifier import SequenceClassifier, check
from llama_jax.data.dialog import find_tag
from llama_jax.evals.reward_scores import score_dialogs
from llama_jax.evals.safety import Judge
from llama_jax.parallel.hosts import from_host_0
from llama_jax.reward.held_out import sigmoid


def classifier(path: str) -> Judge:
    """The probability of a label (`PATH#LABEL`) under a sequence classifier that reads the answer alone, as ToxiGen's RoBERTa
    does; NaN where the answer is longer than its context."""
    model = SequenceClassifier(path)
    return lambda pairs: model([answer for _, answer in pairs])


def check_classifier(name: str, path: str) -> None:
    """Looks at what `classifier` will load, without its weights: what is wrong shows before hours of drawing.

    Raises:
      ModuleNotFoundError: torch or transformers is missing.
      ValueError: names the field of the judges; not there, no classifier, or no such label.
    """
    try:
        check(path)
    except ValueError as error:
        raise ValueError(f"judges.{name}: {error}") from error


def of_host_0(judge: Judge | None) -> Judge:
    """A judge that only host 0 has; the others are told what it says."""
    return lambda pairs: np.array(from_host_0(lambda: judge(pairs).tolist()), np.float64)


def with_question(judge: Judge) -> Judge:
    """The same judge, shown question and answer as one text."""
    return lambda pairs: judge([("", f"Q: {question}\nA: {answer.strip()}") for question, answer in pairs])


def opposite(judge: Judge) -> Judge:
    """1 - p: what a safety reward model, whose high scores are safe, says of toxicity."""
    return lambda pairs: 1 - judge(pairs)


def reward_model(model: Any) -> Judge:
    """sigmoid(score) of each answer as the reply to its prompt, NaN where both are longer than the context; `model` is what
    `llama_jax.load` gives. Of several hosts all ask together, and all are told."""
    if model.head != "reward_head" or model.tokenizer is None:
        raise ValueError(f"{model.path}: expected a reward model with its tokenizer as judge")

    def judge(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        dialogs = [
            [{"role": "user", "content": _plain(prompt)}, {"role": "assistant", "content": _plain(answer)}]
            for prompt, answer in pairs
        ]
        return sigmoid(
            score_dialogs(model.params, model.config, model.tokenizer, dialogs, compute=model.compute, mesh=model.mesh)
        )

    return judge


def _plain(text: str) -> str:
    """Text without the chat format's own marks, which a dialog refuses; something, where nothing was said."""
    while (tag := find_tag(text)) is not None:
        text = text.replace(tag, " ")
    return text.strip() or "..."
