"""Attention in blocks, by the Pallas kernel, around a ring and by exchange of heads: always the full attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import blockwise, splash
from llama_jax.model.attention import attend, implementation, row_attention, training_mask, uses_ring
from llama_jax.model.config import FLOAT32, SIZES, Compute
from llama_jax.model.params import table
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.parallel.ring import ring_order, sharded_attention
from llama_jax.pretrain.base import fresh

pytestmark = pytest.mark.filterwarnings("ignore:.*donated.*")


def mesh_of(data=1, fsdp=1, sequence=1, tensor=1):
    config = MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    return make_mesh(config, devices=jax.devices()[: data * fsdp * sequence * tensor])


def rows(B=2, T=32, H=4, K=2, E=8, *, seed=0):
    """Query, key, value, segments and a cotangent: rows of one document, of several, and with padding behind."""
    draw = np.random.default_rng(seed)
    q, k, v = (draw.normal(size=(B, T, heads, E)).astype(np.float32) for heads in (H, K, K))
    ids = np.ones((B, T), np.int32)
    for row in range(1, B):
        ends = np.sort(draw.choice(np.arange(1, T), 3, replace=False))
        ids[row] = 1 + np.searchsorted(ends, np.arange(T), side="right")
        ids[row, ends[-1] :] = 0 if row % 2 else ids[row, ends[-1] :]
    cotangent = draw.normal(size=(B, T, H, E)).astype(np.float32) * (ids > 0)[..., None, None]
    return q, k, v, ids, cotangent


def full(q, k, v, ids):
    return attend(q, k, v, training_mask(ids), dtype=jnp.dtype("float32"))


def with_gradients(attention, q, k, v, ids, cotangent):
    """[out on real tokens, d query, d key, d value]."""
    def both(q, k, v):
        out, back = jax.vjp(lambda *x: attention(*x, ids), q, k, v)
        return out * (ids > 0)[..., None, None], *back(cotangent)

    return jax.device_get(jax.jit(both)(q, k, v))


def assert_same(found, wanted, atol=2e-5):
    for name, x, y in zip(("out", "d query", "d key", "d value"), found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=atol, err_msg=name)


def by(kernel, method="ring"):
    """Attention by a kernel under the mesh in force, in the ring's order where that is the method."""
    def attention(q, k, v, ids):
        order = ring_order if method == "ring" else lambda x, back=False: x
        q, k, v, ids = map(order, (q * q.shape[-1] ** -0.5, k, v, ids))
        return order(sharded_attention(q, k, v, ids, kernel=kernel, method=method), back=True)

    return attention


@pytest.mark.parametrize(("T", "block"), [(32, 8), (32, 32), (30, 8), (29, 8), (7, 16)])
def test_blockwise_is_full_attention(T, block):
    arguments = rows(T=T)
    assert_same(with_gradients(by(blockwise.kernel(jnp.dtype("float32"), block=block)), *arguments),
                with_gradients(full, *arguments))  # fmt: skip


def test_memory_of_blockwise_attention_is_linear_in_the_length():
    def temporaries(T):
        shapes = [jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (2, 1, 1)]
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def loss(q, k, v, ids):
            return jnp.sum(row_attention(ids, head_size=16, compute=FLOAT32)(q, k, v))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(32768)
    assert long < 9 * short  # 8 times the length; all scores alone would be 64 times as many
    assert long < 32768 * 32768  # bytes: less than a quarter of one head's scores


MESHES = [(1, 1, 4, 2), (2, 2, 2, 1), (1, 1, 1, 4)]  # the last: fewer key-value heads than shards
MORE = [(1, 1, 2, 1), (1, 1, 8, 1), (1, 2, 2, 2)]


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@pytest.mark.parametrize("sizes", [*MESHES, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in MORE)], ids=str)
def test_divided_rows_give_full_attention(sizes, method):
    arguments = rows(B=4, T=32, H=8, K=2)
    with jax.set_mesh(mesh_of(*sizes)):
        found = with_gradients(by(blockwise.kernel(jnp.dtype("float32"), block=4), method), *arguments)
    assert_same(found, with_gradients(full, *arguments))


def test_ring_order_balances_the_causal_mask_and_comes_back():
    x = np.arange(2 * 16).reshape(2, 16)
    with jax.set_mesh(mesh_of(sequence=4)):
        there = jax.jit(ring_order)(x)
        np.testing.assert_array_equal(jax.jit(lambda x: ring_order(ring_order(x), back=True))(x), x)
        # Pieces of two tokens: device 0 has the first and the last, device 3 the two in the middle.
        np.testing.assert_array_equal(there[0], [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9])
        with pytest.raises(ValueError, match="2 x 4 pieces, which does not divide its length 12"):
            ring_order(jnp.zeros((2, 12)))
    assert ring_order(x) is x


def test_ring_sends_blocks_to_neighbours_and_gathers_nothing():
    q, k, v, ids, cotangent = rows(B=1, T=32)

    def both(q, k, v, ids, cotangent):
        return jax.vjp(lambda *x: sharded_attention(*x, ids, kernel=blockwise.kernel(jnp.dtype("float32")),
                                                    method="ring"), q, k, v)[1](cotangent)  # fmt: skip

    mesh = mesh_of(sequence=4)
    row_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding) for x in (q, k, v, ids, cotangent)]
    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(*arguments).compile().as_text()
    assert "collective-permute" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter"))


@pytest.mark.parametrize(
    ("T", "sequence", "H", "K"),
    [(256, 1, 2, 1), pytest.param(512, 2, 2, 1, marks=pytest.mark.slow), pytest.param(1152, 1, 4, 2, marks=pytest.mark.slow)],
)  # 1,152 tokens are three tiles each way
def test_splash_attention_is_full_attention(T, sequence, H, K):
    arguments = rows(B=2, T=T, H=H, K=K, E=64)
    with jax.set_mesh(mesh_of(sequence=sequence)):
        found = with_gradients(by(splash.kernel(jnp.dtype("float32"), interpret=True)), *arguments)
    assert_same(found, with_gradients(full, *arguments), atol=1e-4)


def test_auto_takes_what_suits():
    auto = Compute()
    assert implementation(auto, length=256, head_size=64) == "full"
    assert implementation(auto, length=4096, head_size=64) == "blockwise"
    assert not uses_ring(auto, length=4096, head_size=64)
    with jax.set_mesh(mesh_of(sequence=2)):
        assert implementation(auto, length=256, head_size=64) == "blockwise"
        assert uses_ring(auto, length=256, head_size=64)
        assert not uses_ring(dataclasses.replace(auto, sequence="all_to_all"), length=256, head_size=64)
    assert splash.supports(4096, 128) and not splash.supports(100, 128) and not splash.supports(4096, 32)


def test_splash_by_name_says_what_it_cannot_divide():
    asked = Compute(attention="splash")
    assert implementation(asked, length=256, head_size=64) == "splash"
    for length, head_size in ((100, 64), (256, 32)):
        with pytest.raises(ValueError, match=f"attention=splash: its tiles.* {length} tokens with heads of {head_size};"):
            implementation(asked, length=length, head_size=head_size)
    with jax.set_mesh(mesh_of(sequence=2)):  # a ring works on half-pieces, an exchange of heads on whole rows
        assert implementation(asked, length=512, head_size=64) == "splash"
        with pytest.raises(ValueError, match="pieces of 64 tokens"):
            implementation(asked, length=256, head_size=64)
        assert implementation(dataclasses.replace(asked, sequence="all_to_all"), length=128, head_size=64) == "splash"


@pytest.mark.parametrize(("attention", "sequence"), [
    ("blockwise", "ring"), ("full", "ring"), ("blockwise", "all_to_all")
])  # fmt: skip
def test_the_model_on_divided_rows(tiny, attention, sequence):
    compute = dataclasses.replace(FLOAT32, attention=attention, sequence=sequence)
    params = fresh(table(tiny, head="lm_head"), mesh_of(), seed=0)
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 96, (2, 16)).astype(np.int32)
    ids = rows(B=2, T=16)[3]
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))

    def states(params, compute):
        return hidden_states(params, tokens, ids, positions, config=tiny, compute=compute) * (ids > 0)[..., None]

    wanted = jax.jit(states, static_argnums=1)(params, FLOAT32)
    with jax.set_mesh(mesh_of(sequence=4)):
        program = jax.jit(states, static_argnums=1).lower(jax.device_get(params), compute).compile()
        found = program(jax.device_get(params))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    ways = [word for word in ("collective-permute", "all-to-all") if f" {word}(" in program.as_text()]
    assert ways == {"full": [], "blockwise": ["collective-permute" if sequence == "ring" else "all-to-all"]}[attention]


def test_sizes_of_the_paper_fit_the_kernel():
    for model in SIZES.values():  # the notebooks' size has heads of 32, for which `auto` takes another kernel
        assert splash.supports(model.max_length, model.head_size) == (model.name != "nano"), model.name
