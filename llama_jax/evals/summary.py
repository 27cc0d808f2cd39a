"""From the files of a recipe's workdir to the figures and numbers of its report."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.corpus_build.manifest import read_manifest
from llama_jax.data.sources import read_jsonl
from llama_jax.evals import distillation_figure, drawings, figures, ghost_figures, model_figures, progress, reward_figures
from llama_jax.evals.plots import Plot
from llama_jax.evals.report_sections import label_of, optimisation
from llama_jax.rlhf.best_of import BestOf, expected_max_of_n
from llama_jax.rlhf.pool import choosable_rewards, least_reward
from llama_jax.training.metrics import METRICS_FILE, read_metrics


def reward_accuracies(summary: dict[str, Any]) -> dict[str, float]:
    """Held-out accuracy of a reward model, overall and by degree (paper Table 8)."""
    prefix = "accuracy/"
    return {name.removeprefix(prefix): value for name, value in summary["held_out"].items() if name.startswith(prefix)}


def reward_report(workdir: Path) -> dict[str, dict[str, float]]:
    """What its report says beside that: accuracy on the other track's pairs by degree (Table 8), and Table 29."""
    values = json.loads((workdir / "reward_report.json").read_text())
    others = values.get("others", {})
    together = others.get("all", next(iter(others.values()), {}))  # one source alone has no row of all
    return {
        "others": {degree: cell["share"] for degree, cell in together.items()},
        "safety": {name: cell["share"] for name, cell in values["safety"].items()},
    }


def bits_per_byte(summary: dict[str, Any]) -> dict[str, float]:
    """Held-out bits per byte by source."""
    prefix = "bits_per_byte/"
    return {name.removeprefix(prefix): value for name, value in summary["held_out"].items() if name.startswith(prefix)}


def held_out_lines_seen(corpus: Path) -> dict[str, float]:
    """By source, the share of long held-out lines that the training text has too (`corpus_build.split.lines_seen`)."""
    return {name: source["held_out_lines_seen"] for name, source in read_manifest(corpus)["sources"].items()}


def rewards_of_samples(path: Path) -> np.ndarray:
    """Combined rewards of a rejection-sampling file; what cannot be chosen counts as in the round. # -> float [prompts, K]"""
    rows = [row for _, row in read_jsonl(path)]
    by_prompt: dict[int, list[float]] = {}
    least = least_reward([row["reward"] for row in rows])
    for row, reward in zip(rows, choosable_rewards(rows, least=least), strict=True):
        by_prompt.setdefault(row["prompt"], []).append(reward)
    return np.array(list(by_prompt.values()))


def reward_batches(workdir: Path, versions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Held-out accuracy of each version's reward models by batch, {track: {version: {batch: {degree: share}}}} (Fig. 6)."""
    found: dict[str, dict[str, Any]] = {track: {} for track in progress.TRACKS}
    for track, rows in found.items():
        for version in versions:
            report = json.loads((workdir / version / f"reward_{track}" / "reward_report.json").read_text())
            rows[version] = {
                source.rpartition(", ")[2]: {degree: cell["share"] for degree, cell in row.items()}
                for source, row in report["accuracy"].items() if source != "longer"  # what length alone would reach
            }  # fmt: skip
    return found


def ghost_samples(workdir: Path) -> dict[str, dict[str, float]]:
    """Of each version with Ghost Attention's dialogs: how many were sampled, decided by a program, obeyed, and kept."""
    found = {}
    for path in sorted(workdir.glob("v*/ghost/ghost.jsonl")):
        samples = [row["obeyed"] for _, row in read_jsonl(path.with_name("samples.jsonl"))]
        decided = [obeyed for obeyed in samples if obeyed is not None]
        kept = sum(1 for _ in read_jsonl(path))
        share = float(np.mean(decided)) if decided else float("nan")
        found[path.parts[-3]] = {"samples": len(samples), "decided": len(decided), "obeyed": share, "kept": kept}
    return found


def ppo_seconds(workdir: Path) -> dict[str, float]:
    """Median seconds of the parts of an iteration (the first compiles), as far as they were logged; {} without PPO."""
    if not (workdir / METRICS_FILE).exists():
        return {}
    logged = {name.removeprefix("seconds/"): log for name, log in read_metrics(workdir).items() if name.startswith("seconds/")}
    parts = [name for name in ("rollout", "score", "train") if np.isfinite(logged.get(name, np.nan)).any()]
    return {name: float(np.nanmedian(logged[name])) for name in parts}


def draw(workdir: Path, results: dict[str, Any]) -> dict[str, Plot]:
    """All plots of the report by name."""
    plots = [
        *_training(workdir, results), *_sampling(workdir, results), *_versions(workdir, results), *_studies(workdir, results)
    ]  # fmt: skip
    return {plot.name: plot for plot in plots}


def _training(workdir: Path, results: dict[str, Any]) -> Iterator[Plot]:
    def curve(stage: str, metric: str = "loss") -> figures.Curve:
        log = read_metrics(workdir / stage)
        known = np.isfinite(log.get(metric, np.array([])))
        return log["step"][known], log[metric][known]

    judged = {name: results[name] for name in ("base", "sft", "rejection", "ppo") if name in results}
    rounds = {label_of(name): curve(f"{name}/rejection") for name in results["versions"] if _is_round(name)}
    yield figures.loss_curve({"pretraining": curve("pretrain")}, name="pretrain_loss", title="Pretraining (Fig. 5)")
    yield figures.bits_per_byte(results["pretrain"]["bits_per_byte"], results["pretrain"]["xz_bits_per_byte"])
    yield figures.loss_curve({"SFT": curve("sft")}, name="sft_loss", title="Supervised fine-tuning")
    yield reward_figures.accuracy({name: results["reward"][name]["accuracy"] for name in progress.TRACKS})
    yield figures.loss_curve(rounds, name="rejection_loss", title="Fine-tuning on the best")
    yield figures.verdict(
        {name: version["true_utility"] for name, version in judged.items()},
        {name: judged[name]["win_rate"] for name in ("rejection", "ppo") if name in judged},
    )
    names, reward, utility = optimisation(results)
    if len(names) > 1:
        yield figures.over_optimisation(names, reward, utility)
    if "ppo" in results:
        yield figures.ppo_curves(read_metrics(workdir / "ppo"))


def _sampling(workdir: Path, results: dict[str, Any]) -> Iterator[Plot]:
    """Figs. 7 and 8: the model that a round sampled from is the one before its version."""
    before, curves, temperatures = "sft", {}, {}
    for name in filter(_is_round, results["versions"]):
        label = f"{label_of(before)} (for {label_of(name)})"
        curves[label] = expected_max_of_n(rewards_of_samples(workdir / name / "rejection" / "samples.jsonl"))
        path = workdir / name / "rejection" / "temperatures.json"
        if path.exists():
            found = json.loads(path.read_text())["curves"]
            temperatures[label] = {
                float(temperature): BestOf(np.array(curve["maximum"]), np.array(curve["median"]))
                for temperature, curve in found.items()
            }
        before = name
    yield model_figures.best_of_n(curves)
    if temperatures:
        yield model_figures.temperature_map(temperatures)


def _versions(workdir: Path, results: dict[str, Any]) -> Iterator[Plot]:
    """Figs. 6, 11, 14 and 20."""
    versions = results["versions"]
    judges = {
        judge: {
            label_of(name): {track: rate["mean"] for track, rate in found[key].items()}
            for name, found in versions.items() if key in found
        }
        for judge, key in (("reward models", "win_rate_by_reward_models"), ("simulated annotator", "win_rate_by_track"))
    }  # fmt: skip
    yield figures.version_progress(judges)
    by_track = {track: {} for track in progress.TRACKS}
    for name in versions:
        scores = progress.scores_of(workdir, name)
        is_safety = np.array([row["is_safety"] for row in progress.read_answers(workdir / "answers" / f"{name}.jsonl")])
        for track, inside in zip(progress.TRACKS, (~is_safety, is_safety), strict=True):
            by_track[track][label_of(name)] = scores[track][inside]
    for track, scores in by_track.items():
        title = f"Scores of the {track} reward model (Fig. 20)"
        yield model_figures.reward_shift(scores, name=f"score_shift_{track}", title=title)
    *_, last = versions
    pairs = {track: (found["SFT"], found[label_of(last)]) for track, found in by_track.items()}
    yield figures.score_scatter(pairs, before="SFT", after=label_of(last))
    first, *later = results["reward_batches"]["helpfulness"]
    if not later:
        return
    accuracy = {
        track: {
            degree: [row["batch 1"].get(degree) for row in rows.values()] for degree in ("all", "significantly")
            if degree in rows[first]["batch 1"]
        }
        for track, rows in results["reward_batches"].items()
    }  # fmt: skip
    yield figures.accuracy_by_batch(accuracy)


def _studies(workdir: Path, results: dict[str, Any]) -> Iterator[Plot]:
    """Fig. 10 and Table 30 of Ghost Attention, Fig. 16 of context distillation."""
    if "ghost_attention" in results:
        yield ghost_figures.recall(results["ghost_attention"]["recall"])
        maps = drawings.load_maps(workdir / "ghost_study" / "attention.npz")
        yield dataclasses.replace(drawings.attention_maps(maps), name="ghost_attention")
    if "distillation" in results:
        yield distillation_figure.scores(*distillation_figure.read_run(workdir / "distill"))


def _is_round(name: str) -> bool:
    return name.startswith("v") and not name.endswith("_ppo")
