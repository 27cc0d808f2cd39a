"""Rollouts for PPO and GRPO (paper section 3.2.3): drawn with the current policy, judged, and handed out in mini-batches."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.loader import IndexedBatches
from llama_jax.model.params import Params
from llama_jax.parallel.axes import batch_shardings, batch_shards
from llama_jax.pretrain.base import process_share
from llama_jax.reward.scorers import OtherScores
from llama_jax.rlhf.clock import StepClock
from llama_jax.rlhf.judge import Frozen, Judge, PromptBatch
from llama_jax.rlhf.reward_watch import RewardWatch
from llama_jax.sampling.generate import Samples
from llama_jax.training.step import put_batch


@dataclasses.dataclass(frozen=True)
class Roller:
    """Samples and judges one batch of prompts."""

    sample: Callable[[Params, jax.Array, jax.Array, jax.Array], Samples]
    judge: Judge
    frozen: Frozen
    keys: Callable[[Any], jax.Array]  # prompt numbers [B] -> PRNG keys [B]
    score: Callable[[jax.Array, jax.Array, jax.Array], OtherScores] | None = None  # see `reward.scorers.HostScorers`

    def __call__(
        self, params: dict[str, Params], prompts: PromptBatch, beta: float | np.ndarray, clock: StepClock | None = None
    ) -> tuple[Any, dict[str, float]]:
        """Rolls the current policy out. Returns the rollout (on the device) and its metrics, timings included.

        `clock` knows what the steps before took up to here, where the last of them may still be under way.
        """
        jax.block_until_ready(params)  # the last update
        start = time.monotonic()
        trained = 0.0 if clock is None else clock.take(start)
        samples = self.sample(params["policy"], prompts.tokens, prompts.valid, self.keys(prompts.index))
        jax.block_until_ready(samples)
        sampled = time.monotonic()
        other = None if self.score is None else self.score(prompts.row, samples.tokens, samples.mask)
        rollout, metrics = self.judge(params, self.frozen, prompts, samples, other, np.float32(beta))
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        timing = {"seconds/rollout": sampled - start, "seconds/score": time.monotonic() - sampled}
        if trained:  # not before the first rollout
            timing["seconds/train"] = trained
        return rollout, {**metrics, **timing}


MOST_ERROR = 0.2  # of the KL, as a share of its target, that a change of beta is in proportion to


@dataclasses.dataclass(frozen=True)
class KlControl:
    """The KL coefficient: fixed, as in the paper, or led towards a target (Ziegler et al. 2019, section 2.2).

    beta stays positive only if a rollout has less than `horizon` / MOST_ERROR responses (`PpoSettings` sees to it).
    """

    beta: float
    target: float = 0.0  # KL of a response in nats; 0: fixed
    horizon: float = 10_000.0  # responses in which beta may change by a factor of 1 + MOST_ERROR
    warm_up: int = 0  # iterations for the critic alone, in which the policy stays as it is

    def after(self, beta: float, kl: float, responses: int) -> float:
        """beta for the next rollout, from the KL of this one."""
        if not self.target:
            return beta
        return beta * (1 + min(max(kl / self.target - 1, -MOST_ERROR), MOST_ERROR) * responses / self.horizon)


def check_size(size: int, rows: int, mesh: Mesh) -> None:
    """ConfigError for a rollout that cannot be divided into mini-batches of `rows`, or over the mesh."""
    if size % rows:
        raise ConfigError(f"rollout_size={size} is no multiple of loop.batch_size={rows}")
    for name, count in (("rollout_size", size), ("loop.batch_size", rows)):
        if count % batch_shards(mesh):
            raise ConfigError(f"{name}={count} cannot be divided into {batch_shards(mesh)} shards of the mesh")


def on_mesh(settings: Any, mesh: Mesh) -> Any:
    """Settings whose `sampling_batch` and `judge_batch`, in a config rows of each shard, are rows of all shards."""
    shards = batch_shards(mesh)
    return dataclasses.replace(
        settings, sampling_batch=settings.sampling_batch * shards, judge_batch=settings.judge_batch * shards
    )


def draws_in_slots(settings: Any) -> bool:
    """Whether a rollout is drawn `sampling_batch` rows at a time, and not by one program for all of it (`on_mesh` settings)."""
    return 0 < settings.sampling_batch < settings.rollout_size


class RolloutSource:
    """Rolls out when an iteration begins and hands out its mini-batches; a checkpoint holds the rollout between them.

    An iteration is `epochs` passes over `size` responses, `answers` to each prompt, in mini-batches of `rows`.
    """

    looks_at_params = True

    def __init__(
        self, prompts: IndexedBatches, roll: Roller, *, mesh: Mesh, empty: Any, size: int, rows: int, control: KlControl,
        seed: int, answers: int = 1, epochs: int = 1,
    ):  # fmt: skip
        check_size(size, rows, mesh)
        self.prompts, self.roll, self.mesh, self.rows, self.seed = prompts, roll, mesh, rows, seed
        self.size, self.answers, self.control = size, answers, control
        self.places = np.array(process_share(mesh).places(size))  # of this process's responses
        self.parts = size // rows  # of one pass
        self.minibatches = self.parts * epochs  # of an iteration
        self.beta, self.clock, self.watch = np.float32(control.beta), StepClock(), RewardWatch()
        self.rollout = put_batch(empty, mesh)
        layout = batch_shardings(self.rollout, mesh)
        self._take = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree), out_shardings=layout)

    def batch(self, step: int, params: dict[str, Any]) -> tuple[Any, Mapping[str, float]]:
        """Mini-batch `step % minibatches` of iteration `step // minibatches`."""
        iteration, part = divmod(step, self.minibatches)
        metrics: Mapping[str, float] = {}
        if part == 0:
            prompts = put_batch(self._prompts(iteration), self.mesh)
            self.rollout, metrics = self.roll(params, prompts, self.beta, self.clock)
            metrics = {**metrics, "beta": float(self.beta)}
            if iteration >= self.control.warm_up:
                self.beta = np.float32(self.control.after(float(self.beta), metrics.get("kl", 0.0), self.size))
            self.watch.trained(metrics.get("reward", 0.0))
        # A pass has a shuffled order of its own.
        number = iteration * (self.minibatches // self.parts) + part // self.parts
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(self.seed), number), self.size)
        first = part % self.parts * self.rows
        batch = self._take(self.rollout, order[first : first + self.rows])
        self.clock.begins(step, time.monotonic())
        return batch, metrics

    def epoch(self, step: int) -> float:
        """Epochs of the prompts that have been answered at a step."""
        return self.prompts.epoch(step // self.minibatches)

    def _prompts(self, iteration: int) -> PromptBatch:
        """The prompts of this process's responses; all answers to one stand together in the global rollout. Each draw has a
        number of its own: a prompt that comes again is answered with other random numbers."""
        prompts = jax.tree.map(lambda x: x[self.places // self.answers], self.prompts.batch(iteration))
        return prompts.replace(index=(iteration * self.size + self.places).astype(np.uint32))

    def state(self) -> Any:
        """The rollout that is being trained on, the KL coefficient of the next, and the rewards so far."""
        return {"rollout": self.rollout, "beta": np.asarray(self.beta), "watch": self.watch.state()}

    def restore(self, state: Any) -> None:
        """Goes on in the middle of an iteration."""
        self.rollout, self.beta = state["rollout"], np.float32(state["beta"])
        self.watch.restore(state["watch"])
