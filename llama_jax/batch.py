"""One request a line in, one answer a line out, in their order and many at a time (`llama_jax.chat --requests`)."""

import collections
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.answer_files import under
from llama_jax.requests import Ask, RequestError, check_model, decode, parse
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import Request
from llama_jax.serve_answer import Spelling
from llama_jax.training.metrics import Progress

PAUSE = 0.02  # seconds until an idle reader looks for a line again
# Lines that are read ahead of the first unfinished one. Answers are written in order, so a long one holds up those behind it;
# while they are this many, no slot need wait for it.
WINDOW = 1000


def answer_lines(
    engine: Engine, tokenizer: Tokenizer, lines: Iterable[str | None], out: TextIO, *,
    done: Sequence[tuple[str, bool]] = (), defaults: dict[str, Any], max_tokens: int, system: str = "",
    model: Mapping[str, Any] | None = None, name: str = "", total: int = 0, where: str = "requests",
) -> int:  # fmt: skip
    """Answers JSONL requests, one line each, in their order and many at a time; `done` (of `resume`) were answered before.

    While a line is None, since none has come yet, the engine goes on. A request that cannot be answered gives a line
    `{"error": ...}` and does not stop the others. Lines are written as soon as all before them are, so that a killed run
    leaves whole answers. Dialogs without a system message get `system`; `model` is what tells the one that answers from others,
    `name` the only one that a request may name. A line may also be one of OpenAI's batch files; its answer has its `custom_id`.
    Returns the number of errors, those of before among them.

    Raises:
      ValueError: what was answered before are other requests, or were answered by another model or under other settings.
    """
    settings = json.dumps(
        {"defaults": defaults, "max_tokens": max_tokens, "system": system, "model": dict(model or {})}, sort_keys=True
    )
    window: collections.deque[tuple[int, dict[str, Any], list[_Answer]]] = collections.deque()
    errors, number = sum(failed for _, failed in done), 0

    def flush(limit: int) -> None:
        nonlocal errors
        while window and (len(window) > limit or all(answer.request.finish for answer in window[0][2])):
            n, row, answers = window[0]
            if not all(answer.request.finish for answer in answers):
                engine.step()
                continue
            window.popleft()
            found = [answer.row() for answer in answers]
            row |= found[0] if len(found) == 1 else {"answers": found} if found else {}
            errors += "error" in row
            print(json.dumps({"line": n, **row}, ensure_ascii=False), file=out, flush=True)
            progress.update()

    with Progress(total, "requests", "answer", done=len(done), quiet=jax.process_index() > 0) as progress:
        for line in lines:
            if line is None:
                if window:
                    engine.step()
                else:
                    time.sleep(PAUSE)
            else:
                number += 1
                progress.total = max(total, number)  # of a pipe it is not known beforehand
                row: dict[str, Any] = {"request": digest(line, settings)}
                if number <= len(done):
                    if done[number - 1][0] != row["request"]:
                        raise ValueError(
                            f"{where}:{number}: is not the request that was answered before, or not by the model and under "
                            "the settings of then; expected the requests, the model and the settings that the answers belong "
                            "to, or another file for answers"
                        )
                    continue
                answers = []
                try:
                    body = decode(line)
                    first = number * 64
                    if isinstance(body, dict):
                        row |= {field: body[field] for field in ("id", "custom_id") if field in body}
                        body = _of_a_batch(body)
                        if name:
                            check_model(body.get("model"), name)
                        # A seed of its own gives the same answers on any line, and from a server.
                        first = first if body.get("seed") is None else 0
                        body = _under(system, {**defaults, **body})
                    asks = parse(body, tokenizer, context=engine.settings.max_length, default_tokens=max_tokens)
                    each = itertools.chain.from_iterable([ask] * ask.n for ask in asks)
                    answers = [_Answer(engine, tokenizer, ask, index=first + i) for i, ask in enumerate(each)]
                except ValueError as error:
                    row["error"] = f"{where}:{number}: {error}"
                window.append((number, row, answers))
            flush(WINDOW)
        flush(0)
    return errors


def _of_a_batch(line: dict[str, Any]) -> dict[str, Any]:
    """The request of a line of OpenAI's batch files, {"custom_id", "method", "url", "body"}; any other line is one itself."""
    if "body" not in line:
        return line
    if unknown := sorted(line.keys() - {"custom_id", "method", "url", "body"}):
        raise RequestError(unknown[0], "is unknown beside body")
    fields = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
    url, body = line.get("url"), line["body"]
    if line.get("method", "POST") != "POST":
        raise RequestError("method", f"expected 'POST', got {line['method']!r}")
    if url is not None and url not in list(fields):
        raise RequestError("url", f"expected one of {', '.join(fields)}, got {url!r}")
    if not isinstance(body, dict):
        raise RequestError("body", f"expected a JSON object, got {type(body).__name__}")
    if url is not None and fields[url] not in body:
        raise RequestError(fields[url], f"missing from the body of a request for {url}")
    return body


def digest(line: str, settings: str) -> str:
    """What an answer says of the line that asked for it and of the settings under it, so that it is not taken for another's."""
    return hashlib.sha256(f"{line.strip()}\n{settings}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _under(system: str, body: dict[str, Any]) -> dict[str, Any]:
    """A dialog under a system message, unless it has one of its own."""
    messages = body.get("messages")
    if not system or not isinstance(messages, list) or any(
        isinstance(message, Mapping) and message.get("role") in ("system", "developer") for message in messages
    ):  # fmt: skip
        return body
    return {**body, "messages": under(system, messages)}


class _Answer:
    """An answer on its way: it ends itself at a stop string."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, ask: Ask, *, index: int):
        self._engine, self._chat, self._text = engine, ask.chat, ""
        self._spelling = Spelling(tokenizer, ask) if ask.logprobs else None
        self._stream, self._echo = TextStream(tokenizer, ask.stops, after=() if ask.chat else ask.prompt), ask.echo
        self.request = engine.submit(
            ask.prompt, max_tokens=ask.max_tokens, choice=ask.choice, stop_ids=ask.stop_ids, seed=ask.seed or 0, index=index,
            on_token=self._push, alternatives=ask.alternatives,
        )  # fmt: skip

    def _push(self, request: Request, token: int) -> None:
        if self._spelling is not None:
            self._spelling.add(token, request.model_log_probs[-1], *request.most_likely[-1:])
        if token not in request.stop_ids:
            self._text += self._stream.push(token)
        if self._stream.stopped:
            self._engine.cancel(request)

    def row(self) -> dict[str, Any]:
        """What is written of a finished one."""
        text = self._echo + self._text + self._stream.finish()
        log_probs = {}
        if self._spelling is not None:
            self._spelling.finish()
            log_probs = {"logprobs": self._spelling.told("messages" if self._chat else "prompt")}
        return {
            "text": text.strip() if self._chat else text,
            "finish_reason": "stop" if self._stream.stopped else self.request.finish, "tokens": len(self.request.tokens),
            **log_probs,
        }  # fmt: skip


def resume(path: Path) -> list[tuple[str, bool]]:
    """Which requests a file of answers already holds, by their `digest`, and which of them are errors; an unfinished last line
    is cut off.

    Raises:
      ValueError: a line that is no answer.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            found.append((str(row["request"]), "error" in row))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number}: expected an answer that names its request, got another line") from None
    return found
