"""Held-out documents, by hash of their content: a text is on the same side in every build, whatever else is there."""

from collections.abc import Iterable

from llama_jax.corpus_build.dedup import content_hash
from llama_jax.corpus_build.document import Document


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text is among the share `fraction` that no model trains on."""
    return int.from_bytes(content_hash(text)[:8], "big") < fraction * 2**64


def split(documents: Iterable[Document], *, fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, held out)."""
    train, held_out = [], []
    for document in documents:
        (held_out if is_held_out(document.text, fraction) else train).append(document)
    return train, held_out
