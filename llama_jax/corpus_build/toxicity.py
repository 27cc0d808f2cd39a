"""How toxic the corpus is: scores of lines, averaged to documents, as in the paper's Fig. 13 (section 4.1).

The paper takes HateBERT fine-tuned on ToxiGen; `TransformersClassifier` runs such a checkpoint. The default needs no download:
a linear model over words that the package alt-profanity-check ships, trained on 200,000 comments labelled as clean or
offensive. Nothing is filtered by these scores, here as in the paper.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llama_jax.corpus_build.extras import extra
from llama_jax.data.classifier import SequenceClassifier, check, place_of

# Lines to probabilities [lines] between 0 and 1 of being toxic.
Classifier = Callable[[Sequence[str]], np.ndarray]


def word_classifier(lines: Sequence[str]) -> np.ndarray:
    """The default classifier; about 2 MB/s."""
    return np.asarray(_predict()(list(lines)), np.float64)


class TransformersClassifier:
    """A sequence classification checkpoint, such as one of HateBERT on ToxiGen, from a local directory or the hub.

    `CHECKPOINT#LABEL` says which of its labels is toxic, see `data/classifier.py`.
    """

    def __init__(self, checkpoint: str, *, batch_size: int = 64, length: int = 128):
        self._model = SequenceClassifier(checkpoint, accelerator=True)
        self._options = {"batch": batch_size, "length": length}

    def __call__(self, lines: Sequence[str]) -> np.ndarray:
        return self._model(lines, **self._options)


@functools.cache
def classifier_of(checkpoint: str | None) -> Classifier:
    """The classifier of a checkpoint, loaded once in each process; without one the default."""
    return word_classifier if checkpoint is None else TransformersClassifier(checkpoint)


def check_checkpoint(checkpoint: str) -> None:
    """ValueError for a directory that is no classifier, before hours of work that end in it. One on the hub is looked at when
    it is loaded: workers may reach the hub where the command does not."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("toxicity_checkpoint: needs the package transformers")
    place = Path(place_of(checkpoint))
    if checkpoint.startswith((".", "/")) and not (place / "config.json").is_file():
        raise ValueError(f"toxicity_checkpoint: expected a checkpoint of transformers, found no config.json in {str(place)!r}")
    if place.is_dir():
        try:
            check(checkpoint)
        except (ModuleNotFoundError, ValueError) as error:
            raise ValueError(f"toxicity_checkpoint: {error}") from error


def document_scores(texts: Sequence[str], classifier: Classifier = word_classifier) -> np.ndarray:
    """Mean score of the lines of each text [texts], blank lines apart; 0 for a text without any."""
    lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
    flat = [line for of_text in lines for line in of_text]
    scores = classifier(flat) if flat else np.zeros(0)
    ends = np.cumsum([len(of_text) for of_text in lines])
    starts = [0, *ends[:-1]]
    return np.array([scores[a:b].mean() if b > a else 0.0 for a, b in zip(starts, ends)], np.float64)


def in_sample(text: str, share: float) -> bool:
    """Whether a text is in the sample that is scored (the paper's is 10 %); by hash, so the same in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"toxicity").digest()) < share * 2**64


@functools.cache
def _predict():
    return extra("profanity_check").predict_prob
