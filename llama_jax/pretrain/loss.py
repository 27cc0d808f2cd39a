"""The language-model loss of pretraining, SFT and rejection sampling: they differ in the weights of their targets only."""

import jax.numpy as jnp

from llama_jax.data.loader import TokenBatch
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.heads import token_losses
from llama_jax.model.params import Params
from llama_jax.model.transformer import hidden_states
from llama_jax.training.stage import Loss, Metrics, Weighted


def language_model_loss(config: ModelConfig, compute: Compute, *, z_loss: float = 0.0) -> Loss:
    """(params, TokenBatch) -> sum of weighted next-token losses in nats, and the accuracy.

    With `z_loss` (PaLM used 1e-4; the paper none) the losses have that share of the squared log normaliser.
    """

    def loss(params: Params, batch: TokenBatch) -> tuple[Weighted, Metrics]:
        hidden = hidden_states(
            params, batch.tokens, batch.segment_ids, batch.positions, config=config, compute=compute
        )
        total, hits = token_losses(params, hidden, batch.targets, batch.weights, compute=compute, z_loss=z_loss)
        weight = jnp.sum(batch.weights)
        return Weighted(total, weight), {"accuracy": Weighted(hits, weight)}

    return loss
