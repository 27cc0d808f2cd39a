"""The model against an independent implementation, and its invariants: cached = uncached, packed = unpacked, counts."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax.model import config as model_config
from llama_jax.model import decode, heads, params
from llama_jax.model.attention import attend
from llama_jax.model.cache import empty_cache
from llama_jax.model.config import FLOAT32, SIZES, Compute, ModelConfig
from llama_jax.model.layers import contract, rms_norm, rope_angles, rotate
from llama_jax.model.rope import RopeScaling, sequence_lengths
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.axes import DECODE, is_spec, partition, shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh

MODEL = dataclasses.replace(
    SIZES["tiny"], vocab_size=96, layers=3, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=32
)


def random_params(config: ModelConfig, head="lm_head", seed=0):
    tree = params.init(params.table(config, head=head), jax.random.key(seed))
    # Larger than the initialiser's, so that a wrong detail moves the logits visibly; norms away from 1.
    noise = jax.random.key(seed + 1)
    return jax.tree.map(lambda x: 5 * x + 0.1 * jax.random.normal(noise, x.shape) * (x.ndim < 3), tree)


def full(tokens):
    B, T = tokens.shape
    return jnp.ones((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(T), (B, T))


def logits_of(tree, tokens, config=MODEL, compute=FLOAT32):
    return heads.logits(tree, hidden_states(tree, tokens, *full(tokens), config=config, compute=compute), compute=compute)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("34b", 33_743_970_304),
        ("70b", 68_976_648_192),
        ("llama1-7b", 6_738_415_616),
        ("llama1-13b", 13_015_864_320),
        ("llama1-33b", 32_528_943_616),
        ("llama1-65b", 65_285_660_672),
    ],
)
def test_parameter_counts_of_the_paper(name, count):
    assert params.count(params.table(SIZES[name], head="lm_head")) == count


@pytest.mark.parametrize("heads_", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(heads_, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(MODEL, heads=heads_[0], kv_heads=heads_[1], tie_embeddings=tied, vocab_size=97)
    tree = random_params(config)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=heads_[0],
            num_key_value_heads=heads_[1], head_dim=8, rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=tied,
            max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    layers, state = tree["trunk"]["layers"], {}
    state["model.embed_tokens.weight"] = tree["trunk"]["embedding"]
    state["model.norm.weight"] = tree["trunk"]["final_norm"]
    state["lm_head.weight"] = tree["trunk"]["embedding"] if tied else tree["lm_head"]["kernel"].T
    for i in range(3):
        prefix = f"model.layers.{i}."
        state[prefix + "input_layernorm.weight"] = layers["attention_norm"][i]
        state[prefix + "post_attention_layernorm.weight"] = layers["ffn_norm"][i]
        for ours, name in (("query", "q"), ("key", "k"), ("value", "v")):
            state[prefix + f"self_attn.{name}_proj.weight"] = layers[ours][i].reshape(32, -1).T
        state[prefix + "self_attn.o_proj.weight"] = layers["output"][i].reshape(-1, 32).T
        for name in ("gate", "up", "down"):
            state[prefix + f"mlp.{name}_proj.weight"] = layers[name][i].T
    theirs.load_state_dict({name: torch.tensor(np.array(x)) for name, x in state.items()})
    tokens = np.random.default_rng(0).integers(0, 97, (2, 17))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(tree, jnp.asarray(tokens), config), expected, atol=1e-4, rtol=1e-4)


def test_cached_decoding_equals_the_uncached_forward_in_rows_of_different_length():
    tree, tokens = random_params(MODEL), jax.random.randint(jax.random.key(3), (2, 12), 0, 96)
    weights = decode.prepare(tree, params.table(MODEL, head="lm_head"), compute=FLOAT32)
    # The first row is three tokens shorter from the start: it gets 5 of the first 8, then both get 1, 2 and 1 more.
    cache = empty_cache(MODEL, batch=2, slots=12, dtype=jnp.float32)
    hidden, cache = decode.prefill(weights, tokens[:, :8], jnp.array([5, 8]), cache, config=MODEL, compute=FLOAT32)
    found = [[hidden[0, :5]], [hidden[1]]]
    for count in (1, 2, 1):
        new = jnp.stack([jnp.pad(row[start : start + count], (0, 2 - count)) for row, start in zip(tokens, cache.lengths)])
        hidden, cache = decode.extend(weights, new, jnp.full((2,), count), cache, config=MODEL, compute=FLOAT32)
        for row in range(2):
            found[row].append(hidden[row, :count])
    assert cache.lengths.tolist() == [9, 12]
    for row, length in enumerate((9, 12)):
        logits = decode.logits(weights, jnp.concatenate(found[row]), compute=FLOAT32)
        np.testing.assert_allclose(logits, logits_of(tree, tokens[row : row + 1, :length])[0], atol=1e-4)


def test_generation_reads_queries_keys_and_values_as_one_matrix_and_outward_ones_turned():
    tree, specs = random_params(MODEL), params.table(MODEL, head="lm_head")
    D, K, E, per_key = MODEL.width, MODEL.kv_heads, MODEL.head_size, MODEL.heads // MODEL.kv_heads
    layer = decode.prepare(tree, specs, compute=FLOAT32)["layers"][1]
    assert not {"query", "key", "value"} & set(layer)
    groups = layer["qkv"].reshape(D, K, per_key + 2, E)
    for name, columns in (("query", groups[:, :, :-2]), ("key", groups[:, :, -2]), ("value", groups[:, :, -1])):
        np.testing.assert_array_equal(columns.reshape(D, -1), tree["trunk"]["layers"][name][1].reshape(D, -1))
    for name in ("output", "down"):
        np.testing.assert_array_equal(layer[name].T, tree["trunk"]["layers"][name][1].reshape(-1, D))


@pytest.mark.parametrize(("tensor", "joined"), [(2, True), (4, False)])
def test_groups_are_divided_over_tensor_unless_it_is_wider_than_they_are_many(tensor, joined):
    tree, tokens = random_params(MODEL), jax.random.randint(jax.random.key(3), (2, 9), 0, 96)
    specs = params.table(MODEL, head="lm_head")
    mesh = make_mesh(MeshConfig(tensor=tensor), devices=jax.devices()[:tensor])
    with jax.set_mesh(mesh):
        weights = decode.preparer(MODEL, FLOAT32)(jax.device_put(tree, shardings(specs, mesh)))
        found = decode.row_logits(weights, tokens, config=MODEL, compute=FLOAT32)
    np.testing.assert_allclose(found, logits_of(tree, tokens), atol=1e-4)
    assert ("qkv" in weights["layers"][0]) == joined

    def check(x, axes):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, partition(x.shape, axes, DECODE, mesh)), x.ndim)

    jax.tree.map(check, weights, decode.axes_of(weights, specs))


def test_rows_without_new_tokens_are_not_read(monkeypatch):
    tree, tokens = random_params(MODEL), jax.random.randint(jax.random.key(3), (2, 12), 0, 96)
    weights = decode.prepare(tree, params.table(MODEL, head="lm_head"), compute=FLOAT32)
    cache = empty_cache(MODEL, batch=2, slots=12, dtype=jnp.float32)
    _, cache = decode.prefill(weights, tokens[:, :8], jnp.array([3, 8]), cache, config=MODEL, compute=FLOAT32)
    asked, attend = [], decode.attend_cached
    monkeypatch.setattr(decode, "attend_cached", lambda q, layer, positions, limit, **how: asked.append(
        (positions, limit)
    ) or attend(q, layer, positions, limit, **how))  # fmt: skip
    _, after = decode.extend(weights, tokens[:, :1], jnp.array([1, 0]), cache, config=MODEL, compute=FLOAT32)
    assert after.lengths.tolist() == [4, 8]
    assert {(tuple(map(int, positions[:, 0])), int(limit)) for positions, limit in asked} == {((3, 0), 4)}


def test_packed_segments_equal_separate_rows_and_padding_changes_nothing():
    tree, tokens = random_params(MODEL), jax.random.randint(jax.random.key(4), (1, 12), 1, 96)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    packed = hidden_states(tree, tokens, segments, positions, config=MODEL, compute=FLOAT32)[0]
    for start, end in ((0, 5), (5, 9)):
        part = tokens[:, start:end]
        alone = hidden_states(tree, part, *full(part), config=MODEL, compute=FLOAT32)[0]
        np.testing.assert_allclose(packed[start:end], alone, atol=1e-5)
    assert np.isfinite(packed).all()


@pytest.mark.parametrize("compute", [
    Compute("float32", "float32", remat="full"),
    Compute("float32", "float32", remat="dots"),
    Compute("float32", "float32", remat="queries"),
    Compute("float32", "float32", remat="attention"),
    Compute("float32", "float32", remat="offload"),
    Compute("float32", "float32", unroll=True, loss_chunks=4),
])  # fmt: skip
def test_ways_of_computing_agree(compute):
    tree, tokens = random_params(MODEL), jax.random.randint(jax.random.key(5), (2, 16), 0, 96)
    weights = jax.random.uniform(jax.random.key(6), (2, 16))

    def loss(p, how):
        hidden = hidden_states(p, tokens, *full(tokens), config=MODEL, compute=how)
        return heads.token_losses(p, hidden, jnp.roll(tokens, -1, 1), weights, compute=how)[0]

    expected, expected_gradient = jax.value_and_grad(loss)(tree, FLOAT32)
    found, gradient = jax.value_and_grad(loss)(tree, compute)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected_gradient)


def test_token_losses_and_their_gradient_equal_the_plain_formula():
    tree = random_params(MODEL)
    hidden = jax.random.normal(jax.random.key(0), (2, 8, 32))
    targets = jax.random.randint(jax.random.key(1), (2, 8), 0, 96)
    weights = jnp.array([[1.0, 0, 0.5, 1, 1, 0, 1, 2]] * 2)

    def plain(kernel, h):
        log_p = jax.nn.log_softmax(h @ kernel)
        return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], 2)[..., 0])

    def ours(kernel, h):
        p = {**tree, "lm_head": {"kernel": kernel}}
        how = dataclasses.replace(FLOAT32, loss_chunks=2)
        return 3 * heads.token_losses(p, h, targets, weights, compute=how)[0]

    kernel = tree["lm_head"]["kernel"]
    expected, expected_gradient = jax.value_and_grad(plain, (0, 1))(kernel, hidden)
    found, gradient = jax.value_and_grad(ours, (0, 1))(kernel, hidden)
    np.testing.assert_allclose(found, 3 * expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b, rtol=1e-4, atol=1e-4), gradient, expected_gradient)


@pytest.mark.parametrize("head", ["token_losses", "log_probabilities"])
def test_a_loss_in_chunks_never_holds_the_scores_of_a_whole_batch(head):
    B, T, D, V = 4, 256, 16, 4096
    kernel, hidden = jax.ShapeDtypeStruct((D, V), jnp.float32), jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    targets, weights = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), jnp.float32)

    def compiled(chunks):
        how = dataclasses.replace(FLOAT32, loss_chunks=chunks)

        def loss(kernel, hidden, targets, weights):
            tree = {"lm_head": {"kernel": kernel}}
            if head == "token_losses":
                return heads.token_losses(tree, hidden, targets, weights, compute=how)[0]
            return jnp.sum(weights * heads.log_probabilities(tree, hidden, targets, compute=how)[0])

        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(kernel, hidden, targets, weights).compile()
        shapes = re.findall(r"f32\[([\d,]+)\]", program.as_text())
        return program.memory_analysis().temp_size_in_bytes, max(math.prod(map(int, shape.split(","))) for shape in shapes)

    (whole, largest), (cut, largest_cut) = compiled(1), compiled(8)
    assert largest == B * T * V and whole >= 4 * B * T * V  # float32
    # An eighth of the scores and of all that is made of them; beside it what does not depend on the chunks: the kernel's
    # gradient before and after a chunk is added, and some arrays of the states' size.
    assert largest_cut == B * T * V // 8
    assert cut <= whole / 8 + 4 * (2 * D * V + 4 * B * T * D) < whole / 4


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_gradient_of_log_probabilities_is_that_of_log_softmax(chunks):
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, hidden = jax.random.normal(keys[0], (8, 24)), jax.random.normal(keys[1], (2, 4, 8))
    targets = jax.random.randint(keys[2], (2, 4), 0, 24)
    how = dataclasses.replace(FLOAT32, loss_chunks=chunks)

    def ours(kernel, hidden):
        tree = {"lm_head": {"kernel": kernel}}
        log_p, entropy = heads.log_probabilities(tree, hidden, targets, temperature=0.7, compute=how)
        return jnp.sum(jnp.sin(log_p)), entropy

    def plain(kernel, hidden):
        log_p = jax.nn.log_softmax(hidden @ kernel / 0.7)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        return jnp.sum(jnp.sin(jnp.take_along_axis(log_p, targets[..., None], axis=-1))), entropy

    found, expected = (jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(kernel, hidden) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_z_loss_by_hand():
    # Logits (log 1, log 3): normaliser log 4, p(target 1) = 3/4. Loss -log 3/4 + z (log 4)^2; its gradient by the logits is
    # p (1 + 2 z log 4) - (0, 1).
    tree, hidden = {"lm_head": {"kernel": jnp.eye(2)}}, jnp.log(jnp.array([[[1.0, 3.0]]]))

    def ours(h):
        return heads.token_losses(tree, h, jnp.array([[1]]), jnp.ones((1, 1)), compute=FLOAT32, z_loss=0.1)[0]

    found, gradient = jax.value_and_grad(ours)(hidden)
    log4 = np.log(4)
    np.testing.assert_allclose(found, -np.log(0.75) + 0.1 * log4**2, rtol=1e-6)
    np.testing.assert_allclose(ours(hidden), found, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], np.array([0.25, 0.75]) * (1 + 0.2 * log4) - [0, 1], rtol=1e-5)


def test_log_probabilities_and_entropy_by_hand():
    tree = {"lm_head": {"kernel": jnp.eye(3)}}
    hidden = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    log_p, entropy = heads.log_probabilities(tree, hidden, jnp.array([[1]]), compute=FLOAT32)
    np.testing.assert_allclose(log_p, [[np.log(0.25)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[1.5 * np.log(2)]], rtol=1e-6)
    sharp, _ = heads.log_probabilities(tree, hidden, jnp.array([[0]]), temperature=0.5, compute=FLOAT32)
    np.testing.assert_allclose(sharp, [[np.log(0.25 / 0.375)]], rtol=1e-6)  # squares: 1/4, 1/16, 1/16


def test_contract_has_the_gradients_of_einsum_in_the_operands_type():
    x, w = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    plain = jax.grad(lambda x, w: jnp.sum(jnp.sin(jnp.einsum("btd,df->btf", x, w))), (0, 1))(x, w)
    ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(contract("btd,df->btf", x, w, jnp.float32))), (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, plain)
    # In bfloat16 every product of the backward pass has two bfloat16 operands: none is widened to float32.
    text = str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(contract("btd,df->btf", x, w, jnp.bfloat16))))(w))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("f32[" in line.split("=")[0] for line in products)


def test_rms_norm_and_rotation_by_hand():
    x = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(rms_norm(x, jnp.array([1.0, 2.0]), eps=0.0), [3 / 12.5**0.5, 8 / 12.5**0.5], rtol=1e-6)
    angles = rope_angles(jnp.array([[1]]), 2, theta=10_000.0)  # one pair, frequency 1: a rotation by 1 radian
    turned = rotate(jnp.array([[[[1.0, 0.0]]]]), angles)
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(1), np.sin(1)], rtol=1e-6)


def test_the_gradient_of_a_norms_weight_is_summed_in_float32():
    x = jnp.ones((4096, 4), jnp.bfloat16)  # bfloat16 has no 257
    gradient = jax.grad(lambda weight: jnp.sum(rms_norm(x, weight, eps=0.0).astype(jnp.float32)))(jnp.ones(4))
    np.testing.assert_array_equal(gradient, 4096)
    text = str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(rms_norm(x, w, eps=0.0).astype(jnp.float32))))(jnp.ones(4)))
    sums = [line for line in text.splitlines() if "reduce_sum" in line and "axes=(0,)" in line]
    assert sums and all(":f32[" in line for line in sums)  # and so is what devices exchange
    # With float32 activations both gradients are those of the plain formula.
    x, weight = jax.random.normal(jax.random.key(0), (3, 5, 4)), jnp.arange(1.0, 5)

    def plain(x, weight):
        return jnp.sum(jnp.sin(x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * weight))

    ours = jax.grad(lambda x, weight: jnp.sum(jnp.sin(rms_norm(x, weight, eps=1e-5))), (0, 1))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, jax.grad(plain, (0, 1))(x, weight))


def products(jaxpr):
    """All dot_generals of a program, those of inner programs too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(getattr(inner, "jaxpr", None), "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("attention", ["full", "blockwise"])
def test_float32_products_are_float32_on_every_platform(attention):
    """A TPU would round the operands to bfloat16: products of float32 say that they mean it, those of bfloat16 nothing."""
    tree, tokens = random_params(MODEL), jnp.ones((2, 8), jnp.int32)
    weights = decode.prepare(tree, params.table(MODEL, head="lm_head"), compute=FLOAT32)
    reward = random_params(MODEL, head="reward_head")

    def losses(tree, compute):
        hidden = hidden_states(tree, tokens, *full(tokens), config=MODEL, compute=compute)
        log_p, _ = heads.log_probabilities(tree, hidden, tokens, temperature=1.0, compute=compute)
        loss, _ = heads.token_losses(tree, hidden, tokens, jnp.ones((2, 8)), compute=compute)
        return loss + jnp.sum(log_p)

    def generation(weights):
        cache = empty_cache(MODEL, batch=2, slots=8, dtype=jnp.float32)
        hidden, cache = decode.prefill(weights, tokens[:, :4], jnp.array([4, 3]), cache, config=MODEL, compute=compute)
        hidden, cache = decode.extend(weights, tokens[:, :1], jnp.ones(2, jnp.int32), cache, config=MODEL, compute=compute)
        return decode.logits(weights, hidden[:, 0], compute=compute)

    def score(tree):
        return heads.scores(tree, hidden_states(tree, tokens, *full(tokens), config=MODEL, compute=compute), head="reward_head")

    compute = dataclasses.replace(FLOAT32, attention=attention)
    made = jax.make_jaxpr(jax.grad(functools.partial(losses, compute=compute)))(tree), jax.make_jaxpr(generation)(weights)
    for program in (*made, jax.make_jaxpr(jax.grad(lambda tree: jnp.sum(score(tree))))(reward)):
        found = list(products(program))
        assert len(found) > 8
        for product in found:
            assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, product
    bfloat16 = dataclasses.replace(compute, matmul="bfloat16", activations="bfloat16")
    found = list(products(jax.make_jaxpr(jax.grad(functools.partial(losses, compute=bfloat16)))(tree)))
    assert found and all(product.params["precision"] is None for product in found)


def test_generation_takes_rows_of_lengths_that_splash_attention_cannot_divide():
    tree, tokens = random_params(MODEL), jax.random.randint(jax.random.key(3), (2, 12), 0, 96)
    weights = decode.prepare(tree, params.table(MODEL, head="lm_head"), compute=FLOAT32)
    splash = dataclasses.replace(FLOAT32, attention="splash")
    cache = empty_cache(MODEL, batch=2, slots=12, dtype=jnp.float32)
    found, _ = decode.prefill(weights, tokens, jnp.array([12, 12]), cache, config=MODEL, compute=splash)
    np.testing.assert_array_equal(found, decode.row_states(weights, tokens, config=MODEL, compute=splash))
    with pytest.raises(ValueError, match="attention=splash: its tiles do not divide"):  # a training config's is its word
        logits_of(tree, tokens, compute=splash)


def test_full_rows_of_prepared_weights_know_their_length():
    """Dynamic scaling of positions follows it (`test_interop.py` has the numbers of transformers for training's path)."""
    config = dataclasses.replace(MODEL, max_length=8, rope_scaling=RopeScaling("dynamic", 4.0, 8))
    tree, tokens = random_params(config), jax.random.randint(jax.random.key(3), (1, 19), 0, 96)
    weights = decode.prepare(tree, params.table(config, head="lm_head"), compute=FLOAT32)
    found = decode.row_logits(weights, tokens, config=config, compute=FLOAT32)
    np.testing.assert_allclose(found, logits_of(tree, tokens, config), atol=1e-4)
    assert np.abs(found - logits_of(tree, tokens)).max() > 0.1


def test_tables_that_share_a_leaf_draw_it_alike():
    policy = params.init(params.table(MODEL, head="lm_head"), jax.random.key(0))
    reward = params.init(params.table(MODEL, head="reward_head"), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, policy["trunk"], reward["trunk"])
    assert reward["reward_head"]["kernel"].shape == (32,)


def test_flops_of_the_7b_are_six_per_weight_plus_attention():
    flops = params.flops_per_token(SIZES["7b"], length=4096)
    assert flops == 6 * (6_738_415_616 - 32_000 * 4096) + 6 * 32 * 4096 * 4096


def test_the_flax_module_gives_the_functions_numbers():
    from llama_jax.model.flax_module import Llama

    tokens = jax.random.randint(jax.random.key(5), (2, 8), 0, 96)
    module = Llama(MODEL, FLOAT32)
    variables = module.init(jax.random.key(0), tokens)
    specs = params.table(MODEL, head="lm_head")
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(lambda spec: spec.shape, specs, is_leaf=is_spec)
    tree = random_params(MODEL)
    np.testing.assert_array_equal(module.apply({"params": tree}, tokens), logits_of(tree, tokens))


@pytest.mark.parametrize(
    ("platform", "has", "expected"), [("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("tpu", False, "bfloat16")]
)
def test_auto_multiplies_in_what_the_machine_has(monkeypatch, platform, has, expected):
    monkeypatch.setattr(model_config, "platform", lambda: platform)
    monkeypatch.setattr(model_config, "multiplies_bfloat16", lambda: has)
    assert Compute(matmul="auto").matmul_dtype == jnp.dtype(expected)
    assert Compute(matmul="float32").matmul_dtype == jnp.float32 and Compute(matmul="bfloat16").matmul_dtype == jnp.bfloat16


def test_sequence_lengths_are_those_of_segments_in_linear_memory():
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 9, (3, 40)).astype(np.int32) * 1000 - 2000  # any numbers, in any order
    positions = draw.integers(0, 99, (3, 40)).astype(np.int32)
    expected = [[max(p for i, p in zip(*row, strict=True) if i == one) + 1 for one in row[0]] for row in zip(ids, positions)]
    dynamic = RopeScaling("dynamic", 2.0, 8)
    np.testing.assert_array_equal(sequence_lengths(ids, positions, dynamic), expected)
    assert sequence_lengths(ids, positions, None) is sequence_lengths(ids, positions, RopeScaling("linear", 2.0)) is None

    long = jax.ShapeDtypeStruct((2, 32_768), jnp.int32)
    compiled = jax.jit(lambda ids, positions: sequence_lengths(ids, positions, dynamic)).lower(long, long).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2 * 32_768


def test_a_loss_in_no_chunks_is_refused():
    with pytest.raises(ValueError, match="loss_chunks: expected at least 1, got 0"):
        Compute(loss_chunks=0)


@pytest.mark.parametrize("field, value", [("sequence", "rng"), ("attention", "flash"), ("remat", "all"), ("matmul", "fp16")])
def test_a_way_of_computing_that_there_is_not_is_refused_at_once(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected one of '.*', got '{value}'"):
        Compute(**{field: value})


@pytest.mark.parametrize("field, value", [("kv_heads", 0), ("kv_heads", -2), ("layers", 0), ("width", -1), ("vocab_size", 0)])
def test_a_model_of_nothing_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^tiny.{field}: expected at least 1, got {value}"):
        dataclasses.replace(SIZES["tiny"], **{field: value})


def test_mistaken_heads_and_shapes_are_named(tiny):
    with pytest.raises(ValueError, match="head: expected one of lm_head, reward_head, value_head, got 'lmhead'"):
        params.table(tiny, head="lmhead")
    q, kv = jnp.zeros((1, 2, 4, 8)), jnp.zeros((1, 2, 3, 8))
    with pytest.raises(ValueError, match="for each key-value head, got 4 and 3"):
        attend(q, kv, kv, jnp.ones((1, 2, 2), bool), dtype=jnp.float32)
    ids = jnp.ones(4, jnp.int32)
    for tokens, positions in ((ids, ids), (ids[None], ids)):
        with pytest.raises(ValueError, match=r"of one shape \[B, T\]; got tokens"):
            hidden_states({"trunk": {}}, tokens, tokens, positions, config=tiny, compute=FLOAT32)
