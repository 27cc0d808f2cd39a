"""Evaluation samples that must not stand in the training text: read whole, and checked, before any document is."""

import dataclasses
import logging
from collections.abc import Iterable

from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.shingles import word_hashes
from llama_jax.corpus_build.source_files import expand

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The samples of all evaluation files."""

    texts: tuple[str, ...] = ()
    too_short: int = 0  # of them, with fewer words than a run by which they are found: these are not looked for


def read_evaluation(paths: Iterable[str], ngram: int) -> Evaluation:
    """The samples of evaluation files (a `text` in each row), to be found by runs of `ngram` words.

    Raises:
      ValueError: names file and line of a row that is none, since one missed sample would stay in training.
    """
    texts = []
    for pattern in paths:
        for path in expand(pattern):
            for row in read_file(path, "evaluation"):
                if isinstance(row, BadRow):
                    raise ValueError(f"{row.where}: {row.problem}")
                texts.append(row.text)
    too_short = sum(len(word_hashes(text)) < ngram for text in texts)
    if too_short:
        log.warning("%d evaluation samples have fewer than leak_ngram=%d words and are not looked for", too_short, ngram)
    return Evaluation(tuple(texts), too_short)
