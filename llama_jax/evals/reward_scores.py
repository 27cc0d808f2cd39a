"""A reward model's scores of whole answers, for judging (section 3.4.1): batched, and never of a dialog that was cut."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.data.dialog import Message, encode_dialog, find_tag
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.parallel.axes import batch_shards
from llama_jax.reward.score import scorer

_ROWS, _SHORTEST = 16, 64


def score_dialogs(
    params: Params, config: ModelConfig, tokenizer: Tokenizer, dialogs: Sequence[Sequence[Message]], *, compute: Compute,
    mesh: Mesh, done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:  # fmt: skip
    """The logit of each dialog, which ends with the answer; NaN for one that does not fit the context, or that the chat format
    refuses since the answer holds one of its tags. # float64 [n]"""
    encoded = [
        None if find_tag(dialog[-1]["content"]) else encode_dialog(dialog, tokenizer, train_on="last").ids for dialog in dialogs
    ]
    fit = [i for i, ids in enumerate(encoded) if ids is not None and len(ids) <= config.max_length]
    scores = np.full(len(dialogs), math.nan)
    rows = -(-_ROWS // batch_shards(mesh)) * batch_shards(mesh)
    fit.sort(key=lambda i: len(encoded[i]))  # little padding; few shapes
    with jax.set_mesh(mesh):
        run = _program(config, compute, mesh)
        for start in range(0, len(fit), rows):
            some = fit[start : start + rows]
            length = min(max(_SHORTEST, 1 << (len(encoded[some[-1]]) - 1).bit_length()), config.max_length)
            tokens = np.zeros((rows, length), np.int32)
            segments = np.zeros_like(tokens)
            segments[:, 0] = 1  # rows that only fill the batch have one token
            for row, i in enumerate(some):
                tokens[row, : len(encoded[i])], segments[row, : len(encoded[i])] = encoded[i], 1
            scores[some] = np.asarray(run(params, tokens, segments), np.float64)[: len(some)]
            done(len(some))
    return scores


@functools.lru_cache(maxsize=4)
def _program(config: ModelConfig, compute: Compute, mesh: Mesh):
    return jax.jit(scorer(config, compute), out_shardings=NamedSharding(mesh, PartitionSpec()))  # every host reads all scores
