"""The mixture: which share of the training tokens each source gives, and how often its text is seen for that.

The paper up-samples its most factual sources and names no numbers. Here a source has a weight, or its share follows from its
size and a temperature, and a cap on epochs keeps a small source from being seen until it is memorised.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Share:
    """One line of the mixture table."""

    source: str
    documents: int
    bytes: int
    tokens: int  # in the source
    share: float  # of the training tokens
    planned_tokens: int
    epochs: float  # how often the source's text is seen
    capped: bool  # whether `max_epochs` held it down


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

    Raises:
      ValueError: all sources together do not hold total_tokens / max_epochs.
    """
    if temperature is not None:
        weights = {name: weight * max(tokens[name], 1) ** (1 / temperature) for name, weight in weights.items()}
    whole = sum(weights.values())
    found = {name: weight / whole for name, weight in weights.items()}
    if max_epochs is None:
        return found
    most = {name: max_epochs * tokens[name] / total_tokens for name in weights}
    if sum(most.values()) < 1:
        raise ValueError(
            f"max_epochs: {total_tokens:,} tokens of training ask for {total_tokens / max(sum(tokens.values()), 1):.2f} epochs "
            f"of all sources; expected at most {max_epochs:g}"
        )
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
    """What each source contributes to `total_tokens` of training; `sizes` are bytes. See `shares`."""
    found = shares(weights, tokens, total_tokens=total_tokens, temperature=temperature, max_epochs=max_epochs)
    free = shares(weights, tokens, total_tokens=total_tokens, temperature=temperature)
    return [
        Share(
            source=source,
            documents=documents[source],
            bytes=sizes[source] if sizes else 0,
            tokens=tokens[source],
            share=share,
            planned_tokens=round(total_tokens * share),
            epochs=total_tokens * share / max(tokens[source], 1),
            capped=share < free[source] * (1 - 1e-9),
        )
        for source, share in found.items()
    ]


def table(rows: list[Share]) -> str:
    """The plan as text; * marks a source that the cap on epochs holds down."""
    lines = [f"{'source':<16}{'documents':>10}{'MB':>9}{'tokens':>15}{'share':>8}{'planned':>17}{'epochs':>8}"]
    for row in rows:
        lines.append(
            f"{row.source:<16}{row.documents:>10,}{row.bytes / 1e6:>9,.1f}{row.tokens:>15,}{row.share:>8.1%}"
            f"{row.planned_tokens:>17,}{row.epochs:>8.2f}{'*' if row.capped else ''}"
        )
    return "\n".join(lines)
