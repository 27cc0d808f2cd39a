"""A report on preference data, and open sets as rows of ours: `python -m llama_jax.preferences --data=... --output=...`.

`--data` lists data sets, each a file of ours or `layout=file` in the published layout of an open set (`reward/open_sets.py`);
rows of a file of ours that name no `source` are given the file's name:

    python -m llama_jax.preferences --tokenizer=tokenizer.model --output=/tmp/preferences --rows \\
        --data=anthropic_helpful=helpful-base/train.jsonl.gz,stanford_shp=shp.parquet,ours.jsonl

The output directory appears whole or not at all: `report.md`, `report.json`, `rating_shares.png` where there are ratings and
batches, `best_of_batches.png` for `--samples=batch=samples.jsonl,...` of rejection sampling, and with `--rows` the comparisons
themselves, `comparisons.jsonl.gz`, as `configs/reward.py` and `configs/dpo.py` take them. `--split=validation=0.1,held_out=0.2`
also writes them divided, `train.jsonl.gz` and one file for each name, no conversation in two of them (`reward/split.py`).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from llama_jax import command
from llama_jax.data.rows import TFDS, Row, read_rows, write_jsonl
from llama_jax.data.sources import comparison, read_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import reward_figures
from llama_jax.evals.plots import save
from llama_jax.files import whole_directory, write_json
from llama_jax.reward.open_sets import LAYOUTS, read_open_set
from llama_jax.reward.preference_report import best_of_batches, markdown, report, tally
from llama_jax.reward.split import TRAIN, parse_parts, part_of
from llama_jax.training.metrics import Progress

ROWS = "comparisons.jsonl.gz"


def run(
    data: Sequence[str], output: str | os.PathLike, *, tokenizer: str | os.PathLike, rows: bool = False,
    samples: Sequence[str] = (), split: Sequence[str] = (), quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Writes the report of data sets into a new directory and returns its values.

    Args:
      data: files of comparisons, `layout=file` for an open set.
      output: the directory to be made.
      tokenizer: whose tokens are counted.
      rows: also write the comparisons.
      samples: `batch=samples.jsonl` of rejection sampling, for Fig. 26.
      split: `name=share` of the comparisons that lie in a file of their own; the rest is in `train.jsonl.gz`.

    Raises:
      ValueError, FileNotFoundError: one sentence; nothing is at `output` then.
    """
    if not data:
        raise ValueError("data: expected at least one file, got none")
    words, shares = Tokenizer(tokenizer), parse_parts(split)
    left_out: dict[str, dict[str, int]] = {}
    with whole_directory(output) as directory:
        with Progress(len(data), "read", "file", quiet=quiet) as progress:
            stream = _read(data, left_out, progress)
            if rows or shares:
                write_jsonl(directory / ROWS, stream)
                stream = (row for _, row in read_jsonl(directory / ROWS))
            tallies = tally(stream, lambda texts: [len(ids) for ids in words.encode_many(texts)])
        if not tallies:
            raise ValueError(f"{', '.join(data)}: no usable comparison in them: {left_out}")
        parts = _divide(directory, shares) if shares else {}
        if shares and not rows:
            (directory / ROWS).unlink()
        values = report(tallies) | {"left_out": left_out, "tokenizer": words.fingerprint}
        if parts:
            values["split"] = parts
        plots = []
        if samples:
            values["best_of_batches"] = best_of_batches(dict(_samples(samples)))
            plots.append(reward_figures.best_of_batches(values["best_of_batches"]))
        shares = {batch: row["rating_shares"] for batch, row in values["batches"].items() if row["rating_shares"]}
        if shares:
            plots.append(reward_figures.rating_shares(shares))
        save(plots, directory)
        write_json(directory / "report.json", values)
        (directory / "report.md").write_text(markdown(values), encoding="utf-8")
    return values


def _read(data: Sequence[str], left_out: dict[str, dict[str, int]], progress: Progress) -> Iterator[Row]:
    for name in data:
        layout, found, path = name.partition("=")
        if found and layout in LAYOUTS:
            rows = read_open_set(path, layout)
            yield from rows
            if rows.left_out:
                left_out[path] = dict(rows.left_out.most_common())
        else:
            if found and not Path(name).exists() and not name.startswith("tfds://"):
                raise ValueError(f"data: {name}: {layout!r} is no layout; expected one of {', '.join(LAYOUTS)}")
            for where, row in read_rows(name):
                made = comparison(row, where)
                yield {**made, "source": made["source"] or _stem(name)}
        progress.update()


def _stem(name: str) -> str:
    """What a set is called whose rows do not say: `ours` of `data/ours.jsonl.gz`, `webgpt` of `tfds://webgpt:1.0.0?split=train`."""
    if name.startswith(TFDS):
        return re.split(r"[/:?]", name.removeprefix(TFDS))[0]
    return name.rstrip("/").rpartition("/")[2].partition(".")[0]


def _divide(directory: Path, shares: Mapping[str, float]) -> dict[str, int]:
    """Writes the comparisons by part, one pass over them for each; how many each has."""
    counts: dict[str, int] = {}
    for name in (TRAIN, *shares):
        chosen = [row for _, row in read_jsonl(directory / ROWS) if part_of(row, shares) == name]
        if not chosen:
            raise ValueError(f"split: no comparison falls into {name!r}; expected more rows or a larger share")
        write_jsonl(directory / f"{name}.jsonl.gz", chosen)
        counts[name] = len(chosen)
    return counts


def _samples(names: Sequence[str]) -> Iterator[tuple[str, list[Row]]]:
    for name in names:
        batch, found, path = name.partition("=")
        if not found:
            raise ValueError(f"samples: expected batch=file, got {name!r}")
        rows = []
        for where, row in read_jsonl(path):
            for key in ("prompt", "reward"):
                if key not in row:
                    raise ValueError(f"{where}: {key}: missing; expected a row of rejection sampling")
            rows.append({"prompt": row["prompt"], "reward": row["reward"]})
        yield batch, rows


def main() -> None:
    """Flags to call."""
    values = flags.FLAGS
    run(values.data, values.output, tokenizer=values.tokenizer, rows=values.rows, samples=values.samples, split=values.split)
    print((Path(values.output) / "report.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    flags.DEFINE_list("data", None, "files of comparisons, layout=file for an open set")
    flags.DEFINE_string("output", None, "directory to be made")
    flags.DEFINE_string("tokenizer", None, "tokenizer whose tokens are counted")
    flags.DEFINE_bool("rows", False, "also write the comparisons")
    flags.DEFINE_list("samples", [], "batch=samples.jsonl of rejection sampling, for Fig. 26")
    flags.DEFINE_list("split", [], "name=share,...: comparisons in files of their own, the rest in train.jsonl.gz")
    flags.mark_flags_as_required(["data", "output", "tokenizer"])
    command.launch(main)
