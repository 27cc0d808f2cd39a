"""The report as plain values: titled sections of notes, tables and figures, for Markdown and HTML alike."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from llama_jax.evals import ghost_figures
from llama_jax.evals.reward_figures import DEGREES
from llama_jax.evals.statistics import over_optimisation
from llama_jax.evals.targets import lookup, number, percent, share
from llama_jax.markdown import Table

_TRACKS = ("helpfulness", "safety")
_FIG_16A = {"base": 0.75, "generic": 0.82, "category": 0.87}  # the paper's median safety scores, read off the figure
_SAFE = 0.9  # a median safety score that leaves little to gain
VERSIONS = {"base": "Base", "sft": "SFT", "rejection": "RS", "ppo": "PPO"}
SIMULATION_NOTE = (
    "The annotator of this run is a simulation. No person rated an answer: preferences, true utility and "
    "safety violations come from a program that compares answers with the reference documentation and checks "
    "whether harmful requests are declined. The figures show whether the recipe works, not how people would "
    "judge the model."
)


@dataclasses.dataclass(frozen=True)
class Section:
    """One section: what it shows, in the order notes, tables, figures."""

    title: str
    notes: list[str] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    figures: list[str] = dataclasses.field(default_factory=list)


def build_sections(results: Mapping, figure_names: Iterable[str]) -> list[Section]:
    """Sections of `results` (the keys of report.json); figures with other names than used here come last."""
    names = list(figure_names)
    sections = [
        _verdict(results),
        _pretraining(results),
        _fine_tuning(results),
        _reward_models(results),
        _rejection(),
        _ppo(results),
        *([_versions(results)] if results.get("versions") else []),
        *([_ghost_attention(results["ghost_attention"])] if results.get("ghost_attention") else []),
        *([distillation(results["distillation"])] if results.get("distillation") else []),
        _time(results),
        Section(
            "Everything measured", tables=[Table(["figure", "value"], [[k, v] for k, v in flatten(results)])]
        ),
    ]
    sections = [dataclasses.replace(s, figures=[f for f in s.figures if f in names]) for s in sections]
    placed = {figure for section in sections for figure in section.figures}
    rest = [name for name in names if name not in placed]
    return [*sections[:-1], *([Section("More figures", figures=rest)] if rest else []), sections[-1]]


def label_of(version: str) -> str:
    """A version's name for people: SFT, V1, V5 PPO."""
    return version.upper().replace("_", " ")


def flatten(results: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """Every leaf of nested dicts as (dotted name, text); long lists are left to report.json."""
    leaves = []
    for key, value in results.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves += flatten(value, f"{name}.")
        elif value is None:
            leaves.append((name, "not run"))
        elif isinstance(value, float):
            leaves.append((name, f"{value:.5g}"))
        elif not isinstance(value, list | tuple):
            leaves.append((name, str(value)))
    return leaves


def prompt_text(prompt: str | Sequence[Mapping]) -> str:
    """A prompt for people: its messages one after another with their roles, or the string that it is."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _verdict(results: Mapping) -> Section:
    rows = [
        [
            label,
            _with_interval(results, f"{key}.true_utility", number),
            share(lookup(results, f"{key}.safety_violations")),
            "" if key in ("base", "sft") else _with_interval(results, f"{key}.win_rate", percent),
            number(lookup(results, f"{key}.reward_score")),
        ]
        for key, label in VERSIONS.items()
    ]
    columns = [
        "version",
        "true utility (95 % interval)",
        "safety violations",
        "win rate against SFT",
        "reward model score",
    ]
    return Section(
        "Verdict",
        notes=[
            "Held-out prompts. A tie counts one half; intervals are bootstraps over prompts (section 3.4)."
        ],
        tables=[Table(columns, rows)],
        figures=["verdict"],
    )


def _pretraining(results: Mapping) -> Section:
    pretrain = results.get("pretrain") or {}
    seen = {s: lookup(pretrain, f"held_out_lines_seen.{s}") for s in pretrain.get("bits_per_byte") or {}}
    rows = []
    for source in seen:
        ours, xz = (lookup(pretrain, f"{key}.{source}") for key in ("bits_per_byte", "xz_bits_per_byte"))
        saved = "not run" if ours is None or not xz else f"{100 * abs(1 - ours / xz):.0f} % {'fewer' if ours < xz else 'more'}"
        lines = "" if seen[source] is None else percent(seen[source])
        rows.append([source.replace("_", " "), number(ours), number(xz), saved, lines])
    notes = ["Bits per byte on held-out documents, beside xz -9e on the same documents (paper section 2)."]
    if any(seen.values()):
        notes.append(
            "Documents and passages that stand in training text too are taken out of it; single lines of programs stay "
            "and help the model a little: the last column is the share of the held-out documents' long lines that is there."
        )
    columns = ["source", "model", "xz -9e", "model needs", "lines seen in training"]
    return Section(
        "Pretraining",
        notes=notes,
        tables=[Table(columns, rows or [["all", *["not run"] * 3, ""]])],
        figures=["pretrain_loss", "loss", "bits_per_byte"],
    )


def _fine_tuning(results: Mapping) -> Section:
    rows = [
        [
            VERSIONS[key],
            _with_interval(results, f"{key}.true_utility", number),
            percent(lookup(results, f"{key}.stop_rate")),
            percent(lookup(results, f"{key}.format_rate")),
            share(lookup(results, f"{key}.safety_violations")),
        ]
        for key in ("base", "sft")
    ]
    return Section(
        "Supervised fine-tuning",
        notes=["The base model is prompted with examples; SFT with the question alone (paper section 3.1)."],
        tables=[
            Table(
                ["version", "true utility", "answers that stop", "well-formed answers", "safety violations"],
                rows,
            )
        ],
        figures=["sft_loss"],
    )


def _reward_models(results: Mapping) -> Section:
    accuracy, safety = [], []
    for pairs in _TRACKS:
        for model in _TRACKS:
            found = [lookup(results, f"reward.{model}.{'accuracy' if model == pairs else 'others'}.{d}") for d in DEGREES]
            was_run = any(value is not None for value in found)  # then a degree without a figure had no pairs
            cells = ["no pairs" if value is None and was_run else percent(value) for value in found]
            if model == pairs or was_run:
                accuracy.append([f"{pairs} pairs, {model} reward model", *cells])
    for model in _TRACKS:
        found = results.get("reward", {}).get(model, {}).get("safety", {})
        safety += [[f"{model} reward model", name.replace("_", " "), percent(share)] for name, share in found.items()]
    notes = [
        "Held-out pairs ranked as the annotator ranked them, by degree: each reward model on its own pairs and on those of the "
        "other (Table 8)."
    ]
    if safety:
        notes.append("The second table: accuracy by the safety of both answers, and unsafe answers that are told as such (29).")
    return Section(
        "Reward models", notes=notes, figures=["reward_accuracy", "reward_loss"],
        tables=[
            Table(["accuracy", *DEGREES], accuracy),
            *([Table(["model", "pairs", "accuracy or recall"], safety)] if safety else []),
        ],
    )  # fmt: skip


def _rejection() -> Section:
    return Section(
        "Rejection sampling",
        notes=[
            "Expected reward of the best and of the median among N answers to one prompt (3.2.3, Fig. 7). Best answers of all "
            "versions, scored again by the newest reward models, are fine-tuned on."
        ],
        figures=["best_of_n", "temperature_map", "rejection_loss"],
    )


def _versions(results: Mapping) -> Section:
    """The way from SFT to the last version; judged by the reward models and by the annotator (Figs. 6, 11, 14, 20)."""
    rows = []
    for name, found in results["versions"].items():
        cells = [label_of(name), number(lookup(found, "true_utility")), share(lookup(found, "safety_violations"))]
        for judge in ("win_rate_by_track", "win_rate_by_reward_models"):
            cells += [_with_interval(found, f"{judge}.{track}", percent) if judge in found else "" for track in _TRACKS]
        rows.append(cells)
    progress = Table(
        ["version", "true utility", "violations", "helpfulness, annotator", "safety, annotator", "helpfulness, reward models",
         "safety, reward models"], rows,
    )  # fmt: skip
    notes = [
        "Win rates against SFT on held-out prompts of each track, by the simulated annotator and by the newest reward models "
        "(3.4.1, Fig. 11). The second table: held-out accuracy of each version's reward models on every batch so far (Fig. 6). "
        "`ledger.json` names the data, checkpoints and scores of each version."
    ]
    tables = [progress, *([_batches(results["reward_batches"])] if results.get("reward_batches") else [])]
    if results.get("ghost"):
        notes.append("Then Ghost Attention's dialogs in the mix, and how often the policy before it obeyed (3.3).")
        tables.append(_ghost(results["ghost"]))
    if results.get("ghost_versions"):
        notes.append(
            "The last table: how often greedy answers to held-out dialogs obey an instruction of the first turn, decided by a "
            "program. Ghost Attention's dialogs entered after the first of these versions (Table 30 of themselves)."
        )
        tables.append(_ghost_versions(results["ghost_versions"]))
    names = ["version_progress", "score_shift_helpfulness", "score_shift_safety", "score_scatter", "accuracy_by_batch"]
    return Section("Versions", notes=notes, tables=tables, figures=names)


def _ghost(ghost: Mapping) -> Table:
    rows = [
        [f"Ghost Attention, {name.upper()}", *(number(lookup(found, key)) for key in ("samples", "decided")),
         percent(lookup(found, "obeyed")), number(lookup(found, "kept"))]
        for name, found in ghost.items()
    ]  # fmt: skip
    return Table(["dialogs", "sampled", "decided by a program", "of these obeyed", "in the mix"], rows)


def _ghost_versions(found: Mapping) -> Table:
    """{version: {family: {turn: interval}}} as a row for each version and kind of instruction."""
    turns = sorted({int(turn) for kinds in found.values() for cells in kinds.values() for turn in cells})
    rows = [
        [f"{label_of(name)}, {family}",
         *(_with_interval(found, f"{name}.{family}.{turn}", percent) for turn in turns)]
        for name, kinds in found.items() for family in kinds
    ]  # fmt: skip
    return Table(["version, instruction", *(f"turn {turn}" for turn in turns)], rows)


def _batches(reward_batches: Mapping) -> Table:
    batches = list(dict.fromkeys(b for rows in reward_batches.values() for row in rows.values() for b in row))
    batches = [*(b for b in batches if b != "all"), *(b for b in batches if b == "all")]
    rows = [
        [f"{track}, {name.upper()}", *("" if b not in row else percent(lookup(row[b], "all")) for b in batches)]
        for track, versions in reward_batches.items() for name, row in versions.items()
    ]  # fmt: skip
    return Table(["reward model", *batches], rows)


def _ghost_attention(found: Mapping) -> Section:
    dialogs = found.get("examples") or []
    return Section(
        "Ghost Attention",
        notes=[
            "How often held-out dialogs obey an instruction of their first turn, decided by a program, with 95 % intervals "
            "(section 3.3, Table 30; the paper's by people). The policy before the first version with Ghost Attention's "
            "dialogs is taught to obey in its own turn (the baseline); Ghost Attention samples from it and trains it.",
            f"The baseline obeys in {percent(found['policy_obeys'])} of the samples that Ghost Attention trains on.",
            *([ghost_figures.DIALOGS_NOTE] if dialogs else []),
        ],
        tables=[
            Table(ghost_figures.columns(), ghost_figures.rows(found["recall"])),
            *([Table(ghost_figures.dialog_columns(dialogs), ghost_figures.dialog_rows(dialogs))] if dialogs else []),
        ],
        figures=["ghost_recall", "ghost_attention"],
    )


def distillation(found: Mapping) -> Section:
    """What `distillation_figure.described` says, and, where they were judged, the policies `before` and `after`."""
    medians, shown = found.get("median_safety") or {}, found.get("examples") or []
    columns = ["pre-prompt", "safety score (95 % interval)", *(["median", "paper's median"] if medians else [])]
    scores = [
        [kind, _with_interval(found, f"safety_score.{kind}", number),
         *([number(medians.get(kind)), number(_FIG_16A.get(kind), 2)] if medians else [])]
        for kind in found["safety_score"]
    ]  # fmt: skip
    policies = [
        [name, _with_interval(found, f"{name}.true_utility", number), share(lookup(found, f"{name}.safety_violations"))]
        for name in ("before", "after") if name in found
    ]  # fmt: skip
    beside = ", beside the best answers of the last round" if policies else ""
    return Section(
        "Safety context distillation",
        notes=[
            "Answers to harmful requests as they stand (base), under a generic safety pre-prompt, and under the answer "
            "template of their risk; scored by the safety reward model (section 4.2.4, Fig. 16).",
            f"Of {found['prompts']} prompts, {found['preferred']} have an answer under a pre-prompt that the reward model "
            f"prefers. {_left_out(found)}{found['kept']} are fine-tuned on without the pre-prompt{beside}.",
            *([sentence] if (sentence := _no_rise(found)) else []),
            *(["The last table: prompts from the largest gain to the smallest, with an answer of every kind (Tables 13, 39)."]
              if shown else []),
        ],
        tables=[
            Table(columns, scores),
            *([Table(["policy", "true utility (95 % interval)", "safety violations"], policies)] if policies else []),
            *([_distilled(shown)] if shown else []),
        ],
        figures=["distillation"],
    )  # fmt: skip


def _left_out(found: Mapping) -> str:
    """One sentence on the preferred answers that are not fine-tuned on, "" where all are."""
    unended, unusable = found["unended"], found["unusable"]
    counts = {
        "no such answer ended": unended, "none can be trained on (nothing is said, or it holds a chat tag)": unusable,
        "the gain is less than was asked for": found["preferred"] - found["kept"] - unended - unusable,
    }  # fmt: skip
    said = ", ".join(f"{count} where {reason}" for reason, count in counts.items() if count > 0)
    return f"Of these are left out {said}. " if said else ""


def _no_rise(found: Mapping) -> str:
    """One sentence on the pre-prompts that do not raise the median safety score, "" where all do."""
    medians = found.get("median_safety") or {}
    base = medians.get("base", 0.0)
    flat = {kind: median for kind, median in medians.items() if kind != "base" and median <= base}
    if not flat:
        return ""
    kinds, values = " and ".join(flat), " and ".join(map(number, flat.values()))
    said = [f"The median safety score does not rise under {kinds} pre-prompts ({values}; {number(base)} without one)"]
    if base >= _SAFE:
        said.append(f"the policy is safe already: half of its plain answers have at least {number(base)} of 1")
    said.append(
        f"were the pre-prompts without effect, {found['kept_by_chance']:.0f} of the {found['prompts']} prompts would have a "
        "better answer by chance, since the best of several is compared with one"
    )
    return "; ".join(said) + "."


def _distilled(shown: Sequence[Mapping]) -> Table:
    """Prompts with their answers, a row an answer."""
    rows = []
    for example in shown:
        prompt = ghost_figures.one_line(prompt_text(example["prompt"]), 240)
        for answer in example["answers"]:
            asked = answer["kind"] if not answer["preprompt"] else f"{answer['kind']}: {answer['preprompt']}"
            fate = "kept" if answer["kept"] else "" if answer["ended"] else "cut off"
            texts = [ghost_figures.one_line(asked, 240), ghost_figures.one_line(answer["response"], 320)]
            rows.append([prompt, *texts, number(answer["safety"]), fate])
            prompt = ""
    return Table(["prompt", "pre-prompt", "answer", "safety score", ""], rows)


def _ppo(results: Mapping) -> Section:
    notes = ["Clipped objective, penalty per token for the KL to the start, critic from the reward model (3.2.3)."]
    names, reward, utility = optimisation(results)
    if len(names) > 1:
        found = over_optimisation(reward, utility)
        if found.detected:
            notes.append(
                f"The reward model was over-optimised: true utility was highest in {names[found.peak]} and fell by "
                f"{found.utility_drop:.3f} since; the score rose by {found.reward_gain:.3f}."
            )
        else:
            notes.append("No over-optimisation seen: true utility did not fall while the reward model score rose.")
    return Section("PPO", notes=notes, figures=["ppo", "over_optimisation"])


def optimisation(results: Mapping) -> tuple[list[str], list[float], list[float]]:
    """(versions, their reward model scores, their true utilities), in the order in which they were made."""
    found = [
        (name, version["reward_score"], lookup(version, "true_utility"))
        for name, version in (results.get("versions") or {}).items() if version.get("reward_score") is not None
    ]  # fmt: skip
    found = [row for row in found if row[2] is not None]
    names, reward, utility = ([row[i] for row in found] for i in range(3))
    return list(map(label_of, names)), reward, utility


def _time(results: Mapping) -> Section:
    seconds = results.get("seconds") or {}
    total = lookup(seconds, "total")
    rows = []
    for stage in [*(key for key in seconds if key != "total"), "total"]:
        value = lookup(seconds, stage)
        part = "" if value is None or not total or stage == "total" else f"{100 * value / total:.0f} %"
        rate = lookup(results, f"speed.{stage}.tokens_per_second")
        ceiling = lookup(results, f"speed.{stage}.matmul_share")
        rows.append(
            [
                stage,
                "not run" if value is None else f"{value:,.0f} s",
                part,
                "" if rate is None else f"{rate:,.0f}",
                "" if ceiling is None else percent(ceiling),
            ]
        )
    tables = [Table(["stage", "time", "share", "tokens/s", "of the matmul ceiling"], rows)]
    notes = [
        "Tokens/s are those of a stage's steps, the padding of rows included; PPO's have its rollouts between them. The last "
        "column: operations of what is trained, beside the best rate of a large matrix product on this machine."
    ]
    parts = {name: lookup(results, f"ppo_seconds.{name}") for name in ("rollout", "score", "train")}
    if any(value is not None for value in parts.values()):
        notes.append("The second table: what an iteration of PPO spends its time on.")
        cells = [["PPO, seconds of an iteration", *("" if v is None else number(v, 2) for v in parts.values())]]
        tables.append(Table(["", "rollout", "scoring", "training"], cells))
    return Section("Time", notes=notes, tables=tables)


def _with_interval(results: Mapping, path: str, text) -> str:
    mean, low, high = (lookup(results, name) for name in (path, f"{path}.low", f"{path}.high"))
    return text(mean) if low is None or high is None else f"{text(mean)} ({text(low)} to {text(high)})"
