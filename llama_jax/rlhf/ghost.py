"""Ghost Attention (paper section 3.3, A.3.5): dialogs whose first turn holds an instruction that every answer obeys.

1. Contexts: dialogs of several turns, without instruction; constraints are drawn for each and put into one instruction.
2. The instruction is joined to *every* user message, and the policy's answer to the last one is sampled.
3. For training it stays in the first turn only, and the loss is zero on all earlier turns, answers included: these were not
   given under the instruction. With `resample` they are drawn too, each after the drawn ones before it.
4. The rows join the SFT data. All samples stand in `samples.jsonl`, written whole once (they are drawn in portions, none of
   which a kill draws again), and what is trained in `ghost.jsonl`.

The paper keeps every sample. `keep="obeyed"` leaves out those which a program finds disobeying, as rejection sampling would.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError, check_least, check_shares
from llama_jax.data.mixture import check_files
from llama_jax.data.sources import read_dialogs, read_jsonl, write_jsonl
from llama_jax.parallel.hosts import exist, on_host_0
from llama_jax.pretrain.base import StageConfig, check_language_model, load_tokenizer
from llama_jax.rlhf import drawn
from llama_jax.rlhf.chips import check_generates
from llama_jax.rlhf.constraints import FAMILIES, Constraint, draw_constraints, instruction, obeyed, parse_list
from llama_jax.rlhf.respond import Responder, Tell, usable, write_in_portions
from llama_jax.sft.stage import DialogData, check_fine_tuning, fine_tuning_stage
from llama_jax.training.stage import LoopConfig, Stage

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class GhostSettings:
    """What is synthesised.

    Attributes:
      contexts: dialogs (JSONL) from which the contexts come.
      join: several dialogs make one context of as many turns as wanted; else those dialogs serve that have enough.
      turns: fewest and most turns of a context.
      samples: how many contexts.
      families: of constraints, names of `constraints.FAMILIES`.
      values: JSONL of {"kind": family, "value": ...}; empty: the policy is asked for lists, as in the paper.
      most_constraints: of one instruction.
      terse_share: of the instructions in the short form.
      probe_share: of the contexts whose last question asks for one of the constraints that only asking can show.
      place: the instruction of a training row begins the first user message, or is the system message.
      resample: earlier answers are drawn as well.
      keep: all samples, or those only that no check finds disobeying.
    """

    contexts: tuple[str, ...]
    join: bool
    turns: tuple[int, ...]
    samples: int
    families: tuple[str, ...]
    values: str
    most_constraints: int
    terse_share: float
    probe_share: float
    place: Literal["user", "system"]
    resample: bool
    keep: Literal["all", "obeyed"]
    new_tokens: int
    temperature: float
    sampling_batch: int

    def __post_init__(self):
        check_files("ghost.contexts", self.contexts, some=True)
        if len(self.turns) != 2 or not 1 <= self.turns[0] <= self.turns[1]:
            raise ValueError(f"ghost.turns: expected the fewest and the most turns, got {self.turns}")
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise ValueError(f"ghost.families: expected some of {', '.join(FAMILIES)}; got {', '.join(unknown) or 'none'}")
        check_least("ghost", self, samples=1, most_constraints=1, new_tokens=1, sampling_batch=1, temperature=0)
        check_shares("ghost", self, "terse_share", "probe_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostConfig(StageConfig):
    """See configs/ghost.py. `policy` is sampled from; `start` is what is fine-tuned on `data.train` and the samples."""

    data: DialogData
    ghost: GhostSettings
    policy: str
    epochs: float = 2.0


@dataclasses.dataclass(frozen=True)
class Context:
    """A dialog that ends with a question, and what all of its answers should obey."""

    messages: Messages
    constraints: tuple[Constraint, ...]
    instruction: str


def make_contexts(
    dialogs: Sequence[Messages], values: Mapping[str, Sequence[str]], settings: GhostSettings, *, seed: int
) -> list[Context]:
    """Contexts with their instructions, drawn from dialogs; system messages are left out, the instruction takes their place."""
    dialogs, (fewest, most) = long_enough(dialogs, settings), settings.turns
    contexts = []
    for number in range(settings.samples):
        rng = np.random.default_rng((seed, number))
        turns = int(rng.integers(fewest, most + 1))
        messages = list(dialogs[rng.integers(len(dialogs))])
        while settings.join and len(messages) < 2 * turns:
            messages += dialogs[rng.integers(len(dialogs))]
        messages = messages[: 2 * turns - 1]
        if messages[-1]["role"] == "assistant":  # a dialog of fewer turns than wanted
            messages.pop()
        constraints = draw_constraints(values, most=settings.most_constraints, rng=rng)
        probes = [c.probe for c in constraints if c.probe]
        if probes and rng.random() < settings.probe_share:
            messages[-1] = {"role": "user", "content": str(rng.choice(probes))}
        text = instruction(constraints, terse=bool(rng.random() < settings.terse_share))
        contexts.append(Context(messages, constraints, text))
    return contexts


def long_enough(dialogs: Sequence[Messages], settings: GhostSettings) -> list[Messages]:
    """The dialogs that contexts are made of, without system messages; ConfigError if there is none."""
    dialogs = [[m for m in dialog if m["role"] != "system"] for dialog in dialogs]
    fewest = settings.turns[0]
    if not settings.join:
        dialogs = [dialog for dialog in dialogs if len(dialog) >= 2 * fewest]
    if not dialogs:
        raise ConfigError(f"{', '.join(settings.contexts)}: no dialog has {fewest} turns; ghost.join=True joins several")
    return dialogs


def in_every_turn(messages: Sequence[Mapping[str, str]], text: str) -> Messages:
    """The dialog that is sampled from: the instruction before every user message."""
    return [{**m, "content": f"{text} {m['content']}"} if m["role"] == "user" else dict(m) for m in messages]


def in_first_turn(messages: Sequence[Mapping[str, str]], text: str, *, place: str) -> Messages:
    """The dialog that is trained: the instruction before the first user message, or as system message."""
    if place == "system":
        return [{"role": "system", "content": text}, *map(dict, messages)]
    first = {**messages[0], "content": f"{text} {messages[0]['content']}"}
    return [first, *map(dict, messages[1:])]


def answer_contexts(
    contexts: Sequence[Context], respond: Callable[..., list[tuple[str, bool]]], *, fits: Callable[[Messages], bool],
    resample: bool, seed: int, first: int = 0, progress: Tell | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Sample rows in the order of the contexts.

    An earlier answer that was drawn but cannot stand in a dialog, or would leave no room for the rest of it, leaves the
    context's own in place.

    Args:
      respond: (conversations, seed=, numbers=, progress=) -> [(text, ended)].
      fits: whether a conversation leaves room for an answer; those of `contexts` do.
      first: the number of the first context among all.
    """
    dialogs, too_long = [[dict(m) for m in context.messages] for context in contexts], 0
    if resample:
        for turn in range(max(len(dialog) for dialog in dialogs) // 2):
            rows = [i for i, dialog in enumerate(dialogs) if len(dialog) > 2 * turn + 1]
            asked = [in_every_turn(dialogs[i][: 2 * turn + 1], contexts[i].instruction) for i in rows]
            drawn = respond(asked, seed=seed + turn + 1, numbers=[first + i for i in rows], progress=progress)
            for i, (text, ended) in zip(rows, drawn, strict=True):
                if not usable(text, ended):
                    continue
                answer = dialogs[i][2 * turn + 1]
                own, answer["content"] = answer["content"], text
                if not fits(in_every_turn(dialogs[i], contexts[i].instruction)):
                    answer["content"], too_long = own, too_long + 1
    if too_long:
        log.warning("%d earlier answers left no room for the rest of their dialogs: the contexts' own stay", too_long)
    asked = [in_every_turn(dialog, c.instruction) for dialog, c in zip(dialogs, contexts, strict=True)]
    answers = respond(asked, seed=seed, numbers=range(first, first + len(asked)), progress=progress)
    samples = []
    for context, dialog, (text, ended) in zip(contexts, dialogs, answers, strict=True):
        samples.append({
            "instruction": context.instruction,
            "constraints": [dataclasses.asdict(c) for c in context.constraints],
            "messages": dialog, "response": text, "ended": ended,
            "obeyed": obeyed(context.constraints, text, dialog[-1]["content"]),
        })  # fmt: skip
    return samples


def training_rows(samples: Sequence[Mapping[str, Any]], *, place: str, keep: str) -> list[dict[str, Any]]:
    """Dialog rows of the usable samples; only the last answer of each is trained."""
    return [
        {
            "messages": [
                *in_first_turn(sample["messages"], sample["instruction"], place=place),
                {"role": "assistant", "content": sample["response"]},
            ],
            "source": "ghost_attention",
            "is_safety": False,
            "train_on": "last",
        }
        for sample in samples
        if usable(sample["response"], sample["ended"]) and (keep == "all" or sample["obeyed"] is not False)
    ]


def read_values(path: str | Path, families: Sequence[str]) -> dict[str, list[str]]:
    """Values of the families that have some, from JSONL rows {"kind", "value"}; rows of other kinds are passed over."""
    found: dict[str, list[str]] = {name: [] for name in families}
    for where, row in read_jsonl(path):
        for key in ("kind", "value"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ConfigError(f"{where}: {key}: expected a text, got {row.get(key)!r}")
        if row["kind"] in found and FAMILIES[row["kind"]].request:
            found[row["kind"]].append(row["value"].strip())
    for name, values in found.items():
        if FAMILIES[name].request and not values:
            raise ConfigError(f"{path}: no row of kind {name!r}")
    return found


def ask_for_values(
    respond: Callable[..., list[tuple[str, bool]]], families: Sequence[str], *, rounds: int, seed: int
) -> list[dict[str, str]]:
    """The lists that the model itself writes, so that it knows what they name; rows {"kind", "value"} without repetition."""
    asked = [name for name in families if FAMILIES[name].request for _ in range(rounds)]
    if not asked:
        return []
    answers = respond([[{"role": "user", "content": FAMILIES[name].request}] for name in asked], seed=seed)
    entries: dict[tuple[str, str], dict[str, str]] = {}
    for name, (text, ended) in zip(asked, answers, strict=True):
        listed = parse_list(text)
        for value in listed if ended else listed[:-1]:  # a list that was cut ends in half an entry
            entries.setdefault((name, value.casefold()), {"kind": name, "value": value})
    return list(entries.values())


def draw_samples(config: GhostConfig, mesh: Mesh, workdir: Path) -> None:
    """Writes `samples.jsonl`, and `values.jsonl` if the policy is asked for lists."""
    model, tokenizer = load_tokenizer(config)
    if not config.policy:
        raise ConfigError("config.policy: expected the workdir of the model that is sampled from, got nothing")
    check_language_model("policy", config.policy, model, tokenizer)
    settings, seed = config.ghost, config.loop.seed
    check_generates(model, config.compute, mesh, rows=settings.sampling_batch, length=model.max_length)
    dialogs = [row["messages"] for path in settings.contexts for row in read_dialogs(path)]
    long_enough(dialogs, settings)  # what is wrong with the files is said before a model is loaded
    if settings.values:
        read_values(settings.values, settings.families)
    respond = Responder(
        config.policy, model, tokenizer, compute=config.compute, mesh=mesh, new_tokens=settings.new_tokens,
        temperature=settings.temperature, batch_size=settings.sampling_batch,
    )  # fmt: skip
    values = settings.values or workdir / "values.jsonl"
    if not settings.values and not all(exist([values])):
        on_host_0(write_jsonl, values, ask_for_values(respond, settings.families, rounds=32, seed=seed))
    contexts = make_contexts(dialogs, read_values(values, settings.families), settings, seed=seed)
    fitting = [c for c in contexts if respond.fits(in_every_turn(c.messages, c.instruction))]
    if len(fitting) < len(contexts):
        left_out = len(contexts) - len(fitting)
        log.warning("%d of %d contexts leave no room for an answer and are left out", left_out, len(contexts))
    if not fitting:
        raise ConfigError(f"ghost.turns: no context of {settings.turns} turns fits into {model.max_length} tokens")
    write_in_portions(
        workdir / "samples.jsonl", fitting, lambda some, first, progress: answer_contexts(
            some, respond, fits=respond.fits, resample=settings.resample, seed=seed, first=first, progress=progress
        ),
        answers=lambda context: (len(context.messages) + 1) // 2 if settings.resample else 1, label="ghost: sampling",
    )  # fmt: skip


def put_stale_aside(config: GhostConfig, workdir: Path) -> dict[str, Any]:
    """Puts aside what was drawn under other settings, or from another policy; returns the present settings."""
    settings = drawn.settings_of(config, "policy", "ghost", without=("place", "keep"))
    files = ("values.jsonl", "samples", "samples.jsonl")
    drawn.put_aside(workdir, "samples", settings, _drawn_from(config), files)
    return settings


def _drawn_from(config: GhostConfig) -> dict[str, str]:
    contexts = {f"contexts[{i}]": drawn.data_file(path) for i, path in enumerate(config.ghost.contexts)}
    return {"policy": config.policy, **contexts, "values": drawn.data_file(config.ghost.values)}


def gather(config: GhostConfig, mesh: Mesh, workdir: Path) -> list[dict[str, Any]]:
    """The dialogs to train on, which `ghost.jsonl` holds too; their samples are drawn unless they are there."""
    path, settings = workdir / "samples.jsonl", put_stale_aside(config, workdir)
    if not all(exist([path])):
        drawn.note(workdir, "samples", settings, _drawn_from(config))
        draw_samples(config, mesh, workdir)
    samples = [row for _, row in read_jsonl(path)]
    rows = training_rows(samples, place=config.ghost.place, keep=config.ghost.keep)
    log.info("%d of %d samples are fit for training", len(rows), len(samples))
    on_host_0(write_jsonl, workdir / "ghost.jsonl", rows)
    return rows


def make_stage(config: GhostConfig, mesh: Mesh, workdir: Path) -> tuple[Stage, LoopConfig]:
    """Draws the samples unless they are there, and makes the fine-tuning stage on them and the SFT data."""
    path = workdir / "samples.jsonl"
    put_stale_aside(config, workdir)
    if not all(exist([path])):
        check_fine_tuning(config, config.data, mesh, epochs=config.epochs, most=config.ghost.samples)
    rows = gather(config, mesh, workdir)
    if not rows and not config.data.train:
        raise ConfigError(f"{path}: no sample is fit for training; nothing to fine-tune on")
    data = config.data.joined(*([str(workdir / "ghost.jsonl")] if rows else []))
    return fine_tuning_stage(config, data, mesh, workdir, name="ghost", epochs=config.epochs)
