"""Scores of many answers at once by frozen reward models, as rejection sampling, distillation and studies ask for them."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.parallel.axes import batch_shards, shards_of
from llama_jax.parallel.mesh import platform
from llama_jax.reward.score import scorer
from llama_jax.rlhf.rollout import models_reward


def score_responses(
    config: ModelConfig, compute: Compute, rewards: Mapping[str, Params], prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]], is_safety: Sequence[bool], *, length: int, batch_size: int, threshold: float,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sigmoid scores of the reward models ("helpfulness", "safety" or both) and the reward R_c of each (prompt, response).

    # -> float32 [n] each
    """
    scores = {
        name: sigmoid_scores(config, compute, params, prompts, responses, length=length, batch_size=batch_size)
        for name, params in rewards.items()
    }
    combined = models_reward(jax.tree.map(jnp.asarray, scores), jnp.asarray(is_safety, bool), threshold=threshold)
    return {**scores, "reward": np.asarray(combined)}


def sigmoid_scores(
    config: ModelConfig, compute: Compute, reward: Params, prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]], *, length: int, batch_size: int,
) -> np.ndarray:  # fmt: skip
    """Scores of one reward model, in (0, 1), of each (prompt, response); on several hosts, the same in all. # -> float32 [n]

    Rows of similar length are scored together, `batch_size` of them or what the mesh can divide above it.
    """
    mesh = jax.sharding.get_mesh()
    score, widths = _jitted_scorer(config, compute, mesh), row_widths(length)
    shards = 1 if mesh.empty else batch_shards(mesh)
    rows = -(-batch_size // shards) * shards
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    scores = np.zeros(len(sizes), np.float32)
    for start in range(0, len(sizes), rows):
        part = order[start : start + rows]
        width = next((w for w in widths if sizes[part[-1]] <= w), widths[-1])
        tokens = np.zeros((rows, width), np.int32)
        segment_ids = np.zeros_like(tokens)
        for row, i in enumerate(part):
            tokens[row, : len(prompts[i])] = prompts[i]
            tokens[row, len(prompts[i]) : sizes[i]] = responses[i]
            segment_ids[row, : sizes[i]] = 1
        scores[part] = np.asarray(score(reward, tokens, segment_ids))[: len(part)]
    return scores


def check_scorer(config: ModelConfig, compute: Compute, reward: Params, *, length: int, batch_size: int) -> None:
    """Scores a row of every width: what cannot be compiled is found before hours of drawing, not after them."""
    for width in row_widths(length):
        sigmoid_scores(config, compute, reward, [[1] * min(width, length)], [[]], length=length, batch_size=batch_size)


def row_widths(length: int) -> list[int]:
    """A third, two thirds and all of `length`, for most rows are much shorter than all; rounded up to what the mesh can divide.

    A ring cuts a row into two pieces a device; accelerators want each of a multiple of 128.
    """
    shards = shards_of("length")
    unit = (2 * shards if shards > 1 else 1) * (1 if platform() == "cpu" else 128)
    return sorted({-(-length * share // (3 * unit)) * unit for share in (1, 2, 3)})


@functools.cache
def _jitted_scorer(config: ModelConfig, compute: Compute, mesh: Mesh):
    score = scorer(config, compute)
    # Every host needs all scores, not only those of its rows.
    everywhere = None if mesh.empty else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda *arguments: jax.nn.sigmoid(score(*arguments)), out_shardings=everywhere)
