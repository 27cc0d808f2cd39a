"""What an engine is asked: its shapes, and one prompt with what was drawn for it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from llama_jax.sampling.choose import Choice

Shape = tuple[int, int]  # (tokens, prompts)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The shapes of an engine; each is compiled once.

    slots: requests that decode together.
    max_length: tokens of prompt and answer that a slot holds.
    chunks: (length, prompts) of each way in: the shortest length that holds what is left of a prompt takes it, else the
      longest takes a piece. It depends on the prompt alone, so that results do not depend on who else is waiting.
    whole: (length, prompts) of the ways in for many requests at once: prompts that fit are computed beside the slots, each
      once however many requests share it, and copied into a slot when one is free. Longer prompts enter by `chunks`; without
      any, they are refused.
    steps: decoding steps between two looks of the host; 1 streams every token at once, more cost less overhead.
    reuse: of those that enter by `chunks`, take over a prefix of at least this many tokens from any slot; 0 never does. A
      taken-over prefix is equal to a computed one up to rounding.
    int8_cache: keep keys and values in 8 bits: a quarter of float32's memory, at a small loss of precision.
    alternatives: so many of the most likely tokens can be told of beside each drawn one.
    stops: stop ids that a request may have, the tokenizer's among them.
    """

    slots: int = 8
    max_length: int = 2048
    chunks: tuple[Shape, ...] = ((32, 4), (256, 1))
    whole: tuple[Shape, ...] = ()
    steps: int = 8
    reuse: int = 16
    int8_cache: bool = False
    alternatives: int = 0
    stops: int = 32

    def __post_init__(self):
        shapes = (*self.chunks, *self.whole)
        if self.slots < 1 or self.max_length < 2 or self.steps < 1 or not shapes or min(map(min, shapes)) < 1:
            raise ValueError(f"engine: expected positive sizes, got {self}")
        if any(length > self.max_length for length, _ in self.whole):
            raise ValueError(f"engine: whole prompts of {self.whole} do not fit max_length={self.max_length}")

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that can enter."""
        return self.max_length - 1 if self.chunks else min(max(self.whole)[0] + 1, self.max_length - 1)

    @property
    def seats(self) -> int:
        """How many requests sit down at once; decoding stops early for so many."""
        return max(self.slots // 8, 1)


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what was drawn for it so far."""

    prompt: Sequence[int]
    max_tokens: int
    choice: Choice
    key: np.ndarray  # data of a PRNG key
    stop_ids: tuple[int, ...]
    on_token: Callable[["Request", int], None] | None = None
    alternatives: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)  # of the distribution each was drawn from
    model_log_probs: list[float] = dataclasses.field(default_factory=list)  # of the model's own
    # beside each drawn token the most likely ones by the model's own, with their log-probabilities
    most_likely: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish: Literal["", "stop", "length", "cancelled"] = ""
    slot: int = -1
    filled: int = 0  # tokens of the prompt that are in the slot's cache
    reused: int = 0  # of those, taken over
    seated: bool = False  # decodes

    @property
    def left(self) -> int:
        """Tokens to be put into the cache. The prompt's last one is not: the first decoding step reads it."""
        return len(self.prompt) - 1 - self.filled


def shape_for(tokens: int, shapes: Sequence[Shape]) -> Shape | None:
    """The shortest of the shapes, sorted by length, that holds so many tokens."""
    return next((shape for shape in shapes if shape[0] >= tokens), None)
