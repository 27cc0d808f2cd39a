"""Talk to a model: `python -m llama_jax.chat --checkpoint=runs/demo/ppo --tokenizer=runs/demo/corpus/tokenizer.model`.

Any checkpoint that `llama_jax.load` reads: a workdir of ours, Meta's or Hugging Face's files, a GGUF, `smollm2-135m`. The
answer streams; `/reset` begins anew, `/undo` takes back the last question and its answer, `/system TEXT` sets the system
message, `/save FILE` writes the dialog, `/quit` ends.

JSONL requests (`{"messages": [...]}`, with any fields of OpenAI's API) in a file or through a pipe are answered line by line,
many at a time:

    python -m llama_jax.chat --checkpoint=... --requests=in.jsonl --answers=out.jsonl

On a pod the same command runs on every host; the first one reads and writes.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import flags

from llama_jax import command, requests
from llama_jax.batch import PAUSE, answer_lines
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.origin import identity
from llama_jax.files import write_text
from llama_jax.interop.formats import open_source
from llama_jax.interop.source import require_language_model
from llama_jax.lines import Input, Interrupts, open_input, shared
from llama_jax.parallel.axes import batch_shards
from llama_jax.parallel.host import keep_compiled_at_home, keep_heap
from llama_jax.parallel.hosts import from_host_0
from llama_jax.pretrained import Model, load
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import EngineConfig, Request

HELP = (
    "/reset  begin anew    /undo  take back the last question and its answer    /system TEXT  set the system message    "
    "/save FILE  write the dialog    /quit  end"
)


def make_engine(model: Model, settings: EngineConfig) -> Engine:
    """An engine over a loaded language model, compiled; call it, and use it, inside `jax.set_mesh(model.mesh)`."""
    return Engine(model.config, model.prepared(), settings, compute=model.compute).warm_up()


def settings_of(model: Model, *, slots: int, max_length: int = 0, **more: Any) -> EngineConfig:
    """The settings of a model's engine: at least so many slots as the mesh divides, rows of the model's context, or less where
    `max_length` says so, room for its tokenizer's stop ids and a request's own, and `more` fields of EngineConfig."""
    shards, context = batch_shards(model.mesh), model.config.max_length
    ends = () if model.tokenizer is None else model.tokenizer.stop_ids
    return EngineConfig(
        slots=-(-slots // shards) * shards, max_length=min(max_length or context, context),
        stops=max(len(ends) + requests.STOP_IDS, EngineConfig.stops), **more,
    )  # fmt: skip


def open_engine(
    place: str, settings: Callable[[Model], EngineConfig], *, tokenizer: str | None, int8: bool = False, mesh_tensor: int = 0
) -> tuple[Engine, Model]:
    """An engine over a checkpoint, and its model without the weights, which are the engine's and may be exchanged there.

    They are read as generation needs them, so that one copy of them is all that there ever is. `int8` rounds them to 8 bits,
    which halves bfloat16's memory; the cache has a setting of its own. `mesh_tensor` is that of `llama_jax.load`.

    Raises:
      ValueError: before a tensor is read, where it is no language model or has no tokenizer.
    """
    source = open_source(place)
    require_language_model(source)
    if tokenizer is None and source.tokenizer is None:
        raise ValueError(f"{place}: missing tokenizer: --tokenizer names one")
    model = load(place, tokenizer=tokenizer, dtype="int8" if int8 else "compute", mesh_tensor=mesh_tensor)
    with jax.set_mesh(model.mesh):
        engine = make_engine(model, settings(model))
    return engine, dataclasses.replace(model, weights=None)


class Dialog:
    """A dialog with a model: its messages, and how an answer is drawn.

    `listening` is entered for each answer and gives what is asked between its steps: whether to end it.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, system: str, max_tokens: int, choice: Choice, seed: int,
        listening: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False),
    ):  # fmt: skip
        self.engine, self.tokenizer, self.max_tokens, self.choice, self.seed = engine, tokenizer, max_tokens, choice, seed
        self._listening = listening
        self.number = 0  # answers so far
        self.cut = ""  # what cut the last one off
        self.reset(system)

    def reset(self, system: str) -> None:
        """Begins anew, under a system message unless it is empty."""
        self.system = system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str, show: Callable[[str], Any]) -> tuple[int, float]:
        """Answers; `show` is given the text as it comes. Returns the number of tokens and the seconds they took; `cut` says
        afterwards what ended the answer, unless it ended by itself.

        Raises:
          ValueError: a question or an answer that the chat format refuses, or a dialog that has become too long; nothing is
            added then.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in question):  # how bytes come that are no UTF-8
            raise ValueError("the question holds a byte that is no UTF-8")
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = encode_chat(messages, self.tokenizer, where="dialog", names_are_text=True)
        room = self.engine.settings.max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"the dialog has {len(prompt)} tokens with this question, the context {len(prompt) + room}; /reset begins "
                "anew, /undo takes back the last question and its answer"
            )
        stream, pieces = TextStream(self.tokenizer), []

        def on_token(request: Request, token: int) -> None:
            # The first text of an answer has no space before it.
            text = stream.push(token) if token not in request.stop_ids else ""
            text = text if any(pieces) else text.lstrip()
            pieces.append(text)
            show(text)

        began = time.monotonic()
        request = self.engine.submit(
            prompt, max_tokens=min(self.max_tokens, room), choice=self.choice, seed=self.seed, index=self.number,
            stop_ids=self.tokenizer.stop_ids, on_token=on_token,
        )  # fmt: skip
        with self._listening() as interrupted:
            while not request.finish and not interrupted():
                self.engine.step()
        self.engine.cancel(request)  # unless it has ended; what was said so far stays
        self.cut = ""
        if request.finish == "length":
            self.cut = f"max_tokens={self.max_tokens}" if self.max_tokens <= room else "the context, which is full"
        rest = stream.finish()
        show(rest)
        self.number += 1
        answered = [*messages, {"role": "assistant", "content": ("".join(pieces) + rest).strip()}]
        try:  # no later question could be asked after an answer with a chat tag
            encode_chat(
                [*answered, {"role": "user", "content": ""}], self.tokenizer, where="dialog", names_are_text=True
            )
        except ValueError as error:
            show("\n")
            raise ValueError(f"question and answer are left out of the dialog: {error}") from None
        self.messages = answered
        return len(request.tokens), time.monotonic() - began

    def command(self, line: str) -> str:
        """Carries out a line that begins with "/", and says what it did. ValueError for one that is unknown."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.reset(self.system)
            return "(a new dialog)"
        if name == "/undo":
            if not any(message["role"] == "user" for message in self.messages):
                raise ValueError("there is no question to take back")
            del self.messages[-2:]
            return "(the last question and its answer are taken back)"
        if name == "/system":
            self.reset(rest)
            return "(a new dialog under this system message)" if rest else "(a new dialog without system message)"
        if name == "/save" and rest:
            if not (directory := Path(rest).expanduser().parent).is_dir():
                raise ValueError(f"{rest}: there is no directory {directory}; expected one that exists")
            if jax.process_index() == 0:
                write_text(Path(rest).expanduser(), json.dumps({"messages": self.messages}, indent=1, ensure_ascii=False))
            return f"(saved to {rest})"
        if name == "/help":
            return HELP
        raise ValueError(f"{name} is unknown or incomplete; {HELP}")


def talk(dialog: Dialog, lines: Iterable[str | None], out: TextIO, *, rates: bool) -> None:
    """Answers questions one by one until `/quit` or their end; `rates` shows tokens per second.

    A line is None where none has come yet; empty ones are skipped.
    """
    for line in lines:
        if line is None:
            time.sleep(PAUSE)
            continue
        line = line.strip()
        if not line:
            continue
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                print(dialog.command(line), file=out, flush=True)
                continue
            tokens, seconds = dialog.ask(line, lambda text: print(text, end="", file=out, flush=True))
            rate = f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"
            cut = f"; cut off by {dialog.cut}" if dialog.cut else ""
            print(f"\n({rate}{cut})" if rates else "", file=out, flush=True)
        except (ValueError, OSError) as error:
            print(f"({error})", file=out, flush=True)


def main() -> None:
    """Talks on a terminal; answers what comes through a pipe or a file."""
    keep_heap()
    keep_compiled_at_home()
    values = flags.FLAGS
    choice = Choice(temperature=values.temperature, top_p=values.top_p).check()
    place = values.checkpoint or values.workdir
    if not place:
        raise ValueError("--checkpoint: missing; expected a workdir, a directory of weights, a .gguf, or smollm2-135m")
    command.join_cluster()
    alone, first = jax.process_count() == 1, jax.process_index() == 0
    own: Input | None = None

    def look() -> tuple[str, int, Sequence[tuple[str, bool]]]:
        nonlocal own
        own = open_input(values.requests, values.answers, waits=alone)
        return own.kind, own.total, own.done

    kind, total, done = from_host_0(look)
    lines, out = (own.lines, own.out) if own else ((), open(os.devnull, "w"))  # noqa: SIM115
    listening = Interrupts  # while an answer grows: a step that is broken off leaves the engine without its buffers
    if not alone:
        interrupted = Interrupts()
        lines = shared(lines, interrupted, raises=kind == "requests")
        listening = functools.partial(nullcontext, lambda: from_host_0(interrupted))

    settings = functools.partial(settings_of, max_length=values.max_length, int8_cache=values.int8_cache)
    if kind == "requests":
        settings = functools.partial(settings, slots=values.slots, alternatives=requests.ALTERNATIVES)
    else:
        settings = functools.partial(settings, slots=1, chunks=((32, 1), (256, 1)), steps=4 if kind == "terminal" else 16)

    engine, model = open_engine(
        place, settings, tokenizer=values.tokenizer, int8=values.int8_weights, mesh_tensor=values.mesh_tensor
    )
    with jax.set_mesh(model.mesh):
        if kind == "requests":
            answers = {
                **from_host_0(lambda: identity(place)), "tokenizer": model.tokenizer.fingerprint,
                "int8_weights": values.int8_weights, "int8_cache": values.int8_cache,
                "max_length": engine.settings.max_length,
            }  # fmt: skip
            defaults = {"temperature": values.temperature, "top_p": values.top_p, "seed": values.seed}
            try:
                errors = answer_lines(
                    engine, model.tokenizer, lines, out, done=done, total=total, defaults=defaults,
                    max_tokens=values.max_tokens, system=values.system, model=answers,
                    name=requests.model_name(values.name, place), where=values.requests or "stdin",
                )  # fmt: skip
            except KeyboardInterrupt:
                more = "" if values.answers == "-" else f"; the same command goes on after what {values.answers} holds"
                sys.exit(f"interrupted{more}")
            if errors:
                sys.exit(f"error: {errors} requests could not be answered; their lines say why" if first else 1)
            return
        dialog = Dialog(
            engine, model.tokenizer, system=values.system, max_tokens=values.max_tokens, choice=choice,
            seed=values.seed, listening=listening,
        )  # fmt: skip
        if kind == "terminal":
            print(HELP, file=out)
        talk(dialog, lines, out, rates=kind == "terminal")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "a workdir, a directory of weights, a .gguf, or smollm2-135m")
    flags.DEFINE_string("workdir", None, "the same")
    flags.DEFINE_string("tokenizer", None, "its tokenizer, where none lies beside the weights")
    flags.DEFINE_string("name", "", "the model's name in requests; unless given, the last part of --checkpoint")
    flags.DEFINE_string("system", "", "system message, also of requests that have none of their own")
    flags.DEFINE_float("temperature", 0.6, "0 is greedy")
    flags.DEFINE_float("top_p", 0.9, "nucleus")
    flags.DEFINE_integer("max_tokens", 256, "longest answer", lower_bound=1)
    flags.DEFINE_integer("max_length", 0, "tokens of a dialog; 0: the model's context", lower_bound=0)
    flags.DEFINE_integer("mesh_tensor", 0, "devices that share each matrix; 0: as few as hold the model", lower_bound=0)
    flags.DEFINE_bool("int8_weights", False, "round the weights to 8 bits")
    flags.DEFINE_bool("int8_cache", False, "keep keys and values in 8 bits")
    flags.DEFINE_integer("seed", 1, "of the sampling")
    flags.DEFINE_integer("slots", 8, "requests answered together", lower_bound=1)
    flags.DEFINE_string("requests", "", "JSONL file of requests; -: standard input")
    flags.DEFINE_string("answers", "-", "JSONL file that answers are added to; -: standard output")
    command.define_cluster()
    command.launch(main)
