"""A reward model's scores of whole answers, for judging (section 3.4.1): batched, and never of a dialog that was cut."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.data.dialog import Message, encode_dialog, find_tag
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.params import Params
from llama_jax.parallel import compiler
from llama_jax.parallel.axes import batch_shards
from llama_jax.reward.held_out import sigmoid
from llama_jax.reward.score import gate, scorer

_ROWS, _SHORTEST = 16, 64


def kept_scores(
    dialogs: Sequence[Sequence[Message]], kept: Any, *, judge: Mapping[str, Any], open_model: Callable[[], Any],
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:  # fmt: skip
    """A reward model's score in (0, 1) of each dialog, NaN where `score_dialogs` has none. # float64 [n]

    Args:
      kept: rows of scores that are not computed again (`RowFile`, or what is like it); the others are added as they come.
      judge: what the scores depend on beside the dialog, `origin.identity`; another model's scores do not count.
      open_model: gives the model, a `llama_jax.load`; not called where nothing is missing.
      done: called with how many of the dialogs have their score.
    """
    keys = [_key(judge, dialog) for dialog in dialogs]
    logits = {row["key"]: row["logit"] for row in kept.rows}
    missing = {key: dialog for key, dialog in zip(keys, dialogs) if key not in logits}
    names = list(missing)
    done(len(keys) - len(names))

    def found(places: Sequence[int], values: np.ndarray) -> None:
        for place, value in zip(places, values.tolist()):
            logits[names[place]] = None if math.isnan(value) else value
            kept.append({"key": names[place], "judge": dict(judge), "logit": logits[names[place]]})
        done(len(places))

    if missing:
        model = open_model()
        score_dialogs(
            model.params, model.config, model.tokenizer, list(missing.values()), compute=model.compute, mesh=model.mesh,
            found=found,
        )  # fmt: skip
    return sigmoid(np.array([math.nan if logits[key] is None else logits[key] for key in keys], np.float64))


def combined(helpfulness: np.ndarray, safety: np.ndarray, is_safety: np.ndarray) -> np.ndarray:
    """R_c of 3.2.3, as `reward.score.combined_logit`; NaN where it needs a score that is none. # [n], [n], bool [n] -> [n]"""
    return np.where(gate(safety, is_safety) | np.isnan(safety), safety, helpfulness)


def _key(judge: Mapping[str, Any], dialog: Sequence[Message]) -> str:
    content = [judge, [[message["role"], message["content"]] for message in dialog]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]


def score_dialogs(
    params: Params, config: ModelConfig, tokenizer: Tokenizer, dialogs: Sequence[Sequence[Message]], *, compute: Compute,
    mesh: Mesh, found: Callable[[Sequence[int], np.ndarray], None] = lambda places, logits: None,
) -> np.ndarray:  # fmt: skip
    """The logit of each dialog, which ends with the answer; NaN for one that does not fit the context, or that the chat format
    refuses since the answer holds one of its tags. `found` is told places and logits as they come. # float64 [n]"""
    encoded = [
        None if find_tag(dialog[-1]["content"]) else encode_dialog(dialog, tokenizer, train_on="last").ids for dialog in dialogs
    ]
    fit = [i for i, ids in enumerate(encoded) if ids is not None and len(ids) <= config.max_length]
    scores = np.full(len(dialogs), math.nan)
    if rest := sorted({*range(len(dialogs))} - {*fit}):
        found(rest, scores[rest])
    rows = -(-_ROWS // batch_shards(mesh)) * batch_shards(mesh)
    fit.sort(key=lambda i: len(encoded[i]))  # little padding; few shapes
    with jax.set_mesh(mesh):
        run = _program(config, compute, mesh)
        for start in range(0, len(fit), rows):
            some = fit[start : start + rows]
            length = min(max(_SHORTEST, 1 << (len(encoded[some[-1]]) - 1).bit_length()), config.max_length)
            tokens = np.zeros((rows, length), np.int32)
            segments = np.zeros_like(tokens)
            segments[:, 0] = 1  # rows that only fill the batch have one token
            for row, i in enumerate(some):
                tokens[row, : len(encoded[i])], segments[row, : len(encoded[i])] = encoded[i], 1
            scores[some] = np.asarray(run(params, tokens, segments), np.float64)[: len(some)]
            found(some, scores[some])
    return scores


@functools.lru_cache(maxsize=4)
def _program(config: ModelConfig, compute: Compute, mesh: Mesh):
    everywhere = NamedSharding(mesh, PartitionSpec())  # every host reads all scores
    return compiler.jit(scorer(config, compute), out_shardings=everywhere)
