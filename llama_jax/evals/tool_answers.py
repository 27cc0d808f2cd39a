"""Answers that call tools while they are drawn, many at a time (section 5.1, Table 15, Fig. 23).

An answer is drawn until a call in it ends. The call is carried out, its result is put behind it, and what the prompt, the drawn
tokens and the result make is the next prompt of the engine, which takes over what a slot still holds of it. Nobody waits for
the others: the next piece of an answer is asked for as soon as its call has a result.

Drawn tokens stay what they were: a text that is encoded anew may have others. The result's are what the tokenizer makes of it
behind the call.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from llama_jax.data.text_stream import CONTEXT, TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.answer_files import answer_room
from llama_jax.evals.tool_calls import Call, Tool, carry_out, closing, first_end, result_text, unended
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.request import Request

_HEAD = 8  # characters before that encoding looks at
# How an answer ended: by itself; for want of tokens or of context; with more calls than it may have; not begun, since its
# prompt leaves the context no room.
ENDS = ("stop", "length", "calls", "too long")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with the results of its calls in it.

    Attributes:
      text: stripped; calls and results as `evals/tool_calls.py` writes them.
      calls: those that were ended, in order; the last one of an answer with too many has no result.
      unended: calls that began and did not end, which are malformed too.
      end: one of ENDS.
    """

    text: str
    calls: tuple[Call, ...]
    unended: int
    end: str

    @property
    def malformed(self) -> int:
        """Ends of calls without a beginning, and beginnings without an end."""
        return sum(not call.tool for call in self.calls) + self.unended

    @property
    def failed(self) -> int:
        """Well-formed calls that a tool could not carry out."""
        return sum(call.failed for call in self.calls)


def answer_all(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], tools: Sequence[Mapping[str, Tool]], *,
    max_tokens: int, max_calls: int, done: Callable[[int, Answer], None],
) -> None:  # fmt: skip
    """Answers prompts greedily, each with its tools; `done` is told the number of each and its answer. Inside `jax.set_mesh`.

    Args:
      prompts: ids each. # int [T]
      max_tokens: drawn for an answer, all its pieces together; results are beside them, and count for the context alone.
      max_calls: carried out for an answer; at the end of a further call it ends.
    """
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):  # what begins alike, side by side
        # `done` is bound now, since the loop goes on.
        answer = _Drawn(engine, tokenizer, prompts[i], tools[i], max_calls=max_calls, done=lambda found, i=i: done(i, found))
        answer.begin(max_tokens)
    while engine.step():
        pass


class _Drawn:
    """An answer on its way."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], tools: Mapping[str, Tool], *, max_calls: int,
        done: Callable[[Answer], None],
    ):  # fmt: skip
        self._engine, self._tokenizer, self._tools = engine, tokenizer, tools
        self._max_calls, self._done = max_calls, done
        self._ids = list(prompt)  # with the pieces so far and their results
        self._text, self._calls, self._unended = "", [], 0
        self._left = 0  # tokens that may still be drawn

    def begin(self, max_tokens: int) -> None:
        """Asks for the first piece."""
        self._left = answer_room(len(self._ids), max_tokens=max_tokens, max_length=self._engine.settings.max_length)
        if self._left:
            self._ask()
        else:
            self._end("too long")

    def _ask(self) -> None:
        room = min(self._left, self._engine.settings.max_length - len(self._ids))
        if room < 1:
            self._end("length")
            return
        self._stream = TextStream(self._tokenizer, [closing(tool) for tool in self._tools], after=self._ids)
        self._engine.submit(
            self._ids, max_tokens=room, choice=Choice(0.0), stop_ids=self._tokenizer.stop_ids, on_token=self._push
        )

    def _push(self, request: Request, token: int) -> None:
        """Takes a token."""
        if token not in request.stop_ids:
            self._stream.push(token)
        if self._stream.stopped:
            if not request.finish:
                self._engine.cancel(request)
            self._call(request.tokens)
        elif request.finish:
            drawn = request.tokens[:-1] if request.finish == "stop" else request.tokens
            piece = text_behind(self._tokenizer, self._ids, drawn)
            self._text += piece
            self._unended += unended(piece, tuple(self._tools))
            self._end(request.finish)

    def _call(self, drawn: Sequence[int]) -> None:
        """Carries out the call that has just ended, and goes on behind its result."""
        piece = text_behind(self._tokenizer, self._ids, [token for token in drawn if token not in self._tokenizer.stop_ids])
        piece = piece[: first_end(piece, tuple(self._tools))]
        self._left -= len(drawn)
        if len(self._calls) == self._max_calls:
            self._text += piece
            self._end("calls")
            return
        call, begun = carry_out(piece, self._tools)
        self._calls.append(call)
        self._unended += begun
        result = result_text(call.result)
        self._text += piece + result
        self._ids += continued(self._tokenizer, self._ids, drawn, keep=piece, more=result)
        self._ask()

    def _end(self, how: str) -> None:
        self._done(Answer(self._text.strip(), tuple(self._calls), self._unended, how))


def text_behind(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add to those before them. # int [S], int [T]"""
    context, ids = ([i for i in some if i < tokenizer.vocab_size] for some in (before[-CONTEXT:], ids))
    return tokenizer.decode([*context, *ids])[len(tokenizer.decode(context)) :]


def continued(tokenizer: Tokenizer, before: Sequence[int], drawn: Sequence[int], *, keep: str, more: str) -> list[int]:
    """Drawn ids as far as their text is `keep`, and the ids of `more` behind them. # int [S], int [T] -> int [U]

    The last drawn token may say more than `keep`, as where one piece is ">\\n". Then it goes, and what it said of `keep` is
    encoded with `more`.
    """
    for count in range(len(drawn), 0, -1):
        text = text_behind(tokenizer, before, drawn[:count])
        if not keep.startswith(text):
            continue
        # Of the text before, as much as has a border there: pieces end before a space, and `more` begins with one.
        head = text[-_HEAD:]
        ids, whole = tokenizer.encode(head), tokenizer.encode(head + keep[len(text) :] + more)
        if whole[: len(ids)] == ids:
            return [*drawn[:count], *whole[len(ids) :]]
    return tokenizer.encode(keep + more)
