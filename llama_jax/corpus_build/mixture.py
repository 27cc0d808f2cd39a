"""The mixture: which share of the training tokens each source gives, and how often its text is seen for that."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Share:
    """One line of the mixture table."""

    source: str
    documents: int
    tokens: int  # in the source
    share: float  # of the training tokens
    planned_tokens: int
    epochs: float  # how often the source's text is seen


def plan(
    weights: Mapping[str, float], documents: Mapping[str, int], tokens: Mapping[str, int], *, total_tokens: int
) -> list[Share]:
    """What each source contributes to `total_tokens` of training."""
    whole = sum(weights.values())
    return [
        Share(
            source=source,
            documents=documents[source],
            tokens=tokens[source],
            share=weight / whole,
            planned_tokens=round(total_tokens * weight / whole),
            epochs=total_tokens * weight / whole / max(tokens[source], 1),
        )
        for source, weight in weights.items()
    ]


def table(shares: list[Share]) -> str:
    """The plan as text."""
    lines = [f"{'source':<16}{'documents':>10}{'tokens':>13}{'share':>8}{'planned':>13}{'epochs':>8}"]
    for row in shares:
        lines.append(
            f"{row.source:<16}{row.documents:>10,}{row.tokens:>13,}{row.share:>8.1%}{row.planned_tokens:>13,}"
            f"{row.epochs:>8.2f}"
        )
    return "\n".join(lines)
