"""A report on preference data: the columns of the paper's Tables 6 and 26, the rating shares of Fig. 25, the scores of Fig. 26.

Sets are read as streams and added up, so that millions of comparisons need no memory. The paper prints no definition of its
columns; these reproduce its single-turn rows, where tokens/example = tokens/prompt + tokens/response:

    turns/dialog     user messages of the prompt
    tokens/example   the whole prompt and one response (the mean of both)
    tokens/prompt    one user message
    tokens/response  one of the two compared responses

Tokens are those of the texts, without the chat format's tags; a system message counts in tokens/example only.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.sources import RATINGS, SAFETY_BINS
from llama_jax.markdown import markdown_table
from llama_jax.reward import published

CountTokens = Callable[[Sequence[str]], Sequence[int]]  # texts -> tokens of each
_CHUNK = 1000  # rows whose texts are counted at once


@dataclasses.dataclass
class Tally:
    """Sums over comparisons."""

    comparisons: int = 0
    turns: int = 0
    example_tokens: float = 0.0
    prompt_tokens: int = 0
    response_tokens: int = 0
    ratings: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    safety_bins: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, row: Mapping[str, Any], tokens: Sequence[int]) -> None:
        """Adds a comparison; `tokens` of each message of its prompt, of the chosen and of the rejected response."""
        users = [i for i, message in enumerate(row["prompt"]) if message["role"] == "user"]
        responses = tokens[-2] + tokens[-1]
        self.comparisons += 1
        self.turns += len(users)
        self.example_tokens += sum(tokens[:-2]) + responses / 2
        self.prompt_tokens += sum(tokens[i] for i in users)
        self.response_tokens += responses
        self.ratings[row.get("rating")] += 1
        self.safety_bins[row.get("safety_bin")] += 1

    def row(self) -> dict[str, Any]:
        """The columns of Tables 6 and 26, and the shares of ratings and safety bins among the rows that have one."""
        n = max(self.comparisons, 1)
        return {
            "comparisons": self.comparisons,
            "turns_per_dialog": self.turns / n,
            "tokens_per_example": self.example_tokens / n,
            "tokens_per_prompt": self.prompt_tokens / max(self.turns, 1),
            "tokens_per_response": self.response_tokens / (2 * n),
            "rating_shares": _shares(self.ratings, RATINGS),
            "safety_bin_shares": _shares(self.safety_bins, SAFETY_BINS),
        }

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


def _shares(counts: Mapping[str | None, int], names: Sequence[str]) -> dict[str, float]:
    total = sum(counts.get(name, 0) for name in names)
    return {name: counts.get(name, 0) / total for name in names} if total else {}


def batch_name(row: Mapping[str, Any]) -> str | None:
    """The batch that a comparison is of: one file may write 1, another "1"."""
    return None if row.get("batch") is None else str(row["batch"])


def tally(rows: Iterable[Mapping[str, Any]], count_tokens: CountTokens) -> dict[tuple[str, str | None], Tally]:
    """Sums by (source, batch) over rows as `sources.read_comparisons` returns them."""
    found: dict[tuple[str, str | None], Tally] = {}
    for chunk in _chunks(rows, _CHUNK):
        texts = [[*(m["content"] for m in row["prompt"]), row["chosen"], row["rejected"]] for row in chunk]
        counts = iter(count_tokens([text for of_row in texts for text in of_row]))
        for row, of_row in zip(chunk, texts):
            key = row.get("source") or "", batch_name(row)
            found.setdefault(key, Tally()).add(row, [next(counts) for _ in of_row])
    return found


def _chunks(rows: Iterable[Any], size: int) -> Iterable[list[Any]]:
    chunk: list[Any] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def report(tallies: Mapping[tuple[str, str | None], Tally]) -> dict[str, Any]:
    """{"sources": {name: row}, "batches": {batch: row} of the rows that have one, in order, "total": row, "batched": row}

    "batched" is the total of `batches`, as "total" is that of `sources`.
    """
    batches = {batch: value for batch, value in _grouped(tallies, 1).items() if batch is not None}
    return {
        "sources": {name: value.row() for name, value in _grouped(tallies, 0).items()},
        "batches": {batch: value.row() for batch, value in batches.items()},
        "total": sum(tallies.values(), Tally()).row(),
        "batched": sum(batches.values(), Tally()).row(),
    }


def _grouped(tallies: Mapping[tuple[str, str | None], Tally], part: int) -> dict[Any, Tally]:
    groups: dict[Any, Tally] = {}
    for key in sorted(tallies, key=lambda key: _in_order(key[part])):
        groups[key[part]] = groups.get(key[part], Tally()) + tallies[key]
    return groups


def _in_order(name: Any) -> tuple:
    """Sorts 2 before 10, and "batch2" before "batch10"."""
    text = str(name)
    digits = text[len(text.rstrip("0123456789")) :]
    return text.removesuffix(digits), int(digits or 0)


def best_of_batches(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Fig. 26: by batch, the mean over prompts of the largest and of the median score among a prompt's sampled answers.

    Args:
      samples: batch -> rows {"prompt": number, "reward": score}, as rejection sampling writes them.
    """
    found = {}
    for batch, rows in samples.items():
        by_prompt: dict[Any, list[float]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt"], []).append(float(row["reward"]))
        if not by_prompt:
            raise ValueError(f"samples of batch {batch}: expected at least one, got none")
        found[batch] = {
            "max": float(np.mean([max(scores) for scores in by_prompt.values()])),
            "median": float(np.mean([np.median(scores) for scores in by_prompt.values()])),
            "prompts": len(by_prompt),
            "samples": sum(map(len, by_prompt.values())) / len(by_prompt),
        }
    return found


def markdown(values: Mapping[str, Any]) -> str:
    """The report as Markdown: one table a grouping, ratings and safety bins where there are any; the paper's below each."""
    parts = ["# Preference data", "Columns as in the paper's Tables 6 and 26."]
    groupings = (
        ("sources", "By set (Table 6)", "total", published.TABLE_6),
        ("batches", "By batch (Table 26)", "batched", published.TABLE_26),
    )
    kinds = (
        ("rating_shares", "Ratings (Fig. 25)", published.FIGURE_25),
        ("safety_bin_shares", "Safety bins", published.SAFETY_BINS),
    )
    for name, title, total, paper in groupings:
        if values[name]:
            rows = {**values[name], "total": values[total]}
            parts += [f"## {title}", _size_table(rows), paper.markdown()]
            for shares, heading, of_paper in kinds:
                if any(row[shares] for row in rows.values()):
                    parts += [f"### {heading}, percent of the comparisons that have one", _share_table(rows, shares),
                              of_paper.markdown()]  # fmt: skip
    if values.get("best_of_batches"):
        parts += ["## Reward of sampled answers by batch (Fig. 26)", markdown_table(
            ["batch", "prompts", "answers/prompt", "max", "median"],
            [[name, f"{row['prompts']:,}", f"{row['samples']:.1f}", f"{row['max']:.3f}", f"{row['median']:.3f}"]
             for name, row in values["best_of_batches"].items()],
        ), published.FIGURE_26.markdown()]  # fmt: skip
    if split := values.get("split"):
        parts += ["## Parts, no conversation in two of them", markdown_table(
            ["file", "comparisons"], [[f"{name}.jsonl.gz", f"{count:,}"] for name, count in split.items()]
        )]  # fmt: skip
    if left_out := values.get("left_out"):
        rows_ = [[name, reason, f"{some['rows']:,}", some["first"]]
                 for name, reasons in left_out.items() for reason, some in reasons.items()]  # fmt: skip
        parts += ["## Rows left out", markdown_table(["file", "reason", "rows", "the first"], rows_)]
    return "\n\n".join(parts) + "\n"


def _size_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("turns_per_dialog", "tokens_per_example", "tokens_per_prompt", "tokens_per_response")
    return markdown_table(
        ["", "comparisons", *(name.replace("_per_", "/") for name in columns)],
        [[name or "(none)", f"{row['comparisons']:,}", *(f"{row[column]:.1f}" for column in columns)]
         for name, row in rows.items()],
    )  # fmt: skip


def _share_table(rows: Mapping[str, Mapping[str, Any]], key: str) -> str:
    columns = list(next(row[key] for row in rows.values() if row[key]))
    return markdown_table(
        ["", *columns],
        [[name or "(none)", *(f"{100 * row[key][column]:.1f}" for column in columns)]
         for name, row in rows.items() if row[key]],
    )  # fmt: skip
