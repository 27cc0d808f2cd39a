"""An answer of the server on its way to the client: tokens come from the worker's thread, text goes out as it is settled.

What is told of it has the forms of OpenAI's API, whole and in chunks.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, NamedTuple

from llama_jax.data.text_stream import CONTEXT, TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.requests import Ask
from llama_jax.sampling.prompt_scores import Scored
from llama_jax.sampling.worker import Worker

Field = Literal["messages", "prompt"]  # what was asked with: a dialog or a text


class _Told(NamedTuple):
    """Tokens' texts, their log-probabilities, and the most likely ones in their places."""

    pieces: list[str]
    log_probs: list[float | None]
    most_likely: list[dict[str, float] | None]


class Spelling:
    """Log-probabilities of an answer's tokens, with their texts, where they are asked for; told once, whole or part by part."""

    def __init__(self, tokenizer: Tokenizer, ask: Ask):
        self._tokenizer, self._ask = tokenizer, ask
        after = () if ask.chat else ask.prompt
        self._before = list(after[-CONTEXT:])  # the next token's text depends on these
        self._stream, self._offset = TextStream(tokenizer, after=after), 0
        self._new = _Told([], [], [])  # what was not told yet; the texts of a scored prompt among it

    def add(self, token: int, log_p: float, most_likely: Sequence[tuple[int, float]] = ()) -> None:
        """A drawn token: of those that make up one character the last has all of its text, and an end its name."""
        if not self._ask.logprobs:
            return
        if token in self._ask.stop_ids:
            text = self._stream.finish() + self._tokenizer.piece(token)
        else:
            text = self._stream.push(token)
        self._new.pieces.append(text)
        self._new.log_probs.append(log_p)
        self._new.most_likely.append(self._instead(most_likely, before=self._before))
        self._before.append(token)

    def finish(self) -> None:
        """No token comes any more: the last has what is left of the text."""
        if self._new.pieces:
            self._new.pieces[-1] += self._stream.finish()

    def add_prompt(self, scored: Scored) -> None:
        """A scored prompt, in the form of drawn tokens; of the first one nothing is known but its text."""
        stream, prompt = TextStream(self._tokenizer), self._ask.prompt
        pieces = [stream.push(token) for token in prompt]
        pieces[-1] += stream.finish()
        likely = [
            self._instead(row, before=prompt[max(i - CONTEXT, 0) : i]) for i, row in enumerate(scored.most_likely, start=1)
        ]
        self._new = _Told(pieces, [None, *scored.log_probs], [None, *likely])

    def told(self, field: Field) -> dict[str, Any] | None:
        """What was not told yet, in the form of the API; text comes in whole characters, so it may be of several tokens."""
        (pieces, log_probs, likely), self._new = self._new, _Told([], [], [])
        if not pieces:
            return None
        if field == "prompt":
            *offsets, self._offset = itertools.accumulate(map(len, pieces), initial=self._offset)
            top = likely if self._ask.alternatives else None
            return {"tokens": pieces, "token_logprobs": log_probs, "top_logprobs": top, "text_offset": offsets}
        return {
            "content": [
                {**_token(piece, p), "top_logprobs": [_token(*other) for other in others.items()]}
                for piece, p, others in zip(pieces, log_probs, likely, strict=True)
            ]
        }  # fmt: skip

    def _instead(self, most_likely: Sequence[tuple[int, float]], *, before: Sequence[int]) -> dict[str, float]:
        """The texts that tokens would have added in the place of the next one, with their log-probabilities."""
        found: dict[str, float] = {}
        for token, log_p in most_likely:
            if token >= self._tokenizer.vocab_size:  # a row that fills up the embedding
                continue
            stream = TextStream(self._tokenizer, after=before)
            ends = token in self._ask.stop_ids
            # Of tokens with one text, as those of half a character, the most likely one is told of.
            found.setdefault(self._tokenizer.piece(token) if ends else stream.push(token) + stream.finish(), log_p)
        return found


class Answer:
    """One answer; `worker` draws it when `job` is submitted to it."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer, ask: Ask, index: int):
        self.ask, self.index, self.ticket = ask, index, None
        self.finish, self.text, self.tokens = "", "", []
        self._worker, self._strip, self._spelling = worker, True, Spelling(tokenizer, ask)
        self._stream = TextStream(tokenizer, ask.stops, after=() if ask.chat else ask.prompt)
        self._events: asyncio.Queue = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def job(self) -> dict[str, Any]:
        """What the engine is asked for."""
        ask = self.ask
        scored = {"deliver_prompt": self._deliver_prompt} if ask.scored else {}
        return {
            "prompt": ask.prompt, "max_tokens": ask.max_tokens, "choice": ask.choice, "stop_ids": ask.stop_ids,
            "seed": ask.seed, "index": self.index, "alternatives": ask.alternatives, "deliver": self._deliver,
            **scored,
        }  # fmt: skip

    def _deliver_prompt(self, scored: Scored) -> None:  # in the worker's thread
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, scored)

    def _deliver(
        self, token: int | None, log_p: float, finish: str, most_likely: Sequence[tuple[int, float]] = ()
    ) -> None:  # in the worker's thread
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, (token, log_p, finish, most_likely))

    async def pieces(self) -> AsyncIterator[str]:
        """The text, as it is settled; afterwards `finish` says why it ended."""
        if self.ask.scored:
            first = await self._events.get()
            if isinstance(first, Scored):  # a long prompt takes long to spell, and others are answered meanwhile
                await asyncio.to_thread(self._spelling.add_prompt, first)
            else:
                self._events.put_nowait(first)  # it failed, or was cancelled
        if self.ask.echo:
            self.text = self.ask.echo
            yield self.text
        while not self.finish:
            token, log_p, finish, most_likely = await self._events.get()
            text = ""
            if token is not None:
                self.tokens.append(token)
                self._spelling.add(token, log_p, most_likely)
                if token not in self.ask.stop_ids:
                    text = self._stream.push(token)
            if finish or self._stream.stopped:
                text += self._stream.finish()
                self._spelling.finish()
                if self._stream.stopped and not finish:
                    self._worker.cancel(self.ticket, outcome="stop")
                self.finish = "stop" if self._stream.stopped else finish
            self.text += text
            if text:
                yield text

    def choice(self, field: Field) -> dict[str, Any]:
        """The finished answer in the form of the API."""
        base = {"index": self.index, "finish_reason": self.finish, "logprobs": self._spelling.told(field)}
        if field == "messages":
            return {**base, "message": {"role": "assistant", "content": self.text.strip()}}
        return {**base, "text": self.text}

    def delta(self, field: Field, piece: str | None) -> dict[str, Any]:
        """A chunk with a piece of text, or the last one."""
        base = {"index": self.index, "finish_reason": self.finish if piece is None else None}
        base["logprobs"] = self._spelling.told(field)
        if field == "prompt":
            return {**base, "text": piece or ""}
        if piece is not None and self._strip:  # an answer does not begin with a space
            piece = piece.lstrip()
            self._strip = not piece
        return {**base, "delta": {} if piece is None else {"content": piece}}


def _token(text: str, log_p: float) -> dict[str, Any]:
    return {"token": text, "logprob": log_p, "bytes": list(text.encode())}


def usage(asks: Sequence[Ask], answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of prompts and answers, as the API counts them."""
    prompt, drawn = sum(len(ask.prompt) for ask in asks), sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
