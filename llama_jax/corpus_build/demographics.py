"""Who the corpus speaks of: the pronouns and identities of the paper's Table 9 (section 4.1).

A count is of documents: one that names a group once and one that names it a hundred times are one each. The full HolisticBias
lists hold some 600 descriptors; here are the five most frequent of each axis, which are those the paper prints. A file of more
can be given (`identities_of`, the config's `identities`).
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

_SHE = "she her hers herself"
_HE = "he him his himself"
_UNSPECIFIED = "they them their theirs theirself themself themselves"
PRONOUNS: Mapping[str, frozenset[str]] = {
    "she": frozenset(_SHE.split()),
    "he": frozenset(_HE.split()),
    "unspecified": frozenset(_UNSPECIFIED.split()),
    "1st person": frozenset("i me my mine myself we us our ours ourselves".split()),
    "2nd person": frozenset("you your yours yourself yourselves".split()),
    "3rd person": frozenset(f"{_SHE} {_HE} {_UNSPECIFIED} it its itself".split()),
}
# Words with other common uses (straight, white, black) are left out, as in the paper.
IDENTITIES: Mapping[str, tuple[str, ...]] = {
    "gender and sex": ("female", "male", "feminine", "transgender", "masculine"),
    "sexual orientation": ("gay", "lesbian", "lgbt", "lgbtq", "queer"),
    "nationality": ("american", "indian", "chinese", "korean", "mexican"),
    "race and ethnicity": ("european", "african", "asian", "latin", "indigenous"),
    "religion": ("christian", "religious", "spiritual", "catholic", "jewish"),
}
# Table 9, percent of English documents (of those with any gendered pronoun; of the axis).
PAPER = {
    "any gendered": 75.23, "any person": 94.47,
    "she": 28.45, "he": 50.73, "unspecified": 86.38,
    "1st person": 70.71, "2nd person": 61.80, "3rd person": 93.07,
    "gender and sex": 5.91, "sexual orientation": 6.67, "nationality": 14.83, "race and ethnicity": 19.51, "religion": 7.93,
    "female": 50.0, "male": 39.1, "feminine": 5.4, "transgender": 4.2, "masculine": 3.1,
    "gay": 14.8, "lesbian": 4.3, "lgbt": 4.0, "lgbtq": 3.6, "queer": 3.5,
    "american": 69.4, "indian": 16.5, "chinese": 16.3, "korean": 5.1, "mexican": 4.9,
    "european": 20.7, "african": 11.5, "asian": 7.4, "latin": 6.2, "indigenous": 3.7,
    "christian": 33.2, "religious": 28.8, "spiritual": 20.6, "catholic": 15.4, "jewish": 13.0,
}  # fmt: skip

_WORD = re.compile(r"[a-z]+")
_GENDERED = ("she", "he", "unspecified")
_PERSON = ("1st person", "2nd person", "3rd person")


@functools.cache
def identities_of(path: str | None) -> Mapping[str, tuple[str, ...]]:
    """Axes and their descriptors from a file of lines `axis<TAB>descriptor` (# begins a comment); without one IDENTITIES.

    A descriptor may be of several words; case and punctuation do not count.

    Raises:
      ValueError: for a line of another form, or a descriptor that stands there twice or names an axis or a group of pronouns.
    """
    if path is None:
        return IDENTITIES
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"identities: expected a file of axes and descriptors; {error}") from None
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        axis, _, words = line.partition("#")[0].strip().partition("\t")
        descriptor = " ".join(_WORD.findall(words.lower()))
        if not axis:
            continue
        if not descriptor:
            raise ValueError(f"identities: {path}:{number}: expected an axis, a tab and a descriptor, got {line!r}")
        if descriptor in seen:
            raise ValueError(f"identities: {path}:{number}: {descriptor!r} stands there already")
        seen.add(descriptor)
        found.setdefault(axis.strip(), []).append(descriptor)
    if not found:
        raise ValueError(f"identities: {path}: expected lines of an axis, a tab and a descriptor, found none")
    if twice := seen & {*found, *PRONOUNS, "any gendered", "any person"}:
        raise ValueError(f"identities: {path}: {min(twice)!r} is the name of an axis or of a group of pronouns too")
    return {axis: tuple(descriptors) for axis, descriptors in found.items()}


def mentions(text: str, identities: Mapping[str, tuple[str, ...]] = IDENTITIES) -> list[str]:
    """What a text names: groups of pronouns, "any gendered", "any person", axes and descriptors."""
    in_order = _WORD.findall(text.lower())
    words = set(in_order)
    whole: str | None = None  # for descriptors of several words
    found = [name for name, group in PRONOUNS.items() if not group.isdisjoint(words)]
    found += ["any gendered"] * any(name in found for name in _GENDERED)
    found += ["any person"] * any(name in found for name in _PERSON)
    for axis, descriptors in identities.items():
        named = []
        for descriptor in descriptors:
            if " " not in descriptor:
                if descriptor in words:
                    named.append(descriptor)
                continue
            whole = whole or f" {' '.join(in_order)} "
            if f" {descriptor} " in whole:
                named.append(descriptor)
        found += [axis, *named] if named else []
    return found


def shares(counts: Counter, documents: int, identities: Mapping[str, tuple[str, ...]] = IDENTITIES) -> dict[str, float]:
    """Percentages as Table 9 prints them, from the documents that have each of the `mentions`.

    She, he and unspecified are of the documents with any of them; a descriptor is of the documents of its axis; all else is
    of all documents.
    """
    whole = dict.fromkeys(_GENDERED, counts["any gendered"])
    whole |= {descriptor: counts[axis] for axis, descriptors in identities.items() for descriptor in descriptors}
    names = ["any gendered", *_GENDERED, "any person", *_PERSON]
    names += [name for axis, descriptors in identities.items() for name in (axis, *descriptors)]
    return {name: 100 * counts[name] / max(whole.get(name, documents), 1) for name in names}
