"""Answers on their way: the sides of a pair, drawn together, seen while they grow, drawn anew if they cannot be judged."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from llama_jax.data.dialog import Message, find_tag

log = logging.getLogger(__name__)
TRIES = 3  # draws of a pair whose answers are equal, or hold a chat tag that no dialog may hold


@dataclasses.dataclass(frozen=True)
class Draw:
    """One answer to be drawn. The same draw gives the same answer."""

    model: str
    messages: tuple[Message, ...]
    temperature: float
    seed: int
    index: int


Deliver = Callable[[str, str], None]  # (piece of text, "" or why the answer ended); called from any thread
Done = Callable[[tuple[str, ...], tuple[bool, ...]], None]  # (texts, whether each ended by itself)


class Answerer(Protocol):
    """Whatever answers: engines here, a fake in tests."""

    def start(self, draw: Draw, deliver: Deliver) -> Callable[[], None]:
        """Begins to answer and returns at once, with a function that stops it. ValueError, with words for the rater, if it
        cannot: the dialog is too long, or the model busy."""

    def fits(self, model: str, messages: Sequence[Message]) -> bool:
        """Whether the model's context has room for the dialog and an answer."""


class Pair:
    """One or two answers that are being drawn."""

    def __init__(self, answerer: Answerer, draws: Sequence[Draw], *, distinct: bool, done: Done):
        """`distinct`: equal answers cannot be judged; `done` is called once, when all answers are complete."""
        self._answerer, self._draws, self._distinct, self._done = answerer, tuple(draws), distinct, done
        self._changed = threading.Condition()
        self._try = 0
        self.error = ""

    def start(self) -> "Pair":
        """Begins; ValueError if the dialog cannot be answered."""
        try:
            self._begin()
        except Exception:
            self.stop()
            raise
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """What there is so far."""
        with self._changed:
            return tuple("".join(pieces).strip() for pieces in self._pieces)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        with self._changed:
            return self._finished or bool(self.error)

    def wait(self, seconds: float) -> None:
        """Returns when something has come, or after a while."""
        with self._changed:
            if not (self._finished or self.error):
                self._changed.wait(seconds)

    def stop(self) -> None:
        """Ends the drawing; `done` is not called any more."""
        with self._changed:
            self.error = self.error or "stopped"
            stops = list(self._stops)
            self._changed.notify_all()
        for stop in stops:
            stop()

    def _begin(self) -> None:
        number = self._try
        with self._changed:
            self._pieces: list[list[str]] = [[] for _ in self._draws]
            self._ended = [""] * len(self._draws)
            self._finished = False
            self._stops: list[Callable[[], None]] = []
        for side, draw in enumerate(self._draws):
            again = dataclasses.replace(draw, index=draw.index + number * len(self._draws))
            if self.error:  # stopped between two tries
                return
            stop = self._answerer.start(again, lambda piece, ended, side=side: self._receive(number, side, piece, ended))
            with self._changed:
                self._stops.append(stop)
        if self.error:  # stopped while it began
            self.stop()

    def _receive(self, number: int, side: int, piece: str, ended: str) -> None:
        with self._changed:
            if number != self._try or self.error:
                return
            self._pieces[side].append(piece)
            self._ended[side] = ended
            if ended in ("error", "cancelled"):
                self.error = "The model stopped before it had finished."
            complete = all(self._ended) and not self.error
            self._changed.notify_all()
        if complete:
            self._complete(number)

    def _complete(self, number: int) -> None:
        texts = self.texts
        if not self._fit(texts) and number + 1 < TRIES:
            with self._changed:
                self._try += 1
            # Not in the thread that delivers: it is the engine's, which a new request would wait for.
            threading.Thread(target=self._begin_again, daemon=True).start()
            return
        if any(find_tag(text) for text in texts):
            self._fail("The model wrote a tag of the chat format in every answer. Skip this, or ask something else.")
            return
        try:
            self._done(texts, tuple(ended == "stop" for ended in self._ended))
        except Exception:  # a full disk, say: this is the engine's thread, which answers all raters
            log.exception("answers could not be kept")
            self._fail("The answers could not be kept. Try again.")
            return
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _begin_again(self) -> None:
        try:
            self._begin()
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("answers could not be drawn again")
            self._fail(str(error) if isinstance(error, ValueError) else "The answers could not be drawn again. Try again.")
            self.stop()

    def _fail(self, reason: str) -> None:
        with self._changed:
            self.error = self.error or reason
            self._changed.notify_all()

    def _fit(self, texts: tuple[str, ...]) -> bool:
        return not any(map(find_tag, texts)) and not (self._distinct and len(set(texts)) < len(texts))
