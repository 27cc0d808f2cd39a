"""Whether a model fits the chips when it generates: its weights are then divided over the `tensor` axis alone."""

import math

import jax
from jax.sharding import Mesh, PartitionSpec

from llama_jax.config import ConfigError
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.parallel.axes import DECODE, batch_shards, is_spec, partition
from llama_jax.parallel.host import device_memory


def decode_bytes(model: ModelConfig, compute: Compute, mesh: Mesh) -> int:
    """Bytes of the weights on each device while the model generates."""
    found = 0
    for spec in jax.tree.leaves(table.table(model, head="lm_head"), is_leaf=is_spec):
        shards = _shards(partition(spec.shape, spec.axes, DECODE, mesh), mesh)
        found += math.prod(spec.shape) * compute.matmul_dtype.itemsize // shards
    return found


def _shards(parts: PartitionSpec, mesh: Mesh) -> int:
    """Over how many devices an array is divided."""
    names = [name for entry in parts if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(mesh.shape[name] for name in names)


def cache_bytes(model: ModelConfig, compute: Compute, mesh: Mesh, *, rows: int, length: int) -> int:
    """Bytes of the keys and values of so many rows of so many positions on each device while the model generates."""
    heads = model.kv_heads // _shards(partition((model.kv_heads,), ("act_kv_heads",), DECODE, mesh), mesh)
    position = 2 * model.layers * heads * model.head_size * compute.activation_dtype.itemsize
    return math.ceil(rows / batch_shards(mesh)) * length * position


def check_generates(
    model: ModelConfig, compute: Compute, mesh: Mesh, *, rows: int = 0, length: int = 0, hint: str = ""
) -> None:
    """ConfigError for a model whose weights, with the cache of `rows` of `length`, are more than a chip holds when it
    generates."""
    memory = device_memory()
    weights, cache = decode_bytes(model, compute, mesh), cache_bytes(model, compute, mesh, rows=rows, length=length)
    if memory and weights + cache > memory:
        kept = f" and {cache / 2**30:.1f} GiB of keys and values" if rows else ""
        fewer = ", or fewer rows at a time (sampling_batch)" if rows else ""
        raise ConfigError(
            f"config.mesh: generation puts {weights / 2**30:.1f} GiB of {model.name}'s weights{kept} on each chip, which holds "
            f"{memory / 2**30:.1f} GiB; expected more parts, as by --config.mesh.tensor=8{fewer}{hint}"
        )
