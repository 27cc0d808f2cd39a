"""Supervised fine-tuning (paper section 3.1): the chat format, loss on answers only, packed rows, a few epochs."""

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.chat_template import encode_example
from llama_jax.data.dialog import DialogRow, EncodedDialog, encode_dialogs
from llama_jax.data.loader import row_source
from llama_jax.data.mixture import check_files, mix, whole_or_share
from llama_jax.data.packing import Packed, pack_dialogs
from llama_jax.data.rows import read_rows
from llama_jax.data.sources import read_dialogs
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model import params as table
from llama_jax.pretrain.base import (
    StageConfig,
    begin,
    check_adapters,
    check_length,
    load_tokenizer,
    meta,
    process_share,
)
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.training import optimizer
from llama_jax.training.preparation import in_parts
from llama_jax.training.stage import LoopConfig, Stage, Supervised, evaluation
from llama_jax.training.step import check_batch, put_batch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DialogData:
    """Dialogs (`data.sources`).

    train: what is trained on; `held_out`: what is only measured, may be empty.
    length: tokens of a row.
    shares: of each file of `train` in the mix, by dialogs that fit; 0: all of it; none: all of all. A tenth of safety data:
      `train=("dialogs.jsonl", "safety.jsonl")`, `shares=(0.0, 0.1)`.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    length: int
    train_on: Literal["all", "last"] = "all"
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        check_files("data.train", self.train)
        check_files("data.held_out", self.held_out)

    def joined(self, *paths: str) -> Self:
        """With further files to train on, whole."""
        shares = (*self.shares, *[0.0] * len(paths)) if self.shares else ()
        return dataclasses.replace(self, train=(*self.train, *paths), shares=shares)


@dataclasses.dataclass(frozen=True)
class SftData(DialogData):
    """Dialogs of SFT.

    chat: the format: Llama 2's, or the chat `template` that the tokenizer came with, in which `model.chat` asks such a model.
      The stages after SFT speak Llama 2's.
    """

    chat: Literal["llama2", "template"] = "llama2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(StageConfig):
    """See configs/sft.py. `epochs` > 0 sets the number of steps from the data, at most `loop.steps`; 0 leaves `loop.steps`."""

    data: SftData
    epochs: float = 0.0


def packed_dialogs(
    paths: tuple[str, ...], tokenizer: Tokenizer, *, length: int, train_on: str = "all", chat: str = "llama2",
    shares: tuple[float, ...] = (), seed: int = 0,
) -> Packed:  # fmt: skip
    """Reads, encodes, mixes (`shares`, as in DialogData) and packs dialogs; longer ones than a row are counted in the log.

    A row's own field `train_on` comes before the argument: Ghost Attention's dialogs train their last answer among others that
    train all of theirs.
    """
    if chat == "template" and tokenizer.chat_template is None:
        raise ConfigError(f"data.chat=template: tokenizer {tokenizer.path} came without a chat template")
    shares = whole_or_share(paths, shares)
    files = [encoded_dialogs(path, tokenizer, train_on=train_on, chat=chat) for path in paths]
    fitting = [[example for example in file if len(example.ids) <= length] for file in files]  # before shares are counted
    dialogs, left = sum(map(len, files)), sum(map(len, fitting))
    if left < dialogs:
        log.warning(
            "%d of %d dialogs are longer than %d tokens and left out; the first is %s",
            dialogs - left, dialogs, length, _first_longer(paths, files, length),
        )  # fmt: skip
    packed = pack_dialogs(mix(fitting, shares, names=paths, seed=seed, unit="dialogs"), length)
    if not packed.rows:
        raise ConfigError(f"{', '.join(paths)}: no dialog fits into {length} tokens")
    return packed


def _first_longer(paths: Sequence[str], files: Sequence[Sequence[EncodedDialog]], length: int) -> str:
    """Where the first dialog of more than `length` tokens stands, and how long it is."""
    sizes = ((path, number, len(example.ids)) for path, file in zip(paths, files) for number, example in enumerate(file))
    path, number, tokens = next(found for found in sizes if found[2] > length)
    where, _ = next(itertools.islice(read_rows(path), number, None))  # read again: dialogs are kept without their places
    return f"{where} ({tokens} tokens)"


def encoded_dialogs(path: str, tokenizer: Tokenizer, *, train_on: str, chat: str) -> Sequence[EncodedDialog]:
    """The dialogs of a data set. Those of a file on this machine are kept: the stages of a recipe read the same ones."""
    words = _Words(tokenizer.fingerprint, tokenizer.chat_template if chat == "template" else None, tokenizer)
    if not os.path.isfile(path):
        return _encode(path, words, train_on, chat)
    facts = os.stat(path)
    return _encoded_file(path, (facts.st_ino, facts.st_size, facts.st_mtime_ns), words, train_on, chat)


@dataclasses.dataclass(frozen=True)
class _Words:
    """A tokenizer, equal to every other one that gives the same ids."""

    fingerprint: str
    template: str | None
    tokenizer: Tokenizer = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=8)
def _encoded_file(
    path: str, facts: tuple[int, ...], words: _Words, train_on: str, chat: str
) -> Sequence[EncodedDialog]:
    del facts  # of the file's content, for the cache
    return _encode(path, words, train_on, chat)


def _encode(path: str, words: _Words, train_on: str, chat: str) -> Sequence[EncodedDialog]:
    rows = [
        DialogRow(row["messages"], row["train_on"] or train_on, row["prompt_messages"], where)
        for (where, _), row in zip(read_rows(path), read_dialogs(path), strict=True)
    ]
    examples: list[EncodedDialog] = []
    for some in in_parts(rows, label=f"encode {path}", unit="dialog", total=len(rows)):
        if chat == "template":
            examples += [_as_template(row, words.tokenizer) for row in some]
        else:
            examples += encode_dialogs(some, words.tokenizer)
    for row, example in zip(rows, examples, strict=True):
        if not np.any(example.supervised):
            raise ValueError(
                f"{row.where}: messages: expected an answer that is trained on, got none: {row.prompt_messages} of "
                f"{len(row.messages)} are the prompt (prompt_messages), and those of weight 0 are left out"
            )
    return examples


def _as_template(row: DialogRow, tokenizer: Tokenizer) -> EncodedDialog:
    how = {"train_on": row.train_on, "prompt_messages": row.prompt_messages, "where": row.where}
    example = encode_example(row.messages, tokenizer, **how)
    return EncodedDialog(np.array(example.ids, np.int32), np.array(example.supervised, bool))


def check_fine_tuning(config: StageConfig, data: DialogData, mesh: Mesh, *, epochs: float, most: int) -> None:
    """Refuses what `fine_tuning_stage` would refuse, before a stage spends days on drawing dialogs that join `data.train`.

    `most` of them are drawn at most: with `epochs`, the number of steps follows from theirs. What `data.shares` leave out is
    counted too, since the shares are those of a mix with what will be drawn.
    """
    joined = data.joined("what will be drawn")
    whole_or_share(joined.train, joined.shares)
    model, tokenizer = load_tokenizer(config)
    loop = config.loop
    check_length(data.length, model)
    check_batch(loop, mesh)
    if loop.keep_best and not data.held_out:
        raise ConfigError(f"loop.keep_best={loop.keep_best}: expected dialogs in data.held_out, got none")
    check_adapters(config.lora, config.start)
    rows = {
        paths: len(packed_dialogs(paths, tokenizer, length=data.length, train_on=data.train_on).rows)
        for paths in (data.train, data.held_out) if paths
    }  # fmt: skip
    seen = rows.get(data.train, 0) + most
    if seen or not epochs > 0:  # no row, where nothing can be drawn either, which the stage will say
        loop.check_schedule(config.optim, seen, epochs)


def fine_tuning_stage(
    config: StageConfig, data: DialogData, mesh: Mesh, workdir: Path, *, name: str, epochs: float, chat: str = "llama2"
) -> tuple[Stage, LoopConfig]:
    """A stage that fine-tunes a language model on dialogs, and its loop with the number of steps of `epochs`."""
    model, tokenizer = load_tokenizer(config)
    check_length(data.length, model)
    how = {"length": data.length, "train_on": data.train_on, "chat": chat}
    packed = packed_dialogs(data.train, tokenizer, shares=data.shares, seed=config.loop.seed, **how)
    batches = row_source(packed.rows, config.loop.batch_size, seed=config.loop.seed, share=process_share(mesh))
    loop = config.loop.over(len(packed.rows), epochs)
    loss = language_model_loss(model, config.compute)
    evaluate = None
    if data.held_out:
        held_out = packed_dialogs(data.held_out, tokenizer, **how)
        source = row_source(held_out.rows, config.loop.batch_size, seed=0, share=process_share(mesh))
        evaluate = evaluation(loss, source.eval_batches, lambda batch: put_batch(batch, mesh))
    config.loop.check_schedule(config.optim, len(packed.rows), epochs)
    begun = begin(config, table.table(model, head="lm_head"), mesh, workdir=workdir)
    stage = Stage(
        name=name,
        specs=begun.specs,
        init=begun.init,
        frozen=begun.frozen,
        optimizer=optimizer.make(config.optim, steps=loop.steps, decay=table.decay_mask(begun.specs)),
        loss=loss,
        source=Supervised(batches),
        evaluate=evaluate,
        tokens_per_step=config.loop.batch_size * data.length,
        meta=meta(config, model, tokenizer) | begun.meta,
    )
    return stage, loop


def make_stage(config: SftConfig, mesh: Mesh, workdir: Path) -> tuple[Stage, LoopConfig]:
    """The SFT stage and its loop."""
    data = config.data
    return fine_tuning_stage(config, data, mesh, workdir, name="sft", epochs=config.epochs, chat=data.chat)


