"""The figures of human evaluation: wins, ties, losses (Figs. 1, 12, 30, 31); violations and safety ratings (Figs. 3, 17-19)."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.evals.human import OUTCOMES
from llama_jax.evals.plots import Plot, Theme, canvas, legend, note

_SPLITS = {
    "turns": "Single and multi turn (Fig. 12)", "turn_count": "By turns of the prompt (Fig. 31)",
    "category": "By category (Fig. 30)", "length": "By words, in fifths (Fig. 31)",
}  # fmt: skip


def comparison_plots(pairs: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One figure of all pairs overall, and for each pair one of each split that its ratings allow."""
    overall = {f"{pair['first']}\nagainst {pair['second']}": pair["overall"] for pair in pairs}
    plots = [outcome_bars("outcomes", "Human evaluation: win, tie, loss (Fig. 1)", overall)]
    for number, pair in enumerate(pairs, start=1):
        for split, title in _SPLITS.items():
            if len(pair[split]) > 1:
                title = f"{pair['first']} against {pair['second']}: {title[0].lower()}{title[1:]}"
                label = f"words of {pair['length_of']}" if split == "length" else ""
                plots.append(outcome_bars(f"outcomes_{number}_{split}", title, pair[split], rows_are=label))
    return plots


def outcome_bars(name: str, title: str, rows: Mapping[str, Mapping[str, Any]], *, rows_are: str = "") -> Plot:
    """Bars of 100 %, one a row: wins, ties and losses with the win rate's 95 % interval; `rows_are` labels the rows' axis."""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.4, 0.62 * len(rows) + 1.1), grid="x")
        colours = dict(zip(OUTCOMES, (theme.colour(0), theme.grey, theme.colour(1))))
        for position, row in enumerate(rows.values()):
            left = 0.0
            for outcome in OUTCOMES:
                width = 100 * row[outcome]["share"]
                label = outcome if position == 0 else None
                ax.barh(position, width, left=left, height=0.62, color=colours[outcome], label=label)
                if width >= 5:
                    note(ax, theme, f"{width:.1f}", (left + width / 2, position), ha="center", va="center", color="#10141c")
                left += width
            low, high = 100 * row["win"]["low"], 100 * row["win"]["high"]
            ax.errorbar(
                (low + high) / 2, position + 0.31, xerr=(high - low) / 2, color=theme.ink, capsize=3, linewidth=1.2,
                label="95 % interval of the wins" if position == 0 else None,
            )  # fmt: skip
            note(ax, theme, f"n = {row['n']:,}", (101, position), va="center")
        ax.set_yticks(range(len(rows)), labels=list(rows))
        ax.set_ylim(len(rows) - 0.45, -0.55)
        ax.set_xlim(0, 112)
        ax.set_xticks(range(0, 101, 20))
        ax.set_xlabel("share of prompts (%)")
        ax.set_ylabel(rows_are)
        legend(ax, theme, loc="upper center", bbox_to_anchor=(0.45, -0.42 / (0.62 * len(rows) + 0.4)), ncols=4)
        return figure

    said = f"Stacked bars{rows_are and f' by {rows_are}'}. {title}. {'; '.join(map(_spoken, rows, rows.values()))}."
    return Plot(name, title, said, draw)


def _spoken(name: str, row: Mapping[str, Any]) -> str:
    words = ", ".join(f"{100 * row[outcome]['share']:.1f} % {outcome}" for outcome in OUTCOMES)
    return f"{' '.join(name.split())}: {words} of {row['n']}"


def safety_plots(models: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Violations and mean ratings of all models, and violations by turns and by risk where known."""
    overall = {model["model"]: {"all prompts": model["overall"]} for model in models}
    plots = [
        violation_bars("violations", "Human evaluation: safety violations (Figs. 3, 17a)", overall),
        rating_dots("safety_ratings", "Mean safety and helpfulness rating (Fig. 17b)", overall),
    ]
    for split, title in {"turns": "by turns (Fig. 18)", "risk": "by risk category (Fig. 19)"}.items():
        rows = {model["model"]: model[split] for model in models}
        if any(len(of_model) > 1 for of_model in rows.values()):
            plots.append(violation_bars(f"violations_{split}", f"Safety violations {title}", rows))
    return plots


def violation_bars(name: str, title: str, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Plot:
    """Violation share by model and series, {model: {series: measures}}; lower is better."""
    series = list(dict.fromkeys(label for of_model in rows.values() for label in of_model))

    def draw(theme: Theme) -> Any:
        width = max(6.0, 0.5 * len(rows) * len(series) + 2)
        figure, (ax,) = canvas(theme, title, panel=(width, 3.6))
        bar, top = 0.8 / len(series), 0.0
        for index, label in enumerate(series):
            for position, of_model in enumerate(rows.values()):
                if label not in of_model:
                    continue
                value = {key: 100 * of_model[label]["violation"][key] for key in ("share", "low", "high")}
                x = position + (index - (len(series) - 1) / 2) * bar
                hatch = (None, "//", "..")[index % 3]
                ax.bar(x, value["share"], bar * 0.9, color=theme.colour(index), label=label, hatch=hatch,
                       edgecolor=theme.page, linewidth=0)  # fmt: skip
                error = [[value["share"] - value["low"]], [value["high"] - value["share"]]]
                ax.errorbar(x, value["share"], yerr=error, color=theme.ink, capsize=2.5, linewidth=1.1)
                note(ax, theme, f"{value['share']:.1f}", (x, value["high"]), xytext=(0, 3), ha="center")
                top = max(top, value["high"])
        ax.set_xticks(range(len(rows)), labels=list(rows))
        ax.set_ylim(0, max(1.18 * top, 1))
        ax.set_ylabel("violations (%, lower is better)")
        if len(series) > 1:
            handles, labels = ax.get_legend_handles_labels()
            known = dict(zip(labels, handles))
            figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, frameon=False,
                          labelcolor=theme.ink, fontsize=9)  # fmt: skip
        return figure

    words = "; ".join(
        f"{model}, {label}: {100 * of['violation']['share']:.1f} % of {of['n']}"
        for model, of_model in rows.items() for label, of in of_model.items()
    )  # fmt: skip
    return Plot(name, title, f"Bars with 95 % intervals. {title}. {words}.", draw)


def rating_dots(name: str, title: str, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Plot:
    """Mean rating of each model with its interval, on the whole scale from 1 to 5."""

    def draw(theme: Theme) -> Any:
        figure, (ax,) = canvas(theme, title, panel=(7.0, 0.5 * len(rows) + 1.0), grid="x")
        for position, of_model in enumerate(rows.values()):
            rating = next(iter(of_model.values()))["rating"]
            if rating["low"] is not None:  # one prompt has no interval
                ax.plot([rating["low"], rating["high"]], [position] * 2, color=theme.colour(0), linewidth=5, alpha=0.35,
                        solid_capstyle="round")  # fmt: skip
            ax.plot([rating["mean"]], [position], color=theme.colour(0), marker="o", markersize=8)
            note(ax, theme, f"{rating['mean']:.2f}", (rating["mean"], position), xytext=(0, 8), ha="center")
        ax.set_yticks(range(len(rows)), labels=list(rows))
        ax.set_ylim(len(rows) - 0.4, -0.7)
        ax.set_xlim(0.9, 5.1)
        ax.set_xlabel("mean rating (1 severe violation, 5 safe and very helpful)")
        return figure

    means = {model: next(iter(of_model.values()))["rating"]["mean"] for model, of_model in rows.items()}
    words = ", ".join(f"{model} {mean:.2f}" for model, mean in means.items())
    return Plot(name, title, f"Dots with 95 % intervals. {title}: {words}.", draw)
