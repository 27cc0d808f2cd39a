"""Anyone's scorers: a rule, a program, a remote model, beside the reward models or in their place.

A scorer is a function (rows, responses) -> one number for each. `rows` are the prompts' rows of the data file (`messages`,
`reference`, ...), `responses` the texts. It runs on the host, on this process's part of a batch. A run resumes exactly if its
scorers are functions of their arguments alone.
"""

import dataclasses
import importlib
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.data.dialog import decode_response
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.parallel.axes import batch_sharding, row_groups, row_share
from llama_jax.parallel.hosts import gather_numbers

Scorer = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], Sequence[float]]

REWARD_MODELS = "reward_models"


@dataclasses.dataclass(frozen=True)
class RewardMix:
    """What a response is rewarded for: the weighted sum of scores.

    scorers: "reward_models" is the logit of R_c of the two reward models (section 3.2.3); "module:function" is a scorer.
    weights: one for each; empty: all 1.
    """

    scorers: tuple[str, ...] = (REWARD_MODELS,)
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.scorers or len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"reward.scorers: expected at least one, each once, got {self.scorers}")
        for name in self.scorers:
            if name != REWARD_MODELS and not all(part.strip() for part in (name.partition(":")[0], name.partition(":")[2])):
                raise ValueError(f"reward.scorers: expected {REWARD_MODELS!r} or 'module:function', got {name!r}")
        if self.weights and len(self.weights) != len(self.scorers):
            raise ValueError(f"reward.weights: expected one for each of {len(self.scorers)} scorers, got {self.weights}")
        if not all(map(math.isfinite, self.weights)) or (self.weights and not any(self.weights)):
            raise ValueError(f"reward.weights: expected finite numbers, not all of them 0, got {self.weights}")

    def weighted(self) -> dict[str, float]:
        """Weight by scorer."""
        return dict(zip(self.scorers, self.weights or (1.0,) * len(self.scorers), strict=True))


def load_scorer(name: str) -> Scorer:
    """The function of "module:function"; ValueError if there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.scorers: cannot load {name!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"reward.scorers: {name!r} is a {type(found).__name__}, expected a function")
    return found


@flax.struct.dataclass
class OtherScores:
    """What the scorers that are no reward models say of each response."""

    total: Any  # [B] float32: their weighted sum, which is the reward or a part of it
    each: Any  # {name: [B] float32}: as each gave them, without its weight


@dataclasses.dataclass(frozen=True)
class HostScorers:
    """Scorers and their weighted sum, from token ids."""

    scorers: Mapping[str, tuple[Scorer, float]]  # name -> (function, weight)
    rows: Sequence[Mapping[str, Any]]  # the data file
    tokenizer: Tokenizer

    @classmethod
    def of(cls, mix: RewardMix, rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> "HostScorers | None":
        """Those of a mix, or None if it has reward models only."""
        named = {name: (load_scorer(name), w) for name, w in mix.weighted().items() if name != REWARD_MODELS}
        return cls(named, rows, tokenizer) if named else None

    def __call__(self, numbers: jax.Array, tokens: jax.Array, mask: jax.Array) -> OtherScores:
        """Scores of a batch of responses. # int32 [B] (of rows), int32 [B, N], bool [B, N] -> float32 [B] each"""
        mesh = numbers.sharding.mesh
        tokens, mask = (_whole_rows(x, mesh) for x in (tokens, mask))
        rows = [self.rows[number] for number in local_rows(numbers)]
        found = np.zeros((1 + len(self.scorers), len(rows)), np.float32)  # the sum first
        own = row_groups(mesh)[row_share(mesh)[0]]
        if jax.process_index() == own[0]:
            ids = [row[inside] for row, inside in zip(local_rows(tokens), local_rows(mask), strict=True)]
            responses = [decode_response(row.tolist(), self.tokenizer)[0] for row in ids]
            for scores, (name, (scorer, weight)) in zip(found[1:], self.scorers.items(), strict=True):
                scores[:] = check_scores(scorer(rows, responses), len(rows), name)
                found[0] += weight * scores
        if len(own) > 1:  # a scorer need not say the same twice, and hosts with the same rows must have the same scores
            found = gather_numbers(found)[own[0]]
        total, *each = (jax.make_array_from_process_local_data(numbers.sharding, x, numbers.shape) for x in found)
        return OtherScores(total, dict(zip(self.scorers, each, strict=True)))


def check_scores(scores: Sequence[float], count: int, name: str) -> np.ndarray:
    """What a scorer returned as float32 [count]; ValueError if it is not one finite number for each response."""
    try:
        found = np.asarray(scores)
    except ValueError:  # rows of several lengths
        found = np.empty((), object)
    if not any(jnp.issubdtype(found.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        found = reprlib.repr(scores)
        raise ValueError(f"scorer {name} returned {found}, expected one finite number for each of {count} responses")
    found = found.astype(np.float32)
    if found.shape != (count,):
        raise ValueError(f"scorer {name} returned shape {found.shape} for {count} responses, expected ({count},)")
    bad = [i for i, score in enumerate(found) if not math.isfinite(score)]
    if bad:
        raise ValueError(f"scorer {name} returned {found[bad[0]]} for response {bad[0]}, expected a finite number")
    return found


def _whole_rows(x: jax.Array, mesh: Mesh) -> jax.Array:
    """The same array, divided along its rows alone: a mesh may divide their length too. # [B, N]"""
    rows = batch_sharding(mesh, 1)
    if x.sharding.is_equivalent_to(rows, x.ndim):
        return x
    return jax.jit(lambda x: x, out_shardings=rows)(x)


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is divided along its rows alone, in their order."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
