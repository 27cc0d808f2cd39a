"""Talk to a chat model: `python -m llama_jax.chat --workdir=runs/demo/ppo --tokenizer=runs/demo/corpus/tokenizer.model`."""

import sys

import jax
from absl import app, flags, logging

from llama_jax.config import ConfigError, parse, parse_flags
from llama_jax.data.dialog import decode_response, encode_prompt
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.mesh import make_mesh
from llama_jax.sampling.generate import make_sampler, pad_left, row_keys
from llama_jax.training.checkpoint import read_meta, restore_model


def main(argv: list[str]) -> None:
    """Reads questions from standard input, answers each, keeps the dialog until an empty line or its end."""
    del argv
    logging.set_verbosity(logging.WARNING)
    keep_heap()
    values = flags.FLAGS
    try:
        meta = read_meta(values.workdir)
        model, tokenizer = parse(ModelConfig, meta["model"], where=values.workdir), Tokenizer(values.tokenizer)
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ConfigError(f"{values.tokenizer}: is not the tokenizer that {values.workdir} was trained with")
    except (ConfigError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    specs, mesh = table.table(model, head="lm_head"), make_mesh()
    compute = Compute(activations="float32" if jax.default_backend() == "cpu" else "bfloat16")
    sample = make_sampler(
        model, specs, compute=compute, eos_id=tokenizer.eos_id, max_new_tokens=values.max_tokens,
        temperature=values.temperature, top_p=values.top_p,
    )  # fmt: skip
    room = model.max_length - values.max_tokens
    with jax.set_mesh(mesh):
        params = restore_model(values.workdir, specs, mesh)
        start = [{"role": "system", "content": values.system}] if values.system else []
        messages, number = list(start), 0
        while question := _ask():
            messages.append({"role": "user", "content": question})
            try:
                prompt = encode_prompt(messages, tokenizer)
            except ValueError as error:
                print(f"({error})")
                messages.pop()
                continue
            if len(prompt) > room:
                print("(the dialog is full; a new one begins)")
                messages = list(start)
                continue
            tokens, valid = pad_left([prompt], room)
            samples = jax.device_get(sample(params, tokens, valid, row_keys(values.seed, [number])))
            text, _ = decode_response(samples.tokens[0][samples.mask[0]], tokenizer)
            print(text, flush=True)
            messages.append({"role": "assistant", "content": text})
            number += 1


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "a stage's workdir")
    flags.DEFINE_string("tokenizer", None, "its SentencePiece model")
    flags.DEFINE_string("system", "", "system message")
    flags.DEFINE_float("temperature", 0.6, "0 is greedy")
    flags.DEFINE_float("top_p", 0.9, "nucleus")
    flags.DEFINE_integer("max_tokens", 64, "longest answer")
    flags.DEFINE_integer("seed", 1, "of the sampling")
    flags.mark_flags_as_required(["workdir", "tokenizer"])
    app.run(main, flags_parser=parse_flags)
