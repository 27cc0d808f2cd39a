"""A sequence classifier of `transformers` as one probability: that of a label, from a head that was trained.

`PATH#LABEL` names the label, by its name or its number; it may be left out where there are two that exclude each other (the
second, as in ToxiGen's) or only one. A model without such a head is refused: `transformers` draws one, and judges by chance.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import suggestion

_ENDLESS = 1 << 20  # a tokenizer's length of this or more says nothing


@dataclasses.dataclass(frozen=True)
class Reading:
    """Where a classifier lies, which output is read, and whether by sigmoid (several labels may hold) or softmax (one does)."""

    path: str
    label: int
    sigmoid: bool


def place_of(path: str) -> str:
    """`PATH#LABEL` without its label."""
    return _split(path)[0]


def check(path: str) -> tuple[Reading, Any]:
    """What is read of the classifier at `PATH#LABEL`, and its tokenizer. No weights are: what is wrong shows before long work.

    Raises:
      ModuleNotFoundError: torch or transformers is missing.
      ValueError: not there, no classifier, or no such label.
    """
    place, label = _split(path)
    try:
        import torch  # noqa: F401
        from transformers import AutoConfig, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the classifier {path} needs the package {error.name}: pip install torch transformers", name=error.name
        ) from None
    try:
        config, words = AutoConfig.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: expected a transformers classifier with its tokenizer: {error}") from error
    return read(place, label, config.architectures, config.id2label, config.problem_type), words


def read(path: str, label: str, architectures: Sequence[str] | None, names: Mapping[int, str], problem: str | None) -> Reading:
    """What the fields of its config.json say of a classifier, whose `label` is wanted ("": the one that goes without saying).

    Raises:
      ValueError: it is none, or has no such label.
    """
    if not any(name.endswith("ForSequenceClassification") for name in architectures or ()):
        found = ", ".join(architectures or ["none"])
        raise ValueError(f"{path}: architectures: expected a classifier, ...ForSequenceClassification, found {found}")
    sigmoid = problem == "multi_label_classification"
    if problem == "regression" or len(names) == 1 and not sigmoid:
        raise ValueError(
            f"{path}: problem_type: expected single_label_classification of several labels or multi_label_classification, "
            f"found {problem} of {len(names)}"
        )
    if label:
        numbers = {str(number): number for number in names} | {name: number for number, name in names.items()}
        if label not in numbers:
            raise ValueError(f"{path}: has no label {label!r} among its {len(names)}{suggestion(label, names.values())}")
        return Reading(path, numbers[label], sigmoid)
    if len(names) != (1 if sigmoid else 2):
        raise ValueError(f"{path}: expected one of its labels behind the path, as {path}#LABEL: {', '.join(names.values())}")
    return Reading(path, len(names) - 1, sigmoid)


class SequenceClassifier:
    """Texts to probabilities, on the CPU or on torch's accelerator where there is one, whose memory JAX may hold."""

    def __init__(self, path: str, *, accelerator: bool = False):
        self._reading, self._words = check(path)
        import torch
        from transformers import AutoModelForSequenceClassification

        model, found = AutoModelForSequenceClassification.from_pretrained(self._reading.path, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{self._reading.path}: expected the weights of a classifier, found no {', '.join(missing[:3])}")
        self._model = model.eval().to((accelerator and torch.accelerator.current_accelerator()) or "cpu")
        # Where the tokenizer does not say: RoBERTa counts its positions from 2.
        said, positions = self._words.model_max_length, getattr(model.config, "max_position_embeddings", _ENDLESS)
        self._longest = said if said < _ENDLESS else positions - 2
        # A decoder finds its last token by the padding, which has to be the same to both.
        self._pads = self._words.pad_token_id is not None and self._words.pad_token_id == model.config.pad_token_id

    def __call__(self, texts: Sequence[str], *, batch: int = 16, length: int | None = None) -> np.ndarray:
        """The label's probability for each text [texts]: of its first `length` tokens; without, NaN where it is longer than the
        model's context."""
        import torch

        longest, step = min(length or self._longest, self._longest), batch if self._pads else 1
        out = np.zeros(len(texts))
        for start in range(0, len(texts), step):
            some = list(texts[start : start + step])
            rows = self._words(some, return_tensors="pt", padding=self._pads, truncation=True, max_length=longest)
            with torch.no_grad():
                logits = self._model(**rows.to(self._model.device)).logits.float()
            found = torch.sigmoid(logits) if self._reading.sigmoid else torch.softmax(logits, dim=-1)
            out[start : start + step] = found[:, self._reading.label].cpu().numpy()
            if length is None:
                long = [len(ids) > longest for ids in self._words(some, verbose=False)["input_ids"]]
                out[start : start + step][long] = np.nan
        return out


def _split(path: str) -> tuple[str, str]:
    place, mark, label = path.rpartition("#")
    return (place, label) if mark and not Path(path).exists() else (path, "")
