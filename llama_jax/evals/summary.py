"""From the files of a recipe's workdir to the figures and numbers of its report."""

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.sources import read_jsonl
from llama_jax.evals import figures
from llama_jax.evals.statistics import expected_max_of_n
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


def draw(workdir: Path, results: dict[str, Any]) -> dict[str, bytes]:
    """All plots of the report, as PNG bytes by name."""

    def curve(stage: str, name: str = "loss"):
        log = read_metrics(workdir / stage)
        known = np.isfinite(log.get(name, np.array([])))
        return log["step"][known], log[name][known]

    ppo = read_metrics(workdir / "ppo")
    versions = {name: results[name] for name in ("base", "sft", "rejection", "ppo")}
    return {
        "pretrain_loss": figures.loss_curve({"pretraining": curve("pretrain")}, title="Pretraining"),
        "bits_per_byte": figures.bits_per_byte(
            results["pretrain"]["bits_per_byte"], results["pretrain"]["xz_bits_per_byte"]
        ),
        "sft_loss": figures.loss_curve({"SFT": curve("sft")}, title="Supervised fine-tuning"),
        "reward_accuracy": figures.reward_accuracy(
            {name: results["reward"][name]["accuracy"] for name in ("helpfulness", "safety")}
        ),
        "best_of_n": figures.best_of_n(
            {"SFT model": expected_max_of_n(rewards_of_samples(workdir / "rejection" / "samples.jsonl"))}
        ),
        "rejection_loss": figures.loss_curve({"rejection sampling": curve("rejection")}, title="Fine-tuning on the best"),
        "ppo": figures.ppo_curves(ppo, panels=_PPO_PANELS),
        "verdict": figures.verdict(
            {name: version["true_utility"] for name, version in versions.items()},
            {name: versions[name]["win_rate"] for name in ("rejection", "ppo")},
        ),
    }
