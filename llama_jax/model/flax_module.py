"""The model as a Flax module, for users who compose with Flax: the same parameters, the same numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.model import heads, params
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.transformer import hidden_states


class Llama(nn.Module):
    """A language model: `Llama(config).init(key, tokens)` and `.apply(variables, tokens)`.

    `variables["params"]` is the tree of `model.params.table`, so checkpoints fit without conversion.
    """

    config: ModelConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Next-token logits; without segment ids each row is one document. # int32 [B, T] -> float32 [B, T, V]"""
        specs = params.table(self.config, head="lm_head")
        tree = {
            name: self.param(name, lambda key, name=name: params.init({name: specs[name]}, key)[name]) for name in specs
        }
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = hidden_states(tree, tokens, segment_ids, positions, config=self.config, compute=self.compute)
        return heads.logits(tree, hidden, compute=self.compute)
