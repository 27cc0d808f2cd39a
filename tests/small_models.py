"""A small model with a tokenizer of its own, for what reads, writes and judges answers."""

import dataclasses
from pathlib import Path

import jax

from llama_jax.chat import make_engine, settings_of
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.interop import ours
from llama_jax.model import params
from llama_jax.model.config import FLOAT32, ModelConfig
from llama_jax.parallel.mesh import make_mesh
from llama_jax.pretrained import Model

PIECES = 320
CONFIG = ModelConfig(
    name="small", vocab_size=PIECES, layers=1, width=32, heads=4, kv_heads=2, head_size=8, ffn=48, max_length=128
)
TEXTS = ["the loop reads a line of text and counts tokens, [INST] what is it? [/INST] <<SYS>> be kind <</SYS>>"] * 20


def trained_tokenizer(directory: Path) -> Tokenizer:
    train_tokenizer(TEXTS, path := directory / "tokenizer.model", vocab_size=PIECES)
    return Tokenizer(path)


def tree(head, seed):
    return jax.tree.map(lambda x: 3 * x, params.init(params.table(CONFIG, head=head), jax.random.key(seed)))


def made(tokenizer, head, seed=0):
    return Model(tree(head, seed), CONFIG, head, tokenizer, FLOAT32, make_mesh(devices=jax.devices()[:1]), "small")


def written(directory, tokenizer, head="lm_head", seed=0):
    """The same as a checkpoint of ours, with its tokenizer."""
    ours.write(directory, tree(head, seed), CONFIG, tokenizer=tokenizer.fingerprint, origin={})
    (directory / "tokenizer.model").write_bytes(tokenizer.serialized())


def opened(model, slots=2):
    """An engine over a model, and the model without its parameters, as `chat.open_engine` gives them."""
    with jax.set_mesh(model.mesh):
        engine = make_engine(model, settings_of(model, slots=slots, int8_cache=False))
    return engine, dataclasses.replace(model, params={})


def prompt(i, words="the loop"):
    return {"messages": [{"role": "user", "content": f"{words} {i}"}], "is_safety": i % 2 == 0, "category": "", "risk": ""}
