"""Scores of many answers at once by frozen reward models, as rejection sampling, distillation and studies ask for them."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.data.forest import Placed, Rows, by_stem, grow
from llama_jax.data.packing import pack
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.parallel import compiler
from llama_jax.parallel.axes import batch_shards, shards_of
from llama_jax.parallel.mesh import platform
from llama_jax.reward.held_out import sigmoid
from llama_jax.reward.score import tree_scorer
from llama_jax.rlhf.judge import models_reward

_ROW = 512
_TOKENS, _CPU_TOKENS = 16_384, 1024  # of a shard of the batch at once


def score_responses(
    config: ModelConfig, compute: Compute, rewards: Mapping[str, Params], prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]], is_safety: Sequence[bool], *, length: int, batch_size: int, threshold: float,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sigmoid scores of the reward models ("helpfulness", "safety" or both) and the "reward" R_c of each (prompt, response), in
    float64, which tells the best ones apart; and the "logit" of R_c. # -> float [n] each"""
    logits = {
        name: logit_scores(config, compute, params, prompts, responses, length=length, batch_size=batch_size)
        for name, params in rewards.items()
    }
    combined = models_reward(jax.tree.map(jnp.asarray, logits), jnp.asarray(is_safety, bool), threshold=threshold)
    scores = {name: sigmoid(values) for name, values in logits.items()}
    return {**scores, "reward": sigmoid(combined), "logit": np.asarray(combined)}


def sigmoid_scores(
    config: ModelConfig, compute: Compute, reward: Params, prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]], *, length: int, batch_size: int,
) -> np.ndarray:  # fmt: skip
    """The sigmoids of `logit_scores`. # -> float64 [n]"""
    return sigmoid(logit_scores(config, compute, reward, prompts, responses, length=length, batch_size=batch_size))


def logit_scores(
    config: ModelConfig, compute: Compute, reward: Params, prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]], *, length: int, batch_size: int,
) -> np.ndarray:  # fmt: skip
    """One reward model's logit of each (prompt, response); on several hosts, the same in all. # -> float32 [n]

    A prompt is computed once for as many of its responses as a row holds (`data/forest.py`). At once in memory are at most
    `batch_size` texts of `length` tokens (`rows_at_once`).

    Raises:
      ValueError: a prompt without tokens, or a text that is longer than `length`.
    """
    mesh = jax.sharding.get_mesh()
    texts = list(zip(prompts, responses, strict=True))
    for number, (prompt, response) in enumerate(texts):
        if not len(prompt) or len(prompt) + len(response) > length:
            raise ValueError(
                f"text {number}: expected a prompt and a response of at most {length} tokens together, got {len(prompt)} + "
                f"{len(response)}"
            )
    # One scaling of RoPE reads the length of a text, which the branches of a tree do not have in common.
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        texts = [((*prompt, *response), ()) for prompt, response in texts]
    row = row_length(length)
    trees = [tree for stem, branches in by_stem(texts).items() for tree in grow(stem, branches, row=row)]
    rows = pack([tree.size() for tree in trees], row)
    batch = rows_at_once(row, length=length, batch_size=batch_size, shards=1 if mesh.empty else batch_shards(mesh))
    score, scores, late = _jitted_scorer(config, compute, mesh), np.zeros(len(texts), np.float32), None

    def read(logits: jax.Array, placed: Sequence[Sequence[Placed]]) -> None:
        for values, found in zip(np.asarray(logits), placed):
            for branch in found:
                scores[list(branch.requests)] = values[branch.places[-1] if branch.places else branch.last]

    for start in range(0, len(rows), batch):
        filled = Rows.empty(batch, row)
        placed = [filled.fill(i, [trees[t] for t in chosen]) for i, chosen in enumerate(rows[start : start + batch])]
        computed = (score(reward, *filled), placed)
        if late is not None:  # the device computes these rows while the host reads those before
            read(*late)
        late = computed
    if late is not None:
        read(*late)
    return scores


def check_scorer(config: ModelConfig, compute: Compute, reward: Params, *, length: int, batch_size: int) -> None:
    """Scores a text: what cannot be compiled is found before hours of drawing, not after them."""
    logit_scores(config, compute, reward, [[1]], [[]], length=length, batch_size=batch_size)


def row_length(length: int) -> int:
    """Of rows that hold texts of `length` tokens: a multiple of 512, so that prompts and several answers stand together, and of
    what the mesh can divide. `branch_attention` holds the scores of 512 queries at once."""
    unit = shards_of("length") * _ROW
    return -(-length // unit) * unit


def rows_at_once(row: int, *, length: int, batch_size: int, shards: int) -> int:
    """How many rows of `row` tokens are scored together: the tokens of `batch_size` texts, in rows that the mesh can divide.

    More than 16,384 a device would gain nothing and cost memory for attention's scores. A CPU is fastest with few: what a layer
    reads and writes stays in its cache.
    """
    most = shards * (_CPU_TOKENS if platform() == "cpu" else _TOKENS)
    return -(-max(min(batch_size * length, most) // row, 1) // shards) * shards


@functools.cache
def _jitted_scorer(config: ModelConfig, compute: Compute, mesh: Mesh):
    # Every host needs all scores, not only those of its rows.
    everywhere = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
    return compiler.jit(tree_scorer(config, compute), out_shardings=everywhere)
