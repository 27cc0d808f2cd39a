"""Whether a model fits the chips when it generates: its weights are then divided over the `tensor` axis alone."""

import math

import jax
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.parallel.axes import DECODE, is_spec, partition
from llama_jax.parallel.host import device_memory


def decode_bytes(model: ModelConfig, compute: Compute, mesh: Mesh) -> int:
    """Bytes of the weights on each device while the model generates."""
    found = 0
    for spec in jax.tree.leaves(table.table(model, head="lm_head"), is_leaf=is_spec):
        parts = partition(spec.shape, spec.axes, DECODE, mesh)
        names = [name for entry in parts if entry for name in ((entry,) if isinstance(entry, str) else entry)]
        shards = math.prod(mesh.shape[name] for name in names)
        found += math.prod(spec.shape) * compute.matmul_dtype.itemsize // shards
    return found


def check_generates(model: ModelConfig, compute: Compute, mesh: Mesh, *, hint: str = "") -> None:
    """ConfigError for a model whose weights alone are more than a chip holds when it generates."""
    needed, memory = decode_bytes(model, compute, mesh), device_memory()
    if memory and needed > memory:
        raise ConfigError(
            f"config.mesh: generation puts {needed / 2**30:.1f} GiB of {model.name}'s weights on each chip, which holds "
            f"{memory / 2**30:.1f} GiB; expected more parts, as by --config.mesh.tensor=8{hint}"
        )
