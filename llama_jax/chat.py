"""Talk to a model: `python -m llama_jax.chat --checkpoint=runs/demo/ppo --tokenizer=runs/demo/corpus/tokenizer.model`.

Any checkpoint that `llama_jax.load` reads: a workdir of ours, Meta's or Hugging Face's files, a GGUF, `smollm2-135m`. The
answer streams; `/reset` begins anew, `/system TEXT` sets the system message, `/save FILE` writes the dialog, `/quit` ends.

A pipe of JSONL requests (`{"messages": [...]}`, with any fields of OpenAI's API) is answered line by line, many at a time:

    python -m llama_jax.chat --checkpoint=... --requests=in.jsonl --answers=out.jsonl
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import flags

from llama_jax import command, requests
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import write_json
from llama_jax.model.decode import prepare
from llama_jax.model.params import table
from llama_jax.parallel.axes import batch_shards
from llama_jax.parallel.host import keep_heap
from llama_jax.pretrained import Model, load
from llama_jax.requests import Ask, RequestError
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import EngineConfig, Request
from llama_jax.training.metrics import Progress

HELP = "/reset  begin anew    /system TEXT  set the system message    /save FILE  write the dialog    /quit  end"


def make_engine(model: Model, settings: EngineConfig, *, int8: bool = False) -> Engine:
    """An engine over a loaded language model, compiled; call it, and use it, inside `jax.set_mesh(model.mesh)`.

    `int8` rounds the weights to 8 bits, which halves bfloat16's memory; the cache has a setting of its own.
    """
    specs = table(model.config, head="lm_head")
    weights = jax.jit(lambda params: prepare(params, specs, compute=model.compute, int8=int8))(model.params)
    return Engine(model.config, weights, settings, compute=model.compute).warm_up()


class Dialog:
    """A dialog with a model: its messages, and how an answer is drawn."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, system: str, max_tokens: int, choice: Choice, seed: int):
        self.engine, self.tokenizer, self.max_tokens, self.choice, self.seed = engine, tokenizer, max_tokens, choice, seed
        self.number = 0  # answers so far
        self.reset(system)

    def reset(self, system: str) -> None:
        """Begins anew, under a system message unless it is empty."""
        self.system = system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str, show: Callable[[str], Any]) -> tuple[int, float]:
        """Answers; `show` is given the text as it comes. Returns the number of tokens and the seconds they took.

        Raises:
          ValueError: a message that the chat format refuses, or a dialog that has become too long; nothing is added then.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = encode_chat(messages, self.tokenizer)
        room = self.engine.settings.max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"the dialog has {len(prompt)} tokens with this question, the context {len(prompt) + room}; /reset begins anew"
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
            stop_ids=(self.tokenizer.eos_id,), on_token=on_token,
        )  # fmt: skip
        try:
            self.engine.run([request])
        except KeyboardInterrupt:  # what was said so far stays
            self.engine.cancel(request)
        rest = stream.finish()
        show(rest)
        self.number += 1
        self.messages = [*messages, {"role": "assistant", "content": ("".join(pieces) + rest).strip()}]
        return len(request.tokens), time.monotonic() - began

    def command(self, line: str) -> str:
        """Carries out a line that begins with "/", and says what it did. ValueError for one that is unknown."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.reset(self.system)
            return "(a new dialog)"
        if name == "/system":
            self.reset(rest)
            return "(a new dialog under this system message)" if rest else "(a new dialog without system message)"
        if name == "/save" and rest:
            write_json(Path(rest), {"messages": self.messages})
            return f"(saved to {rest})"
        if name == "/help":
            return HELP
        raise ValueError(f"{name} is unknown or incomplete; {HELP}")


def talk(dialog: Dialog, lines: Iterable[str], out: TextIO, *, rates: bool) -> None:
    """Answers questions one by one until `/quit`, an empty line or their end; `rates` shows tokens per second."""
    for line in lines:
        line = line.strip()
        if not line or line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                print(dialog.command(line), file=out, flush=True)
                continue
            tokens, seconds = dialog.ask(line, lambda text: print(text, end="", file=out, flush=True))
            print(f"\n({tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s)" if rates else "", file=out, flush=True)
        except (ValueError, OSError) as error:
            print(f"({error})", file=out, flush=True)


def answer_requests(
    engine: Engine, tokenizer: Tokenizer, lines: Iterable[str], out: TextIO, *, done: int = 0, defaults: dict[str, Any],
    max_tokens: int, total: int = 0, where: str = "requests",
) -> int:  # fmt: skip
    """Answers JSONL requests, one line each, in their order and many at a time; the first `done` were answered before.

    A request that cannot be answered gives a line `{"error": ...}` and does not stop the others. Lines are written as soon as
    all before them are, so that a killed run leaves whole answers. Returns the number of errors.
    """
    window: list[tuple[int, dict[str, Any], list[tuple[Request, Ask]]]] = []
    errors = number = 0

    def flush(limit: int) -> None:
        nonlocal errors
        while len(window) > limit or (window and all(request.finish for request, _ in window[0][2])):
            n, head, drawn = window[0]
            if not all(request.finish for request, _ in drawn):
                engine.step()
                continue
            window.pop(0)
            row = head if "error" in head else {**head, **_result(drawn, tokenizer)}
            errors += "error" in row
            print(json.dumps({"line": n, **row}, ensure_ascii=False), file=out, flush=True)
            progress.update()

    with Progress(total, "requests", "answer", done=done) as progress:
        for number, line in enumerate(lines, 1):
            if number <= done:
                continue
            try:
                body = json.loads(line)
                asks = requests.parse(
                    {**defaults, **body} if isinstance(body, dict) else body, tokenizer,
                    context=engine.settings.max_length, default_tokens=max_tokens,
                )  # fmt: skip
                drawn = [
                    (
                        engine.submit(
                            ask.prompt, max_tokens=ask.max_tokens, choice=ask.choice, stop_ids=ask.stop_ids,
                            seed=ask.seed or 0, index=number * 64 + i,
                        ),
                        ask,
                    )
                    for ask in asks for i in range(ask.n)
                ]  # fmt: skip
                window.append((number, {"id": body["id"]} if "id" in body else {}, drawn))
            except (json.JSONDecodeError, RequestError) as error:
                window.append((number, {"error": f"{where}:{number}: {error}"}, []))
            flush(4 * engine.settings.slots)
        flush(0)
    return errors


def _result(drawn: list[tuple[Request, Ask]], tokenizer: Tokenizer) -> dict[str, Any]:
    answers = []
    for request, ask in drawn:
        stream = TextStream(tokenizer, ask.stops)
        text = "".join(stream.push(token) for token in request.tokens if token not in ask.stop_ids) + stream.finish()
        answers.append({
            "text": text.strip(), "finish_reason": "stop" if stream.stopped else request.finish,
            "tokens": len(request.tokens),
        })  # fmt: skip
    return answers[0] if len(answers) == 1 else {"answers": answers}


def resume(path: Path) -> int:
    """How many requests a file of answers already holds; an unfinished last line is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")


def main() -> None:
    """Talks on a terminal; answers what comes through a pipe or a file."""
    keep_heap()
    values = flags.FLAGS
    choice = Choice(temperature=values.temperature, top_p=values.top_p).check()
    place = values.checkpoint or values.workdir
    if not place:
        raise ValueError("--checkpoint: missing; expected a workdir, a directory of weights, a .gguf, or smollm2-135m")
    lines, total, piped = _requests(values.requests)
    model = load(place, tokenizer=values.tokenizer)
    if model.tokenizer is None:
        raise ValueError(f"{place}: missing tokenizer: --tokenizer names one")
    length = min(values.max_length or model.config.max_length, model.config.max_length)
    with jax.set_mesh(model.mesh):
        if piped:
            settings = EngineConfig(slots=values.slots, max_length=length, int8_cache=values.int8_cache)
            engine = make_engine(model, settings, int8=values.int8_weights)
            out, done = sys.stdout, 0
            if values.answers != "-":
                done = resume(Path(values.answers))
                out = open(values.answers, "a", encoding="utf-8")  # noqa: SIM115 - closed by the end of the process
            defaults = {"temperature": values.temperature, "top_p": values.top_p, "seed": values.seed}
            errors = answer_requests(
                engine, model.tokenizer, lines, out, done=done, total=total, defaults=defaults,
                max_tokens=values.max_tokens, where=values.requests or "stdin",
            )  # fmt: skip
            if errors:
                sys.exit(f"error: {errors} requests could not be answered; their lines say why")
            return
        terminal = sys.stdin.isatty()
        settings = EngineConfig(
            slots=batch_shards(model.mesh), max_length=length, chunks=((32, 1), (256, 1)), steps=4 if terminal else 16,
            int8_cache=values.int8_cache,
        )  # fmt: skip
        engine = make_engine(model, settings, int8=values.int8_weights)
        dialog = Dialog(
            engine, model.tokenizer, system=values.system, max_tokens=values.max_tokens, choice=choice,
            seed=values.seed,
        )  # fmt: skip
        if terminal:
            print(HELP)
        talk(dialog, _typed() if terminal else lines, sys.stdout, rates=terminal)


def _requests(path: str) -> tuple[Iterable[str], int, bool]:
    """The lines to read, how many they are (0: unknown), and whether they are JSONL requests."""
    if path and path != "-":
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        return lines, len(lines), True
    if sys.stdin.isatty():
        return (), 0, False
    lines = sys.stdin.read().splitlines() if path != "-" else sys.stdin
    return lines, len(lines) if isinstance(lines, list) else 0, path == "-" or bool(lines and lines[0].startswith("{"))


def _typed() -> Iterable[str]:
    try:
        import readline  # noqa: F401 - history and editing, where the platform has it
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "a workdir, a directory of weights, a .gguf, or smollm2-135m")
    flags.DEFINE_string("workdir", None, "the same")
    flags.DEFINE_string("tokenizer", None, "its tokenizer, where none lies beside the weights")
    flags.DEFINE_string("system", "", "system message")
    flags.DEFINE_float("temperature", 0.6, "0 is greedy")
    flags.DEFINE_float("top_p", 0.9, "nucleus")
    flags.DEFINE_integer("max_tokens", 256, "longest answer")
    flags.DEFINE_integer("max_length", 0, "tokens of a dialog; 0: the model's context")
    flags.DEFINE_bool("int8_weights", False, "round the weights to 8 bits")
    flags.DEFINE_bool("int8_cache", False, "keep keys and values in 8 bits")
    flags.DEFINE_integer("seed", 1, "of the sampling")
    flags.DEFINE_integer("slots", 8, "requests answered together")
    flags.DEFINE_string("requests", "", "JSONL file of requests; -: standard input")
    flags.DEFINE_string("answers", "-", "JSONL file that answers are added to; -: standard output")
    command.launch(main)
