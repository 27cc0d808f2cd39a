"""The text of a model card (Table 52): what `card_facts` found, as Markdown in the order of the paper's card.

What a reader looks for and no file says is "not said".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

import llama_jax
from llama_jax.evals import card_facts
from llama_jax.evals.card_facts import NOT_SAID, Facts, Stage, is_number, short
from llama_jax.evals.groups import TITLES
from llama_jax.interop.names import leaves
from llama_jax.markdown import markdown_table, verbatim
from llama_jax.model.params import count

MARK = "Written by `llama_jax.model_card`"
_SAFETY = ("truthfulqa", "toxigen", "bold")
_INTERVAL = 1.96  # standard errors on each side: 95 %

USE = {
    "base model": "Research, and as the start of models for a task or for dialog. It continues text and is not meant "
    "to follow instructions.",
    "chat model": "Research on dialog and on how such models are made. As part of a product only behind safeguards, and after "
    "tests for that product.",
    "reward model": "To rank answers to the same prompt: in rejection sampling, reinforcement learning and evaluation. Its "
    "score says what its annotators would prefer, not what is true.",
    "language model": "Research. Whether it was tuned for dialog is not said, so look before you rely on either.",
}
OUT_OF_SCOPE = (
    "What the law, its license or the terms of its data forbid; decisions about people that no person answers for; languages "
    "and subjects for which neither its data nor a result below speaks."
)
RISKS = {
    "reward model": "It has learned the judgements it was shown, with their mistakes and one-sidedness. A policy that is "
    "trained against it long enough finds answers that score high and are not good.",
    "language model": "Like every model of this kind it may write what is false, one-sided or harmful, and may repeat what it "
    "was trained on.",
}


def card(
    facts: Facts, *, name: str, license_: str = "", results: Sequence[Mapping[str, Any]] = (),
    planned: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The card; `results` are of `card_facts.evaluation`, `planned` of `card_facts.plan`."""
    risks = RISKS.get(facts.kind, RISKS["language model"])
    safety = any(name in _SAFETY for found in results for name in found["rows"])
    tested = "What stands under evaluation results is all that is known of its behaviour"
    tested += "." if safety else ", and no safety benchmark is among it."
    blocks = [
        f"# Model card: {verbatim(name)}",
        f'{MARK} from the files of the model. "{NOT_SAID.capitalize()}": no file says it.',
        "## Model details",
        _details(facts, license_),
        "## Intended use",
        f"**Meant for.** {USE[facts.kind]}",
        f"**Out of scope.** {OUT_OF_SCOPE}",
        "## Hardware and software",
        *_hardware(facts),
        *(_carbon(planned) if planned else ()),
        "## Training data",
        *_data(facts),
        "## Evaluation results",
        *(_evaluation(facts, results) or [f"{NOT_SAID.capitalize()}."]),
        "## Ethical considerations and limitations",
        f"{risks} {tested} Test it for your own use first.",
    ]
    return "\n\n".join(blocks) + "\n"


def _details(facts: Facts, license_: str) -> str:
    config, source = facts.source.config, facts.source
    attention = {config.heads: "multi-head", 1: "multi-query"}.get(config.kv_heads, "grouped-query")
    out = "one number, the higher the better," if source.head == "reward_head" else "text"
    rows = {
        "Developers and contact": NOT_SAID,
        "Kind": facts.kind,
        "Input, output": f"text in, {out} out",
        "Architecture": f"decoder-only transformer of Llama 2: RMSNorm, SwiGLU, rotary positions, {attention} attention",
        "Parameters": f"{count(leaves(config, source.head)):,}",
        "Layers": f"{config.layers:,}",
        "Width": f"{config.width:,}",
        "Heads": f"{config.heads:,}, of keys and values {config.kv_heads:,}, {config.head_size:,} wide",
        "Feed-forward": f"{config.ffn:,}",
        "Vocabulary": f"{config.vocab_size:,}",
        "Context": f"{config.max_length:,} tokens",
        **({"Tokenizer": f"sha256 {source.words[:16]}"} if source.words else {}),
        **({"Dialog format": source.chat} if source.chat else {}),
        "Stages": " → ".join([facts.before, *(f"{stage.name} ({short(stage.workdir)})" for stage in facts.stages)]),
        "Dates": card_facts.dates(facts),
        "Status": f"fixed weights{f', of step {facts.stages[-1].step.name}' if facts.stages else ''}",
        "License": license_ or NOT_SAID,
    }
    return _two_columns(rows)


def _hardware(facts: Facts) -> list[str]:
    written = f"The card was written with llama_jax {llama_jax.__version__} and JAX {jax.__version__}."
    if not facts.trained:
        return [f"Training: {NOT_SAID}.", written]
    rows = []
    for stage in facts.trained:
        seconds, goodput, kind, version = map(stage.at_end, ("seconds", "goodput", "device_kind", "jax"))
        rows.append([
            verbatim(stage.name), _number(stage.meta.get("seconds") if seconds is None else seconds, "{:,.0f} s"),
            _number(goodput, "{:.1%}"), verbatim(card_facts.devices(stage)), _text(kind), _text(version),
        ])  # fmt: skip
    return [
        markdown_table(["stage", "wall time", "goodput", "devices", "kind of device", "JAX"], rows),
        f"Kind of device and JAX are those of a run's last start. {written}",
    ]


def _carbon(planned: Mapping[str, Any]) -> list[str]:
    spent, what = planned["run"], verbatim(f"{planned['program']} on {planned['topology']}, {planned['chips']} chips")
    rows = {"tokens": _number(spent["tokens"], "{:,.0f}"), "chip hours": _number(spent["chip_hours"])}
    formula = ""
    if "tco2eq" in spent:
        rows["tCO2eq"] = _number(spent["tco2eq"])
        formula = " tCO2eq as in the paper's Table 2: chip hours x watts a chip x 1.1 x 0.385 t/MWh."
    return ["### Carbon", f"Planned, not measured: {what}.{formula}", _two_columns(rows)]


def _data(facts: Facts) -> list[str]:
    unknown = [] if facts.before == card_facts.DRAWN else [f"Data of what came before ({verbatim(facts.before)}): {NOT_SAID}."]
    blocks = [block for stage in facts.trained for block in (_corpus if stage.name == "pretrain" else _files)(stage)]
    return [*unknown, *blocks, f"Until when the data reach: {NOT_SAID}."]


def _amount(stage: Stage, length: Any, *, packed: bool) -> str:
    """Steps, rows and tokens of a run until its checkpoint."""
    steps, rows = int(stage.step.name), (stage.config.get("loop") or {}).get("batch_size")
    said = f"{steps:,} steps"
    if is_number(rows):
        said += f" of {rows:,} rows"
        if is_number(length):
            said += f" of {'' if packed else 'at most '}{length:,} tokens"
            said += f", {steps * rows * length:,} tokens in all" if packed else ""
    return f"**{verbatim(stage.name)}** ({verbatim(short(stage.workdir))}): {said}."


def _corpus(stage: Stage) -> list[str]:
    """Pretraining's data."""
    found = card_facts.corpus(stage)
    if found is None:
        path = (stage.config.get("data") or {}).get("corpus")
        where = verbatim(short(path)) if isinstance(path, str) else NOT_SAID
        lost = f"Corpus {where}: the manifest of then is not there. Sources: {NOT_SAID}."
        return [_amount(stage, None, packed=True), lost]
    length, sources = found
    rows = [
        [verbatim(name), f"{documents:,}", f"{tokens:,}", f"{blocks:,}", f"{share:.1%}"]
        for name, (documents, tokens, blocks, share) in sources.items()
    ]
    return [
        _amount(stage, length, packed=True),
        markdown_table(["source", "documents", "tokens", "rows", "share of what was read"], rows),
    ]


def _files(stage: Stage) -> list[str]:
    """A later stage's data: the files that it recorded, what its samples were drawn from, and the models that took part."""
    blocks = [_amount(stage, (stage.config.get("data") or {}).get("length"), packed=False)]
    rows = [[verbatim(cell) for cell in row] for row in card_facts.files(stage)]
    blocks.append(markdown_table(["field", "file or model", "fingerprint"], rows) if rows else f"Files: {NOT_SAID}.")
    if models := card_facts.other_models(stage):
        blocks.append(f"With other models: {', '.join(f'{name} {verbatim(path)}' for name, path in models.items())}.")
    if "lora" in stage.meta:
        blocks.append(f"Adapters (LoRA) of rank {verbatim(str(stage.meta['lora'].get('rank')))} were trained.")
    return blocks


def _evaluation(facts: Facts, results: Sequence[Mapping[str, Any]]) -> list[str]:
    blocks: list[str] = []
    measured = (facts.stages[-1].at_end("held_out") or {}) if facts.stages else {}
    if rows := [[verbatim(name), f"{value:.4g}"] for name, value in measured.items() if is_number(value)]:
        blocks += ["On held-out data of its training:", markdown_table(["measured", "value"], rows)]
    for found in results:
        how = "percent, BOLD from -1 to 1; 95 % intervals from standard errors"
        rows = [[verbatim(TITLES[name]), *_measured(name, row)] for name, row in found["rows"].items()]
        blocks += [
            f"`llama_jax.evaluate`, suite {verbatim(str(found['suite']))} ({how}):",
            markdown_table(["benchmark", "value", "interval", "n"], rows) if rows else "None of the paper's groups.",
            *(
                f"{TITLES[name]}: without {verbatim(', '.join(row['missing']))}, so not the paper's average."
                for name, row in found["rows"].items() if row.get("missing")
            ),
        ]  # fmt: skip
        if found["limit"]:
            blocks.append(f"The first {found['limit']} rows of each task only: a trial, not a result.")
    return blocks


def _measured(name: str, row: Mapping[str, Any]) -> list[str]:
    """Value, interval and number of questions of a benchmark."""
    unit, digits = (1.0, 2) if name == "bold" else (100.0, 1)
    value, error = (row.get(field) for field in ("value", "stderr"))
    interval = NOT_SAID
    if is_number(value) and is_number(error) and error > 0:
        interval = " to ".join(f"{unit * (value + side * _INTERVAL * error):.{digits}f}" for side in (-1, 1))
    return [f"{unit * value:.{digits}f}" if is_number(value) else NOT_SAID, interval, _number(row.get("n"), "{:,}")]


def _two_columns(rows: Mapping[str, str]) -> str:
    return markdown_table(["", ""], [[verbatim(name), verbatim(value)] for name, value in rows.items()])


def _text(value: Any) -> str:
    return verbatim(value) if value and isinstance(value, str) else NOT_SAID


def _number(value: Any, form: str = "") -> str:
    if not is_number(value):
        return NOT_SAID
    return form.format(value) if form else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
