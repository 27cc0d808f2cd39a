"""From the files of a recipe's workdir to the figures and numbers of its report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.sources import read_jsonl
from llama_jax.evals import distillation_figure, figures, ghost_figures, model_figures, progress
from llama_jax.rlhf.best_of import expected_max_of_n
from llama_jax.training.metrics import read_metrics

_PPO_PANELS = {
    "reward": "combined reward R_c",
    "kl": "KL to the start (nats an answer)",
    "policy_entropy": "entropy (nats a token)",
    "clip_fraction": "clip fraction",
    "explained_variance": "explained variance",
    "response_length": "answer length (tokens)",
    "eos_rate": "answers that end",
    "approx_kl": "approximate KL of an update",
    "sampler_drift": "largest sampler drift (nats)",
}


def reward_accuracies(summary: dict[str, Any]) -> dict[str, float]:
    """Held-out accuracy of a reward model, overall and by degree (paper Table 8)."""
    prefix = "accuracy/"
    return {name.removeprefix(prefix): value for name, value in summary["held_out"].items() if name.startswith(prefix)}


def bits_per_byte(summary: dict[str, Any]) -> dict[str, float]:
    """Held-out bits per byte by source."""
    prefix = "bits_per_byte/"
    return {name.removeprefix(prefix): value for name, value in summary["held_out"].items() if name.startswith(prefix)}


def rewards_of_samples(path: Path) -> np.ndarray:
    """Combined rewards of a rejection-sampling file. # -> float [prompts, K]"""
    by_prompt: dict[int, list[float]] = {}
    for _, row in read_jsonl(path):
        by_prompt.setdefault(row["prompt"], []).append(row["reward"])
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


def label_of(name: str) -> str:
    """A version's name for people: SFT, V1, V5 PPO."""
    return name.upper().replace("_", " ")


def draw(workdir: Path, results: dict[str, Any]) -> dict[str, bytes]:
    """All plots of the report, as PNG bytes by name."""
    return {
        **_training(workdir, results), **_sampling(workdir, results), **_versions(workdir, results),
        **_studies(workdir, results),
    }  # fmt: skip


def _training(workdir: Path, results: dict[str, Any]) -> dict[str, bytes]:
    def curve(stage: str, name: str = "loss"):
        log = read_metrics(workdir / stage)
        known = np.isfinite(log.get(name, np.array([])))
        return log["step"][known], log[name][known]

    judged = {name: results[name] for name in ("base", "sft", "rejection", "ppo") if name in results}
    rounds = {label_of(name): curve(f"{name}/rejection") for name in results["versions"] if _is_round(name)}
    drawn = {
        "pretrain_loss": figures.loss_curve({"pretraining": curve("pretrain")}, title="Pretraining"),
        "bits_per_byte": figures.bits_per_byte(
            results["pretrain"]["bits_per_byte"], results["pretrain"]["xz_bits_per_byte"]
        ),
        "sft_loss": figures.loss_curve({"SFT": curve("sft")}, title="Supervised fine-tuning"),
        "reward_accuracy": figures.reward_accuracy(
            {name: results["reward"][name]["accuracy"] for name in progress.TRACKS}
        ),
        "rejection_loss": figures.loss_curve(rounds, title="Fine-tuning on the best"),
        "verdict": figures.verdict(
            {name: version["true_utility"] for name, version in judged.items()},
            {name: judged[name]["win_rate"] for name in ("rejection", "ppo") if name in judged},
        ),
    }
    if "ppo" in results:
        drawn["ppo"] = figures.ppo_curves(read_metrics(workdir / "ppo"), panels=_PPO_PANELS)
    return drawn


def _sampling(workdir: Path, results: dict[str, Any]) -> dict[str, bytes]:
    """Figs. 7 and 8: the model that a round sampled from is the one before its version."""
    before, curves, drawn = "sft", {}, {}
    for name in filter(_is_round, results["versions"]):
        rewards = rewards_of_samples(workdir / name / "rejection" / "samples.jsonl")
        curves[f"{label_of(before)} (for {label_of(name)})"] = expected_max_of_n(rewards)
        path = workdir / name / "rejection" / "temperatures.json"
        if path.exists():
            title = f"Best of N answers of {label_of(before)} by temperature"
            drawn[f"temperatures_{name}"] = figures.best_by_temperature(json.loads(path.read_text())["curves"], title=title)
        before = name
    return {"best_of_n": model_figures.best_of_n(curves).png(), **drawn}


def _versions(workdir: Path, results: dict[str, Any]) -> dict[str, bytes]:
    """Figs. 6, 11, 14 and 20."""
    versions = results["versions"]
    judges = {
        judge: {
            label_of(name): {track: rate["mean"] for track, rate in found[key].items()}
            for name, found in versions.items() if key in found
        }
        for judge, key in (("reward models", "win_rate_by_reward_models"), ("simulated annotator", "win_rate_by_track"))
    }  # fmt: skip
    by_track = {track: {} for track in progress.TRACKS}
    for name in versions:
        scores = progress.scores_of(workdir, name)
        is_safety = np.array([row["is_safety"] for row in progress.read_answers(workdir / "answers" / f"{name}.jsonl")])
        for track, inside in zip(progress.TRACKS, (~is_safety, is_safety), strict=True):
            by_track[track][label_of(name)] = scores[track][inside]
    *_, last = versions
    pairs = {track: (found["SFT"], found[label_of(last)]) for track, found in by_track.items()}
    first = next(iter(results["reward_batches"]["helpfulness"]))
    accuracy = {
        track: {
            degree: [row["batch 1"].get(degree) for row in rows.values()] for degree in ("all", "significantly")
            if degree in rows[first]["batch 1"]
        }
        for track, rows in results["reward_batches"].items()
    }  # fmt: skip
    return {
        "version_progress": figures.version_progress(judges),
        "score_shift": figures.score_shift(by_track),
        "score_scatter": figures.score_scatter(pairs, before="SFT", after=label_of(last)),
        "accuracy_by_batch": figures.accuracy_by_batch(accuracy),
    }


def _studies(workdir: Path, results: dict[str, Any]) -> dict[str, bytes]:
    """Fig. 10 and Table 30 of Ghost Attention, Fig. 16 of context distillation."""
    drawn = {}
    if "ghost_attention" in results:
        drawn["ghost_recall"] = ghost_figures.recall(results["ghost_attention"]["recall"]).png()
        drawn["ghost_attention"] = (workdir / "ghost_study" / "attention.png").read_bytes()
    if "distillation" in results:
        samples = [row for _, row in read_jsonl(workdir / "distill" / "samples.jsonl")]
        drawn["distillation"] = distillation_figure.scores(samples).png()
    return drawn


def _is_round(name: str) -> bool:
    return name.startswith("v") and not name.endswith("_ppo")
