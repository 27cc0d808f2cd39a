"""A report on preference data, and open sets as rows of ours: `python -m llama_jax.preferences --data=... --output=...`.

`--data` lists data sets, each a file of ours or `layout=file` in the published layout of an open set (`reward/open_sets.py`),
where a directory of shards or a pattern may stand for a file (`data/rows.py`); rows of ours that name no `source` are given the
file's name:

    python -m llama_jax.preferences --tokenizer=tokenizer.model --output=/tmp/preferences --rows \\
        --data='anthropic_helpful=helpful-base/train.jsonl.gz,stanford_shp=shp.parquet,ours/train-*'

A row of ours that is no comparison ends the command. With `--leave_out` such rows, and unreadable ones of any set, are left out
like those of the open sets that hold no usable comparison, and the report counts them by reason, each with its first row.

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
from llama_jax.data.rows import TFDS, Row, write_jsonl
from llama_jax.data.sources import read_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import reward_figures
from llama_jax.evals.plots import require, save
from llama_jax.files import whole_directory, write_json
from llama_jax.reward.open_sets import LAYOUTS, read_open_set, read_our_set
from llama_jax.reward.preference_report import best_of_batches, markdown, report, tally
from llama_jax.reward.split import TRAIN, parse_parts, part_of
from llama_jax.training.metrics import Progress

ROWS = "comparisons.jsonl.gz"


def run(
    data: Sequence[str], output: str | os.PathLike, *, tokenizer: str | os.PathLike, rows: bool = False,
    leave_out: bool = False, samples: Sequence[str] = (), split: Sequence[str] = (), quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Writes the report of data sets into a new directory and returns its values.

    Args:
      data: files of comparisons, `layout=file` for an open set.
      output: the directory to be made.
      tokenizer: whose tokens are counted.
      rows: also write the comparisons.
      leave_out: leave out and count rows that are no comparison, of which the first is an error otherwise.
      samples: `batch=samples.jsonl` of rejection sampling, for Fig. 26.
      split: `name=share` of the comparisons that lie in a file of their own; the rest is in `train.jsonl.gz`.

    Raises:
      ValueError, FileNotFoundError, ModuleNotFoundError: one sentence; nothing is at `output` then.
    """
    if not data:
        raise ValueError("data: expected at least one file, got none")
    words, shares = Tokenizer(tokenizer), parse_parts(split)
    drawn = best_of_batches(dict(_samples(samples))) if samples else {}
    require()  # what is wrong shows before hours of reading
    left_out: dict[str, Any] = {}
    with whole_directory(output) as directory:
        with Progress(len(data), "read", "file", quiet=quiet) as progress:
            stream = _read(data, left_out, progress, leave_out=leave_out)
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
        if drawn:
            values["best_of_batches"] = drawn
            plots.append(reward_figures.best_of_batches(drawn))
        shares = {batch: row["rating_shares"] for batch, row in values["batches"].items() if row["rating_shares"]}
        if shares:
            plots.append(reward_figures.rating_shares(shares))
        save(plots, directory)
        write_json(directory / "report.json", values)
        (directory / "report.md").write_text(markdown(values), encoding="utf-8")
    return values


def _read(data: Sequence[str], left_out: dict[str, Any], progress: Progress, *, leave_out: bool) -> Iterator[Row]:
    """The comparisons of all sets; fills `left_out` with {set: {reason: {"rows": how many, "first": where}}}."""
    for name in data:
        layout, found, path = name.partition("=")
        if found and layout in LAYOUTS:
            rows = read_open_set(path, layout, leave_out=leave_out)
        elif found and not re.search("[/:]", layout) and not Path(name).exists():
            raise ValueError(f"data: {name}: {layout!r} is no layout; expected one of {', '.join(LAYOUTS)}")
        else:
            rows = read_our_set(name, _stem(name), leave_out=leave_out)
        yield from rows
        if rows.left_out:
            counts = rows.left_out.most_common()
            left_out[rows.path] = {reason: {"rows": count, "first": rows.first[reason]} for reason, count in counts}
        progress.update()


def _stem(name: str) -> str:
    """What a set is called whose rows do not say: `ours` of `data/ours.jsonl.gz`, `train` of `data/train-*`, `data` of
    `data/*.parquet`, `webgpt` of `tfds://webgpt:1.0.0?split=train`."""
    if name.startswith(TFDS):
        return re.split(r"[/:?]", name.removeprefix(TFDS))[0]
    stems = [re.split(r"[.*?[]", part)[0].rstrip("-_") for part in name.split("/")]
    return next((stem for stem in reversed(stems) if stem), "")


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
    run(
        values.data, values.output, tokenizer=values.tokenizer, rows=values.rows, leave_out=values.leave_out,
        samples=values.samples, split=values.split,
    )  # fmt: skip
    print((Path(values.output) / "report.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    flags.DEFINE_list("data", None, "files, directories or patterns of comparisons, layout=file for an open set")
    flags.DEFINE_string("output", None, "directory to be made")
    flags.DEFINE_string("tokenizer", None, "tokenizer whose tokens are counted")
    flags.DEFINE_bool("rows", False, "also write the comparisons")
    flags.DEFINE_bool("leave_out", False, "leave out and count rows that are no comparison, instead of ending at the first")
    flags.DEFINE_list("samples", [], "batch=samples.jsonl of rejection sampling, for Fig. 26")
    flags.DEFINE_list("split", [], "name=share,...: comparisons in files of their own, the rest in train.jsonl.gz")
    flags.mark_flags_as_required(["data", "output", "tokenizer"])
    command.launch(main)
