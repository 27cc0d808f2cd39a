"""Constraints that should hold through a whole dialog: families, wordings and checks (paper section 3.3, A.3.5).

The paper's families are hobbies, a language and a public figure to act as. The others were added because a program can decide
whether an answer obeys them; with `probe`, hobbies and figures are decided too, by asking for them, as in the paper's Table 30.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from llama_jax.data.dialog import find_tag


def begins_with(answer: str, value: str) -> bool:
    """Whether the answer's first words are those of `value`; case and punctuation do not count."""
    words, expected = _words(answer), _words(value)
    return bool(expected) and words[: len(expected)] == expected


def ends_with(answer: str, value: str) -> bool:
    """Whether the answer's last words are those of `value`; case and punctuation do not count."""
    words, expected = _words(answer), _words(value)
    return bool(expected) and words[-len(expected) :] == expected


def mentions(answer: str, value: str) -> bool:
    """Whether the words of `value` stand in the answer, in their order and side by side."""
    words, expected = _words(answer), _words(value)
    return bool(expected) and any(words[i : i + len(expected)] == expected for i in range(len(words) - len(expected) + 1))


def in_capitals(answer: str, value: str = "") -> bool:
    """Whether all letters that have a case are capitals, and there is at least one."""
    del value
    return answer.isupper()


def in_one_sentence(answer: str, value: str = "") -> bool:
    """Whether the answer has no sentence mark before its end. The stop of an abbreviation or number is none."""
    del value
    text = answer.strip()
    return bool(text) and "\n" not in text and not any(_ends_sentence(text, mark) for mark in _MARK.finditer(text))


# A mark that a small letter follows ends nothing.
_MARK = re.compile(r"([.!?])[\"')\]`]*\s+(?=[^\sa-z])")
# Stops that end no sentence; that end none before a number; that may end one, as those of initials and of "U.S." do.
_NEVER = frozenset("mr mrs ms mx dr prof rev gen capt sgt vs e.g i.e cf approx".split())
_BEFORE_NUMBERS = frozenset("no nos fig figs eq ch p pp vol jan feb mar apr jun jul aug sep sept oct nov dec".split())
_PERHAPS = frozenset("inc ltd co corp jr sr st etc al dept a.m p.m".split())
# These are no names: after a stop of the third kind, a capital of theirs begins a sentence.
_OPENINGS = frozenset(
    "a after all also although an and as at because before both but by each every for from he her here his how however i if in "
    "it its many more most my no not on once one or our she since so some such that the their then there these they this "
    "those though thus to we what when where which while who why with yet you your".split()
)


def _ends_sentence(text: str, mark: re.Match) -> bool:
    if mark[1] != ".":
        return True
    before = re.split(r"[^\w.]", text[: mark.start()])[-1]  # with the stops inside it
    after = re.match(r"\W*(\w*)", text[mark.end() :])[1].casefold()
    initial, word = before.rpartition(".")[2], before.casefold()
    if word in _NEVER:
        return False
    if word in _BEFORE_NUMBERS:
        return not after[:1].isdigit()
    if word in _PERHAPS or len(initial) == 1 and initial.isupper():
        return after in _OPENINGS
    return True


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of constraint.

    Attributes:
      sentence: its wording, with `{value}` where it has values.
      terse: the "Figure: Napoleon" form.
      request: what the model is asked for a list of values; empty where the family has none.
      check: (answer, value) -> whether the answer obeys; None where no program of ours can tell.
      probe: the question whose answer is checked; empty: any answer is.
    """

    sentence: str
    terse: str
    request: str = ""
    check: Callable[[str, str], bool] | None = None
    probe: str = ""


FAMILIES: dict[str, Family] = {
    "hobby": Family(
        "You enjoy {value}.", "Hobby: {value}.", "List twenty hobbies, one on each line.", mentions, "What is your hobby?"
    ),
    "language": Family("Always speak in {value}.", "Language: {value}.", "List twenty languages, one on each line."),
    "figure": Family(
        "Act as {value}.", "Figure: {value}.", "List twenty famous people or characters, one on each line.", mentions,
        "Who are you?",
    ),
    "opening": Family(
        "Begin every answer with {value}.", "Begin: {value}.", "List twenty common nouns, one on each line.", begins_with
    ),
    "closing": Family(
        "End every answer with {value}.", "End: {value}.", "List twenty common nouns, one on each line.", ends_with
    ),
    "mention": Family(
        "Mention {value} in every answer.", "Mention: {value}.", "List twenty common nouns, one on each line.", mentions
    ),
    "capitals": Family("Write all your answers in capital letters.", "Letters: capitals.", check=in_capitals),
    "sentence": Family("Answer always in one sentence.", "Length: one sentence.", check=in_one_sentence),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A family with one of its values."""

    family: str
    value: str = ""

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"constraint family {self.family!r} is unknown; expected one of {', '.join(FAMILIES)}")
        if bool(self.value) != bool(FAMILIES[self.family].request):
            expected = "a value" if FAMILIES[self.family].request else "no value"
            raise ValueError(f"constraint {self.family}: expected {expected}, got {self.value!r}")

    @property
    def probe(self) -> str:
        """The question that asks for it directly, or ""."""
        return FAMILIES[self.family].probe

    def holds(self, answer: str) -> bool | None:
        """Whether an answer obeys; None if no program can tell."""
        check = FAMILIES[self.family].check
        return None if check is None else check(answer, self.value)


def obeyed(constraints: Iterable[Constraint], answer: str, question: str) -> bool | None:
    """Whether an answer obeys all constraints that can be decided after this question; None if there is none."""
    found = [c.holds(answer) for c in constraints if not c.probe or c.probe == question]
    decided = [holds for holds in found if holds is not None]
    return all(decided) if decided else None


def instruction(constraints: Sequence[Constraint], *, terse: bool) -> str:
    """The combined instruction, in whole sentences or in the short form."""
    families = [FAMILIES[c.family] for c in constraints]
    texts = [family.terse if terse else family.sentence for family in families]
    return " ".join(text.format(value=c.value) for text, c in zip(texts, constraints, strict=True))


def draw_constraints(
    values: Mapping[str, Sequence[str]], *, most: int, rng: np.random.Generator
) -> tuple[Constraint, ...]:
    """One to `most` constraints of different families, at random. `values`: family -> its values, () if it has none."""
    number = int(rng.integers(1, min(most, len(values)) + 1))
    drawn = rng.choice(sorted(values), size=number, replace=False)
    return tuple(Constraint(str(name), str(rng.choice(values[name])) if len(values[name]) else "") for name in drawn)


def parse_list(text: str, *, longest: int = 40) -> list[str]:
    """The entries of a list that a model wrote: one a line or between commas, without numbers, bullets and final stops."""
    lines = [line for line in text.splitlines() if line.strip()]
    parts = lines if len(lines) > 1 else text.split(",")
    entries: dict[str, str] = {}
    for part in parts:
        entry = re.sub(r"^\s*(?:[-*\u2022]|\(?\d+[.):])?\s*", "", part).strip().rstrip(".;,").strip("\"'` ")
        if entry and len(entry) <= longest and not entry.endswith(":") and find_tag(entry) is None:
            entries.setdefault(entry.casefold(), entry)
    return list(entries.values())
