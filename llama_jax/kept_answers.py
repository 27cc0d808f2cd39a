"""Answers of checkpoints to prompts, drawn once and kept: what compares, judges and reads answers goes on where it stopped.

A model is the place of a checkpoint, or a file of its answers (`evals/answer_files.py`). Answers that another checkpoint gave
under a name, or this one under other settings, are refused. A checkpoint may answer under a system message of its own, as the
paper's models do (Table 31): it is no part of the prompt, which both models' answers share. On a pod every host draws; the
first one writes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from llama_jax import command
from llama_jax.chat import open_engine, settings_of
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import decode_response, prompt_key
from llama_jax.data.row_file import RowFile
from llama_jax.evals.answer_files import Answered, answer_room, read_answers, under
from llama_jax.evals.origin import claim
from llama_jax.evals.words import tokenizer_of, words_of
from llama_jax.parallel.hosts import from_host_0
from llama_jax.paths import place as place_of
from llama_jax.pretrained import Model
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import Request
from llama_jax.training.metrics import Progress

Open = Callable[[str], tuple[Engine, Model]]  # a language model's place -> its engine, and the model without parameters


class Kept:
    """The rows of a file that host 0 appends to, known on every host."""

    def __init__(self, path: Path):
        self.path = path
        self._file: RowFile | None = None
        self.rows: list[dict[str, Any]] = from_host_0(self._open)

    def _open(self) -> list[dict[str, Any]]:
        self._file = RowFile(self.path)
        return self._file.rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; on host 0 it is on the disk when this returns."""
        if self._file is not None:
            self._file.append(row)
        if jax.process_count() > 1:  # else they are the file's own
            self.rows.append(dict(row))

    def close(self) -> None:
        """Lets others write."""
        if self._file is not None:
            self._file.close()


def collect(
    name: str, place: str, prompts: Sequence[dict[str, Any]], directory: Path, *, open_model: Open, choice: Choice,
    max_tokens: int, seed: int, int8_cache: bool = False, system: str = "",
) -> list[Answered]:  # fmt: skip
    """A model's answers: read from a file, or drawn by a checkpoint (see `draw_answers`) and kept in `answers_<name>.jsonl`.

    Prompts that do not fit a checkpoint's context with an answer (`answer_files.answer_room`) get none; nothing is cut.

    Raises:
      ConfigError: what is kept was drawn by another checkpoint, or otherwise.
    """
    if is_file(place):
        return _read_alike(place)
    if not prompts:
        raise ValueError("--prompts: missing; a checkpoint needs prompts to answer")
    from_host_0(lambda: check_kept(
        name, place, directory, choice=choice, max_tokens=max_tokens, seed=seed, int8_cache=int8_cache, system=system
    ))  # fmt: skip
    kept = Kept(directory / f"answers_{name}.jsonl")
    try:
        if missing := _unanswered(prompts, kept):
            how = {"choice": choice, "max_tokens": max_tokens, "seed": seed, "system": system}
            draw_answers(*open_model(place), missing, kept, name=name, **how)
    finally:
        kept.close()
    wanted = {prompt_key(row["messages"]) for row in prompts}
    answers = _read_alike(kept.path) if kept.rows else []
    return [answer for answer in answers if prompt_key(answer.messages) in wanted]


def check_kept(
    name: str, place: str, directory: Path, *, choice: Choice, max_tokens: int, seed: int, int8_cache: bool = False,
    system: str = "",
) -> None:  # fmt: skip
    """Refuses to go on with answers that another checkpoint gave under this name, or this one under other settings."""
    if not is_file(place):
        claim(
            directory / f"model_{name}.json", place, temperature=choice.temperature, top_p=choice.top_p,
            max_tokens=max_tokens, seed=seed, int8_cache=int8_cache, **({"system": system} if system else {}),
        )  # fmt: skip


def read_systems(items: Sequence[str], models: Mapping[str, str]) -> dict[str, str]:
    """{name: its system message} of a flag `--system=name=file,...`.

    Raises:
      ValueError, FileNotFoundError: a name that is none of the checkpoints among the `models`, or a file without a text.
    """
    found = {}
    for name, file in command.named("system", items).items():
        if name not in models:
            raise ValueError(f"--system: expected one of {', '.join(models)}, got {name!r}")
        if is_file(models[name]):
            raise ValueError(f"--system: {name!r}: expected a checkpoint that answers, got a file of answers, {models[name]}")
        if not place_of(file).is_file():
            raise FileNotFoundError(f"--system: {file}: expected a file with the system message of {name!r}, found none")
        try:
            found[name] = place_of(file).read_bytes().decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"--system: {file}: expected the system message of {name!r} in UTF-8") from None
        if not found[name]:
            raise ValueError(f"--system: {file}: expected the system message of {name!r}, found no text")
    return found


def check_systems(systems: Mapping[str, str], prompts: Sequence[dict[str, Any]]) -> None:
    """ValueError for a prompt that has a system message already, if a model has one for all."""
    for name in systems:
        for number, row in enumerate(prompts):
            if row["messages"][0]["role"] == "system":
                raise ValueError(
                    f"{_where(number, row)}: messages[0]: has a system message, and --system gives {name!r} one for all; "
                    "expected one of the two"
                )


def check_prompts(place: str, prompts: Sequence[dict[str, Any]], *, tokenizer: str | None, system: str = "") -> None:
    """Looks, before its weights are loaded, whether the chat format of the checkpoint at `place` takes all prompts.

    Raises:
      ValueError: names the row of one that it does not take: it holds a control piece, or its roles are not in turn; or the
        system message, which may hold one too, or have no place in the format.
    """
    words = words_of(place, tokenizer)
    if system:
        encode_chat(under(system, [{"role": "user", "content": "Hello."}]), words, where="--system")
    for number, row in enumerate(prompts):
        encode_chat(row["messages"], words, where=_where(number, row))


def _where(number: int, row: Mapping[str, Any]) -> str:
    return row.get("where", f"prompt {number + 1}")


def _read_alike(path: str | Path) -> list[Answered]:
    """The answers of a file as host 0 has it."""
    rows = from_host_0(lambda: [dataclasses.asdict(answer) for answer in read_answers(path)])
    return [Answered(**{**row, "messages": tuple(row["messages"])}) for row in rows]


def is_file(place: str) -> bool:
    return place.endswith((".jsonl", ".jsonl.gz"))


def _unanswered(prompts: Sequence[dict[str, Any]], kept: Kept) -> list[tuple[int, dict[str, Any]]]:
    done, found = {prompt_key(row["messages"]) for row in kept.rows}, []
    for number, row in enumerate(prompts):
        if (key := prompt_key(row["messages"])) not in done:
            done.add(key)
            found.append((number, row))
    return found


def define_engines(slots: str = "answers drawn together") -> None:
    """Defines the flags by which a command opens the models that answer."""
    flags.DEFINE_string("tokenizer", None, "the tokenizer, where none lies beside the weights")
    flags.DEFINE_integer("slots", 16, slots, lower_bound=1)
    flags.DEFINE_integer("mesh_tensor", 0, "devices that share each matrix; 0: as few as hold the model")


def opener(*, int8_cache: bool = False) -> Open:
    """How models are opened, by the flags of `define_engines`."""
    values = flags.FLAGS
    settings = functools.partial(settings_of, slots=values.slots, int8_cache=int8_cache)
    return lambda place: open_engine(
        place, settings, tokenizer=tokenizer_of(place, values.tokenizer), mesh_tensor=values.mesh_tensor
    )


def draw_answers(
    engine: Engine, model: Model, prompts: Sequence[tuple[int, dict[str, Any]]], kept: Kept, *, name: str, choice: Choice,
    max_tokens: int, seed: int, system: str = "",
) -> None:  # fmt: skip
    """Appends the answer to each (number, prompt), many drawn together; what a prompt draws depends on (seed, number) alone."""
    encoded = [
        (number, row, encode_chat(under(system, row["messages"]), model.tokenizer, where=_where(number, row)))
        for number, row in prompts
    ]
    quiet = jax.process_index() > 0
    with jax.set_mesh(model.mesh), Progress(len(encoded), f"answers of {name}", "answer", quiet=quiet) as progress:

        def finished(row: dict[str, Any], request: Request, token: int) -> None:
            del token
            if request.finish:
                text, ended = decode_response(request.tokens, model.tokenizer)
                known = {field: row[field] for field in ("is_safety", "category", "risk")}
                lost = {"ended": ended, "less_room": request.max_tokens < max_tokens}
                kept.append({"messages": row["messages"], "answer": text, **known, **lost})
                progress.update()

        for number, row, ids in encoded:
            room = answer_room(len(ids), max_tokens=max_tokens, max_length=engine.settings.max_length)
            if not room:
                continue  # whoever asked finds no answer, and counts it
            engine.submit(
                ids, max_tokens=room, choice=choice, seed=seed, index=number,
                stop_ids=model.tokenizer.stop_ids, on_token=functools.partial(finished, row),
            )  # fmt: skip
        while engine.step():
            pass
