"""The mixture: which share of the training tokens each source gives, and how often its text is seen for that.

The paper up-samples its most factual sources and names no numbers. Here a source has a weight, or its share follows from its
size and a temperature, and a cap on epochs keeps a small source from being seen until it is memorised. Where all sources
together hold too little for a run under that cap, the plan is as long as they last, and says so.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from llama_jax.corpus_build.tables import aligned


@dataclasses.dataclass(frozen=True)
class Share:
    """One line of the mixture table."""

    source: str
    documents: int
    bytes: int
    tokens: int  # in the source
    asked_share: float  # of the training tokens, before the cap
    share: float  # of the training tokens
    planned_tokens: int
    epochs: float  # how often the source's text is seen
    capped: bool  # whether `max_epochs` held it down
    asked_tokens: int  # of the whole run; more than all sources are planned to give if `max_epochs` leaves no more


def shares(
    weights: Mapping[str, float],
    tokens: Mapping[str, int],
    *,
    total_tokens: int,
    temperature: float | None = None,
    max_epochs: float | None = None,
) -> dict[str, float]:
    """The share of each source; they add up to 1.

    Args:
      weights: the shares asked for, up to a factor. With a temperature: factors on top of it, 1 for a plain source.
      tokens: in each source.
      total_tokens: of the training run.
      temperature: T, for shares in proportion to weight * tokens^(1/T): 1 is by size, a large T all alike. None: by weight.
      max_epochs: cap on how often a source is seen; what it gives up goes to the others in their proportions.

    Where all sources together do not hold total_tokens / max_epochs, each is seen max_epochs times.
    """
    if temperature is not None:
        weights = {name: weight * max(tokens[name], 1) ** (1 / temperature) for name, weight in weights.items()}
    whole = sum(weights.values())
    found = {name: weight / whole for name, weight in weights.items()}
    if max_epochs is None:
        return found
    most = {name: max_epochs * tokens[name] / total_tokens for name in weights}
    if 0 < (reach := sum(most.values())) < 1:
        return {name: share / reach for name, share in most.items()}
    full: set[str] = set()
    while over := {name for name in weights if name not in full and found[name] > most[name] * (1 + 1e-12)}:
        full |= over
        left = 1 - sum(most[name] for name in full)
        rest = sum(weight for name, weight in weights.items() if name not in full)
        found = {name: most[name] if name in full else left * weight / rest for name, weight in weights.items()}
    return found


def plan(
    weights: Mapping[str, float],
    documents: Mapping[str, int],
    tokens: Mapping[str, int],
    *,
    total_tokens: int,
    sizes: Mapping[str, int] | None = None,
    temperature: float | None = None,
    max_epochs: float | None = None,
) -> list[Share]:
    """What each source contributes to `total_tokens` of training, or to as many as the cap leaves; `sizes` are bytes."""
    found = shares(weights, tokens, total_tokens=total_tokens, temperature=temperature, max_epochs=max_epochs)
    free = shares(weights, tokens, total_tokens=total_tokens, temperature=temperature)
    reach = total_tokens if max_epochs is None else int(max_epochs * sum(tokens.values()))
    planned = min(total_tokens, reach)
    return [
        Share(
            source=source,
            documents=documents[source],
            bytes=sizes[source] if sizes else 0,
            tokens=tokens[source],
            asked_share=free[source],
            share=share,
            planned_tokens=round(planned * share),
            epochs=planned * share / max(tokens[source], 1),
            capped=planned < total_tokens or share < free[source] * (1 - 1e-9),
            asked_tokens=total_tokens,
        )
        for source, share in found.items()
    ]


def shortfall(rows: Sequence[Share]) -> str | None:
    """A sentence if the cap on epochs leaves less than the run asks for."""
    asked, planned = max(row.asked_tokens for row in rows), sum(row.planned_tokens for row in rows)
    if asked - planned <= len(rows):  # rounding
        return None
    needed = asked / max(sum(row.tokens for row in rows), 1)
    return (
        f"max_epochs leaves {planned:,} of the {asked:,} tokens of training asked for, which are {needed:,.2f} epochs of all "
        "sources: train for less, raise max_epochs, or find more text."
    )


def table(rows: Sequence[Share]) -> str:
    """The plan as text; * marks a source that the cap on epochs holds down, and the last line says if all are."""
    lines = [["source", "documents", "MB", "tokens", "share", "planned", "epochs "]]
    for row in rows:
        epochs = f"{row.epochs:,.2f}{'*' if row.capped else ' '}"
        lines.append([row.source, f"{row.documents:,}", f"{row.bytes / 1e6:,.1f}", f"{row.tokens:,}", f"{row.share:.1%}",
                      f"{row.planned_tokens:,}", epochs])  # fmt: skip
    return "\n".join([aligned(lines), *filter(None, [shortfall(rows)])])
