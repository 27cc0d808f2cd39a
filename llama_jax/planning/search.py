"""Which settings to compile when the best are asked for: meshes, remat policies and microbatches, the likely ones first."""

import dataclasses
import itertools
from collections.abc import Iterator

from llama_jax.model.config import size
from llama_jax.parallel.mesh import MeshConfig
from llama_jax.pretrain.base import StageConfig

# From the least recomputation to the least memory.
REMAT = ("dots", "queries", "attention", "full")


def candidates(config: StageConfig, *, devices: int, slices: int = 1) -> Iterator[StageConfig]:
    """Configs to try, in an order in which good ones come early.

    `data` is the number of slices; what is left goes to fsdp as far as the batch has rows for it, since gathering weights
    costs less than exchanging activations; then to the sequence, then to tensor parallelism, whose products are the smallest.
    Of microbatches, the fewest that leave a device one to eight rows.
    """
    rows, model = config.loop.batch_size, size(config.model)
    if devices % slices:
        return
    per_slice = devices // slices
    meshes = [
        (sequence, tensor)
        for sequence, tensor in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8))
        if per_slice % (sequence * tensor) == 0
        and rows % (devices // (sequence * tensor)) == 0
        and model.heads % tensor == 0
        and model.vocab_size % tensor == 0
    ]
    for (sequence, tensor), rows_each, remat in itertools.product(
        sorted(meshes, key=lambda m: (m[0] * m[1], m[1])), (4, 2, 1, 8), REMAT
    ):
        shards = devices // (sequence * tensor)
        if rows % (shards * rows_each):
            continue
        mesh = MeshConfig(data=slices, fsdp=shards // slices, sequence=sequence, tensor=tensor)
        loop = dataclasses.replace(config.loop, microbatches=rows // shards // rows_each)
        yield dataclasses.replace(config, mesh=mesh, loop=loop, compute=dataclasses.replace(config.compute, remat=remat))
