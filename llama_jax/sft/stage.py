"""Supervised fine-tuning (paper section 3.1): the chat format, loss on answers only, packed rows, a few epochs."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.chat_template import encode_example
from llama_jax.data.dialog import EncodedDialog, encode_dialog
from llama_jax.data.loader import row_source
from llama_jax.data.packing import Packed, pack_dialogs
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
    process_slice,
)
from llama_jax.pretrain.loss import language_model_loss
from llama_jax.training import optimizer
from llama_jax.training.stage import LoopConfig, Stage, Supervised, evaluation
from llama_jax.training.step import check_batch, put_batch

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DialogData:
    """Dialogs (`data.sources`): what is trained on, what is held out (may be empty), and the length of a row."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    length: int
    train_on: Literal["all", "last"] = "all"


@dataclasses.dataclass(frozen=True)
class SftData(DialogData):
    """Dialogs of SFT.

    chat: the format: Llama 2's, or the chat `template` that the tokenizer came with, in which `model.chat` asks such a model.
      The stages after SFT speak Llama 2's.
    """

    chat: Literal["llama2", "template"] = "llama2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig(StageConfig):
    """See configs/sft.py. `epochs` > 0 sets the number of steps from the data; 0 leaves `loop.steps`."""

    data: SftData
    epochs: float = 0.0


def packed_dialogs(
    paths: tuple[str, ...], tokenizer: Tokenizer, *, length: int, train_on: str = "all", chat: str = "llama2"
) -> Packed:
    """Reads, encodes and packs dialogs; those longer than a row are left out and counted in the log.

    A row's own field `train_on` comes before the argument: Ghost Attention's dialogs train their last answer among others that
    train all of theirs.
    """
    if chat == "template" and tokenizer.chat_template is None:
        raise ConfigError(f"data.chat=template: tokenizer {tokenizer.path} came without a chat template")
    encode = encode_example if chat == "template" else encode_dialog
    examples: list[EncodedDialog] = []
    for path in paths:
        for number, row in enumerate(read_dialogs(path), start=1):
            trained, prompt, where = row["train_on"] or train_on, row["prompt_messages"], f"{path}:{number}"
            example = encode(row["messages"], tokenizer, train_on=trained, prompt_messages=prompt, where=where)
            if not any(example.supervised):
                raise ValueError(
                    f"{where}: prompt_messages: expected an answer after the prompt, which is not trained on; got {prompt} of "
                    f"{len(row['messages'])} messages"
                )
            examples.append(example)
    packed = pack_dialogs(examples, length, overlong="report")
    if packed.overlong:
        log.warning("%d of %d dialogs are longer than %d tokens and left out", len(packed.overlong), len(examples), length)
    if not packed.rows:
        raise ConfigError(f"{', '.join(paths)}: no dialog fits into {length} tokens")
    return packed


def check_fine_tuning(config: StageConfig, data: DialogData, mesh: Mesh, *, epochs: float, most: int) -> None:
    """Refuses what `fine_tuning_stage` would refuse, before a stage spends days on drawing dialogs that join `data.train`.

    `most` of them are drawn at most: with `epochs`, the number of steps follows from theirs.
    """
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
    steps = math.ceil(epochs * (rows.get(data.train, 0) + most) / loop.batch_size) if epochs > 0 else loop.steps
    if steps:  # none, where nothing can be drawn either, which the stage will say
        optimizer.schedule(config.optim, steps)


def fine_tuning_stage(
    config: StageConfig, data: DialogData, mesh: Mesh, workdir: Path, *, name: str, epochs: float, chat: str = "llama2"
) -> tuple[Stage, LoopConfig]:
    """A stage that fine-tunes a language model on dialogs, and its loop with the number of steps of `epochs`."""
    model, tokenizer = load_tokenizer(config)
    check_length(data.length, model)
    how = {"length": data.length, "train_on": data.train_on, "chat": chat}
    packed = packed_dialogs(data.train, tokenizer, **how)
    batches = row_source(packed.rows, config.loop.batch_size, seed=config.loop.seed, **process_slice(mesh))
    loop = config.loop
    if epochs > 0:
        loop = dataclasses.replace(loop, steps=max(math.ceil(epochs * len(packed.rows) / loop.batch_size), 1))
    begun = begin(config, table.table(model, head="lm_head"), mesh, workdir=workdir)
    loss = language_model_loss(model, config.compute)
    evaluate = None
    if data.held_out:
        held_out = packed_dialogs(data.held_out, tokenizer, **how)
        source = row_source(held_out.rows, config.loop.batch_size, seed=0, **process_slice(mesh))
        evaluate = evaluation(loss, source.eval_batches, lambda batch: put_batch(batch, mesh))
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


