"""Free answers against references, as SQuAD's own script compares them (Tables 22 and 23): exact match and F1 of words."""

import collections
import re
import string
from collections.abc import Sequence


def normalise(text: str) -> str:
    """Lower case, without articles, punctuation and surplus spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, normalised."""
    return float(any(normalise(answer) == normalise(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of words over the references; without words on one side, 1 if the other has none either."""
    return max(_f1(normalise(answer).split(), normalise(reference).split()) for reference in references)


def f1_of_raters(answer: str, references: Sequence[str]) -> float:
    """QuAC's F1, as its own script has it (but for the questions on which people agree too little, which it leaves out): with
    several references, the mean over leaving each of them out; see `that_agree`."""
    references = that_agree(references)
    if len(references) < 2:
        return f1(answer, references)
    left = [[r for j, r in enumerate(references) if j != i] for i in range(len(references))]
    return sum(f1(answer, rest) for rest in left) / len(left)


def that_agree(references: Sequence[str], *, none: str = "CANNOTANSWER") -> Sequence[str]:
    """QuAC's references: where at least half of them say that there is no answer, that alone; else those that give one."""
    spans = [reference for reference in references if reference != none]
    return spans if len(spans) > len(references) / 2 else [none]


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((collections.Counter(answer) & collections.Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))
