"""Log-probabilities of a prompt's own tokens, for clients that score texts (`echo` with `logprobs` of OpenAI's API).

Rows have few static lengths, each compiled by `warm_up`. The logits of 64 tokens are in memory at once.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared, logits, row_states
from llama_jax.parallel.axes import ENTER, layout

_CHUNK = 64  # tokens
_SHORTEST = 128


@dataclasses.dataclass(frozen=True)
class Scored:
    """Of each token after the first: log p under the model, and the most likely tokens in its place with theirs."""

    log_probs: list[float]
    most_likely: list[list[tuple[int, float]]]


class PromptScorer:
    """Scores prompts, one at a time. Call it inside `jax.set_mesh`, with the weights of an engine."""

    def __init__(self, config: ModelConfig, *, compute: Compute, longest: int, alternatives: int):
        """Prompts have at most `longest` tokens; `alternatives` most likely ones can be told of."""
        self.lengths, length = [], _SHORTEST
        while not self.lengths or self.lengths[-1] < longest:
            self.lengths.append(min(length, -(-longest // _CHUNK) * _CHUNK))
            length *= 2

        def score(weights: Prepared, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """# int32 [T], [] -> [T], [T, A] x 2: of the token after each one; `length` tokens are real"""
            with layout(ENTER):  # one row, which devices cannot share
                hidden = row_states(weights, tokens[None], config=config, compute=compute, lengths=length)[0]
                targets = jnp.roll(tokens, -1)

                def chunk(_, part):
                    states, wanted = part  # [C, D], [C]
                    scores = logits(weights, states, compute=compute)
                    log_p = scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
                    best, ids = jax.lax.top_k(log_p, alternatives)
                    return None, (jnp.take_along_axis(log_p, wanted[:, None], axis=1)[:, 0], ids, best)

                parts = hidden.reshape(-1, _CHUNK, hidden.shape[-1]), targets.reshape(-1, _CHUNK)
                found = jax.lax.scan(chunk, None, parts)[1]
                return jax.tree.map(lambda x: x.reshape(len(tokens), *x.shape[2:]), found)

        self._score, self._alternatives = jax.jit(score), alternatives

    @property
    def compilations(self) -> int:
        """Programs compiled so far. It does not grow after `warm_up`."""
        return self._score._cache_size()

    def warm_up(self, weights: Prepared) -> "PromptScorer":
        """Compiles every length."""
        for length in self.lengths:
            self(weights, [0] * length)
        return self

    def __call__(self, weights: Prepared, prompt: Sequence[int], *, alternatives: int = 0) -> Scored:
        """Scores a prompt.

        Raises:
          ValueError: it is longer than the scorer was made for, or more alternatives are asked for.
        """
        if not 0 < len(prompt) <= self.lengths[-1] or not 0 <= alternatives <= self._alternatives:
            raise ValueError(
                f"prompt: expected 1 to {self.lengths[-1]} tokens and at most {self._alternatives} alternatives, got "
                f"{len(prompt)} and {alternatives}"
            )
        tokens = np.zeros((next(length for length in self.lengths if len(prompt) <= length),), np.int32)
        tokens[: len(prompt)] = prompt
        count = len(prompt) - 1
        log_probs, ids, best = (np.asarray(x)[:count] for x in self._score(weights, tokens, np.int32(len(prompt))))
        pairs = [list(zip(*row, strict=True)) for row in zip(ids[:, :alternatives].tolist(), best[:, :alternatives].tolist())]
        return Scored(log_probs.tolist(), pairs)
