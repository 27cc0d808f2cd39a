"""Weights in and out: parity with transformers, bitwise round trips, and errors that name the tensor."""

import dataclasses
import functools
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax import convert
from llama_jax.interop import huggingface, meta, names
from llama_jax.interop.formats import open_source
from llama_jax.interop.load import load_params
from llama_jax.interop.source import named
from llama_jax.interop.torch_file import read_header
from llama_jax.model import heads, params
from llama_jax.model.cache import empty_cache
from llama_jax.model.config import FLOAT32, SIZES, ModelConfig, ffn_size
from llama_jax.model.rope import RopeScaling, stretched
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.axes import TRAIN, is_spec, partition
from llama_jax.parallel.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(
    name="test", vocab_size=96, layers=3, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=64, norm_eps=1e-5
)
SHAPES = {
    "MHA": {"kv_heads": 4},
    "GQA": {},
    "MQA": {"kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "odd": {"vocab_size": 97, "width": 36, "heads": 3, "kv_heads": 1, "head_size": 10, "ffn": 53, "rope_theta": 5e5},
    "square": {"vocab_size": 32, "ffn": 32, "kv_heads": 4},  # every matrix: shapes do not tell which way one lies
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 16, 0.5, 2.0)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 16, 1.0, 32.0, 1.25)},
}


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def theirs(config: ModelConfig, *, seed=0, reward=False):
    """A random model of transformers, norms away from 1."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    kind = transformers.LlamaForSequenceClassification if reward else transformers.LlamaForCausalLM
    model = kind(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.ffn,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
            head_dim=config.head_size, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings, max_position_embeddings=config.max_length, initializer_range=0.2,
            pad_token_id=0, **({"num_labels": 1} if reward else {}),
            **({"rope_parameters": huggingface.rope_json(config)} if config.rope_scaling else {}),
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


# Compiling takes most of the time of these models, and optimising most of that.
quickly = functools.partial(jax.jit, static_argnames="config", compiler_options={"xla_backend_optimization_level": 0})


def states(tree, tokens, config):
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return hidden_states(tree, tokens, jnp.ones((B, T), jnp.int32), positions, config=config, compute=FLOAT32)


ours_hidden = quickly(states)


@quickly
def ours_logits(tree, tokens, config):
    return heads.logits(tree, states(tree, tokens, config), compute=FLOAT32)


@quickly
def packed_logits(tree, tokens, segments, positions, config):
    hidden = hidden_states(tree, tokens, segments, positions, config=config, compute=FLOAT32)
    return heads.logits(tree, hidden, compute=FLOAT32)


def random_tree(config):
    """Random parameters of a language model, drawn by numpy, which compiles nothing."""
    rng, specs = np.random.default_rng(0), params.table(config, head="lm_head")
    return jax.tree.map(lambda spec: rng.normal(0, 0.1, spec.shape).astype(np.float32), specs, is_leaf=is_spec)


def random_tokens(config):
    return np.random.default_rng(1).integers(1, config.vocab_size, (2, 19))


def random_values(source, dtype, seed=0):
    """Random tensors of a source's shapes, in our layout."""
    rng = np.random.default_rng(seed)
    return {row: rng.standard_normal(row.ours).astype(dtype) for row in source}


def write_meta(directory: Path, config: ModelConfig, *, shards=1, dtype=ml_dtypes.bfloat16, head="lm_head") -> dict:
    directory.mkdir(parents=True)
    writer = meta.Writer(directory, config, head, np.dtype(dtype), shards=shards)
    values = random_values(writer.tensors, dtype)
    for row, x in values.items():
        writer.add(row, x)
    writer.close()
    return values


# Parity with transformers


@pytest.mark.parametrize("shape", SHAPES)
def test_their_model_gives_the_same_logits_here_layer_by_layer(shape, tmp_path):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(MODEL, **SHAPES[shape])
    model, tokens = theirs(config), random_tokens(config)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert dataclasses.replace(source.config, name="test") == config
    tree = load_params(source, one_device())
    with torch.no_grad():
        expected = model(torch.tensor(tokens), output_hidden_states=True)
        np.testing.assert_allclose(ours_logits(tree, tokens, config), expected.logits.numpy(), atol=1e-4, rtol=1e-4)
        # The stream after k layers, under the final norm, is what a model of the first k layers gives.
        for k in range(1, config.layers):
            cut = jax.tree.map(lambda x, k=k: np.asarray(x)[:k], tree["trunk"]["layers"])
            found = ours_hidden({"trunk": {**tree["trunk"], "layers": cut}}, tokens, dataclasses.replace(config, layers=k))
            np.testing.assert_allclose(found, model.model.norm(expected.hidden_states[k]).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_give_their_logits_in_float32(dtype, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, tokens = theirs(MODEL), random_tokens(MODEL)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert {source.dtype_of(row).name for row in source.tensors} == {dtype}
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = again(torch.tensor(tokens)).logits.numpy()
    found = ours_logits(load_params(source, one_device()), tokens, MODEL)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["GQA", "tied", "odd", "yarn", "square"])
def test_what_we_export_gives_our_logits_there(shape, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(MODEL, **SHAPES[shape])
    tree, tokens = random_tree(config), random_tokens(config)
    export(tree, config, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours_logits(tree, tokens, config), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scaling", [
    RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 8192, 1.0, 4.0), RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
    RopeScaling("yarn", 16.0, 4096, 1.0, 32.0, 1.277),
], ids=str)  # fmt: skip
def test_scaled_frequencies_are_those_of_transformers(scaling):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = dataclasses.replace(SIZES["7b"], rope_theta=5e5, rope_scaling=scaling)
    described = transformers.LlamaConfig(
        hidden_size=config.width, num_attention_heads=config.heads, rope_parameters=huggingface.rope_json(config)
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS[scaling.kind](described, "cpu")
    np.testing.assert_allclose(stretched(128, 5e5, scaling), expected.numpy(), rtol=1e-5)
    assert magnitude == scaling.magnitude


def test_dynamic_scaling_follows_each_sequences_own_length(tmp_path):
    """Rows beyond the old context, alone, packed, and within it; transformers scales a whole batch by its longest row."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(MODEL, max_length=8, rope_scaling=RopeScaling("dynamic", 4.0, 8))
    model = theirs(config)
    model.save_pretrained(tmp_path / "in")
    source = open_source(tmp_path / "in")
    assert dataclasses.replace(source.config, name="test") == config
    tree, tokens = load_params(source, one_device()), random_tokens(config)[:1]
    lengths = (8, 9, 19)  # in this order: transformers keeps the frequencies of the longest row that it has seen
    rows = [tokens[:, :length] for length in lengths]
    with torch.no_grad():
        expected = [model(torch.tensor(row)).logits.numpy() for row in rows]
    for row, logits in zip(rows, expected):
        np.testing.assert_allclose(ours_logits(tree, row, config), logits, atol=1e-4, rtol=1e-4)
    plain = ours_logits(tree, rows[2], dataclasses.replace(config, rope_scaling=None))
    assert np.abs(plain - expected[2]).max() > 0.1
    # All in one row, each keeps its own length.
    packed = np.concatenate(rows, axis=1)
    segments, positions = np.repeat([1, 2, 3], lengths)[None], np.concatenate([np.arange(n) for n in lengths])[None]
    found = packed_logits(tree, packed, segments, positions, config)
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=1e-4, rtol=1e-4)
    # Out again, and what cannot be said or done is refused.
    assert huggingface.rope_json(config) == {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 4.0}
    longer = dataclasses.replace(config, max_length=32)
    with pytest.raises(ValueError, match="takes max_length 32 for the old context of its rotary positions, which is 8"):
        huggingface.rope_json(longer)
    with pytest.raises(ValueError, match="beyond 8 tokens, which generation cannot follow: expected a max_length of at most"):
        empty_cache(longer, batch=1, slots=16, dtype=jnp.float32)
    empty_cache(config, batch=1, slots=8, dtype=jnp.float32)


def test_tied_embeddings_are_written_twice_into_metas_layout(tmp_path):
    config = dataclasses.replace(MODEL, tie_embeddings=True)
    tree, tokens = random_tree(config), random_tokens(config)
    export(tree, config, tmp_path / "meta", to="meta", shards=2)
    source = open_source(tmp_path / "meta")
    assert not source.config.tie_embeddings
    again = load_params(source, one_device())
    np.testing.assert_array_equal(again["lm_head"]["kernel"], tree["trunk"]["embedding"].T)
    found = ours_logits(again, tokens, dataclasses.replace(config, tie_embeddings=False))
    np.testing.assert_allclose(found, ours_logits(tree, tokens, config), atol=1e-5)


def test_metas_layout_says_that_it_loses_the_context(tmp_path, caplog):
    export(random_tree(MODEL), MODEL, tmp_path / "meta", to="meta")
    assert open_source(tmp_path / "meta").config.max_length == 4096
    (said,) = [record.getMessage() for record in caplog.records if "is lost" in record.getMessage()]
    assert "params.json: the context of 64 tokens is lost" in said and said.endswith("read again it is 4096")


def export(tree, config, directory, head="lm_head", to="huggingface", **how):
    """Parameters to another format's files, by way of a checkpoint of ours."""
    from llama_jax.interop import ours

    ours.write(directory.with_suffix(".ours"), tree, config, tokenizer="", origin={})
    convert.run(directory.with_suffix(".ours"), directory, to=to, tokenizer="none", quiet=True, **how)


def test_reward_models_score_alike_in_both_directions(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from llama_jax.reward.score import scorer

    model, tokens = theirs(MODEL, reward=True), random_tokens(MODEL)
    model.save_pretrained(tmp_path / "in")
    source = open_source(tmp_path / "in")
    assert source.head == "reward_head"
    tree = load_params(source, one_device())
    found = scorer(MODEL, FLOAT32)(tree, jnp.asarray(tokens), jnp.ones_like(tokens))
    with torch.no_grad():
        np.testing.assert_allclose(found, model(torch.tensor(tokens)).logits[:, 0].numpy(), atol=1e-4, rtol=1e-4)
    convert.run(tmp_path / "in", tmp_path / "out", to="huggingface", tokenizer="none", quiet=True)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(again) is transformers.LlamaForSequenceClassification
    with torch.no_grad():
        np.testing.assert_allclose(found, again(torch.tensor(tokens)).logits[:, 0].numpy(), atol=1e-4, rtol=1e-4)
    # Meta released none; our files in that layout carry the same bits back.
    convert.run(tmp_path / "out", tmp_path / "meta", to="meta", tokenizer="none", shards=2, quiet=True)
    convert.run(tmp_path / "meta", tmp_path / "back", to="huggingface", tokenizer="none", quiet=True)
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_an_exported_reward_model_pads_with_another_piece_than_eos(tmp_path):
    """As SmolLM2's would: its padding is its EOS, and `transformers` scores the last token that is not padding."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from llama_jax.reward.score import scorer

    names_of = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(["the loop"], tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=names_of))
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words/tokenizer.json"))
    said = {"bos_token": names_of[1], "eos_token": names_of[2], "unk_token": names_of[0], "pad_token": names_of[2]}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "words" / name).write_text(json.dumps(said))
    theirs(MODEL, reward=True).save_pretrained(tmp_path / "in")
    convert.run(tmp_path / "in", tmp_path / "out", to="huggingface", tokenizer=tmp_path / "words", quiet=True)
    tokens = np.array([[1, 5, 6, 7, 8, 2], [1, 9, 10, 2, 0, 0]])  # they end in EOS, the second is padded
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    tree = load_params(open_source(tmp_path / "out"), one_device())
    found = scorer(MODEL, FLOAT32)(tree, jnp.asarray(tokens), jnp.asarray(mask))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits[:, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert model.config.pad_token_id == transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 0
    # A language model's ids are those of the config that it came with.
    theirs(MODEL).save_pretrained(tmp_path / "lm")
    convert.run(tmp_path / "lm", tmp_path / "lm_out", to="huggingface", tokenizer=tmp_path / "words", quiet=True)
    assert json.loads((tmp_path / "lm_out/config.json").read_text())["pad_token_id"] == 0


def reference_logits(state: dict[str, np.ndarray], tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Meta's model in numpy as its code reads: adjacent pairs as complex numbers, weights [out, in], key heads repeated."""
    E, T = config.head_size, len(tokens)
    turn = np.exp(1j * np.outer(np.arange(T), config.rope_theta ** (-np.arange(0, E, 2) / E)))

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * weight

    def rotated(x):
        pairs = x.reshape(T, -1, E // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    x = state["tok_embeddings.weight"][tokens]
    for i in range(config.layers):
        layer = {k.removeprefix(f"layers.{i}."): w for k, w in state.items() if k.startswith(f"layers.{i}.")}
        h = norm(x, layer["attention_norm.weight"])
        q, k, v = (
            (h @ layer[f"attention.w{n}.weight"].T).reshape(T, -1, E) for n in "qkv"
        )
        repeat = config.heads // config.kv_heads
        q, k, v = rotated(q), np.repeat(rotated(k), repeat, axis=1), np.repeat(v, repeat, axis=1)
        scores = np.einsum("the,she->hts", q, k) / np.sqrt(E) + np.triu(np.full((T, T), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,she->the", weights, v).reshape(T, -1) @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        gate = h @ layer["feed_forward.w1.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["feed_forward.w3.weight"].T)) @ layer["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_files_give_the_logits_of_metas_code(shards, tmp_path):
    write_meta(tmp_path / "meta", MODEL, shards=shards, dtype=np.float32)
    files = [read_header(tmp_path / f"meta/consolidated.{i:02d}.pth") for i in range(shards)]
    # Fact sheet 1.4, spelled out once more: axis 0 or 1 by name, norms are copies.
    state = {}
    for name in files[0]:
        parts = [file[name].read() for file in files]
        if "norm" in name:
            state[name] = parts[0]
        else:
            state[name] = np.concatenate(parts, axis=int(any(n in name for n in (".wo.", ".w2.", "tok_embeddings"))))
    tree, tokens = load_params(open_source(tmp_path / "meta"), one_device()), random_tokens(MODEL)[:1]
    expected = reference_logits({k: v.astype(np.float64) for k, v in state.items()}, tokens[0], MODEL)
    np.testing.assert_allclose(ours_logits(tree, tokens, MODEL)[0], expected, atol=2e-3, rtol=1e-3)


# Round trips


@pytest.mark.parametrize("shards", [1, 2])
def test_meta_ours_hugging_face_ours_meta_is_bitwise(shards, tmp_path):
    values = write_meta(tmp_path / "0", MODEL, shards=shards)
    for i, to in enumerate(("llama_jax", "huggingface", "llama_jax", "meta")):
        how = {"shards": shards} if to == "meta" else {}
        done = convert.run(tmp_path / str(i), tmp_path / str(i + 1), to=to, tokenizer="none", quiet=True, **how)
        assert done["dtype"] == "bfloat16"
    for i in range(shards):
        name = f"consolidated.{i:02d}.pth"
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()
    assert json.loads((tmp_path / "0/params.json").read_text()) == json.loads((tmp_path / "4/params.json").read_text())
    source = open_source(tmp_path / "2")
    for row, x in values.items():
        (other,) = (r for r in source.tensors if (r.path, r.layer) == (row.path, row.layer))
        assert source.read(other).tobytes() == x.tobytes()


def test_torch_reads_our_pth_and_we_read_torchs(tmp_path):
    torch = pytest.importorskip("torch")
    values = write_meta(tmp_path / "meta", MODEL)
    state = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True, mmap=True)
    for row, x in values.items():
        np.testing.assert_array_equal(state[row.name].float().numpy(), row.from_ours(x).astype(np.float32))
    # A module's state dict hangs `_metadata` on an OrderedDict; views share one storage.
    module = torch.nn.Linear(3, 4, dtype=torch.float16)
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({**module.state_dict(), "part": whole[1:]}, tmp_path / "views.pth")
    torch.save(module.state_dict(), tmp_path / "module.pth")
    found = read_header(tmp_path / "views.pth")
    np.testing.assert_array_equal(found["part"].read(), whole[1:].numpy())
    np.testing.assert_array_equal(read_header(tmp_path / "module.pth")["weight"].read(), module.weight.detach().numpy())


def test_the_safetensors_library_agrees_with_our_files(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    values = write_meta(tmp_path / "meta", MODEL, dtype=np.float16)
    done = convert.run(
        tmp_path / "meta", tmp_path / "hf", to="huggingface", tokenizer="none", shard_bytes=20_000, quiet=True
    )
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert done["dtype"] == "float16" and len(files) > 2
    assert all(file.stat().st_size < 30_000 for file in files)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    state = {}
    for file in files:
        part = numpy_files.load_file(file)
        assert {index["weight_map"][name] for name in part} == {file.name}
        state |= part
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in state.values())
    for row in names.tensors(MODEL, "lm_head", "huggingface"):
        (x,) = (x for other, x in values.items() if (other.path, other.layer) == (row.path, row.layer))
        np.testing.assert_array_equal(state[row.name], row.from_ours(x))


@pytest.mark.parametrize("file_format", names.FORMATS)
def test_every_parameter_has_a_name_and_its_transformation_an_inverse(file_format):
    for head in ("lm_head", "reward_head"):
        rows = names.tensors(MODEL, head, file_format)
        assert len({row.name for row in rows}) == len(rows)
        assert sum(np.prod(row.shape) for row in rows) == params.count(params.table(MODEL, head=head))
        for row in rows:
            x = np.arange(np.prod(row.ours)).reshape(row.ours)
            assert row.from_ours(x).shape == row.shape
            np.testing.assert_array_equal(row.to_ours(row.from_ours(x)), x)


@pytest.mark.parametrize("size", ["7b", "13b", "34b", "70b"])
def test_a_70b_is_planned_as_the_releases_are(size, tmp_path):
    config, shards = SIZES[size], {"7b": 1, "13b": 2, "34b": 4, "70b": 8}[size]
    found = meta.params_json(config)
    wide = {"70b": {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}}.get(size, {"multiple_of": 256})
    assert {key: found[key] for key in ("multiple_of", "ffn_dim_multiplier") if key in found} == wide
    (tmp_path / "params.json").write_text(json.dumps(found))
    assert meta.read_config(tmp_path / "params.json", vocab_size=32_000, ffn=config.ffn) == config
    rows = {row.name: row for row in names.tensors(config, "lm_head", "meta")}
    assert rows["layers.0.feed_forward.w2.weight"].shape == (config.width, config.ffn)
    assert all(row.split is None or row.shape[row.split] % shards == 0 for row in rows.values())


def test_any_feed_forward_width_has_params():
    for ffn in (1, 47, 53, 176, 1536, 704, 28672):
        fields = meta._ffn(576, ffn)
        assert ffn_size(576, multiplier=fields.get("ffn_dim_multiplier"), multiple_of=fields["multiple_of"]) == ffn


def test_presets_are_recognised_by_shape():
    assert named(dataclasses.replace(SIZES["7b"], name="x")) is SIZES["7b"]
    assert named(dataclasses.replace(SIZES["llama1-7b"], name="x", max_length=9), any_length=True) is SIZES["llama1-7b"]
    assert named(MODEL) is MODEL


# Into shards


def test_tensors_stream_into_their_shards(tmp_path):
    write_meta(tmp_path / "meta", MODEL)
    source = open_source(tmp_path / "meta")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    sharded, whole = load_params(source, mesh), load_params(source, one_device(), dtype="bfloat16")
    specs = params.table(MODEL, head="lm_head")

    def same(spec, x, y):
        assert x.sharding.spec == partition(spec.shape, spec.axes, TRAIN, mesh) and x.dtype == jnp.float32
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, y.astype(jnp.float32))

    jax.tree.map(same, specs, sharded, whole, is_leaf=is_spec)


# Errors name the tensor, and nothing is written


@pytest.fixture
def hf(tmp_path):
    """A directory of Hugging Face's files, without transformers."""
    write_meta(tmp_path / "meta", MODEL)
    convert.run(tmp_path / "meta", tmp_path / "hf", to="huggingface", tokenizer="none", shard_bytes=30_000, quiet=True)
    return tmp_path / "hf"


def refused(path: Path, match: str, error=ValueError, **how):
    output = path.parent / "output"
    with pytest.raises(error, match=match):
        convert.run(path, output, **{"to": "huggingface", "tokenizer": "none", "quiet": True, **how})
    assert not output.exists() and not list(path.parent.glob(".output*"))


def edit_header(file: Path, change) -> None:
    """Rewrites a safetensors header in place of the old one, padded to its length."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    file.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def test_damaged_files_of_hugging_face(hf):
    files = sorted(hf.glob("*.safetensors"))
    index = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    last = [name for name, file in index.items() if file == files[1].name][-1]
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-10])
    refused(hf, rf"truncated: tensor {last} should end at byte")
    files[1].write_bytes(whole + b"xx")
    refused(hf, f"{files[1].name}: mis-sized: 2 bytes lie behind its last tensor")
    files[1].write_bytes(whole)

    edit_header(files[1], lambda header: header[last].update(shape=[1, 2]))
    refused(hf, f"tensor {last} of shape .1, 2. and type BF16 needs 4 bytes")
    files[1].write_bytes(whole)
    edit_header(files[1], lambda header: header.pop(last))
    files[1].write_bytes(files[1].read_bytes()[: -2 * MODEL.width])
    refused(hf, f"tensor {last} is missing")
    files[1].write_bytes(whole)

    x = bytearray(whole)
    x[-2:] = b"\xc0\x7f"  # the last element becomes NaN
    files[1].write_bytes(bytes(x))
    refused(hf, rf"tensor {last} holds nan at \[")
    refused(hf, f"tensor {last} holds nan", to="llama_jax")
    files[1].write_bytes(whole)

    files[1].rename(hf / "elsewhere")
    refused(hf, f"{files[1].name}: missing; .* puts tensor", FileNotFoundError)
    (hf / "elsewhere").rename(files[1])
    convert.run(hf, hf.parent / "fine", to="huggingface", tokenizer="none", quiet=True)


def test_a_full_disk_is_named_with_its_file_and_nothing_is_left(hf, monkeypatch):
    monkeypatch.setattr(huggingface, "WEIGHTS", "/dev/full")
    refused(hf, r"No space left on device: '/dev/full'", OSError)


def test_tensors_that_are_not_the_configs(hf):
    config = json.loads((hf / "config.json").read_text())

    def with_fields(**fields):
        (hf / "config.json").write_text(json.dumps({**config, **fields}))

    with_fields(num_hidden_layers=2)
    refused(hf, r"tensor model.layers.2.\S+ of shape .* is not part of this model \(and 8 more\)")
    with_fields(num_hidden_layers=4)
    refused(hf, r"tensor model.layers.3.input_layernorm.weight of shape \[32\] is missing \(and 8 more\)")
    with_fields(intermediate_size=50)
    refused(hf, r"tensor model.layers.0.mlp.gate_proj.weight has shape \[48, 32\], the config asks for \[50, 32\]")
    with_fields(tie_word_embeddings=True)
    refused(hf, "tie_word_embeddings is true, but tensor lm_head.weight differs")
    with_fields(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5})
    refused(hf, "low_freq_factor is missing, expected a positive float")
    with_fields(rope_scaling={"type": "longrope", "factor": 2.0}, rope_parameters=None)
    refused(hf, "rope_type is 'longrope'; rotary positions are computed here as one of 'default', 'linear', ")
    with_fields(rope_parameters={"rope_type": "yarn", "factor": 2.0, "mscale": 0.7})
    refused(hf, "mscale is 0.7, a feature of rope_type 'yarn' not computed here")
    with_fields(model_type="mistral")
    refused(hf, "model_type is 'mistral'; the Llama architecture here has 'llama'")
    with_fields(attention_bias=True)
    refused(hf, "attention_bias is True")
    with_fields(hidden_size=None)
    refused(hf, "hidden_size is missing, expected a positive int")
    with_fields(architectures=["LlamaForSequenceClassification"])
    refused(hf, "config.json: num_labels is 2; a reward model has 1")  # so many where no field says it
    with_fields(architectures=["LlamaForSequenceClassification"], num_labels=1)
    refused(hf, "tensor score.weight of shape .1, 32. is missing")
    for fields, words in (
        ({"rope_scaling": "linear"}, "config.json: rope_scaling is 'linear', expected an object"),
        ({"rope_parameters": None, "rope_theta": "abc"}, "config.json: rope_theta is 'abc', expected a positive float"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"config.json: rope_type is \['yarn'\]"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "beta_fast is 'x', expected a positive"),
        ({"rope_scaling": {"factor": 4.0}}, "config.json: rope_scaling.factor is 4.0, expected rope_type beside it to be one"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "config.json: rope_parameters.factor is 4.0, expected"),
        ({"rope_parameters": {"full_attention": {"factor": 4.0}}}, "rope_parameters.full_attention is {'factor': 4.0}, exp"),
        ({"attn_logit_softcapping": 30.0}, "config.json: attn_logit_softcapping is 30.0; the Llama architecture here has None"),
        ({"final_logit_softcapping": 30.0}, "config.json: final_logit_softcapping is 30.0"),
        *(({field: 12.0}, f"config.json: {field} is 12.0; the Llama architecture here has None or 1.0") for field in (
            "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
        )),
        ({"id2label": 3}, "config.json: id2label is 3, expected an object"),
        ({"architectures": 3}, "config.json: architectures is 3, expected one of"),
        ({"architectures": [{}]}, r"config.json: architectures is \[\{\}\], expected one of"),
        ({"hidden_size": float("nan")}, "config.json: hidden_size is nan, expected a positive int"),
        ({"vocab_size": float("inf")}, "config.json: vocab_size is inf, expected a positive int"),
        ({"tie_word_embeddings": "no"}, "config.json: tie_word_embeddings is 'no', expected true or false"),
    ):  # fmt: skip
        with_fields(**fields)
        refused(hf, words)
    neutral = {"logits_scaling": 1, "embedding_multiplier": None, "rope_scaling": {"factor": 1.0, "type": "default"}}
    with_fields(**neutral)
    assert open_source(hf).config.rope_scaling is None
    with_fields(rope_parameters=None, rope_theta=None)  # as where it is missing
    assert open_source(hf).config.rope_theta == 10_000.0
    with_fields()
    for content, words in (("{", "expected JSON: "), ("[]", "expected a JSON object, got list")):
        (hf / "config.json").write_text(content)
        refused(hf, f"config.json: {words}")
    with_fields()
    for content in ("[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (hf / "model.safetensors.index.json").write_text(content)
        refused(hf, "model.safetensors.index.json: expected (a JSON object|JSON with a weight_map)")


def test_a_params_json_that_is_none_is_a_sentence(tmp_path):
    write_meta(tmp_path / "m", MODEL)
    file = tmp_path / "m/params.json"
    whole = json.loads(file.read_text())
    for content, words in (
        ("{", "expected JSON: "), ("[]", "expected a JSON object, got list"),
        (json.dumps({**whole, "ffn_dim_multiplier": "x"}), "ffn_dim_multiplier is 'x', expected a positive float"),
        (json.dumps({**whole, "dim": "x"}), "dim is 'x', expected a positive int"),
        (json.dumps({**whole, "rope_theta": []}), r"rope_theta is \[\], expected a positive float"),
    ):  # fmt: skip
        file.write_text(content)
        refused(tmp_path / "m", f"params.json: {words}")


def test_damaged_files_of_meta(tmp_path):
    write_meta(tmp_path / "m", MODEL, shards=2)
    file = tmp_path / "m/consolidated.01.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "m", "consolidated.01.pth: truncated, or not a file of torch.save")
    file.unlink()
    refused(tmp_path / "m", r"expected 2 shards consolidated.NN.pth, found 1", FileNotFoundError)
    file.write_bytes(whole)
    stored = read_header(file)["layers.1.attention.wk.weight"]
    x = bytearray(whole)
    x[stored.offset : stored.offset + 2] = b"\x80\x7f"
    file.write_bytes(bytes(x))
    refused(tmp_path / "m", r"tensor layers.1.attention.wk.weight holds inf at \[8, 0\]")
    (tmp_path / "m/consolidated.00.pth").unlink()
    refused(tmp_path / "m", "expected consolidated.00.pth next, found consolidated.01.pth", FileNotFoundError)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def pth_of(content: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/version", "3\n")
    return path


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"a": Evil()}, 2),
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on the class itself
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        b"\x80\x02}(X\x01\x00\x00\x00a",
        pickle.dumps({"a": 1}),
        pickle.dumps([1]),
    ],
)
def test_pickles_that_are_more_than_tensors_are_refused(content, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"is refused|is no tensor|expected a dictionary"):
        read_header(pth_of(content, tmp_path / "x.pth"))
    assert capsys.readouterr().out == ""


def test_damaged_archives_are_one_sentence_with_the_file(tmp_path):
    write_meta(tmp_path / "m", dataclasses.replace(MODEL, layers=1))
    whole = (tmp_path / "m/consolidated.00.pth").read_bytes()
    central, end = whole.index(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")
    for at, value, match in (
        (central + 6, b"\xff", "truncated, or not a file"),  # a version of zip that does not exist
        (central + 8, b"\x01", "is refused"),  # encrypted
        (central + 10, b"\x63", "truncated, or not a file|is refused"),  # an unknown compression
        (central + 42, b"\xff\xff\xff\x7f", "truncated, or not a file|is refused"),  # a record far behind the end
        (end + 16, b"\xff\xff\xff\x7f", "truncated, or not a file|is refused"),  # so is the directory
    ):
        (tmp_path / "x.pth").write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(ValueError, match=f"x.pth: .*({match})"):
            read_header(tmp_path / "x.pth")


def test_other_paths_are_sentences(tmp_path, hf):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected params.json .Meta., config.json .Hugging Face., one .gguf file"):
        open_source(tmp_path / "empty")
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match="expected a directory of weights or a .gguf file"):
        open_source(tmp_path / "x.bin")
    refused(hf, "missing tokenizer: expected tokenizer.json or tokenizer.model beside", FileNotFoundError, tokenizer=None)
    refused(hf, "dtype: expected one of float32, bfloat16, float16, got 'int8'", dtype="int8")
    refused(hf, "3 shards do not divide tensor", to="meta", shards=3)
    (hf.parent / "full").mkdir()
    (hf.parent / "full/file").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already; expected a new or an empty directory"):
        convert.run(hf, hf.parent / "full", to="huggingface", tokenizer="none", quiet=True)
    assert (hf.parent / "full/file").read_text() == "mine"


def test_what_a_killed_convert_left_goes_with_the_next_one(tmp_path):
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    dead, alive, other = (
        tmp_path / f".out.{host}.{process}.tmp"
        for host, process in ((socket.gethostname(), ended), (socket.gethostname(), os.getppid()), ("elsewhere", ended))
    )
    for left in (dead, alive, other):
        (left / "part").mkdir(parents=True)
    export(random_tree(MODEL), MODEL, tmp_path / "out")
    assert not dead.exists() and alive.exists() and other.exists() and (tmp_path / "out" / "config.json").exists()


def test_numbers_too_large_for_float16_are_refused(tmp_path):
    values = write_meta(tmp_path / "m", MODEL)
    row = next(row for row in values if row.name == "norm.weight")
    shutil.rmtree(tmp_path / "m")
    (tmp_path / "m").mkdir()
    writer = meta.Writer(tmp_path / "m", MODEL, "lm_head", np.dtype(np.float32))
    for tensor, x in values.items():
        writer.add(tensor, np.full(32, 7e4, np.float32) if tensor == row else x.astype(np.float32))
    writer.close()
    refused(tmp_path / "m", r"tensor norm.weight holds 70000.0 at \[0\], too large for float16", dtype="float16")


def test_old_files_rotary_buffers_must_be_the_configs(tmp_path):
    torch = pytest.importorskip("torch")
    write_meta(tmp_path / "m", MODEL)
    file = tmp_path / "m/consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    right = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    torch.save({**state, "rope.freqs": torch.tensor(right, dtype=torch.bfloat16)}, file)
    # The length is not in Meta's files, and the name is the directory's.
    assert open_source(tmp_path / "m").config == dataclasses.replace(MODEL, name="m", max_length=4096)
    torch.save({**state, "rope.freqs": torch.tensor(right / 2, dtype=torch.bfloat16)}, file)
    refused(tmp_path / "m", "tensor rope.freqs is not that of rope_theta 10000.0, head_size 8")


def test_zip_reader_survives_any_cut(tmp_path):
    write_meta(tmp_path / "m", dataclasses.replace(MODEL, layers=1))
    whole = (tmp_path / "m/consolidated.00.pth").read_bytes()
    for cut in range(0, len(whole), 997):
        (tmp_path / "cut.pth").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated"):
            read_header(tmp_path / "cut.pth")
    assert zipfile.ZipFile(io.BytesIO(whole)).testzip() is None
