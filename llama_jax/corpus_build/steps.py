"""The cleaning of one document as a chain of named steps, each a pure function (paper section 2.1).

A source names the steps it goes through, in their order: web pages all of them, books and documentation few. What a step
learns stays in the document's findings (`language`, `private`); what it leaves out comes back as `Removed`, with the reason.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from llama_jax.corpus_build import language, privacy, quality, text
from llama_jax.corpus_build.document import Document, Removed, Step


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """Settings of the steps; the limits are the published ones."""

    extractor: str = "resiliparse"  # of `extract`: resiliparse, or trafilatura (slower, more precise)
    page_characters: int = 5_000_000  # of HTML; longer pages are left out
    gopher: quality.GopherLimits = quality.GopherLimits()
    c4: quality.C4Limits = quality.C4Limits()
    languages: tuple[str, ...] = ("en",)  # ISO 639 codes that stay, and "unknown" for what is below the threshold
    language_threshold: float = language.THRESHOLD
    block_list: str | None = None  # a file of domains and reasons instead of the built-in list
    private_density: float = 1.0  # findings per 1,000 characters from which on a document is left out
    private_least: int = 3  # findings that a document is allowed whatever its length
    mask: bool = False  # replace the findings in what stays

    def __post_init__(self):
        if self.extractor not in ("resiliparse", "trafilatura"):
            raise ValueError(f"extractor: expected resiliparse or trafilatura, got {self.extractor!r}")
        if self.page_characters < 1:
            raise ValueError(f"page_characters: expected at least 1, got {self.page_characters}")
        for name in self.languages:
            if name != language.UNKNOWN and not re.fullmatch("[a-z]{2,3}", name):
                raise ValueError(f"languages: expected ISO 639 codes such as 'en', or {language.UNKNOWN!r}, got {name!r}")
        if not 0 < self.language_threshold <= 1:
            raise ValueError(f"language_threshold: expected a number between 0 and 1, got {self.language_threshold}")
        self.blocked()

    def blocked(self) -> Mapping[str, str]:
        """The domains that `privacy` leaves out, with the reasons. ValueError for a list that is not there or malformed."""
        if self.block_list is None:
            return privacy.BLOCKED_DOMAINS
        if not Path(self.block_list).is_file():
            raise ValueError(f"block_list: expected a file of domains and reasons, found nothing at {self.block_list!r}")
        return privacy.read_block_list(Path(self.block_list).read_text(errors="replace").splitlines(), self.block_list)


# The steps that read each setting.
_READERS: Mapping[str, tuple[str, ...]] = {
    "extractor": ("extract",), "page_characters": ("extract",), "gopher": ("gopher", "repetition"), "c4": ("c4",),
    "languages": ("language",), "language_threshold": ("language",),
    **dict.fromkeys(("block_list", "private_density", "private_least", "mask"), ("privacy",)),
}  # fmt: skip


def check_readers(steps: Iterable[Sequence[str]], config: CleanConfig) -> None:
    """ValueError for a setting that was changed and that no step of any source (`steps`) reads."""
    present = {name for of_source in steps for name in of_source}
    for field in dataclasses.fields(config):
        readers, value = _READERS[field.name], getattr(config, field.name)
        if value != field.default and not present.intersection(readers):
            shown = repr(value) if isinstance(value, bool | int | float | str | tuple) else "other limits"
            raise ValueError(
                f"clean.{field.name}: {shown} is for the step {' or '.join(readers)}, which no source has; expected it among "
                "the steps of one"
            )


def make_steps(names: Sequence[str], config: CleanConfig) -> list[Step]:
    """The steps of a source. ValueError for a name that is none."""
    for name in names:
        if name not in STEPS:
            raise ValueError(f"step {name!r} is unknown; expected some of {', '.join(STEPS)}")
    return [STEPS[name](config) for name in names]


def trail(document: Document, steps: Sequence[Step]) -> list[Document | Removed]:
    """The document as it came and after each step; the last one is what the first step that left it out said, if any did."""
    found: list[Document | Removed] = [document]
    if not document.text.strip():
        return [document, Removed(document, "read", "blank")]
    for step in steps:
        found.append(step(found[-1]))
        if isinstance(found[-1], Removed):
            break
    return found


def clean(document: Document, steps: Sequence[Step]) -> Document | Removed:
    """The document after all steps, or what the first step that left it out said."""
    return trail(document, steps)[-1]


def _with(document: Document, text_: str, **findings) -> Document:
    if text_ == document.text and not findings:
        return document
    return dataclasses.replace(document, text=text_, findings={**document.findings, **findings})


def _extract(config: CleanConfig) -> Step:
    def extract(document: Document) -> Document | Removed:
        if not text.is_markup(document.text):  # a conversion of a WET file, a page that came as text
            return document
        if (size := len(document.text)) > config.page_characters:
            return Removed(document, "extract", "too_large", f"{size:,} characters")
        found = text.extract_text(document.text, extractor=config.extractor)
        if found is None:
            return Removed(document, "extract", "too_tangled")
        return _with(document, found) if found.strip() else Removed(document, "extract", "no_text")

    return extract


def _normalise(config: CleanConfig) -> Step:
    del config

    def normalise(document: Document) -> Document | Removed:
        result = text.normalise(text.fix_mojibake(document.text))
        return _with(document, result) if result.strip() else Removed(document, "normalise", "no_text")

    return normalise


def _rules(name: str, rule: Callable[[Document], quality.Failure | None]) -> Step:
    def check(document: Document) -> Document | Removed:
        failure = rule(document)
        return Removed(document, name, failure[0], f"{failure[1]:.4g}") if failure else document

    return check


def _gopher(config: CleanConfig) -> Step:
    # Where no step before has identified the language, the text is held to be English, as it is in Gopher's paper.
    return _rules("gopher", lambda d: quality.gopher_quality(d.text, config.gopher, d.findings.get("language", "en")))


def _repetition(config: CleanConfig) -> Step:
    return _rules("repetition", lambda document: quality.gopher_repetition(document.text, config.gopher))


def _c4(config: CleanConfig) -> Step:
    def c4(document: Document) -> Document | Removed:
        kept, failure = quality.c4_lines(document.text, config.c4)
        if not failure and not kept.strip():  # where no sentence is asked for
            return Removed(document, "c4", "no_text")
        return Removed(document, "c4", failure[0], f"{failure[1]:.4g}") if failure else _with(document, kept)

    return c4


def _language(config: CleanConfig) -> Step:
    def identify(document: Document) -> Document | Removed:
        found, probability = language.identify(document.text, threshold=config.language_threshold)
        document = _with(document, document.text, language=found)
        if found in config.languages:
            return document
        return Removed(document, "language", "unknown" if found == language.UNKNOWN else "other", f"{found} {probability:.2f}")

    return identify


def _privacy(config: CleanConfig) -> Step:
    blocked = config.blocked()

    def private(document: Document) -> Document | Removed:
        if document.url and (reason := privacy.blocked_reason(document.url, blocked)):
            return Removed(document, "privacy", "blocked_site", reason)
        found = privacy.find(document.text)
        if not found:
            return document
        counts = {kind: len(spans) for kind, spans in found.items()}
        document = _with(document, document.text, private=counts)
        density = privacy.density(found, document.text)
        if density >= config.private_density and sum(counts.values()) > config.private_least:
            return Removed(document, "privacy", "dense", f"{density:.2f} per 1,000 characters")
        return _with(document, privacy.mask(document.text, found)) if config.mask else document

    return private


# In the order in which a web page goes through them: what is cheap and removes much comes first.
STEPS: Mapping[str, Callable[[CleanConfig], Step]] = {
    "extract": _extract,
    "normalise": _normalise,
    "language": _language,
    "gopher": _gopher,
    "repetition": _repetition,
    "c4": _c4,
    "privacy": _privacy,
}
