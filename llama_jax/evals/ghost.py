"""How well a model keeps an instruction over many turns (paper section 3.3, A.3.5: Table 30, Fig. 10), decided by programs.

The instruction stands in the first turn only, as a user would give it. The model's own answers fill the dialog, so an answer
that drops the instruction is there for the next ones to follow. What only asking can show (a hobby, a name) is asked for beside
the dialog: neither the question nor its answer stays in it.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.chat_template import encode_example
from llama_jax.data.dialog import B_INST, B_SYS, encode_prompt
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.statistics import Interval, share_interval
from llama_jax.model.attention_map import largest_attention
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.rlhf.constraints import Constraint, obeyed
from llama_jax.rlhf.ghost import Context, Messages, in_first_turn
from llama_jax.rlhf.instructions import contexts_of, single_turns
from llama_jax.rlhf.respond import Responder, usable
from llama_jax.training.metrics import Progress

log = logging.getLogger(__name__)

TURNS = (2, 4, 6, 20)  # of Table 30


@dataclasses.dataclass(frozen=True)
class Recall:
    """An answer at one of the measured turns, 1 being the first, and whether it obeys all that can be decided."""

    context: int
    turn: int
    question: str
    answer: str
    obeyed: bool


def follow(
    contexts: Sequence[Context], respond: Callable[..., list[tuple[str, bool]]], *, turns: Sequence[int] = TURNS,
    place: str = "user", seed: int = 0, progress: Callable[[int], None] | None = None,
    fits: Callable[[Messages], bool] | None = None,
) -> list[Recall]:  # fmt: skip
    """Goes through the contexts turn by turn and checks the answers at `turns`.

    Args:
      contexts: each with at least `max(turns)` user messages; its answers stand in only for drawn ones that cannot enter a
        dialog (no end, nothing said, a chat tag) or would leave no room for the rest of it.
      respond: (conversations, seed=, progress=) -> [(text, ended)], see `rlhf.respond.Responder`.
      place: of the instruction, as in training.
      fits: whether a conversation leaves room for an answer, as `respond` counts; all do without it.
    """
    fits = fits or (lambda messages: True)
    check_contexts(contexts, turns=turns, place=place, fits=fits)
    too_long = 0
    dialogs = [[dict(m) for m in context.messages] for context in contexts]
    found: list[Recall] = []
    for turn in range(1, max(turns) + 1):
        until = 2 * turn - 1  # the dialog up to the user's message of this turn
        asked = [
            in_first_turn(dialog[:until], c.instruction, place=place) for dialog, c in zip(dialogs, contexts, strict=True)
        ]
        drawn = respond(asked, seed=seed + turn, progress=progress)
        if turn in turns:
            found += _judge(contexts, dialogs, drawn, turn)
            found += _probe(contexts, dialogs, respond, turn=turn, place=place, seed=seed + turn, progress=progress)
        for context, dialog, (text, ended) in zip(contexts, dialogs, drawn, strict=True):
            if usable(text, ended) and len(dialog) > until:
                own, dialog[until]["content"] = dialog[until]["content"], text
                if not has_room(context, dialog, most=max(turns), place=place, fits=fits):
                    dialog[until]["content"], too_long = own, too_long + 1
    if too_long:
        log.warning("%d answers left no room for the rest of their dialogs: the contexts' own stay", too_long)
    return found


def check_contexts(
    contexts: Sequence[Context], *, turns: Sequence[int], fits: Callable[[Messages], bool], place: str = "user"
) -> None:
    """ValueError for a context of fewer turns than `follow` asks for, or whose own answers leave no room for the last one."""
    most = max(turns)
    for number, context in enumerate(contexts):
        users = sum(m["role"] == "user" for m in context.messages)
        if users < most:
            raise ValueError(f"context {number}: expected at least {most} user messages, got {users}")
        if not has_room(context, context.messages, most=most, place=place, fits=fits):
            raise ValueError(f"context {number}: its {most} turns leave no room for an answer; expected shorter dialogs")


def has_room(context: Context, dialog: Messages, *, most: int, place: str, fits: Callable[[Messages], bool]) -> bool:
    """Whether all that will be asked up to turn `most` leaves room for an answer, if the dialog's own answers follow."""
    before = dialog[: 2 * most - 2]
    last = [dialog[len(before)]["content"], *(c.probe for c in context.constraints if c.probe)]
    asked = [[*before, {"role": "user", "content": question}] for question in last]
    return all(fits(in_first_turn(m, context.instruction, place=place)) for m in asked)


def _judge(
    contexts: Sequence[Context], dialogs: Sequence[Messages], drawn: Sequence[tuple[str, bool]], turn: int
) -> list[Recall]:
    """The answers to the dialogs' own questions."""
    rows = []
    for number, (context, dialog, (text, _)) in enumerate(zip(contexts, dialogs, drawn, strict=True)):
        question = dialog[2 * turn - 2]["content"]
        if (holds := obeyed([c for c in context.constraints if not c.probe], text, question)) is not None:
            rows.append(Recall(number, turn, question, text, holds))
    return rows


def _probe(
    contexts: Sequence[Context], dialogs: Sequence[Messages], respond: Callable[..., list[tuple[str, bool]]], *, turn: int,
    place: str, seed: int, progress: Callable[[int], None] | None,
) -> list[Recall]:  # fmt: skip
    """The answers to questions that ask for a constraint in place of the dialog's own question of this turn."""
    asked: list[tuple[int, Constraint, Messages]] = []
    for number, (context, dialog) in enumerate(zip(contexts, dialogs, strict=True)):
        for constraint in context.constraints:
            if constraint.probe:
                messages = [*dialog[: 2 * turn - 2], {"role": "user", "content": constraint.probe}]
                asked.append((number, constraint, in_first_turn(messages, context.instruction, place=place)))
    if not asked:
        return []
    drawn = respond([messages for _, _, messages in asked], seed=seed, progress=progress)
    return [
        Recall(number, turn, constraint.probe, text, bool(constraint.holds(text)))
        for (number, constraint, _), (text, _) in zip(asked, drawn, strict=True)
    ]


def fits_into(room: int, tokenizer: Tokenizer) -> Callable[[Messages], bool]:
    """Whether a conversation has at most so many tokens: what a `Responder` of that room says, before there is one."""
    return lambda messages: len(encode_prompt(messages, tokenizer)) <= room


def held_out_contexts(
    dialogs: str, values: Mapping[str, Sequence[str]], tokenizer: Tokenizer, *, turns: int, room: int, place: str, seed: int,
    count: int = 64,
) -> list[Context]:  # fmt: skip
    """Contexts of `turns` turns that leave room for an answer in `room` tokens, of a file's dialogs of one short turn each.

    Raises:
      ConfigError: no dialog is that short.
    """
    short = single_turns(dialogs, tokenizer, longest=room // turns)
    drawn = contexts_of(short, values, 2 * count, turns=turns, rng=np.random.default_rng(seed)) if short else []
    fitting = [
        c for c in drawn
        if has_room(c, c.messages, most=turns, place=place, fits=fits_into(room, tokenizer))
    ]  # fmt: skip
    if not fitting:
        raise ConfigError(f"{dialogs}: no {turns} dialogs of one turn fit into {room} tokens together")
    return fitting[:count]


def keeps_instructions(
    workdir: str, contexts: Sequence[Context], model: ModelConfig, tokenizer: Tokenizer, *, compute: Compute, mesh: Mesh,
    turns: Sequence[int], new_tokens: int, batch_size: int, seed: int, label: str, place: str = "user",
) -> list[Recall]:  # fmt: skip
    """What `follow` finds of a checkpoint's greedy answers."""
    respond = Responder(
        workdir, model, tokenizer, compute=compute, mesh=mesh, new_tokens=new_tokens, temperature=0.0, batch_size=batch_size
    )
    most, probed = max(turns), sum(any(constraint.probe for constraint in context.constraints) for context in contexts)
    with Progress(most * len(contexts) + len(turns) * probed, label, "answer") as progress:
        return follow(
            contexts, respond, turns=turns, place=place, seed=seed, progress=progress.update, fits=respond.fits
        )


def recall_table(found: Sequence[Recall]) -> dict[int, Interval]:
    """The share of answers that obey, by turn, with its 95 % interval."""
    turns = sorted({row.turn for row in found})
    return {turn: share_interval(np.array([row.obeyed for row in found if row.turn == turn])) for turn in turns}


def by_family(found: Sequence[Recall], contexts: Sequence[Context]) -> dict[str, dict[str, dict[str, float]]]:
    """`recall_table` of each kind of instruction, {family: {turn: interval}}; of contexts with one constraint each."""
    kinds = [context.constraints[0].family for context in contexts]
    return {
        family: {
            str(turn): dataclasses.asdict(interval)
            for turn, interval in recall_table([row for row in found if kinds[row.context] == family]).items()
        }
        for family in dict.fromkeys(kinds)
    }


def recall_rows(tables: dict[str, dict[int, Interval]]) -> list[list[Any]]:
    """Rows of Table 30: a header, then one row a turn with one column a model."""
    turns = sorted({turn for table in tables.values() for turn in table})
    rows: list[list[Any]] = [["turn", *tables]]
    for turn in turns:
        rows.append([turn, *(_shown(table.get(turn)) for table in tables.values())])
    return rows


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{100 * interval.mean:.0f} % ({100 * interval.low:.0f} to {100 * interval.high:.0f})"


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """Fig. 10 of one dialog.

    Attributes:
      cells: the largest attention weight between the tokens of two bins. # [Q, S] float32
      bin_size: tokens of a bin; the last one may have fewer.
      instruction: first and last + 1 token of the instruction.
      by_turn: for each turn, the mean over its tokens of the largest weight that they give to the instruction. # [turns]
      turns: the first token of each turn; () of maps that were kept before this was.
    """

    cells: np.ndarray
    bin_size: int
    instruction: tuple[int, int]
    by_turn: np.ndarray
    turns: tuple[int, ...] = ()


def attention_map(
    params: Params, messages: Messages, text: str, tokenizer: Tokenizer, *, config: ModelConfig, compute: Compute,
    bin_size: int = 8, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None,
) -> AttentionMap:  # fmt: skip
    """The attention map of a finished dialog whose first message holds the instruction `text` (or is it, as system message)."""
    dialog = encode_example(messages, tokenizer)
    ids = dialog.ids
    if len(ids) > config.max_length:
        raise ValueError(f"messages: expected at most {config.max_length} tokens, got {len(ids)}")
    tokens = np.array([ids], np.int32)
    weights = _jitted_largest(config, compute, _tuple(layers), _tuple(heads))(params, tokens, np.ones_like(tokens))[0]
    start, end = instruction_span(messages, text, tokenizer)
    begins = turn_begins(dialog.supervised)
    return AttentionMap(
        bin_maxima(np.asarray(weights), bin_size), bin_size, (start, end),
        attention_by_turn(np.asarray(weights), begins, (start, end)), tuple(np.flatnonzero(begins).tolist()),
    )  # fmt: skip


def instruction_span(messages: Messages, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """First and last + 1 token of the instruction in the encoded dialog, from what its text shares with shorter ones."""
    ids = encode_example(messages, tokenizer).ids
    opening = f"{B_INST} {B_SYS}" if messages[0]["role"] == "system" else f"{B_INST} "
    if not messages[0]["content"].startswith(text):
        raise ValueError(f"messages[0].content: expected to begin with the instruction {text!r}")
    if tokenizer.chat_template is not None:  # shorter and longer first messages, as the template writes them
        first, *rest = messages
        others = ("", text if first["content"] != text else f"{text} {text}")
        start, end = (_shared(ids, encode_example([{**first, "content": c}, *rest], tokenizer).ids) for c in others)
        return start, end
    start, end = (
        _shared(ids, tokenizer.encode(prefix, bos=True)) for prefix in (opening.rstrip(" "), f"{opening}{text.rstrip()}")
    )
    return start, end


def bin_maxima(weights: np.ndarray, size: int) -> np.ndarray:
    """The largest weight of each `size` x `size` square, the last ones cut. # [T, S] -> [ceil(T / size), ceil(S / size)]"""
    T, S = weights.shape
    return np.maximum.reduceat(np.maximum.reduceat(weights, range(0, T, size), axis=0), range(0, S, size), axis=1)


def turn_begins(supervised: Sequence[bool]) -> np.ndarray:
    """Where turns begin: at the first token of a dialog and behind each answer, if another follows. # bool [T] -> bool [T]"""
    trained = np.asarray(supervised, bool)
    behind = np.concatenate([[True], trained[:-1] & ~trained[1:]])
    return behind & (np.cumsum(trained[::-1])[::-1] > 0)


def attention_by_turn(weights: np.ndarray, begins: np.ndarray, instruction: tuple[int, int]) -> np.ndarray:
    """Mean over a turn's tokens of their largest weight on the instruction. # [T, S], bool [T] -> [turns]

    Args:
      begins: where a turn begins. In the first one, only tokens after the instruction are counted.
    """
    start, end = instruction
    borders = [*np.flatnonzero(begins), len(weights)]
    received = weights[:, start:end].max(axis=1)
    return np.array([received[max(a, end) : b].mean() for a, b in zip(borders[:-1], borders[1:], strict=True)])


@functools.lru_cache(maxsize=8)
def _jitted_largest(config: ModelConfig, compute: Compute, layers: tuple[int, ...] | None, heads: tuple[int, ...] | None):
    return jax.jit(functools.partial(largest_attention, config=config, compute=compute, layers=layers, heads=heads))


def _tuple(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
