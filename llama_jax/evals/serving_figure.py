"""Fig. 24: queries a second against the time of a token, by batch, with a kv head for every head, for eight groups, for all.

The paper served 30B models on eight A100 of 80 GiB. Of its curves the fact sheet has the last points, read off the figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.evals.plots import Plot, Theme, canvas, legend, note, styles
from llama_jax.markdown import markdown_table

# {tokens of a prompt: {kv heads: (milliseconds a token, queries a second) of the largest batch that fitted}}
PAPER = {
    256: {"MHA": (89.0, 45.0), "MQA": (160.0, 50.0), "GQA": (160.0, 50.0)},
    2048: {"MHA": (124.0, 4.05), "MQA": (215.0, 4.6), "GQA": (224.0, 4.45)},
}
_STOPPED = {"memory": "the next batch does not fit", "largest": "larger ones were not asked for"}


def latency(point: Mapping[str, Any], new_tokens: int) -> float:
    """Milliseconds a token: of the whole batch, prompt included."""
    return 1e3 * point["seconds"] / new_tokens


def throughput(point: Mapping[str, Any]) -> float:
    """Queries a second."""
    return point["batch"] / point["seconds"]


def curves(found: Mapping[str, Any]) -> Plot:
    """A panel for each length of prompt, a line for each number of kv heads; points are batches, the last one is named."""
    new, prompts = found["config"]["new_tokens"], found["config"]["prompts"]
    said = []
    for prompt in prompts:
        best = {name: max((throughput(p) for p in points), default=0.0) for name, points in _lines(found, prompt).items()}
        said.append(f"prompts of {prompt}: " + ", ".join(f"{name} {most:.3g} queries/s at most" for name, most in best.items()))

    def draw(theme: Theme) -> Any:
        title = f"Serving {found['config']['size']} on {found['devices']} x {found['device']} (Fig. 24)"
        figure, panels = canvas(theme, title, columns=len(prompts), panel=(5.2, 3.8), grid="both")
        from matplotlib.ticker import LogLocator  # which `canvas` would have missed with more words

        for ax, prompt in zip(panels, prompts):
            for style, (name, points) in zip(styles(theme, len(found["variants"]), size=5), _lines(found, prompt).items()):
                if points:
                    ax.plot([latency(p, new) for p in points], [throughput(p) for p in points], label=name, **style)
                    last = points[-1]
                    note(ax, theme, str(last["batch"]), (latency(last, new), throughput(last)), xytext=(5, 3))
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            ax.set_title(f"prompt {prompt}, answer {new} tokens; last batch named", loc="left", color=theme.ink, fontsize=10)
            ax.set_xlabel("milliseconds a token")
            ax.set_ylabel("queries a second")
            ax.set_ylim(bottom=0)
            if ax.lines:
                legend(ax, theme, loc="best")
        return figure

    return Plot("serving", "Fig. 24", f"Throughput against latency of serving. {'; '.join(said)}.", draw)


def report(found: Mapping[str, Any]) -> str:
    """Markdown: what the variants are, and for each length of prompt the batches, beside the paper's largest."""
    new = found["config"]["new_tokens"]
    shapes = [
        [name, str(one["kv_heads"]), f"{one['ffn']:,}", f"{one['parameters'] / 1e6:,.1f} M"]
        for name, one in found["variants"].items()
    ]
    blocks = [
        "# Serving with fewer kv heads",
        f"{found['config']['size']}, {found['devices']} x {found['device']}, answers of {new} tokens (Fig. 24).",
        markdown_table(["variant", "kv heads", "feed-forward width", "parameters"], shapes),
    ]
    for prompt in found["config"]["prompts"]:
        lines = _lines(found, prompt)
        sizes = sorted({point["batch"] for points in lines.values() for point in points})
        rows = [[str(batch), *(cell for points in lines.values() for cell in _cells(points, batch, new))] for batch in sizes]
        columns = ["batch", *(f"{name}, {what}" for name in lines for what in ("ms/token", "queries/s"))]
        blocks += [f"## Prompts of {prompt} tokens", markdown_table(columns, rows)]
        ends = [f"{name}: {_STOPPED[one['prompts'][str(prompt)]['stopped']]}" for name, one in found["variants"].items()]
        blocks.append(f"{'; '.join(ends)}.")
        if prompt in PAPER:
            cells = [f"{name} {time:g} ms/token, {rate:g} queries/s" for name, (time, rate) in PAPER[prompt].items()]
            blocks.append(f"The paper's largest batches (30B, 8 x A100 of 80 GiB): {'; '.join(cells)}.")
    return "\n\n".join(blocks) + "\n"


def _lines(found: Mapping[str, Any], prompt: int) -> dict[str, Sequence[Mapping[str, Any]]]:
    return {name: one["prompts"][str(prompt)]["points"] for name, one in found["variants"].items()}


def _cells(points: Sequence[Mapping[str, Any]], batch: int, new_tokens: int) -> list[str]:
    for point in points:
        if point["batch"] == batch:
            return [f"{latency(point, new_tokens):.3g}", f"{throughput(point):.3g}"]
    return ["", ""]
