"""The converter: GGUF in, checkpoints that stages start from, bounded memory, and the command's one-line errors."""

import dataclasses
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llama_jax import convert
from llama_jax.config import ConfigError
from llama_jax.data import gguf_file
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.interop import huggingface, layered, names, ours, tokenizer_files
from llama_jax.interop.formats import open_source
from llama_jax.interop.load import load_params
from llama_jax.model import params
from llama_jax.model.config import SIZES, ModelConfig
from llama_jax.model.rope import RopeScaling, stretched
from llama_jax.parallel.axes import is_spec, shardings
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.pretrain.base import check_start, starting_params
from llama_jax.training.fingerprint import CheckpointError, sealed
from llama_jax.training.saved import read_meta, restore_model
from llama_jax.verify import verify

ROOT = Path(__file__).parents[1]
PIECES = 320
MODEL = ModelConfig(
    name="small", vocab_size=PIECES, layers=2, width=64, heads=4, kv_heads=2, head_size=16, ffn=96, max_length=128
)
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXTS = ["the loop reads a line of text and counts tokens, what is it?"] * 20


def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("words") / "tokenizer.model", vocab_size=PIECES)


def write_hf(
    directory: Path, config=MODEL, *, dtype=ml_dtypes.bfloat16, vectors=None, head="lm_head", words=None
) -> dict:
    """Random weights in Hugging Face's files; returns them by (leaf, layer)."""
    directory.mkdir(parents=True)
    kind = lambda row: np.dtype(vectors if vectors and len(row.ours) == 1 else dtype)  # noqa: E731
    writer = huggingface.Writer(directory, config, head, kind)
    rng, values = np.random.default_rng(0), {}
    for row in writer.tensors:
        values[row.path, row.layer] = rng.standard_normal(row.ours).astype(kind(row))
        writer.add(row, values[row.path, row.layer])
    writer.close()
    described = huggingface.config_json(config, head, np.dtype(dtype), token_ids=IDS)
    huggingface.write_json(directory / "config.json", described)
    if words:
        (directory / "tokenizer.model").write_bytes(words.serialized())
    return values


def random_tree(head: str, seed: int) -> dict:
    """Random parameters, drawn by numpy, which compiles nothing."""
    rng, specs = np.random.default_rng(seed), params.table(MODEL, head=head)
    return jax.tree.map(lambda spec: rng.normal(0, 0.1, spec.shape).astype(np.float32), specs, is_leaf=is_spec)


# GGUF


def adjacent(x: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in GGUF files, in llama.cpp's own words: pairs of halves become neighbours."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path: Path, config: ModelConfig, kind: str, *, tied=False, **fields):
    """A file as llama.cpp's converter writes it, from random Hugging Face tensors; returns those."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    for name, value in fields.items():
        writer.add_uint32(name, value) if isinstance(value, int) else writer.add_string(name, value)
    rng, values = np.random.default_rng(0), {}
    described = dataclasses.replace(config, tie_embeddings=tied)
    for ours_, theirs in zip(
        names.tensors(described, "lm_head", "gguf"), names.tensors(described, "lm_head", "huggingface"), strict=True
    ):
        x = rng.standard_normal(theirs.shape).astype(np.float32)
        stored = adjacent(x, {"q": config.heads, "k": config.kv_heads}[ours_.name[-8]]) if ours_.paired_heads else x
        if x.ndim == 1:
            writer.add_tensor(ours_.name, stored)
        elif kind in ("F32", "F16"):
            writer.add_tensor(ours_.name, stored.astype({"F32": np.float32, "F16": np.float16}[kind]))
        else:
            code = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[code]
            try:
                packed = gguf.quants.quantize(stored, code)
            except NotImplementedError:  # the package cannot make these; any bytes with modest scales are such a tensor
                packed = rng.integers(0, 60, (stored.shape[0], stored.shape[1] // block * size), dtype=np.uint8)
            writer.add_tensor(ours_.name, packed, raw_dtype=code)
            stored = gguf.quants.dequantize(packed, code)
            x = stored
            if ours_.paired_heads:  # what was stored, in Hugging Face's order
                heads = config.heads if "attn_q" in ours_.name else config.kv_heads
                x = stored.reshape(heads, -1, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        values[theirs.name] = x.astype(np.float16).astype(np.float32) if kind == "F16" and x.ndim == 2 else x
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


WIDE = dataclasses.replace(MODEL, width=256, heads=4, head_size=64, ffn=512, vocab_size=64, layers=1)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q4_K", "Q5_K", "IQ4_NL"]
)
def test_gguf_tensors_are_what_the_package_dequantises_in_our_order(kind, tmp_path):
    values = write_gguf(tmp_path / "x.gguf", WIDE, kind, tied=kind == "Q4_1")
    source = open_source(tmp_path / "x.gguf")
    assert source.config.tie_embeddings == (kind == "Q4_1")
    assert dataclasses.replace(source.config, name="small", tie_embeddings=False) == WIDE
    kinds = {row.name: source.dtype_of(row).name for row in source.tensors}
    assert kinds["blk.0.ffn_up.weight"] == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert kinds["output_norm.weight"] == "float32"
    convert.run(tmp_path / "x.gguf", tmp_path / "hf", to="huggingface", tokenizer="none", dtype="float32", quiet=True)
    state = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "hf/model.safetensors")
    assert state.keys() == values.keys()
    for name, x in values.items():
        np.testing.assert_array_equal(state[name], x, err_msg=name)


def test_a_gguf_of_llama_3_has_its_scaling_as_divisors(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    config = dataclasses.replace(WIDE, rope_theta=500_000.0, max_length=131_072)
    # As llama.cpp's converter computes them: 1 for short wavelengths, the factor for long ones, between them a smooth border.
    frequencies = config.rope_theta ** (-np.arange(0, config.head_size, 2) / config.head_size)
    waves = 2 * np.pi / frequencies
    smooth = (8192 / waves - 1) / (4 - 1)
    divisors = np.where(waves < 8192 / 4, 1, np.where(waves > 8192, 32, 1 / ((1 - smooth) / 32 + smooth))).astype(np.float32)
    add, begin = gguf.GGUFWriter.add_rope_freq_base, divisors
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_rope_freq_base", lambda self, base: add(self, base) or self.add_tensor("rope_freqs.weight", begin)
    )
    write_gguf(tmp_path / "x.gguf", config, "F32")
    source = open_source(tmp_path / "x.gguf")
    assert source.config.rope_scaling == RopeScaling("llama3", 32.0, 8192)
    np.testing.assert_allclose(stretched(64, 500_000.0, source.config.rope_scaling), frequencies / divisors, rtol=1e-5)
    begin = divisors[::-1].copy()
    write_gguf(tmp_path / "y.gguf", config, "F32")
    with pytest.raises(ValueError, match=r"y.gguf: rope_freqs.weight is not Llama 3.1's scaling of 8,192 tokens; exp"):
        open_source(tmp_path / "y.gguf")


def test_block_sizes_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    for code, (name, block, size) in gguf_file._BLOCKS.items():
        kind = gguf.GGMLQuantizationType(code)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)


def test_ggufs_that_cannot_be_read_are_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"

    def refused(match, **how):
        output = tmp_path / "out"
        with pytest.raises(ValueError, match=match):
            convert.run(path, output, to="huggingface", tokenizer="none", quiet=True, **how)
        assert not output.exists()

    write_gguf(path, MODEL, "F32", **{"llama.rope.scaling.type": "yarn"})
    refused("rope.scaling.type is 'yarn'; the Llama architecture here has 'none' or 'linear'")
    write_gguf(path, MODEL, "F32", **{"llama.expert_count": 8})
    refused("expert_count is 8")
    write_gguf(path, MODEL, "F32", **{"llama.attention.sliding_window": 8})
    refused("llama.attention.sliding_window is 8, a feature that is not computed here")
    write_gguf(path, MODEL, "F32")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    # GGUF keeps the order of writing: the last tensor is the head.
    refused(r"truncated: tensor output.weight should end at byte [\d,]+, the file has")
    for cut in range(4, 2000, 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="truncated"):
            open_source(path)
    path.write_bytes(b"GGML" + whole[4:])
    refused("not a GGUF file")
    path.write_bytes(whole.replace(b"blk.0.attn_k.weight", b"blk.0.attn_z.weight"))
    refused(r"tensor blk.0.attn_k.weight of shape .32, 64. is missing")
    offset = next(t.data_offset for t in gguf.GGUFReader(_rewritten(path, whole)).tensors if t.name == "blk.1.ffn_up.weight")
    path.write_bytes(whole[:offset] + np.float32("nan").tobytes() + whole[offset + 4 :])
    refused(r"tensor blk.1.ffn_up.weight holds nan at \[0, 0\]")


def test_headers_of_ggufs_that_promise_more_than_the_file_has_are_refused(tmp_path):
    path = tmp_path / "x.gguf"

    def refused(match, *, fields=(), tensors=0, rest=b""):
        head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields))
        path.write_bytes(head + b"".join(struct.pack("<Q", 1) + b"x" + field for field in fields) + rest)
        with pytest.raises(ValueError, match=match):
            gguf_file.read_header(path)

    for kind in (0, 8, 12):  # bytes, texts, numbers of eight bytes
        for count in (2**40, 2**62):
            refused("truncated inside its header", fields=[struct.pack("<IIQ", 9, kind, count)])
    refused("an array of values of type 9", fields=[struct.pack("<IIQ", 9, 9, 1)])
    refused("tensor x has 4,294,967,295 dimensions", tensors=1, rest=struct.pack("<Q", 1) + b"x" + struct.pack("<I", 2**32 - 1))
    name = b"general.alignment"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name + struct.pack("<II", 4, 0))
    with pytest.raises(ValueError, match="general.alignment is 0, expected a positive int"):
        gguf_file.read_header(path)


def _rewritten(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Checkpoints of ours


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stages_start_from_a_converted_checkpoint(dtype, words, tmp_path):
    values = write_hf(tmp_path / "hf", dtype=np.dtype(dtype) if dtype == "float32" else ml_dtypes.bfloat16, words=words)
    done = convert.run(tmp_path / "hf", tmp_path / "start", to="llama_jax", quiet=True)
    assert (done["dtype"], done["head"], done["format"]) == (dtype, "lm_head", "huggingface")
    meta = read_meta(tmp_path / "start")
    model = open_source(tmp_path / "hf").config
    tokenizer = Tokenizer(tmp_path / "start/tokenizer.model")
    assert meta["dtype"] == dtype and tokenizer.fingerprint == words.fingerprint
    check_start(tmp_path / "start", model, tokenizer)
    with pytest.raises(ConfigError, match="holds model .*, expected"):
        check_start(tmp_path / "start", SIZES["tiny"], tokenizer)

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    specs = params.table(model, head="lm_head")
    tree = starting_params(specs, mesh, start=str(tmp_path / "start"), seed=0)()
    jax.tree.map(lambda x, sharding: x.sharding == sharding or pytest.fail(f"{x.sharding}"), tree, shardings(specs, mesh))
    for (path, layer), x in values.items():
        leaf = tree
        for key in path.split("/"):
            leaf = leaf[key]
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf if layer is None else leaf[layer], x.astype(np.float32))
    # A reward model takes the trunk and draws its head.
    reward = starting_params(params.table(model, head="reward_head"), mesh, start=str(tmp_path / "start"), seed=0)()
    np.testing.assert_array_equal(reward["trunk"]["embedding"], tree["trunk"]["embedding"])


@pytest.mark.parametrize("to", ["huggingface", "meta", "llama_jax"])
def test_each_tensor_keeps_its_type(to, tmp_path):
    values = write_hf(tmp_path / "hf", vectors=np.float32)
    done = convert.run(tmp_path / "hf", tmp_path / "out", to=to, tokenizer="none", quiet=True)
    source = open_source(tmp_path / "out")
    assert done["dtype"] == "bfloat16 and float32"
    for row in source.tensors:
        assert source.dtype_of(row) == source.read(row).dtype == values[row.path, row.layer].dtype
        np.testing.assert_array_equal(source.read(row), values[row.path, row.layer])
    one = convert.run(tmp_path / "hf", tmp_path / "one", to=to, tokenizer="none", dtype="bfloat16", quiet=True)
    assert one["dtype"] == "bfloat16" and one["bytes"] < done["bytes"]


def test_a_smollm2_sized_checkpoint_starts_the_preset(tmp_path):
    config = dataclasses.replace(SIZES["smollm2-135m"], name="whatever")
    assert huggingface.read_config(_config_file(tmp_path, config))[0] is SIZES["smollm2-135m"]


def _config_file(directory: Path, config: ModelConfig) -> Path:
    described = huggingface.config_json(config, "lm_head", np.dtype(np.float32), token_ids=IDS)
    huggingface.write_json(directory / "config.json", described)
    return directory / "config.json"


def test_ppos_policy_and_no_critic_is_exported(tmp_path):
    policy, critic = random_tree("lm_head", 0), random_tree("value_head", 1)
    ours.write(tmp_path / "ppo", {"policy": policy, "critic": critic}, MODEL, tokenizer="", origin={})
    tree = load_params(open_source(tmp_path / "ppo"), one_device())
    jax.tree.map(np.testing.assert_array_equal, tree, policy)


def test_verify_compares_converted_weights_as_float32_whatever_they_are_stored_in(tmp_path):
    tree = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), random_tree("lm_head", 0))
    ours.write(tmp_path / "w", tree, MODEL, tokenizer="", origin={})
    assert verify(tmp_path / "w") == {0: []}


def test_damaged_checkpoints_of_ours_are_refused(tmp_path):
    ours.write(tmp_path / "w", random_tree("lm_head", 0), MODEL, tokenizer="", origin={})
    assert open_source(f"{tmp_path}/w@0").config == MODEL and verify(tmp_path / "w") == {0: []}
    with pytest.raises(CheckpointError, match="has no checkpoint 1; it holds 0"):
        open_source(f"{tmp_path}/w@1")
    meta_file = next((tmp_path / "w").glob("checkpoints/0/meta/metadata"))
    meta = json.loads(meta_file.read_text())
    meta["fingerprints"]["['params']['trunk']['layers']['down']"] += 1
    meta_file.write_text(json.dumps(sealed(meta)))
    problem = "trunk/layers/down has another checksum than when it was saved; there is no other that is whole"
    with pytest.raises(CheckpointError, match=problem):
        convert.run(tmp_path / "w", tmp_path / "out", to="huggingface", tokenizer="none", quiet=True)
    with pytest.raises(CheckpointError):
        restore_model(tmp_path / "w", params.table(MODEL, head="lm_head"), one_device())
    del meta["fingerprints"]["['params']['trunk']['final_norm']"]
    meta_file.write_text(json.dumps(sealed(meta)))
    with pytest.raises(CheckpointError, match="has no parameter trunk/final_norm"):
        open_source(tmp_path / "w")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sharded", [MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2)], ids=["fsdp", "tensor"])
def test_a_checkpoint_of_many_devices_is_read_piece_by_piece(sharded, tmp_path, monkeypatch):
    config = dataclasses.replace(MODEL, layers=6)
    specs = params.table(config, head="lm_head")
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda spec: rng.normal(0, 0.1, spec.shape).astype(np.float32), specs, is_leaf=is_spec)
    ours.write(tmp_path / "layers", tree, config, tokenizer="", origin={})
    handler = ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), params=ocp.PyTreeCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:  # as a stage saves it
        placed = jax.device_put(tree, shardings(specs, make_mesh(sharded)))
        meta = json.loads((tmp_path / "layers/checkpoints/0/meta/metadata").read_text())
        arguments = ocp.args.Composite(meta=ocp.args.JsonSave(meta), params=ocp.args.PyTreeSave(placed))
        checkpointer.save(tmp_path / "stage/checkpoints/0", args=arguments)
    pieces, read = [], layered.read
    monkeypatch.setattr(layered, "read", lambda *what: pieces.append(read(*what)) or pieces[-1])
    monkeypatch.setattr(ours, "_IN_MEMORY", 0)
    source = open_source(tmp_path / "stage")
    for row in source.tensors:
        whole = tree
        for key in row.path.split("/"):
            whole = whole[key]
        np.testing.assert_array_equal(source.read(row), whole if row.layer is None else whole[row.layer])
    gate = tree["trunk"]["layers"]["gate"]
    found = [piece for piece in pieces if piece.ndim == 3 and piece.shape[0] == 6 and piece.size * 8 == gate.size]
    assert len(found) == 24  # of gate, up and down each piece once
    assert max(piece.nbytes for piece in pieces if piece.shape[0] == 6) < gate.nbytes / 4
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match=r"layers/\w+ cannot be read: .* takes [\d,]+ bytes in .* .TMPDIR., which has"):
        source = open_source(tmp_path / "stage")
        list(map(source.fetch, source.tensors))


def test_meta_and_our_stages_get_the_sentencepiece_model_that_lies_beside_its_json(words, tmp_path):
    pytest.importorskip("tokenizers")
    write_hf(tmp_path / "in", words=words)
    convert.run(tmp_path / "in", tmp_path / "hf", to="huggingface", quiet=True)
    assert (tmp_path / "hf/tokenizer.json").is_file() and (tmp_path / "hf/tokenizer.model").is_file()
    for to in ("meta", "llama_jax"):
        convert.run(tmp_path / "hf", tmp_path / to, to=to, quiet=True)
        assert (tmp_path / to / "tokenizer.model").read_bytes() == words.serialized()
    assert read_meta(tmp_path / "llama_jax")["tokenizer"] == words.fingerprint
    # A model that gives other ids is no other form of the file.
    other = train_tokenizer(["zyx wvu tsr qpo, 9876 or so"] * 20, tmp_path / "other.model", vocab_size=290)
    (tmp_path / "hf/tokenizer.model").write_bytes(other.serialized())
    with pytest.raises(ValueError, match="Meta's layout holds a SentencePiece tokenizer.model, which this one is not"):
        convert.run(tmp_path / "hf", tmp_path / "again", to="meta", quiet=True)


def test_a_configs_special_ids_go_where_the_model_goes(words, tmp_path):
    write_hf(tmp_path / "in", words=words)
    said = {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 11}
    config = {**json.loads((tmp_path / "in/config.json").read_text()), **said}
    goes_by = tmp_path / "in/generation_config.json"

    def carried(name, **how):
        huggingface.write_json(tmp_path / "in/config.json", config)
        convert.run(tmp_path / "in", tmp_path / name, to="huggingface", quiet=True, **how)
        found = json.loads((tmp_path / name / "config.json").read_text())
        copied = tmp_path / name / "generation_config.json"
        assert copied.is_file() == goes_by.is_file()
        assert not copied.is_file() or copied.read_bytes() == goes_by.read_bytes()
        return {field: found[field] for field in found if field.endswith("_token_id")}

    assert carried("bare", tokenizer="none") == said and carried("spoken") == said
    goes_by.write_text('{"eos_token_id": [8, 9], "temperature": 0.3}')
    assert Tokenizer(tmp_path / "in").stop_ids == (2, 8, 9)  # its own end is one more
    assert carried("bare_too", tokenizer="none") == said and carried("spoken_too") == said
    # Where a config says nothing, the other says nothing.
    del config["pad_token_id"], config["bos_token_id"]
    assert carried("unpadded") == {"eos_token_id": [8, 9]}


def test_a_tied_model_that_goes_into_metas_layout_is_warned_of(tmp_path, caplog):
    for tied in (False, True):
        write_hf(tmp_path / f"hf_{tied}", dataclasses.replace(MODEL, tie_embeddings=tied))
        convert.run(tmp_path / f"hf_{tied}", tmp_path / f"meta_{tied}", to="meta", tokenizer="none", quiet=True)
        said = [record.getMessage() for record in caplog.records if "are tied" in record.getMessage()]
        assert len(said) == tied
    assert said[0].startswith(f"{tmp_path}/hf_True: head and embedding are tied, which Meta's layout cannot say")


def test_a_directory_of_llama_2_converts_without_the_package_of_its_json(words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write_hf(tmp_path / "hf")
    tokenizer_files.write(words, tmp_path / "hf", to="huggingface")
    assert open_source(tmp_path / "hf").tokenizer == tmp_path / "hf/tokenizer.model"
    convert.run(tmp_path / "hf", tmp_path / "start", to="llama_jax", quiet=True)
    assert read_meta(tmp_path / "start")["tokenizer"] == words.fingerprint
    # A JSON of other pieces is another tokenizer.
    said = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    shutil.copytree(tmp_path / "hf", tmp_path / "more")
    said["added_tokens"].append({**said["added_tokens"][0], "id": PIECES, "content": "<pad>"})
    (tmp_path / "more/tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ModuleNotFoundError, match=r"more/tokenizer.json: reading it needs the package tokenizers: pip install"):
        convert.run(tmp_path / "more", tmp_path / "again", to="llama_jax", quiet=True)


# The command


def command(*arguments: str, **how) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "llama_jax.convert", *arguments]
    # A platform that is not here, as a TPU that somebody else computes on: the command has no use for it.
    how = {"env": {**os.environ, "JAX_PLATFORMS": "tpu"}} | how
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, **how)


def test_the_command_converts_and_says_so_or_gives_one_line(words, tmp_path):
    write_hf(tmp_path / "hf", words=words)
    done = command(f"--input={tmp_path}/hf", f"--output={tmp_path}/o", "--to=llama_jax")
    assert done.returncode == 0, done.stderr
    done = command(f"--input={tmp_path}/hf", f"--output={tmp_path}/m", "--to=meta", "--shards=2", "--dtype=float16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/m: hf (") and "from huggingface as meta, float16" in done.stdout
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model",
    ]  # fmt: skip
    (tmp_path / "hf/model.safetensors").write_bytes((tmp_path / "hf/model.safetensors").read_bytes()[:-1])
    done = command(f"--input={tmp_path}/hf", f"--output={tmp_path}/n", "--to=meta")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "truncated: tensor lm_head.weight" in line
    assert not (tmp_path / "n").exists()
    said = []
    for process in ("0", "1"):  # on a cluster, one of the processes says why not
        cluster = {**os.environ, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": process}
        done = command(f"--input={tmp_path}/hf", f"--output={tmp_path}/n", "--to=meta", env=cluster)
        assert done.returncode == 1 and not (tmp_path / "n").exists()
        said += done.stderr.strip().splitlines()
    assert said == ["error: convert runs in one process, and JAX_NUM_PROCESSES is 2: start it on one host, without it"]


def test_commands_of_one_process_notice_the_hosts_of_a_pod(monkeypatch):
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    for hosts, worker in ((None, None), ("localhost", "0")):
        if hosts:
            monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
            monkeypatch.setenv("TPU_WORKER_ID", worker)
        convert.one_process("serve")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    with pytest.raises(ValueError, match="^serve runs in one process, and TPU_WORKER_HOSTNAMES names 4 hosts: start it on one"):
        convert.one_process("serve")
    monkeypatch.setenv("TPU_WORKER_ID", "3")
    with pytest.raises(SystemExit):
        convert.one_process("serve")


# Memory

MEASURE = """
import json, sys
from llama_jax import convert
path, output, to = sys.argv[1:4]
def now(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
import jax; jax.devices()
before = now("VmRSS")
done = convert.run(path, output, to=to, tokenizer="none", quiet=True)
print(json.dumps({"before": before, "peak": now("VmHWM"), **done}))
"""


def measured(path: Path, output: Path, to: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, output, to], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def sparse_hf(directory: Path, config: ModelConfig) -> int:
    """Hugging Face's files of a shape, as holes: all weights are zero and take no disk. Returns their bytes."""
    directory.mkdir()
    dtype, total = np.dtype(ml_dtypes.bfloat16), 0
    rows = names.tensors(config, "lm_head", "huggingface")
    plan = huggingface._plan(rows, names.kinds(rows, dtype), huggingface.SHARD_BYTES)
    index = {}
    for i, shard in enumerate(plan):
        file = directory / f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors"
        with huggingface.write_file(file, {row.name: (row.shape, dtype) for row in shard}):
            pass
        size = sum(math.prod(row.shape) * 2 for row in shard)
        with open(file, "r+b") as opened:
            opened.truncate(file.stat().st_size + size)
        index |= {row.name: file.name for row in shard}
        total += size
    huggingface.write_json(directory / huggingface.INDEX, {"weight_map": index})
    _config_file(directory, config)
    return total


@pytest.mark.parametrize("to", ["meta", "huggingface"])
def test_files_stream_through_bounded_memory(to, tmp_path):
    config = dataclasses.replace(MODEL, layers=12, width=1024, heads=16, head_size=64, kv_heads=16, ffn=2816, vocab_size=8192)
    total = sparse_hf(tmp_path / "in", config)
    found = measured(tmp_path / "in", tmp_path / "out", to)
    assert total > 300e6 and found["bytes"] > total
    assert found["peak"] - found["before"] < 120e6, f"{(found['peak'] - found['before']) / 1e6:.0f} MB"


LOAD = """
import json, sys
import jax
from llama_jax.interop.formats import open_source
from llama_jax.interop.load import load_params
from llama_jax.parallel.mesh import make_mesh
def now(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
mesh = make_mesh(devices=jax.devices()[:1])
before = now("VmRSS")
tree = load_params(open_source(sys.argv[1]), mesh)
arrays = sum(x.nbytes for x in jax.tree.leaves(tree))
print(json.dumps({"more": now("VmHWM") - before - arrays, "arrays": arrays}))
"""


def loaded(path: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", LOAD, path], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_checkpoints_of_ours_stream_through_bounded_memory(tmp_path):
    """Written, read and loaded: the largest leaf of all layers has 140 MB here, one layer of it 6 MB."""
    config = dataclasses.replace(MODEL, layers=24, width=1024, heads=16, head_size=64, kv_heads=16, ffn=2816, vocab_size=8192)
    total = sparse_hf(tmp_path / "in", config)
    written = measured(tmp_path / "in", tmp_path / "ours", "llama_jax")
    read = measured(tmp_path / "ours", tmp_path / "out", "huggingface")
    assert read["bytes"] > total > 600e6
    for found in (written, read):
        assert found["peak"] - found["before"] < 400e6, f"{(found['peak'] - found['before']) / 1e6:.0f} MB"
    found = loaded(tmp_path / "ours")
    assert found["arrays"] == 2 * total and found["more"] < 400e6, f"{found['more'] / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["meta", "llama_jax"])
def test_a_7b_converts_below_3_gb(to, tmp_path):
    total = sparse_hf(tmp_path / "in", SIZES["7b"])
    assert total == 2 * 6_738_415_616
    found = measured(tmp_path / "in", tmp_path / "out", to)
    assert found["model"] == "7b" and (found["bytes"] > total or to == "llama_jax")  # which is compressed, and all zeros
    assert found["peak"] < 3e9, f"{found['peak'] / 1e9:.2f} GB"
