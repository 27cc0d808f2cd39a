"""The TPU's decode attention: its numbers in interpret mode, and its compiled form on described slices."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding

from llama_jax.model import paged
from llama_jax.model.cache import LayerCache, write_token
from llama_jax.model.config import SIZES, Compute
from llama_jax.model.decode import prepare
from llama_jax.model.decode_attention import attend_cached
from llama_jax.model.params import table
from llama_jax.parallel import topology
from llama_jax.parallel.axes import DECODE, abstract, layout
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.sampling import slots as device
from llama_jax.sampling.request import EngineConfig

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")


def cached(B, K, S, E, longest):
    keys, values = jax.random.normal(jax.random.key(0), (2, B, K, S, E)).astype(jnp.bfloat16)
    # What lies behind a row's length must not be seen, whatever it is.
    return keys.at[:, :, longest:].set(1e4), values.at[:, :, longest:].set(1e4)


@pytest.mark.parametrize(
    ("H", "K", "S", "longest"),
    [(2, 2, 256, 200), (8, 1, 256, 200), pytest.param(16, 2, 2048, 1900, marks=pytest.mark.slow)],
    ids=["multi-head", "multi-query", "four blocks"],
)
def test_the_kernel_gives_what_plain_attention_gives(H, K, S, longest):
    B, E = 3, 128
    keys, values = cached(B, K, S, E, longest)
    query = jax.random.normal(jax.random.key(1), (B, H, E))
    lengths = np.array([1, longest - 70, longest])
    with pltpu.force_tpu_interpret_mode():
        out = paged.attend(query, keys, values, jnp.asarray(lengths, jnp.int32))
    grouped = np.asarray(query).reshape(B, K, H // K, E)
    keys, values = (np.asarray(x, np.float32) for x in (keys, values))
    for row, n in enumerate(lengths):
        scores = np.einsum("kge,kse->kgs", grouped[row], keys[row, :, :n]) / np.sqrt(E)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        expected = np.einsum("kgs,kse->kge", weights / weights.sum(axis=-1, keepdims=True), values[row, :, :n])
        np.testing.assert_allclose(out[row], expected.reshape(H, E), atol=0.02)


@pytest.mark.parametrize("axis", [2, 3])
def test_one_token_a_row_is_written_where_it_belongs(axis):
    B, K, S, E = 3, 2, 128, 4
    slots, new = np.zeros((B, K, S, E), np.float32), np.arange(B * K * E, dtype=np.float32).reshape(B, K, E) + 1
    given = np.moveaxis(slots, 2, axis)
    found = np.asarray(write_token(jnp.asarray(given), jnp.asarray(new), jnp.array([5, S, 0]), axis))  # S: dropped
    slots[0, :, 5], slots[2, :, 0] = new[0], new[2]
    np.testing.assert_array_equal(np.moveaxis(found, axis, 2), slots)


@pytest.mark.parametrize("T", [1, 3])
def test_keys_in_either_layout_give_the_same(T):
    B, H, K, S, E = 2, 4, 2, 128, 16
    keys, values = jax.random.normal(jax.random.key(0), (2, B, K, S, E))
    query = jax.random.normal(jax.random.key(1), (B, T, H, E))
    positions = jnp.array([[5], [100]]) + jnp.arange(T)
    plain = LayerCache(jnp.swapaxes(keys, 2, 3), values)
    one, other = (
        attend_cached(query, cache, positions, jnp.array(120), dtype=jnp.dtype("float32"))
        for cache in (plain, LayerCache(keys, values, lengthwise=True))
    )
    np.testing.assert_allclose(one, other, atol=1e-6)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("tpu", "tensor"), [("v5e:2x4", 4), ("v5p:2x2x2", 2)], ids=str)
def test_decoding_compiles_for_a_slice_with_the_kernel_in_every_layer(tpu, tensor):
    model = dataclasses.replace(SIZES["70b"], layers=2)
    compute, settings = Compute(), EngineConfig(slots=16, max_length=2048, steps=4)
    mesh = make_mesh(MeshConfig(tensor=tensor), devices=topology.describe(tpu).devices)
    specs = table(model, head="lm_head")
    with jax.set_mesh(mesh):
        run = device.programs(model, compute, settings, mesh)
        slots = jax.eval_shape(run.empty)
        assert slots.cache.layers[0].lengthwise
        slots = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), slots, device.shardings(slots, mesh)
        )

        def place(params):
            with layout(DECODE):
                return prepare(params, specs, compute=compute)

        prepared = jax.jit(place).lower(abstract(specs, mesh)).compile()
        weights = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(place, abstract(specs, mesh)), prepared.output_shardings,
        )  # fmt: skip
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, jax.sharding.PartitionSpec()))
        flag = jax.ShapeDtypeStruct((), jnp.bool_, sharding=number.sharding)
        text = run.decode.lower(weights, slots, number, number, flag).compile().as_text()
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line and " custom-call(" in line]
    assert len(kernels) == model.layers
    # Nobody copies or gathers the cache: it is written where it lies.
    rows, heads = 16 * tensor // len(mesh.devices.flatten()), model.kv_heads // tensor
    shapes = [f"= bf16[{rows},{heads},2048,128]", f"= bf16[{rows * heads},2048,128]"]
    whole = [line for line in text.splitlines() if any(shape in line for shape in shapes)]
    assert any(" scatter(" in line for line in whole)
    assert not [line for line in whole if " copy(" in line or " all-gather(" in line]
