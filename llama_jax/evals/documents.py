"""Bits that a language model needs for each held-out document: what two models are compared on, document by document."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.data.loader import TokenBatch, row_source
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.heads import log_probabilities
from llama_jax.model.params import Params
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel import compiler
from llama_jax.pretrain.base import process_share
from llama_jax.pretrain.stage import document_rows
from llama_jax.training.step import put_batch


def row_nats(config: ModelConfig, compute: Compute) -> Callable[[Params, TokenBatch], jax.Array]:
    """(params, batch) -> sum of weighted next-token losses of each row, in nats. # -> float32 [B]"""

    def nats(params: Params, batch: TokenBatch) -> jax.Array:
        hidden = hidden_states(params, batch.tokens, batch.segment_ids, batch.positions, config=config, compute=compute)
        log_p, _ = log_probabilities(params, hidden, batch.targets, compute=compute)
        return -jnp.sum(batch.weights * log_p, axis=1)

    return nats


def document_bits(
    config: ModelConfig,
    compute: Compute,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    mesh: Mesh,
) -> Callable[[Params], np.ndarray]:
    """A function from parameters to -log2 p of each text. # -> float64 [documents]

    Every token of a text and its EOS is predicted once, in rows that overlap by half (`pretrain.stage.document_rows`).
    """
    rows = [document_rows(text, tokenizer, length) for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(part) for part in rows])
    source = row_source([row for part in rows for row in part], batch_size, seed=0, shuffle=False, share=process_share(mesh))
    step = compiler.jit(row_nats(config, compute), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def bits(params: Params) -> np.ndarray:
        nats = np.concatenate([np.asarray(step(params, put_batch(batch, mesh))) for batch in source.eval_batches()])
        return np.bincount(owner, nats[: len(owner)], minlength=len(texts)) / math.log(2)

    return bits
