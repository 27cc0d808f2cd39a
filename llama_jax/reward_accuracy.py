"""Accuracy of finished reward models, side by side (paper 3.2.2, Tables 7 and 8): `python -m llama_jax.reward_accuracy`.

    python -m llama_jax.reward_accuracy --checkpoint=ours=runs/helpfulness,other=runs/safety --output=runs/accuracy \\
        --data=anthropic=held_out.jsonl,webgpt=webgpt.jsonl

Sets are files of comparisons as `configs/reward.py` takes them; `llama_jax.preferences --rows` makes them of the open sets. No
model may have been trained on them. A set whose rows have several sources stands in the report by source. Beside the models
stands what length alone gives: the longer response, a coin where both have as many tokens (of the first model's tokenizer).

A pair that is longer than a model's context is left out whole, and of all models, so that all answer the same questions; the
report counts such pairs, and those that prefer an unsafe answer to a safe one, which are left out as in training.

`results.json`, `report.md`, `report.html` and `figures/`. Scores are kept in `scores/MODEL/SET/scores.jsonl`, a row for each
pair that fits: a run that is stopped goes on with the same command, and further models or sets are added to those that are
there. Another model under a name, or other pairs, are refused; degrees and sources of the same pairs may be corrected. The
output may lie in a bucket (gs://bucket/...). On a pod the same command runs on every host.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.compare import check_judge, load_judge
from llama_jax.data.rows import read_rows
from llama_jax.data.sources import RATINGS, read_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import plots, reward_figures
from llama_jax.evals.origin import claim
from llama_jax.evals.page import Chapter, page
from llama_jax.evals.words import tokenizer_of
from llama_jax.files import write_json, write_text
from llama_jax.interop.formats import open_source
from llama_jax.interop.tokenizer_files import open_tokenizer
from llama_jax.markdown import Table
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.hosts import exist, from_host_0, on_host_0
from llama_jax.parallel.mesh import start_distributed
from llama_jax.parallel.output import worked_in
from llama_jax.pretrained import Model
from llama_jax.reward.comparisons import Comparison, encode_comparisons
from llama_jax.reward.held_out import HeldOutScores, accuracy_table, percent
from llama_jax.reward.published import TABLE_7, TABLE_8
from llama_jax.reward.scorers import check_scores
from llama_jax.rlhf.respond import Tell, write_in_portions
from llama_jax.rlhf.scoring import logit_scores

LONGER = "the longer response"
_PORTION = 1000  # pairs that are scored and written together
_ROWS = 16  # texts of the longest length in memory at once

Shares = Mapping[str, Mapping[str, Mapping[str, float]]]  # {source: {degree or "all": share}}

NOTES = (
    "Percent, with Wilson's 95 % intervals. A pair counts where the chosen response scores higher, each scored alone, and one "
    "half where both score alike.",
    "All models answer the same pairs. In `all` every pair counts once, with or without a degree; the paper does not say how "
    "its average is weighted.",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A set as a tokenizer reads it: its pairs in the order of the file, however long."""

    pairs: Sequence[Comparison]
    unsafe: int  # pairs that prefer an unsafe answer, which are not among them
    digest: str  # of all tokens, on which scores depend


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A reward model that is not loaded yet, and the sets as it reads them."""

    place: str
    max_length: int
    sets: Mapping[str, Encoded]

    def fits(self, name: str) -> np.ndarray:
        """Which pairs of a set its context holds. # -> bool [n]"""
        return np.array([pair.tokens <= self.max_length for pair in self.sets[name].pairs], bool)


def read_set(path: str, words: Tokenizer) -> Encoded:
    """A file of comparisons with all of its pairs: each model leaves out what is too long for it."""
    pairs = encode_comparisons(path, words, length=sys.maxsize, margin="none")
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.chosen, pair.rejected):
            digest.update(np.int64(ids.size).tobytes() + np.asarray(ids, np.int32).tobytes())
    return Encoded(pairs, sum(1 for _ in read_rows(path)) - len(pairs), digest.hexdigest()[:16])


def open_judges(checkpoints: Mapping[str, str], data: Mapping[str, str], tokenizer: str | None) -> dict[str, Judge]:
    """Looks at the files of all models and reads all sets; sets are read once by each tokenizer.

    Raises:
      ValueError, FileNotFoundError: no reward model, not its tokenizer, no comparisons, or none that a model can read.
    """
    if not checkpoints or not data:
        raise ValueError("expected at least one --checkpoint=name=checkpoint and one --data=name=file")
    for flag, names in (("checkpoint", checkpoints), ("data", data)):
        command.check_directories(flag, names)
    if "all" in data:
        raise ValueError("--data: 'all' is the name of all sets together; expected another one")
    opened = {}
    for name, place in checkpoints.items():
        check_judge(place, tokenizer)
        source = open_source(place)
        opened[name] = (source, open_tokenizer(source, tokenizer_of(place, tokenizer) or source.tokenizer))
    read: dict[str, dict[str, Encoded]] = {}
    judges = {}
    for name, (source, words) in opened.items():
        if words.fingerprint not in read:
            read[words.fingerprint] = {of: read_set(path, words) for of, path in data.items()}
        judges[name] = judge = Judge(checkpoints[name], source.config.max_length, read[words.fingerprint])
        for of in data:
            if not judge.fits(of).any():
                raise ValueError(
                    f"{data[of]}: none of {len(judge.sets[of].pairs)} pairs fits into the {judge.max_length} tokens of {name}"
                )
    return judges


def score(name: str, judge: Judge, output: Path, *, tokenizer: str | None = None) -> dict[str, np.ndarray]:
    """The logits of (chosen, rejected) of each set's pairs, NaN for those that do not fit; what is not kept yet is scored.

    # -> {set: float64 [n, 2]}
    """
    files = {of: output / "scores" / name / of / "scores.jsonl" for of in judge.sets}
    model, scores = None, {}
    for of, file in files.items():
        pairs, fits = judge.sets[of].pairs, judge.fits(of)
        if not all(exist([file])):
            model = model or load_judge(judge.place, tokenizer)
            _write_scores(model, [pair for pair, fit in zip(pairs, fits) if fit], file, label=f"{name} on {of}")
        kept = from_host_0(lambda file=file: [[row["chosen"], row["rejected"]] for _, row in read_jsonl(file)])
        scores[of] = np.full((len(pairs), 2), np.nan)
        scores[of][fits] = kept
    return scores


def _write_scores(model: Model, pairs: Sequence[Comparison], file: Path, *, label: str) -> None:
    longest = max(pair.tokens for pair in pairs)

    def scored(some: Sequence[Comparison], first: int, progress: Tell) -> list[dict[str, float]]:
        del first
        logits = logit_scores(
            model.config, model.compute, model.params,
            [pair.chosen[: pair.response_start] for pair in some for _ in range(2)],
            [ids[pair.response_start :] for pair in some for ids in (pair.chosen, pair.rejected)],
            length=longest, batch_size=_ROWS,
        )  # fmt: skip
        progress(2 * len(some))
        found = check_scores(logits, 2 * len(some), model.path).reshape(-1, 2)
        return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in found.tolist()]

    with jax.set_mesh(model.mesh):
        write_in_portions(file, pairs, scored, answers=lambda _: 2, label=label, size=_PORTION)


def run(
    checkpoints: Mapping[str, str], data: Mapping[str, str], output: str | Path, *, tokenizer: str | None = None
) -> dict[str, Any]:
    """Scores what is missing and writes the report of {name: checkpoint} and {name: file}; returns its values.

    Raises:
      ValueError, FileNotFoundError, ConfigError: wrong models or files, or scores of others in `output`; before a model is
        loaded.
    """
    output = Path(output)
    judges = open_judges(checkpoints, data, tokenizer)

    def claim_all() -> None:
        for name, judge in judges.items():
            for of, encoded in judge.sets.items():
                claim(output / "scores" / name / of / "model.json", judge.place, pairs=encoded.digest)

    from_host_0(claim_all)
    alike = {of: np.all([judge.fits(of) for judge in judges.values()], axis=0) for of in data}  # what every model can read
    for of, inside in alike.items():
        if not inside.any():
            raise ValueError(f"{data[of]}: no pair fits into the contexts of all models, {', '.join(judges)}")
    scores = {name: score(name, judge, output, tokenizer=tokenizer) for name, judge in judges.items()}
    rows = {name: pair_rows(next(iter(judges.values())).sets, scores[name], alike) for name in judges}
    first = next(iter(rows))
    values = {
        "checkpoints": dict(checkpoints),
        "data": {
            of: {
                "file": path, "pairs": len(alike[of]), "compared": int(alike[of].sum()),
                "unsafe_chosen": next(iter(judges.values())).sets[of].unsafe,
                "too_long": {name: int((~judge.fits(of)).sum()) for name, judge in judges.items()},
            }
            for of, path in data.items()
        },
        "accuracy": {name: by_source(some)[0] for name, some in rows.items()},
        "longer": by_source(rows[first])[1],
    }  # fmt: skip
    on_host_0(write, values, output)
    return values


def pair_rows(
    sets: Mapping[str, Encoded], scores: Mapping[str, np.ndarray], alike: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """A row for each pair of `alike`, as `HeldOutScores.of` takes them; its source is the set's name, with its own
    source where a set has several."""
    rows = []
    for of, encoded in sets.items():
        several = len({pair.source for pair in encoded.pairs}) > 1
        rows += [
            {"chosen": chosen, "rejected": rejected, "source": f"{of}: {pair.source or 'no source'}" if several else of,
             "rating": RATINGS[pair.degree] if pair.degree >= 0 else None, "safety_bin": pair.safety_bin,
             "longer_by": len(pair.chosen) - len(pair.rejected)}
            for pair, (chosen, rejected), inside in zip(encoded.pairs, scores[of].tolist(), alike[of], strict=True) if inside
        ]  # fmt: skip
    return rows


def by_source(rows: Sequence[Mapping[str, Any]]) -> tuple[Shares, Shares]:
    """Accuracy by source and degree, of "all" sources too where there are several: the model's, and that of the longer
    response on the same pairs."""
    names = list(dict.fromkeys(row["source"] for row in rows))
    own, longer = {}, {}
    for name in [*names, "all"] if len(names) > 1 else names:
        some = [{**row, "source": ""} for row in rows if name in ("all", row["source"])]
        found = accuracy_table(HeldOutScores.of(some))
        own[name], longer[name] = found[""], found["longer"]
    return own, longer


def tables_of(values: Mapping[str, Any]) -> dict[str, Table]:
    """Tables 7 and 8, the latter where pairs have degrees, and what was left out, by heading."""
    models = {**values["accuracy"], LONGER: values["longer"]}
    sources = list(values["longer"])
    tables = {
        "By source (Table 7)": Table(["", *sources], [
            *([name, *(percent(of[source]["all"]) for source in sources)] for name, of in models.items()),
            ["pairs", *(f"{values['longer'][source]['all']['n']:,}" for source in sources)],
        ])
    }  # fmt: skip
    degrees = [degree for degree in (*RATINGS, "all") if any(degree in row for row in values["longer"].values())]
    if rated := [source for source in sources if len(values["longer"][source]) > 1]:
        tables["By degree of preference (Table 8)"] = Table(["", "model", *degrees], [
            [source, name, *(percent(of[source].get(degree)) for degree in degrees)]
            for source in rated for name, of in models.items()
        ])  # fmt: skip
    names = list(values["accuracy"])
    tables["Pairs"] = Table(
        ["", "compared", "of", *(f"too long for {name}" for name in names), "unsafe answer chosen"],
        [[of, *(f"{n:,}" for n in (
            found["compared"], found["pairs"] + found["unsafe_chosen"], *(found["too_long"][name] for name in names),
            found["unsafe_chosen"],
        ))] for of, found in values["data"].items()],
    )  # fmt: skip
    return tables


def figures_of(values: Mapping[str, Any]) -> dict[str, plots.Plot]:
    """Bars by source, and by degree over all pairs, where there are degrees; under the headings of their tables."""
    models = {**values["accuracy"], LONGER: values["longer"]}
    shares = {name: {source: of[source]["all"]["share"] for source in of} for name, of in models.items()}
    drawn = {"By source (Table 7)": reward_figures.accuracy_by_source(shares)}
    whole = list(values["longer"])[-1]  # "all", or the only source
    if len(values["longer"][whole]) > 1:
        drawn["By degree of preference (Table 8)"] = reward_figures.accuracy(
            {name: {degree: value["share"] for degree, value in of[whole].items()} for name, of in models.items()}
        )
    return drawn


def write(values: Mapping[str, Any], output: Path) -> None:
    """results.json, report.md, report.html and the figures."""
    tables, drawn = tables_of(values), figures_of(values)
    papers = dict(zip(tables, (TABLE_7, TABLE_8))) if len(tables) > 2 else dict(zip(tables, (TABLE_7,)))
    write_json(output / "results.json", values)
    parts = ["# Accuracy of reward models", *NOTES]
    for heading, table in tables.items():
        parts += [f"## {heading}", table.markdown(), *([papers[heading].markdown()] if heading in papers else [])]
    write_text(output / "report.md", "\n\n".join(parts) + "\n")
    plots.save(drawn.values(), output / "figures")
    chapters = [
        Chapter(
            heading, NOTES if not number else (), [table, *([papers[heading]] if heading in papers else [])],
            [drawn[heading]] if heading in drawn else [],
        )
        for number, (heading, table) in enumerate(tables.items())
    ]  # fmt: skip
    models = "; ".join(f"{name}: {place}" for name, place in values["checkpoints"].items())
    lead = f"Which of two answers people preferred. {models}."
    write_text(output / "report.html", page("Accuracy of reward models", lead, chapters))


def main() -> None:
    """Flags to call."""
    values = flags.FLAGS
    checkpoints = command.named("checkpoint", values.checkpoint, "checkpoint")
    data = command.named("data", values.data)
    keep_heap()
    start_distributed()
    with worked_in(values.output) as output:
        run(checkpoints, data, output, tokenizer=values.tokenizer)
        if jax.process_index() == 0:
            print((output / "report.md").read_text(encoding="utf-8"), end="")
            print(os.path.join(values.output, "report.html"))


if __name__ == "__main__":
    flags.DEFINE_list("checkpoint", None, "name=checkpoint of each reward model")
    flags.DEFINE_list("data", None, "name=file of each set of comparisons")
    flags.DEFINE_string("output", None, "directory of scores and report, gs://bucket/... too; an unfinished one is continued")
    flags.DEFINE_string("tokenizer", None, "the tokenizer, where none lies beside the weights")
    flags.mark_flags_as_required(["checkpoint", "data", "output"])
    command.launch(main)
