"""Training loss of several pretraining runs by tokens, a line a size, beside where the paper's curves end (2.2, Fig. 5).

Losses are nats a token (the figure's axis says perplexity, its values cannot be): runs with another tokenizer than the paper's
have other tokens, and a smaller vocabulary a lower loss for the same text.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ConfigError
from llama_jax.corpus_build.manifest import read_manifest
from llama_jax.evals import figures, plots
from llama_jax.files import read_json, write_json
from llama_jax.paths import place
from llama_jax.training.metrics import METRICS_FILE, read_metrics

FIG_5 = {"7B": 1.74, "13B": 1.67, "34B": 1.57, "70B": 1.50}  # nats a token after 2T tokens, read off the plot
FIG_5_TOKENS = 2e12
_LAST = 100  # logged steps whose mean is the loss that a run has reached
_UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, ""))


@dataclasses.dataclass(frozen=True)
class Run:
    """The curve of a run, finished or not: tokens seen after each logged step, and its loss."""

    tokens: np.ndarray  # float64 [n]
    loss: np.ndarray  # float64 [n]
    steps: int

    @property
    def reached(self) -> float:
        """Mean loss of the last steps: one batch is one draw."""
        return float(self.loss[-_LAST:].mean())


def config_of(workdir: str | os.PathLike) -> dict[str, Any]:
    """The config of a pretraining run; ConfigError for a workdir that is none."""
    path = place(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(f"{path}: expected the config of a pretraining run, found nothing")
    config = read_json(path)
    if config["stage"] != "pretrain":
        raise ConfigError(f"{path}: stage: expected pretrain, got {config['stage']}")
    return config


def log_of(workdir: str | os.PathLike) -> dict[str, np.ndarray]:
    """What a run has logged, see `read_metrics`; ConfigError for one that has no log."""
    if not (place(workdir) / METRICS_FILE).exists():
        raise ConfigError(f"{workdir}: has no log yet; expected a run of at least one step")
    return read_metrics(workdir)


def read(workdir: str | os.PathLike) -> Run:
    """The run in a workdir; ConfigError for one that is no pretraining run's, or has logged no loss."""
    config = config_of(workdir)
    log = log_of(workdir)
    known = np.isfinite(log.get("loss", np.zeros(0)))
    if not known.any():
        raise ConfigError(f"{workdir}: loss: its log has none yet; expected a run of at least one step")
    per_step = config["loop"]["batch_size"] * read_manifest(config["data"]["corpus"])["block_length"]
    done = log["step"][known] + 1  # the log counts from 0
    return Run(done * per_step, log["loss"][known], steps=int(done.max()))


def curves(runs: Mapping[str, Run]) -> plots.Plot:
    """Loss by tokens, {size: run}, with the paper's end points in the colour of the run of that size. (Fig. 5)"""
    most = max(run.tokens.max() for run in runs.values())
    unit, word = next((unit, word) for unit, word in _UNITS if most >= 10 * unit or unit == 1)
    lines = figures.loss_curve(
        {name: (run.tokens / unit, run.loss) for name, run in runs.items()}, name="loss_by_tokens",
        title="Training loss by tokens (Fig. 5)", xlabel=f"tokens{word and f' ({word})'}",
    )  # fmt: skip
    colour_of = {name.casefold(): index for index, name in enumerate(runs)}

    def draw(theme: plots.Theme) -> Any:
        figure = lines.draw(theme)
        (ax,) = figure.axes
        # As the figure, which begins at 2.2 nats: what a run loses in its first tenth would leave the rest no room.
        shown = np.concatenate([*(run.loss[len(run.loss) // 10 :] for run in runs.values()), [*FIG_5.values()]])
        low, high = shown.min(), shown.max()
        for (size, loss), marker in zip(FIG_5.items(), plots.MARKERS):
            own = colour_of.get(size.casefold())
            style = {"color": theme.ink if own is None else theme.colour(own), "marker": marker, "markerfacecolor": "none",
                     "markersize": 6, "linestyle": "", "label": f"the paper's {size} at 2T: {loss:.2f}"}  # fmt: skip
            if most >= FIG_5_TOKENS / 10:
                ax.plot(FIG_5_TOKENS / unit, loss, **style)
            else:  # far beyond these runs: at the right edge
                ax.plot(1.0, loss, **style, transform=ax.get_yaxis_transform(), clip_on=False, zorder=3)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        plots.legend(ax, theme, **plots.BESIDE)
        figure.set_size_inches(9.0, 4.6)
        return figure

    words = ", ".join(f"{size} {loss:.2f}" for size, loss in FIG_5.items())
    return dataclasses.replace(lines, draw=draw, alt=f"{lines.alt} The paper's losses after 2T tokens: {words}.")


def write(runs: Mapping[str, Run], directory: Path) -> None:
    """The figure, and `loss_by_tokens.json` with what each run has reached."""
    plots.save([curves(runs)], directory)
    reached = {
        name: {"steps": run.steps, "tokens": int(run.tokens.max()), "loss": run.reached} for name, run in runs.items()
    }
    write_json(directory / "loss_by_tokens.json", {"runs": reached, "paper": {"tokens": int(FIG_5_TOKENS), "loss": FIG_5}})
