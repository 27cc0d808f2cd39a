"""Embedding look-up in a table that is divided over both its vocabulary and its width.

Left to GSPMD, a look-up in such a table is replicated and cut again on most meshes ("involuntary full rematerialization").
Here the ids travel instead of the table: every device looks the tokens of all its peers up in its own piece, and the results
are exchanged for rows. No device holds the whole table or its whole gradient, and what travels is one activation each way.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.parallel.axes import current_rules, partition


def look_up(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The rows of `table` as activations of `dtype`; the gradient of the table is added up in float32.

    Args:
      table: # [V, D]
      tokens: # int32 [B, T]

    Returns:
      [B, T, D], laid out as the residual stream
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    return _look_up(_Layout.of(table, tokens, mesh), dtype, table, tokens)


class _Layout:
    """Where the axes of the table and of the activations lie, and the exchanges that follow from it."""

    def __init__(self, specs, mesh, vocab, width, batch_sums, scatter):
        self.table, self.tokens, self.rows = specs
        self.vocab, self.width, self.batch_sums, self.scatter = vocab, width, batch_sums, scatter
        self.key = (specs, mesh, vocab, width, batch_sums, scatter)

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return self.key == other.key

    @classmethod
    def of(cls, table, tokens, mesh):
        rules = current_rules()
        (B, T), D = tokens.shape, table.shape[1]
        specs = (
            partition(table.shape, ("vocab", "width"), rules, mesh),
            partition(tokens.shape, ("batch", "length"), rules, mesh),
            partition((B, T, D), ("batch", "residual", "act_width"), rules, mesh),
        )
        vocab, width = (name if name and mesh.shape[name] > 1 else None for name in specs[0])
        split_rows = tuple(
            name for entry in specs[1] for name in ((entry,) if isinstance(entry, str) else entry or ())
            if mesh.shape[name] > 1
        )  # fmt: skip
        if width is not None and width not in split_rows:
            raise ValueError(f"the width of the embedding is divided over {width!r}, which does not divide the batch")
        # The gradient is summed over the devices that hold the same piece of the table and other tokens.
        batch_sums = tuple(name for name in split_rows if name not in (width, vocab))
        scatter = vocab is not None and vocab in (specs[2][1] or ())
        return cls(specs, mesh, vocab, width, batch_sums, scatter)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(layout: _Layout, dtype, table, tokens):
    def island(table, tokens):
        ids, mine = _local_ids(layout, table, tokens)
        x = jnp.where(mine[..., None], jnp.take(table, ids, axis=0).astype(dtype), 0)
        if layout.scatter:
            x = jax.lax.psum_scatter(x, layout.vocab, scatter_dimension=1, tiled=True)
        elif layout.vocab:
            x = jax.lax.psum(x, layout.vocab)
        return jax.lax.all_to_all(x, layout.width, 0, 2, tiled=True) if layout.width else x

    return jax.shard_map(island, in_specs=(layout.table, layout.tokens), out_specs=layout.rows, check_vma=False)(table, tokens)


def _look_up_forward(layout, dtype, table, tokens):
    return _look_up(layout, dtype, table, tokens), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _look_up_backward(layout, dtype, residuals, d_rows):
    tokens, like = residuals

    def island(tokens, d_rows, like):
        if layout.width:
            d_rows = jax.lax.all_to_all(d_rows, layout.width, 2, 0, tiled=True)
        if layout.scatter:
            d_rows = jax.lax.all_gather(d_rows, layout.vocab, axis=1, tiled=True)
        ids, mine = _local_ids(layout, like, tokens)
        d_rows = jnp.where(mine[..., None], d_rows.astype(jnp.float32), 0)
        d_table = jnp.zeros((like.shape[0], d_rows.shape[-1]), jnp.float32).at[ids].add(d_rows)
        return jax.lax.psum(d_table, layout.batch_sums) if layout.batch_sums else d_table

    like_spec = jax.sharding.PartitionSpec(layout.table[0], None)
    d_table = jax.shard_map(
        island, in_specs=(layout.tokens, layout.rows, like_spec), out_specs=layout.table, check_vma=False
    )(tokens, d_rows, like)
    return d_table.astype(like.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _local_ids(layout, table, tokens):
    """The ids of all tokens whose width this device serves, as rows of its piece of the table, and which of them lie there."""
    if layout.width:
        tokens = jax.lax.all_gather(tokens, layout.width, axis=0, tiled=True)
    rows = table.shape[0]
    ids = tokens - (jax.lax.axis_index(layout.vocab) * rows if layout.vocab else 0)
    return jnp.clip(ids, 0, rows - 1), (ids >= 0) & (ids < rows)
