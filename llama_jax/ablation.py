"""What data are worth (section 2.1): `python -m llama_jax.ablation --config=configs/ablation.py:clean --workdir=/tmp/clean`.

raw documents -> one corpus an arm -> one model an arm and seed, equal tokens -> the same held-out documents -> report.html.

The held-out documents are taken out before anything else, and so is text that the others share with them: no arm can win by
having seen them. The first arm's tokenizer serves all arms, so that only the text differs. A killed ablation goes on.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from llama_jax import command, corpus
from llama_jax.config import ConfigError, check_least, describe, parse
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.dedup import content_hash
from llama_jax.corpus_build.dirt import Dirt, dirty
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.paragraphs import LEAK_LIMIT, drop_leaks
from llama_jax.corpus_build.refine import Deduplication, HeldOut, refine
from llama_jax.corpus_build.steps import CleanConfig, make_steps
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.ablation import Arm, HeldOutTexts, compare, verdicts, write_ablation
from llama_jax.evals.documents import document_bits
from llama_jax.files import whole_directory
from llama_jax.model.config import size
from llama_jax.parallel.host import keep_compiled, keep_heap
from llama_jax.parallel.mesh import make_mesh, start_distributed
from llama_jax.pretrain.stage import PretrainConfig, make_stage
from llama_jax.steps import change, load_config
from llama_jax.training.loop import Diverged, claim, finished, train
from llama_jax.training.metrics import read_metrics
from llama_jax.training.saved import read_meta
from llama_jax.training.workdir import own

_ALL = "bits_per_byte"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Raw documents: "installation" or files, as in `corpus.SourceConfig`."""

    reader: str
    byte_budget: int
    weight: float = 1.0
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class ArmConfig:
    """One state of the data."""

    what: str  # a sentence for the report
    steps: tuple[str, ...] = ()  # cleaning
    deduplication: dict[str, Any] = dataclasses.field(default_factory=dict)  # changes; exact copies are always taken out
    weights: dict[str, float] = dataclasses.field(default_factory=dict)  # by source; empty: those of the sources


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """See configs/ablation.py."""

    size: str
    configs: str  # directory of the other configs
    sources: dict[str, SourceConfig]
    evaluate: dict[str, SourceConfig]  # of what the held-out documents are; empty: a part of each of the sources
    held_out_bytes: int  # of each source
    leak_ngram: int  # words: train paragraphs that share such a run with a held-out document are cut
    dirt: Dirt | None  # what the documents are soiled with; None: they are raw as they are
    arms: dict[str, ArmConfig]
    order: tuple[str, ...]  # of the arms; the first is what the others are compared with
    block_length: int
    train: dict[str, Any]  # changes of configs/pretrain.py
    seeds: tuple[int, ...]  # of training
    seed: int = 0  # of the data

    def __post_init__(self):
        if sorted(self.order) != sorted(self.arms) or len(self.order) < 2:
            raise ValueError(f"order: expected each of the arms {sorted(self.arms)} once, at least two, got {list(self.order)}")
        if not self.sources or not self.seeds:
            raise ValueError("sources, seeds: expected at least one of each")
        check_least("", self, held_out_bytes=1, leak_ngram=1)
        for name, arm in self.arms.items():  # before the first one has trained
            if unknown := set(arm.weights) - set(self.sources):
                raise ValueError(f"arms.{name}.weights: unknown source {sorted(unknown)}")
            if wrong := [source for source, weight in arm.weights.items() if not weight > 0]:
                raise ValueError(f"arms.{name}.weights.{wrong[0]}: expected a positive share, got {arm.weights[wrong[0]]}")
            try:
                make_steps(arm.steps, CleanConfig())
                parse(Deduplication, {**arm.deduplication, "leak_ngram": self.leak_ngram})
            except ValueError as error:
                raise ValueError(f"arms.{name}: {error}") from None


def run(config: AblationConfig, workdir: Path) -> dict[str, Any]:
    """The whole ablation; returns the results that the report shows."""
    workdir = workdir.resolve()
    claim(workdir, describe(config))
    if not (workdir / "pool").exists():
        print("raw documents ...", file=sys.stderr, flush=True)
        with whole_directory(workdir / "pool") as directory:
            make_pool(config, directory)
    rows = [row for path in sorted((workdir / "pool" / "held_out").glob("*.jsonl")) for _, row in read_jsonl(path)]
    texts = [str(row["text"]) for row in rows]
    held_out = HeldOutTexts([str(row["source"]) for row in rows], np.array([len(t.encode()) for t in texts]), config.seeds)
    manifests = {name: make_corpus(config, name, workdir) for name in config.order}  # before hours of training
    mesh = None
    arms = []
    for name, manifest in manifests.items():
        bits, curves = [], []
        for seed in config.seeds:
            settings = _train_config(config, name, seed, workdir)
            mesh = mesh or make_mesh(settings.mesh)
            bits.append(train_arm(config, name, seed, workdir, texts, held_out.bytes, mesh))
            curves.append(read_curve(workdir / name / f"seed{seed}", settings, config.block_length))
        arms.append(_arm(config, name, manifest, np.array(bits), curves))
    results = compare(arms, held_out)
    write_ablation(results, workdir, title=f"Ablation: {', '.join(config.order[1:])} against {config.order[0]}")
    return results


def make_pool(config: AblationConfig, directory: Path) -> None:
    """Held-out documents, and the raw ones to train on without what they share with those, as JSONL by source."""
    documents = {name: list(_documents(name, source, config.seed)) for name, source in config.sources.items()}
    whole = {name for name, source in config.sources.items() if source.whole}
    if config.evaluate:
        held_out = {name: _first(_documents(name, source, config.seed), config.held_out_bytes)
                    for name, source in config.evaluate.items()}  # fmt: skip
        secrets = [document.text for part in held_out.values() for document in part]
        train, _ = drop_leaks(documents, secrets, ngram=config.leak_ngram, whole=whole)
    else:
        rule = HeldOut(0.01, config.held_out_bytes, config.held_out_bytes, group_field="module")
        parts = refine(documents, rule, Deduplication(leak_ngram=config.leak_ngram), whole=whole)
        train, held_out = ({name: getattr(part, side) for name, part in parts.items()} for side in ("train", "held_out"))
    if not any(held_out.values()):
        raise ConfigError(f"held_out_bytes: expected room for a document, got {config.held_out_bytes:,}: none is held out")
    for name, part in held_out.items():
        write_jsonl(directory / "held_out" / f"{name}.jsonl", map(dataclasses.asdict, part))
    for name, part in train.items():
        raw = part if config.dirt is None else dirty(part, config.dirt, seed=config.seed)
        write_jsonl(directory / f"{name}.jsonl", map(dataclasses.asdict, raw))


def _documents(name: str, source: SourceConfig, seed: int) -> Iterator[Document]:
    values = corpus.SourceConfig(source.reader, source.weight, source.byte_budget)
    for row in corpus.documents(name, values, seed=seed):
        if isinstance(row, BadRow):
            raise ConfigError(f"{row.where}: {row.problem}")
        if row.text.strip():
            yield row


def _first(documents: Iterator[Document], budget: int) -> list[Document]:
    """Documents up to a number of bytes, in the order of their hashes."""
    chosen, left = [], budget
    for document in sorted(documents, key=lambda d: content_hash(d.text)):
        if (used := len(document.text.encode())) <= left:
            chosen.append(document)
            left -= used
    return chosen


def make_corpus(config: AblationConfig, name: str, workdir: Path) -> dict[str, Any]:
    """The corpus of an arm, built once; returns its manifest."""
    arm, first = config.arms[name], config.order[0]
    values = load_config(Path(config.configs), "corpus.py:jsonl").to_dict()
    sources = {
        source: {
            "reader": str(workdir / "pool" / f"{source}.jsonl"), "weight": arm.weights.get(source, settings.weight),
            "byte_budget": None, "whole": settings.whole, "steps": arm.steps,
        }
        for source, settings in config.sources.items()
    }  # fmt: skip
    loop = _train_values(config, name, config.seeds[0], workdir).loop
    values |= {
        "sources": sources, "order": tuple(sources), "block_length": config.block_length, "seed": config.seed,
        "vocab_size": size(config.size).vocab_size, "tokenizer_bytes": 4_000_000,
        "total_tokens": loop.steps * loop.batch_size * config.block_length,
        # The arms are compared on documents that no corpus has; what a corpus holds out itself is not looked at.
        "held_out_fraction": 0.002, "held_out_minimum": 1, "held_out_maximum": 100_000,
        "tokenizer": None if name == first else str(workdir / first / "corpus" / "tokenizer.model"),
    }  # fmt: skip
    # What is not named there is off. Cleaning may uncover what raw text hid from `make_pool`: tags between a sentence's words.
    # Programs stay or go by the share that they went by there.
    values["deduplication"] = {
        **arm.deduplication, "evaluation": (str(workdir / "pool" / "held_out" / "*.jsonl"),), "leak_ngram": config.leak_ngram,
        "evaluation_share": LEAK_LIMIT,
    }  # fmt: skip
    print(f"corpus {name} ...", file=sys.stderr, flush=True)
    return corpus.run(parse(corpus.CorpusConfig, values), workdir / name / "corpus")


def _train_values(config: AblationConfig, name: str, seed: int, workdir: Path) -> Any:
    values = load_config(Path(config.configs), f"pretrain.py:{config.size}")
    change(values, config.train, where="train")
    directory = workdir / name / "corpus"
    paths = {"tokenizer": str(directory / "tokenizer.model"), "data": {"corpus": str(directory)}, "loop": {"seed": seed}}
    change(values, paths, where=name)
    return values


def _train_config(config: AblationConfig, name: str, seed: int, workdir: Path) -> PretrainConfig:
    return parse(PretrainConfig, _train_values(config, name, seed, workdir))


def train_arm(
    config: AblationConfig, name: str, seed: int, workdir: Path, texts: list[str], sizes: np.ndarray, mesh: Mesh
) -> np.ndarray:
    """Trains one model, or goes on with it; returns the bits it needs for each held-out text. # -> float64 [documents]"""
    directory = workdir / name / f"seed{seed}"
    settings = _train_config(config, name, seed, workdir)
    claim(directory, describe(settings))
    if finished(directory) is None:
        stage = make_stage(settings, mesh, directory)
        bits = document_bits(
            size(config.size), settings.compute, texts, Tokenizer(settings.tokenizer),
            length=config.block_length, batch_size=settings.loop.batch_size, mesh=mesh,
        )  # fmt: skip
        stage = dataclasses.replace(
            stage, name=f"{name}, seed {seed}",
            evaluate=lambda params: {_ALL: float(bits(params).sum() / sizes.sum())},
            measure=lambda params: {"document_bits": bits(params).tolist()},
        )  # fmt: skip
        train(stage, settings.loop, mesh=mesh, workdir=directory)
    return np.array(read_meta(directory)["document_bits"])


def read_curve(directory: Path, settings: PretrainConfig, length: int) -> list[tuple[int, float]]:
    """Tokens trained on, and the bits per byte of the held-out text then."""
    log = read_metrics(directory)
    values = log[f"held_out/{_ALL}"]
    # An evaluation during training is logged under the step that has just been done, as the last one is.
    return [
        (round(step + 1) * settings.loop.batch_size * length, float(value))
        for step, value in zip(log["step"], values)
        if np.isfinite(value)
    ]


def _arm(config: AblationConfig, name: str, manifest: Mapping[str, Any], bits: np.ndarray, curves: list) -> Arm:
    sources = manifest["sources"].values()
    tokens = sum(source["tokens"] for source in sources)
    curve = [(points[0][0], float(np.mean([value for _, value in points]))) for points in zip(*curves, strict=True)]
    band = [(min(value for _, value in points), max(value for _, value in points)) for points in zip(*curves, strict=True)]
    return Arm(
        name=name, what=config.arms[name].what, bits=bits, curve=curve, band=band, tokens=tokens,
        documents=sum(source["documents"] for source in sources), epochs=curve[-1][0] / tokens, table=manifest["table"],
    )  # fmt: skip


def main() -> None:
    """Flags to config to call."""
    keep_heap()
    keep_compiled(flags.FLAGS.workdir)
    start_distributed()
    if jax.process_count() > 1:
        raise ConfigError(f"an ablation builds its corpora and trains in one process; got {jax.process_count()}")
    config, workdir = parse(AblationConfig, flags.FLAGS.config), Path(flags.FLAGS.workdir)
    with own(workdir):
        results = run(config, workdir)
    print("\n".join(verdicts(results)))
    print(f"report: {Path(flags.FLAGS.workdir) / 'report.html'} (report.md, report.json beside it)", file=sys.stderr)


if __name__ == "__main__":
    command.define("configs/ablation.py:<name>", workdir="directory of everything that the ablation makes")
    command.launch(main, expected=(Diverged,))
