"""How long checkpoints keep an instruction of the first turn (3.3, A.3.5, Table 30, Fig. 10): `python -m llama_jax.recall`.

    python -m llama_jax.recall --checkpoint=baseline=runs/v3 --checkpoint=ghost=runs/v4 --dialogs=held_out.jsonl \\
        --output=runs/recall

Dialogs of one turn that no checkpoint was trained on are joined to longer ones, and an instruction is put before the first
question. Each checkpoint answers them turn by turn, greedily, by its own earlier answers; a program decides at the turns of
Table 30 whether it still obeys. Instructions are of `--families` (`rlhf/constraints.py`) with the values of `--values`, rows
{"kind": family, "value": ...}, or with short words of ours. `recall.json` and `recall.md` have the shares with their intervals,
`ghost_recall.png` shows them, `recall_<name>.jsonl` has the answers that were judged. `recall.md` also has the first dialogs
with the answers of all checkpoints side by side (Fig. 9; with instructions that none was trained on, Fig. 28). With
`--attention=N`, `attention_1.png` to N show how each checkpoint attends to the instruction in the first dialogs, with its own
answers in them (Fig. 10). Answers are kept as they come: a run that is stopped goes on with the same command. Those of another
checkpoint under this name, or under other settings, are refused. On a pod the same command runs on every host.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llama_jax import command
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import decode_response
from llama_jax.data.sources import read_dialogs, read_jsonl, write_jsonl
from llama_jax.desk import name_checkpoints
from llama_jax.evals import drawings, ghost_figures
from llama_jax.evals.ghost import (
    TURNS,
    AttentionMap,
    Recall,
    attention_map,
    follow,
    has_room,
    instruction_span,
    recall_rows,
    recall_table,
)
from llama_jax.evals.origin import claim
from llama_jax.evals.plots import MARKERS, Plot, save
from llama_jax.evals.words import tokenizer_of, words_of
from llama_jax.files import write_json, write_text
from llama_jax.kept_answers import Kept, Open, define_engines, opener
from llama_jax.markdown import markdown_table
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.hosts import exist, from_host_0, on_host_0
from llama_jax.parallel.mesh import start_distributed
from llama_jax.parallel.output import worked_in
from llama_jax.pretrained import Model, load
from llama_jax.rlhf.constraints import FAMILIES
from llama_jax.rlhf.ghost import Context, Messages, in_first_turn, read_values
from llama_jax.rlhf.instructions import VALUES, contexts_of
from llama_jax.rlhf.respond import usable
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.training.metrics import Progress


def make_contexts(
    dialogs: str, values: Mapping[str, Sequence[str]], *, count: int, turns: int, longest: int, seed: int
) -> list[Context]:
    """Dialogs of so many turns with one instruction each, of dialogs of one turn with at most `longest` characters."""
    found = [row["messages"] for row in read_dialogs(dialogs)]
    short = [m for m in found if len(m) == 2 and sum(len(message["content"]) for message in m) <= longest]
    if not short:
        raise ValueError(
            f"{dialogs}: expected dialogs of one turn, without system message and with at most --longest={longest} characters; "
            f"none of {len(found)} is one"
        )
    return contexts_of(short, values, count, turns=turns, rng=np.random.default_rng(seed))


def values_of(path: str, families: Sequence[str]) -> dict[str, Sequence[str]]:
    """What instructions are made of, by family: values of a file, or ours."""
    if unknown := [name for name in families if name not in FAMILIES]:
        raise ValueError(f"--families: expected some of {', '.join(FAMILIES)}; got {', '.join(unknown)}")
    if path:
        return dict(read_values(path, families))
    if missing := [name for name in families if FAMILIES[name].request and name not in VALUES]:
        raise ValueError(f"--values: missing; there are no values of ours for {', '.join(missing)}")
    return {name: VALUES.get(name, ()) for name in families}


class Answers:
    """What a checkpoint answers, as `evals.ghost.follow` asks it; each answer is on the disk as soon as it is drawn."""

    def __init__(self, engine: Engine, model: Model, kept: Kept, *, max_tokens: int):
        self.engine, self.model, self.kept, self.max_tokens = engine, model, kept, max_tokens
        self.found = {row["conversation"]: (row["answer"], row["ended"]) for row in kept.rows}

    def fits(self, messages: Messages) -> bool:
        """Whether a conversation leaves room for the longest answer."""
        return len(encode_chat(messages, self.model.tokenizer)) + self.max_tokens <= self.engine.settings.max_length

    def __call__(
        self, conversations: Sequence[Messages], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) of each conversation; greedily, whatever the seed."""
        del seed
        keys, tokenizer = [digest(messages) for messages in conversations], self.model.tokenizer

        def finished(key: str, request: Any, token: int) -> None:
            del token
            if request.finish:
                text, ended = self.found[key] = decode_response(request.tokens, tokenizer)
                self.kept.append({"conversation": key, "answer": text, "ended": ended})

        for key, messages in dict(zip(keys, conversations)).items():
            if key not in self.found:
                self.engine.submit(
                    encode_chat(messages, tokenizer), max_tokens=self.max_tokens, choice=Choice(0.0), seed=0, index=0,
                    stop_ids=tokenizer.stop_ids, on_token=functools.partial(finished, key),
                )  # fmt: skip
        while self.engine.step():
            pass
        if progress is not None:
            progress(len(keys))
        return [self.found[key] for key in keys]


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def measure(
    name: str, place: str, contexts: Sequence[Context], directory: Path, *, turns: Sequence[int], open_model: Open,
    max_tokens: int,
) -> list[Recall]:  # fmt: skip
    """The judged answers of a checkpoint, which `recall_<name>.jsonl` holds when all are there.

    Raises:
      ConfigError: what is kept is another checkpoint's, or was asked otherwise.
    """
    asked = digest([[context.messages, context.instruction] for context in contexts])
    from_host_0(lambda: claim(
        directory / f"model_{name}.json", place, contexts=asked, turns=list(turns), max_tokens=max_tokens
    ))  # fmt: skip
    judged = directory / f"recall_{name}.jsonl"
    if not all(exist([judged])):
        probed = sum(any(constraint.probe for constraint in context.constraints) for context in contexts)
        total = max(turns) * len(contexts) + len(turns) * probed
        kept = Kept(directory / f"answers_{name}.jsonl")
        try:
            engine, model = open_model(place)
            answers = Answers(engine, model, kept, max_tokens=max_tokens)
            check_room(name, contexts, answers.fits, most=max(turns), max_tokens=max_tokens, length=engine.settings.max_length)
            quiet = jax.process_index() > 0
            with jax.set_mesh(model.mesh), Progress(total, f"recall of {name}", "answer", quiet=quiet) as progress:
                found = follow(contexts, answers, turns=turns, progress=progress.update, fits=answers.fits)
        finally:
            kept.close()
        on_host_0(write_jsonl, judged, [dataclasses.asdict(row) for row in found])
    rows = from_host_0(lambda: [row for _, row in read_jsonl(judged)])
    return [Recall(**row) for row in rows]


def check_room(
    name: str, contexts: Sequence[Context], fits: Callable[[Messages], bool], *, most: int, max_tokens: int, length: int
) -> None:
    """ValueError, in the words of the flags, for a dialog that leaves no room in `length` tokens for its last answer."""
    for number, context in enumerate(contexts, start=1):
        if not has_room(context, context.messages, most=most, place="user", fits=fits):
            raise ValueError(
                f"{name} takes {length} tokens, which dialog {number} of {most} turns exceeds with an answer of "
                f"--max_tokens={max_tokens}; expected fewer --turns, or a smaller --longest or --max_tokens"
            )


Maps = Mapping[str, Mapping[str, AttentionMap]]  # {checkpoint: {number of the dialog, from 1: its map}}


def drawn_dialog(context: Context, answers: Mapping[str, tuple[str, bool]]) -> Messages:
    """The dialog as `evals.ghost.follow` left it, with its instruction and the answers that were drawn, {`digest` of what was
    asked: (text, ended)}."""
    dialog = in_first_turn(context.messages, context.instruction, place="user")
    for until in range(1, len(dialog), 2):
        own, (text, ended) = dialog[until], answers[digest(dialog[:until])]
        if usable(text, ended):
            dialog[until] = {**own, "content": text}
            if until + 2 < len(dialog) and digest(dialog[: until + 2]) not in answers:
                dialog[until] = own  # the answer left no room for the rest: this was never asked
    return dialog


def attend(name: str, place: str, contexts: Sequence[Context], directory: Path, *, tokenizer: str | None) -> None:
    """How a checkpoint attends in these contexts' dialogs with its own answers (Fig. 10): `attention_<name>.npz`, unless it has
    as many. `measure` has claimed the directory for the same contexts, so that kept maps are of these dialogs."""
    path, quiet = directory / f"attention_{name}.npz", jax.process_index() > 0
    if from_host_0(lambda: path.exists() and len(drawings.load_maps(path)) >= len(contexts)):
        return
    rows = from_host_0(lambda: [row for _, row in read_jsonl(directory / f"answers_{name}.jsonl")])
    answers = {row["conversation"]: (row["answer"], row["ended"]) for row in rows}
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = load(place, tokenizer=tokenizer_of(place, tokenizer), dtype=dtype)
    maps = {}
    with jax.set_mesh(model.mesh), Progress(len(contexts), f"attention of {name}", "dialog", quiet=quiet) as progress:
        for number, context in enumerate(contexts, start=1):
            maps[str(number)] = attention_map(
                model.params, drawn_dialog(context, answers), context.instruction, model.tokenizer, config=model.config,
                compute=model.compute,
            )  # fmt: skip
            progress.update(1)
    on_host_0(drawings.save_maps, path, maps)


def kept_maps(name: str, directory: Path, count: int) -> dict[str, AttentionMap]:
    """The first of the maps that `attend` kept, by the number of the dialog."""
    return dict(list(drawings.load_maps(directory / f"attention_{name}.npz").items())[:count])


def check_attention(name: str, place: str, context: Context, directory: Path, *, tokenizer: str | None) -> None:
    """Looks, before a model answers, whether the instruction can be found in dialogs as the checkpoint's chat format has them.

    Raises:
      ValueError: also where the format does not say where an answer ends.
    """
    if (directory / f"attention_{name}.npz").exists():
        return  # of one that has answered, the weights may be gone
    dialog = in_first_turn(context.messages, context.instruction, place="user")
    instruction_span(dialog, context.instruction, words_of(place, tokenizer))


def report(
    found: Mapping[str, Sequence[Recall]], places: Mapping[str, str], contexts: Sequence[Context], directory: Path, *,
    maps: Maps,
) -> str:  # fmt: skip
    """Writes `recall.json`, `recall.md` and the figures; returns the table and the first dialogs."""
    tables = {name: recall_table(rows) for name, rows in found.items()}
    shares = {
        name: {str(turn): dataclasses.asdict(interval) for turn, interval in table.items()} for name, table in tables.items()
    }
    by_turn = {name: [m.by_turn.tolist() for m in some.values()] for name, some in maps.items()}
    values = {"checkpoints": dict(places), "recall": shares}
    write_json(directory / "recall.json", values | ({"attention": by_turn} if by_turn else {}))
    header, *rows = recall_rows(tables)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows)]
    shown = ghost_figures.examples(
        [context.instruction for context in contexts],
        {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()},
    )
    lead = "Answers that obey the instruction of the first turn, with 95 % intervals (Table 30)."
    blocks = [
        lead, "\n".join(lines), ghost_figures.papers().markdown(), *_attention_blocks(by_turn),
        *ghost_figures.dialog_blocks(shown),
    ]  # fmt: skip
    text = "\n\n".join(blocks) + "\n"
    write_text(directory / "recall.md", text)
    save([ghost_figures.recall(shares), *_drawn(maps)], directory)
    return text


def _drawn(maps: Maps) -> list[Plot]:
    """A figure a dialog, in it a map a checkpoint."""
    numbers = dict.fromkeys(number for some in maps.values() for number in some)
    title = "Largest attention of all heads, dialog {} (Fig. 10)"
    drawn = {
        number: drawings.attention_maps({name: some[number] for name, some in maps.items()}, title=title.format(number))
        for number in numbers
    }
    return [dataclasses.replace(plot, name=f"attention_{number}") for number, plot in drawn.items()]


def _attention_blocks(by_turn: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """Fig. 10 as a table, a row a dialog; nothing without maps."""
    if not by_turn:
        return []
    rows = [
        [str(number), *(f"{turns[0]:.2f}, {turns[-1]:.2f}" for turns in some)]
        for number, some in enumerate(zip(*by_turn.values(), strict=True), start=1)
    ]
    lead = (
        "The largest attention of any head from a token to the instruction: its mean over the tokens of the first turn and of "
        "the last one (Fig. 10; `attention_1.png` and on are of the same dialogs)."
    )
    return [lead, markdown_table(["dialog", *by_turn], rows)]


def main() -> None:
    """Flags to calls."""
    values = flags.FLAGS
    keep_heap()
    places, turns = name_checkpoints(values.checkpoint), tuple(map(int, values.turns))
    if not turns or min(turns) < 1:
        raise ValueError(f"--turns: expected turns from 1, got {','.join(values.turns)}")
    if len(places) > len(MARKERS):
        raise ValueError(f"--checkpoint: expected at most {len(MARKERS)}, which a figure can tell apart; got {len(places)}")
    if values.attention > values.count:
        raise ValueError(f"--attention: expected at most --count={values.count} dialogs, got {values.attention}")
    start_distributed()
    contexts = make_contexts(
        values.dialogs, values_of(values.values, values.families), count=values.count, turns=max(turns),
        longest=values.longest, seed=values.seed,
    )  # fmt: skip
    looked_at = contexts[: values.attention]
    with worked_in(values.output) as directory:
        for name, place in places.items() if looked_at else ():
            from_host_0(lambda name=name, place=place: check_attention(
                name, place, looked_at[0], directory, tokenizer=values.tokenizer
            ))  # fmt: skip
        found = {
            name: measure(name, place, contexts, directory, turns=turns, open_model=opener(), max_tokens=values.max_tokens)
            for name, place in places.items()
        }
        for name, place in places.items() if looked_at else ():
            attend(name, place, looked_at, directory, tokenizer=values.tokenizer)

        def finish() -> None:
            maps = {name: kept_maps(name, directory, len(looked_at)) for name in places} if looked_at else {}
            print(report(found, places, contexts, directory, maps=maps))
            print(os.path.join(values.output, "recall.json"))

        on_host_0(finish)


if __name__ == "__main__":
    flags.DEFINE_multi_string("checkpoint", None, "a chat model, or name=model; once for each")
    flags.DEFINE_string("dialogs", None, "JSONL file of dialogs that no checkpoint was trained on")
    flags.DEFINE_string("output", None, "directory for answers, table and figure; gs://bucket/... too")
    define_engines()
    flags.DEFINE_list("turns", [str(turn) for turn in TURNS], "where answers are judged")
    flags.DEFINE_integer("count", 48, "dialogs that each checkpoint answers", lower_bound=1)
    flags.DEFINE_integer("longest", 300, "characters of a question with its answer in the dialogs", lower_bound=1)
    flags.DEFINE_list("families", list(VALUES), "what instructions ask for")
    flags.DEFINE_string("values", "", 'JSONL file of {"kind": family, "value": ...}; without it, words of ours')
    flags.DEFINE_integer("max_tokens", 128, "longest answer", lower_bound=1)
    flags.DEFINE_integer("attention", 0, "of how many dialogs attention is drawn for each checkpoint (Fig. 10)", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of which dialogs are joined")
    flags.mark_flags_as_required(["checkpoint", "dialogs", "output"])
    command.launch(main)
