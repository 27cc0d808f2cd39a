"""Text of tokens as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from llama_jax.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what decoding gives for the bytes of a character that is not complete yet
CONTEXT = 8  # tokens of what comes before that decoding looks at


class TextStream:
    """Turns tokens into pieces of text that add up to `tokenizer.decode` of all, cut before the first stop string.

    `stopped` says whether a stop string was met; what comes after it is ignored. With `after`, the tokens continue those:
    a space between the two is kept, which decoding the new ones alone would drop.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, after: Sequence[int] = ()):
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = list(after[-CONTEXT:])
        # Tokens before `_shown` have become text; decoding starts at `_context`.
        self._context, self._shown = 0, len(self._ids)
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that a further token settles; often empty."""
        if self.stopped or token >= self._tokenizer.vocab_size:  # a row that fills up the embedding has no text
            return ""
        self._ids.append(token)
        # Decoding needs a little context on the left (spaces), not all of it: that would cost the square of the length.
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(_UNFINISHED) or len(text) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """The rest: bytes that never became a character, text that looked like the beginning of a stop string."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        rest = self._tokenizer.decode(self._ids[self._context :])[len(before) :]
        self._context = self._shown = len(self._ids)
        text = self._release(rest) if rest else ""
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
