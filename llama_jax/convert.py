"""Weights from any format to any other, in bounded memory: `python -m llama_jax.convert --input=... --output=... --to=meta`.

`--input` is Meta's directory, Hugging Face's, a `.gguf` or a workdir of ours (what lies there is recognised); `--to` is one of
`huggingface`, `meta` and `llama_jax`. A converted workdir is a `--config.start` of every stage. Tensors stream through one by
one, checked before anything is written; the output appears whole or not at all, Hugging Face's with a model card as README.md
(`llama_jax.model_card`). One process does it. What many devices saved is put together in a scratch file of `TMPDIR`, as large
as the largest parameter of all layers.
"""

import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any, Literal

import jax
from absl import flags

from llama_jax import command, model_card
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import whole_directory
from llama_jax.interop import huggingface, meta, ours, tokenizer_files
from llama_jax.interop.formats import open_source
from llama_jax.interop.names import leaves
from llama_jax.interop.source import Source
from llama_jax.interop.storage import DTYPES, cast, check_finite
from llama_jax.model.params import count
from llama_jax.training.metrics import Progress

Target = Literal["huggingface", "meta", "llama_jax"]
TARGETS: tuple[Target, ...] = ("huggingface", "meta", "llama_jax")
NO_TOKENIZER = "none"
log = logging.getLogger(__name__)


def run(
    path: str | os.PathLike, output: str | os.PathLike, *, to: Target, dtype: str | None = None,
    tokenizer: str | os.PathLike | None = None, shards: int = 1, shard_bytes: int = huggingface.SHARD_BYTES,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Converts one checkpoint into another format and says what it did.

    Args:
      path: the checkpoint, of any format; see `interop.formats.open_source`.
      output: the directory to be made.
      to: its format.
      dtype: "float32", "bfloat16" or "float16"; None: each tensor as it is stored in the input (float32 if quantised).
      tokenizer: a tokenizer that is not beside the weights; "none": the output has none.
      shards: tensor-parallel shards of Meta's layout.
      shard_bytes: largest file of Hugging Face's.

    Returns:
      {"model", "format", "head", "dtype", "parameters", "bytes", "tokenizer"}

    Raises:
      ValueError, FileNotFoundError, FileExistsError: one sentence; nothing is at `output` then.
    """
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, got {to!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    source = open_source(path)
    stored = {(tensor.path, tensor.layer): source.dtype_of(tensor) for tensor in source.tensors}
    kind = DTYPES[dtype] if dtype else lambda tensor: stored[tensor.path, tensor.layer]
    words = _tokenizer(source, tokenizer)
    if words is not None and to != "huggingface":
        words = tokenizer_files.sentencepiece_beside(words)
    token_ids = source.token_ids if to == "huggingface" else None  # the ids of one config go into the other
    if token_ids is not None:  # a reward model's rows are scored before what its config calls padding
        pad_id = token_ids.get("pad_token_id") if source.head == "reward_head" else None
    else:
        pad_id = 0 if words is None else tokenizer_files.padding(words, source.head)
    if to == "meta" and source.config.tie_embeddings:
        log.warning("%s: head and embedding are tied, which Meta's layout cannot say: the output has two copies", source.path)
    with whole_directory(output) as directory:
        fingerprint = ""
        if words is not None:
            fingerprint = Tokenizer(tokenizer_files.write(words, directory, to=to, pad_id=pad_id, chat=source.chat)).fingerprint
        if to == "meta":
            make: Any = functools.partial(meta.Writer, shards=shards)
        elif to == "huggingface":
            make = functools.partial(huggingface.Writer, shard_bytes=shard_bytes)
        else:
            origin = {"format": source.format, "path": str(source.path)}
            make = functools.partial(ours.Writer, tokenizer=fingerprint, origin=origin, chat=source.chat)
        writer = make(directory, source.config, source.head, kind)
        _stream(source, writer, quiet=quiet)
        kinds = [writer.kinds[tensor.name] for tensor in writer.tensors]  # the first is that of the embedding
        if to == "huggingface":
            if token_ids is not None:
                _copy_generation(source.path, directory)
            else:
                bos_id, eos_id = (1, 2) if words is None else (words.bos_id, words.eos_id)
                token_ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
            config = huggingface.config_json(source.config, source.head, kinds[0], token_ids=token_ids)
            huggingface.write_json(directory / huggingface.CONFIG, config)
            card = model_card.readme(source, name=Path(output).absolute().name)
            (directory / model_card.README).write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    return {
        "model": source.config.name, "format": source.format, "head": source.head,
        "dtype": " and ".join(dict.fromkeys(kind.name for kind in kinds)),
        "parameters": count(leaves(source.config, source.head)), "bytes": size,
        "tokenizer": str(words.path) if words is not None else NO_TOKENIZER,
    }  # fmt: skip


def _tokenizer(source: Source, given: str | os.PathLike | None) -> Tokenizer | None:
    if given is not None and str(given) == NO_TOKENIZER:
        return None
    if given is None and source.tokenizer is None:
        raise FileNotFoundError(
            f"{source.path}: missing tokenizer: expected tokenizer.json or tokenizer.model beside the weights; "
            "--tokenizer=... names one elsewhere"
        )
    return tokenizer_files.open_tokenizer(source, given if given is not None else source.tokenizer)


def _copy_generation(source: Path, directory: Path) -> None:
    """What generation goes by is as Hugging Face's source says it, whether a tokenizer is beside it or not."""
    (directory / huggingface.GENERATION).unlink(missing_ok=True)  # a tokenizer's idea of it
    if (source / huggingface.GENERATION).is_file():
        (directory / huggingface.GENERATION).write_bytes((source / huggingface.GENERATION).read_bytes())


def _stream(source: Source, writer: Any, *, quiet: bool) -> None:
    """Reads every tensor twice: to check it, then to write it."""
    with Progress(len(source.tensors), "check", "array", quiet=quiet) as progress:
        for tensor, target in zip(source.tensors, writer.tensors, strict=True):
            x = source.fetch(tensor)
            check_finite(x, tensor.name, source.path)
            cast(x, writer.kinds[target.name], tensor.name, source.path)
            del x  # a view keeps its whole leaf, and the next one comes beside it
            progress.update()
    with Progress(len(source.tensors), "convert", "array", quiet=quiet) as progress:
        for tensor, target in zip(source.tensors, writer.tensors, strict=True):
            writer.add(target, cast(source.read(tensor), writer.kinds[target.name], tensor.name, source.path))
            progress.update()
    writer.close()


def one_process(name: str) -> None:
    """Ends a command in every process of a cluster, in the first of them with a sentence: each would do the same."""
    processes = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    for described, number, own in (
        (f"JAX_NUM_PROCESSES is {processes}", processes, "JAX_PROCESS_ID"),
        (f"TPU_WORKER_HOSTNAMES names {hosts} hosts", hosts, "TPU_WORKER_ID"),
    ):
        if number > 1:
            if os.environ.get(own, "0") != "0":
                sys.exit(1)
            raise ValueError(f"{name} runs in one process, and {described}: start it on one host, without it")


def main() -> None:
    """Flags to call."""
    one_process("convert")
    # On a TPU it would otherwise take the chips from whoever computes there, or wait for the other hosts.
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    done = run(values.input, values.output, to=values.to, dtype=values.dtype, tokenizer=values.tokenizer, shards=values.shards)
    print(
        f"{values.output}: {done['model']} ({done['parameters']:,} parameters, {done['head']}) from {done['format']} as "
        f"{values.to}, {done['dtype']}, {done['bytes'] / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "weights of any format, or smollm2-135m")
    flags.DEFINE_string("output", None, "directory to be made")
    flags.DEFINE_enum("to", None, TARGETS, "format of the output")
    flags.DEFINE_enum("dtype", None, sorted(DTYPES), "type of the stored numbers; as in the input unless given")
    flags.DEFINE_string("tokenizer", None, f"tokenizer that is not beside the weights; {NO_TOKENIZER!r} leaves it out")
    flags.DEFINE_integer("shards", 1, "tensor-parallel shards (to=meta)", lower_bound=1)
    flags.mark_flags_as_required(["input", "output", "to"])
    command.launch(main, expected=(OSError,))
