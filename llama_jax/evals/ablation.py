"""What a change of the training data is worth: arms of an ablation compared on the same held-out documents.

An arm is a model, trained on one state of the data with as many tokens as the others. Its gain is what the first arm needs
more, in bits per byte of held-out text; the interval is a bootstrap over documents, each with the bits of both models (paired),
averaged over the training seeds. It speaks of other documents like these. How much another seed changes is shown beside it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.corpus_build import report_page as html
from llama_jax.evals.corpus_figures import save_figures
from llama_jax.evals.plots import BESIDE, Plot, Theme, canvas, legend, note, styles
from llama_jax.evals.statistics import Interval, is_clear, mean_interval, ratio_interval
from llama_jax.files import write_json, write_text
from llama_jax.markdown import markdown_table


@dataclasses.dataclass(frozen=True)
class Arm:
    """One state of the data and what it came to."""

    name: str
    what: str  # one sentence
    bits: np.ndarray  # float64 [seeds, documents]
    curve: list[tuple[int, float]]  # tokens trained on, bits per byte of all held-out text; mean over seeds
    tokens: int  # of its corpus
    documents: int
    epochs: float  # of the corpus that the run has seen
    table: str  # of its corpus: what was left out
    band: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # lowest and highest of the seeds along the curve


@dataclasses.dataclass(frozen=True)
class HeldOutTexts:
    """The documents that all arms are compared on."""

    sources: Sequence[str]  # [documents]
    bytes: np.ndarray  # int64 [documents]
    seeds: Sequence[int]


def compare(arms: Sequence[Arm], held_out: HeldOutTexts) -> dict[str, Any]:
    """The results of an ablation as JSON values; every arm beside the first one."""
    first, results = arms[0], []
    sources = np.array(held_out.sources)
    for arm in arms:
        bits, base = arm.bits.mean(axis=0), first.bits.mean(axis=0)
        gains = {"all": _gain(base, bits, held_out.bytes)}
        for source in dict.fromkeys(held_out.sources):
            inside = sources == source
            gains[source] = _gain(base[inside], bits[inside], held_out.bytes[inside])
        results.append({
            "name": arm.name,
            "what": arm.what,
            "bits_per_byte": float(bits.sum() / held_out.bytes.sum()),
            "by_source": {s: float(bits[sources == s].sum() / held_out.bytes[sources == s].sum()) for s in gains if s != "all"},
            "gain": gains,
            "relative_gain": gains["all"]["mean"] / float(base.sum() / held_out.bytes.sum()),
            "gain_by_seed": ((first.bits - arm.bits).sum(axis=1) / held_out.bytes.sum()).tolist(),
            "documents_won": dataclasses.asdict(mean_interval((bits < base).astype(float))),
            "tokens_to_match": tokens_to_match(arm.curve, first.curve[-1][1]) if arm is not first else None,
            "curve": [list(point) for point in arm.curve],
            "band": [list(ends) for ends in arm.band],
            "corpus": {"tokens": arm.tokens, "documents": arm.documents, "epochs": arm.epochs, "table": arm.table},
        })  # fmt: skip
    return {
        "arms": results,
        "held_out": {"documents": len(sources), "bytes": int(held_out.bytes.sum()), "sources": list(gains)[1:]},
        "seeds": list(held_out.seeds),
        "tokens": first.curve[-1][0],
    }


def _gain(base: np.ndarray, bits: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    interval: Interval = ratio_interval(base - bits, sizes)
    return dataclasses.asdict(interval)


def tokens_to_match(curve: Sequence[tuple[int, float]], level: float) -> float | None:
    """Tokens after which a curve first is at `level` or below, between its points on a straight line; None if never."""
    before: tuple[int, float] | None = None
    for tokens, value in curve:
        if value <= level:
            if before is None or before[1] == value:
                return float(tokens)
            return before[0] + (tokens - before[0]) * (before[1] - level) / (before[1] - value)
        before = (tokens, value)
    return None


def write_ablation(results: Mapping[str, Any], workdir: Path, *, title: str) -> None:
    """Writes report.json, report.md and report.html, and the plots beside them where matplotlib is there."""
    write_json(workdir / "report.json", results)
    for name, text in (("report.md", markdown(results, title)), ("report.html", page(results, title))):
        write_text(workdir / name, text)
    save_figures([gain_figure(results), curve_figure(results)], workdir)


def gain_figure(results: Mapping[str, Any]) -> Plot:
    """The gain of each arm over the first, on all held-out text and by source, with its interval."""
    title, rows = f"Bits per byte saved against {results['arms'][0]['name']}", _gains(results)

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.6, 0.42 * len(rows) + 1.0), grid="x")
        ax.axvline(0, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        for place, (_, gain) in enumerate(rows):
            ends = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
            ax.errorbar(gain["mean"], place, xerr=ends, fmt="o", color=theme.colour(0), capsize=3)
            beside = {"xycoords": ("axes fraction", "data"), "xytext": (8, 0), "va": "center"}
            note(ax, theme, html.interval_text(gain), (1.0, place), **beside)
        ax.set_yticks(range(len(rows)), labels=[name for name, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.locator_params(axis="x", nbins=6)
        ax.set_xlabel("bits per byte, 95 % intervals; right of 0 is better")
        return figure

    words = "; ".join(f"{name}: {html.interval_text(gain)}" for name, gain in rows)
    return Plot("ablation_gain", title, f"Means with 95 % intervals. {title}. {words}.", draw)


def curve_figure(results: Mapping[str, Any]) -> Plot:
    """Bits per byte of the held-out text while the arms trained; the band holds all seeds."""
    title, arms = "Held-out bits per byte while the arms trained", results["arms"]

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title)
        for arm, style in zip(arms, styles(theme, len(arms))):
            tokens, means = zip(*arm["curve"])
            ax.plot(tokens, means, label=f"{arm['name']} {means[-1]:.3f}", linewidth=1.8, **style)
            if len(results["seeds"]) > 1 and arm["band"]:
                ax.fill_between(tokens, *zip(*arm["band"]), color=style["color"], alpha=0.18, linewidth=0)
        ax.xaxis.set_major_formatter(lambda tokens, _: html.short(tokens))
        ax.set_xlabel(f"tokens{_BAND if len(results['seeds']) > 1 else ''}")
        ax.set_ylabel("bits per byte")
        legend(ax, theme, **(BESIDE if len(arms) > 2 else {}))
        return figure

    words = "; ".join(f"{arm['name']} from {arm['curve'][0][1]:.3f} to {arm['curve'][-1][1]:.3f}" for arm in arms)
    return Plot("ablation_curves", title, f"Lines over tokens. {title}. {words}.", draw)


_BAND = " (bands: lowest to highest of the seeds)"


def _gains(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return [
        (arm["name"] if source == "all" else f"{arm['name']} · {source}", arm["gain"][source])
        for arm in results["arms"][1:] for source in ("all", *results["held_out"]["sources"])
    ]  # fmt: skip


_HEADS = ("arm", "bits per byte", "gain", "95 % interval", "relative", "documents won", "tokens to match", "gain by seed")


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for number, arm in enumerate(results["arms"]):
        gain, row = arm["gain"]["all"], [arm["name"], f"{arm['bits_per_byte']:.4f}"]
        match = arm["tokens_to_match"]
        rows.append(row + ["", "", "", "", "", ""] if not number else row + [
            f"{gain['mean']:+.4f}", f"{gain['low']:+.4f} to {gain['high']:+.4f}", f"{arm['relative_gain']:+.1%}",
            f"{arm['documents_won']['mean']:.0%}", "never" if match is None else f"{match / results['tokens']:.0%}",
            " ".join(f"{value:+.4f}" for value in arm["gain_by_seed"]),
        ])  # fmt: skip
    return rows


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """One sentence an arm: better, worse, or not to be told apart."""
    base = results["arms"][0]["name"]
    lines = []
    for arm in results["arms"][1:]:
        gain = arm["gain"]["all"]
        seeds_agree = len({value > 0 for value in arm["gain_by_seed"]}) == 1
        clear = is_clear(gain) and seeds_agree
        word = f"{abs(arm['relative_gain']):.1%} {'better' if gain['mean'] > 0 else 'worse'} than" if clear else (
            "not to be told apart from"
        )  # fmt: skip
        lines.append(f"{arm['name']} is {word} {base}: {gain['mean']:+.4f} bits per byte "
                     f"({gain['low']:+.4f} to {gain['high']:+.4f}).")  # fmt: skip
    return lines


def _lead(results: Mapping[str, Any]) -> str:
    held = results["held_out"]
    return (
        f"Equal tokens for every arm: {results['tokens']:,}. The same {held['documents']} held-out documents "
        f"({held['bytes'] / 1000:,.0f} kB), training seeds {', '.join(map(str, results['seeds']))}. A gain is what "
        f"{results['arms'][0]['name']} needs more, in bits per byte; its interval resamples documents, with both models' bits "
        "on each."
    )


def markdown(results: Mapping[str, Any], title: str) -> str:
    """The report as Markdown."""
    arms = "\n".join(f"- **{arm['name']}**: {arm['what']}" for arm in results["arms"])
    blocks = [
        f"# {title}", _lead(results), "\n".join(f"- {line}" for line in verdicts(results)),
        markdown_table(_HEADS, _rows(results)),
        "## Gain by source", markdown_table(*_by_source(results)), "## Arms", arms, "## Data", markdown_table(*_data(results)),
        *(f"### {arm['name']}\n\n```\n{arm['corpus']['table']}\n```" for arm in results["arms"]),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _by_source(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    sources = results["held_out"]["sources"]
    rows = [
        [f"{arm['name']} · {source}", f"{arm['by_source'][source]:.4f}", f"{gain['mean']:+.4f}",
         f"{gain['low']:+.4f} to {gain['high']:+.4f}", f"{gain['n']}"]
        for arm in results["arms"][1:] for source in sources for gain in [arm["gain"][source]]
    ]  # fmt: skip
    return ["arm · source", "bits per byte", "gain", "95 % interval", "documents"], rows


def _data(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [arm["name"], f"{arm['corpus']['documents']:,}", f"{arm['corpus']['tokens']:,}", f"{arm['corpus']['epochs']:.2f}"]
        for arm in results["arms"]
    ]
    return ["arm", "documents", "tokens", "epochs seen"], rows


def page(results: Mapping[str, Any], title: str) -> str:
    """The report as one self-contained HTML page."""
    arms, base = results["arms"], results["arms"][0]
    best = max(arms[1:], key=lambda arm: arm["gain"]["all"]["mean"])
    tiles = [
        (f"bits per byte, {base['name']}", f"{base['bits_per_byte']:.3f}"),
        (f"bits per byte, {best['name']}", f"{best['bits_per_byte']:.3f}"),
        ("best gain", f"{best['relative_gain']:+.1%}"),
        ("of the tokens suffice to match", "never" if best["tokens_to_match"] is None
         else f"{best['tokens_to_match'] / results['tokens']:.0%}"),
    ]  # fmt: skip
    bands = {arm["name"]: arm["band"] for arm in arms if len(results["seeds"]) > 1}
    words = "".join(f"<p>{html.escape(line)}</p>" for line in verdicts(results))
    trained = f"Bits per byte of all held-out text over the tokens trained on{_BAND if bands else ''}."
    curves = html.lines({arm["name"]: arm["curve"] for arm in arms}, x="tokens", y="bits per byte", bands=bands)
    sections = [
        html.section("The gain", "Bits per byte saved on held-out text, all of it and by source, with 95 % intervals. "
                     "What lies right of 0 is better.",
                     words, html.intervals(_gains(results)), html.table(_HEADS, _rows(results))),
        html.section("While they trained", trained, curves),
        html.section("By source", "Where the gain comes from.", html.table(*_by_source(results))),
        html.section("The data", "More epochs mean that a smaller corpus was seen more often.", html.table(*_data(results)),
                     *(html.samples(arm["name"], arm["what"], [("what was left out, and the mixture", arm["corpus"]["table"])])
                       for arm in arms)),
    ]  # fmt: skip
    return html.page(title, _lead(results), tiles, sections)
