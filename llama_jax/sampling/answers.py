"""Many prompts to many answers, by continuous batching: what RLHF, data synthesis and evaluation ask of sampling.

    answerer = Answerer(params, config, compute=compute, prompt_length=96, new_tokens=48, eos_id=2, slots=128)
    answers = answerer(prompts, choice=Choice(temperature=1.0), seed=0)

Answer i depends on its prompt, its settings and (seed, i) alone: not on what is asked beside it, nor on the number of slots up
to the rounding of the matrix products. A prompt that is asked K times is computed once. `make_slot_sampler` is the same for a
rollout, whose weights are others each time.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import preparer
from llama_jax.model.params import Params
from llama_jax.parallel.axes import batch_sharding, batch_shards
from llama_jax.parallel.hosts import on_every_host
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine
from llama_jax.sampling.generate import Samples
from llama_jax.sampling.keys import key_data
from llama_jax.sampling.request import EngineConfig, Shape

# Prompts that are computed together hold about this many tokens: enough to keep matrix units busy, and few enough that
# a batch of them is soon asked for.
_TOKENS = 1024
_SHORTEST, _LONGEST = 64, 1024  # of whole prompts; what is longer enters in chunks


@dataclasses.dataclass(frozen=True)
class Response:
    """One answer."""

    tokens: list[int]  # with EOS where it was drawn
    log_probs: list[float]  # of each token, under the distribution it was drawn from
    ended: bool  # by itself, not for want of room


class Answerer:
    """A model that answers prompts, again and again; its programs are compiled once for all models of one shape.

    Make and call it inside `jax.set_mesh`, on any mesh; on several hosts, in every process with the same arguments.
    """

    def __init__(
        self, params: Params, config: ModelConfig, *, compute: Compute, prompt_length: int, new_tokens: int, eos_id: int,
        slots: int, stop_ids: Sequence[int] = (), int8: bool = False,
    ):  # fmt: skip
        """Prompts have at most `prompt_length` tokens; `slots` answers are drawn at a time (more where the mesh asks it)."""
        self._new_tokens, self._stops = new_tokens, (eos_id, *stop_ids)
        settings = answering(
            prompt_length, new_tokens, slots=slots, mesh=jax.sharding.get_mesh(), int8_cache=int8, stops=len(self._stops)
        )
        weights = preparer(config, compute, int8=int8)(params)
        self.engine = Engine(config, weights, settings, compute=compute).warm_up()
        self._compiled = self.engine.compilations

    @property
    def compilations_after_warm_up(self) -> int:
        """Programs that were compiled while answers were drawn. It stays 0."""
        return self.engine.compilations - self._compiled

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, choice: Choice, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[Response]:
        """Answers in the order of the prompts; ValueError, before anything is drawn, for a prompt that does not fit."""
        requests = self.engine.answer(
            prompts, keys=key_data(seed, range(len(prompts))), max_tokens=self._new_tokens, choice=choice,
            stop_ids=self._stops, progress=progress,
        )  # fmt: skip
        return [Response(request.tokens, request.log_probs, request.finish == "stop") for request in requests]


def answering(
    prompt_length: int, new_tokens: int, *, slots: int, mesh: Mesh, int8_cache: bool = False, stops: int = 0
) -> EngineConfig:
    """The shapes of an engine that draws at least `slots` answers at a time, as many of them on every device, each of which
    ends at one of at least `stops` ids."""
    shards = 1 if mesh.empty else batch_shards(mesh)
    slots = -(-slots // shards) * shards
    # The last token is read by the first decoding step.
    whole = whole_shapes(prompt_length - 1, shards, most=slots)
    return EngineConfig(
        slots=slots, max_length=prompt_length + new_tokens, whole=whole,
        chunks=() if whole[-1][0] >= prompt_length - 1 else ((_LONGEST, 1),), steps=16, reuse=0, int8_cache=int8_cache,
        stops=max(stops, EngineConfig.stops),
    )  # fmt: skip


def make_slot_sampler(
    config: ModelConfig, *, compute: Compute, eos_id: int, max_new_tokens: int, temperature: float, slots: int,
    progress: Callable[[int], None] | None = None,
) -> Callable[..., Samples]:  # fmt: skip
    """(params, left-padded tokens [B, P], valid [B, P], keys [B]) -> Samples, as of `generate.make_sampler`, `slots` at a time.

    One program for all rows holds the cache of all of them and goes on until the last has ended. Here a slot whose row has
    ended takes the next one, and `progress` is told how many just have. Nothing stays on the devices between two calls: the
    update needs the memory.
    """
    lay_out, choice, N = preparer(config, compute), Choice(temperature=temperature), max_new_tokens

    def sample(params: Params, tokens: jax.Array, valid: jax.Array, keys: jax.Array) -> Samples:
        mesh, (B, P) = jax.sharding.get_mesh(), tokens.shape
        tokens, valid, keys = on_every_host((tokens, valid, jax.random.key_data(keys)))
        engine = Engine(config, lay_out(params), answering(P, N, slots=min(slots, B), mesh=mesh), compute=compute)
        if not engine.is_warm:
            engine.warm_up()
        prompts = [row[real] for row, real in zip(tokens, valid, strict=True)]
        requests = engine.answer(prompts, keys=keys, max_tokens=N, choice=choice, stop_ids=(eos_id,), progress=progress)
        drawn, log_probs = np.zeros((B, N), np.int32), np.zeros((B, N), np.float32)
        for row, request in enumerate(requests):
            drawn[row, : len(request.tokens)] = request.tokens
            log_probs[row, : len(request.tokens)] = request.log_probs
        lengths = np.array([len(request.tokens) for request in requests])
        mask, ended = np.arange(N) < lengths[:, None], np.array([request.finish == "stop" for request in requests])
        return jax.tree.map(functools.partial(_divided, mesh=mesh), Samples(drawn, log_probs, mask, ended))

    return sample


def _divided(x: np.ndarray, *, mesh: Mesh) -> jax.Array:
    """An array that every host has, with its rows over the devices of the batch."""
    if mesh.empty:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh, x.ndim), x.__getitem__)


def whole_shapes(longest: int, shards: int, *, most: int) -> tuple[Shape, ...]:
    """(length, prompts) of the batches, of `most` prompts at most, in which prompts of up to `longest` tokens are computed."""
    lengths, longest = [], max(min(longest, _LONGEST), 1)
    while (length := _SHORTEST * 4 ** len(lengths)) < longest:
        lengths.append(length)
    together = ((length, min(max(_TOKENS // length, 1), most)) for length in (*lengths, longest))
    return tuple((length, -(-prompts // shards) * shards) for length, prompts in together)
