"""Rejection-sampling fine-tuning (paper section 3.2.3): K answers a prompt, the best by reward model, then fine-tuning as SFT.

A round, in the paper's order; each step leaves a file, written whole, and is not done again where its file is there. Step 2, by
far the longest, is drawn in portions, none of which is drawn again (`respond.write_in_portions`).

1. `temperatures.json`: the temperature at which the best of K is highest, on a few prompts; it moves with the model (Fig. 8).
2. `samples.jsonl`: K answers to each prompt from the policy at the start of the round, with their rewards (Fig. 7).
3. `pool.jsonl`: the best of each prompt, with version and policy, for this version and all later ones.
4. `best.jsonl`: the best of each prompt over this pool and those of earlier versions, scored again by the newest reward models.
5. Fine-tuning on `best.jsonl` and the SFT dialogs of `data.train`.

Policy and reward models may have other sizes than what is fine-tuned: the paper samples from its 70B model only and fine-tunes
the smaller ones on the best of these answers. With `answers=0` nothing is sampled and the pools alone serve.

An answer is worth R_c of the reward models (of one alone, its score), or the sum with scorers of one's own, as in PPO. Files
that were drawn under other settings, or of which only some were drawn before a model changed, are put aside and drawn anew
(`drawn.py`).
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError, check_least, check_shares
from llama_jax.data.dialog import decode_response, encode_dialog, encode_prompt, encode_response
from llama_jax.data.mixture import check_files, files_of
from llama_jax.data.sources import read_jsonl, read_prompts, write_jsonl
from llama_jax.files import write_json
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import ModelConfig, size
from llama_jax.model.params import Params
from llama_jax.parallel.hosts import exist, from_host_0, on_host_0
from llama_jax.pretrain.base import StageConfig, check_language_model, check_reward_model, load_tokenizer
from llama_jax.reward.scorers import REWARD_MODELS, RewardMix, check_scores, load_scorer
from llama_jax.rlhf import drawn
from llama_jax.rlhf.best_of import best_temperature
from llama_jax.rlhf.chips import check_generates
from llama_jax.rlhf.pool import SCORES, Row, best_samples, choosable_rewards, dialogs, of_prompt, read_pool, select
from llama_jax.rlhf.reinforce import check_prompts, mixed_prompts, reward_models
from llama_jax.rlhf.respond import Responder, Tell, write_in_portions
from llama_jax.rlhf.scoring import check_scorer, score_responses
from llama_jax.sampling.choose import Choice
from llama_jax.sft.stage import DialogData, check_fine_tuning, fine_tuning_stage
from llama_jax.training.metrics import Progress
from llama_jax.training.stage import LoopConfig, Stage

log = logging.getLogger(__name__)

T = TypeVar("T")
Prompt = tuple[dict[str, Any], list[int]]  # a prompt row and its ids


@dataclasses.dataclass(frozen=True)
class RejectionSettings:
    """One round. The paper gives no K; its figures use 10 to 100 answers a prompt.

    Attributes:
      prompts: JSONL, one file or several; `shares`: of each in the mix, as in PPO. `max_prompts` are chosen from the mix.
      answers: K; 0: nothing is sampled, the pools alone serve.
      temperature: of sampling, where `temperatures` is empty.
      temperatures: what is tried on `search_prompts` prompts, K answers each; the best one is then used for all.
      version: the name of this round in its pool.
      repeat: how often the best answers stand in the mix with `data.train`.
    """

    prompts: str | tuple[str, ...]
    prompt_length: int
    max_prompts: int
    answers: int
    new_tokens: int
    temperature: float
    temperatures: tuple[float, ...]
    search_prompts: int
    sampling_batch: int
    version: str
    repeat: int = 1
    safety_threshold: float = 0.15
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        check_prompts("rejection", self)
        check_least("rejection", self, prompt_length=1, max_prompts=1, answers=0, new_tokens=1, sampling_batch=1, repeat=1)
        check_least("rejection", self, temperature=0, temperatures=0, search_prompts=1 if self.temperatures else 0)
        check_shares("rejection", self, "safety_threshold")
        for temperature in self.temperatures or (self.temperature,):
            if self.answers > 1 and temperature == 0 or not math.isfinite(temperature):
                raise ValueError(
                    f"rejection.temperature: expected a positive number for {self.answers} answers, got {temperature}: the "
                    "most likely answer is always the same"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionConfig(StageConfig):
    """See configs/rejection.py. `policy` is sampled from; `start` is what is fine-tuned on the best answers.

    The paper restarts each round from the base model, with the SFT data in the mix (`data.train`).

    Attributes:
      data: dialogs that the best answers are mixed with; may be empty.
      policy, policy_model: workdir and size of the model that is sampled from; size "": that of `model`.
      helpfulness, safety, reward_model: workdirs of the reward models, and their size. One alone serves too; without them and
        other scorers (and with `answers=0`) the rewards stand as the pools give them.
      reward: what an answer is worth, as in PPO.
      pools: of earlier versions, from the oldest to the newest.
    """

    data: DialogData
    rejection: RejectionSettings
    policy: str
    policy_model: str
    helpfulness: str
    safety: str
    reward_model: str
    pools: tuple[str, ...]
    reward: RewardMix = RewardMix()
    epochs: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        check_files("pools", self.pools)
        for name in ("policy_model", "reward_model"):
            if getattr(self, name):
                size(getattr(self, name))


def check_models(config: RejectionConfig) -> None:
    """ConfigError for a round that lacks a model or a pool."""
    if config.rejection.answers and not config.policy:
        raise ConfigError("config.policy: expected the workdir of a stage, got nothing")
    others = len(config.reward.scorers) - (REWARD_MODELS in config.reward.scorers)
    if REWARD_MODELS in config.reward.scorers and (config.rejection.answers or others) and not reward_models(config):
        raise ConfigError(
            f"config.helpfulness, config.safety: reward.scorers names {REWARD_MODELS!r}; expected the workdir of one at least, "
            "got nothing"
        )
    if not config.rejection.answers and not config.pools:
        raise ConfigError("config.pools: expected at least one where rejection.answers=0, got none")


def choose_prompts(prompts: Sequence[T], limit: int, seed: int) -> list[T]:
    """A random choice of at most `limit` prompts: files are often sorted by kind, so the first ones would not do."""
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:limit]]


def judges_of(config: RejectionConfig) -> dict[str, str]:
    """Workdirs of the reward models that score the answers."""
    return reward_models(config) if REWARD_MODELS in config.reward.scorers else {}


class Round:
    """The models of one round, each loaded when it is first needed."""

    def __init__(self, config: RejectionConfig, mesh: Mesh):
        model, self.tokenizer = load_tokenizer(config)
        self.config, self.mesh = config, mesh
        self.policy = _sized(config.policy_model, model)
        self.reward = _sized(config.reward_model, model)
        self.judges = judges_of(config)
        self.weights = config.reward.weighted()
        self.scorers = {name: load_scorer(name) for name in self.weights if name != REWARD_MODELS}
        for name, path in self.judges.items():
            check_reward_model(name, path, self.reward, self.tokenizer)
        settings = config.rejection
        self.length = settings.prompt_length + settings.new_tokens
        if settings.answers:
            check_language_model("policy", config.policy, self.policy, self.tokenizer)
            check_generates(
                self.policy, config.compute, mesh, rows=settings.sampling_batch, length=self.length,
                hint=" (configs/rejection.py:7b,70b sets it)",
            )  # fmt: skip
        for expected in (self.policy, self.reward):
            if self.length > expected.max_length:
                raise ConfigError(
                    f"rejection.prompt_length={settings.prompt_length} + new_tokens={settings.new_tokens} exceed the "
                    f"{expected.max_length} tokens of {expected.name}"
                )

    @functools.cached_property
    def respond(self) -> Responder:
        """The model that is sampled from."""
        settings = self.config.rejection
        return Responder(
            self.config.policy, self.policy, self.tokenizer, compute=self.config.compute, mesh=self.mesh,
            prompt_length=settings.prompt_length, new_tokens=settings.new_tokens, temperature=settings.temperature,
            batch_size=settings.sampling_batch,
        )  # fmt: skip

    @functools.cached_property
    def rewards(self) -> dict[str, Params]:
        """Of the reward models."""
        specs = table.table(self.reward, head="reward_head")
        with jax.set_mesh(self.mesh):
            return {name: restore_model(path, specs, self.mesh) for name, path in self.judges.items()}

    def check(self) -> None:
        """Compiles what scores before anything is drawn for it."""
        with jax.set_mesh(self.mesh):
            for reward in list(self.rewards.values())[:1]:  # all have one program
                check_scorer(
                    self.reward, self.config.compute, reward, length=self.length,
                    batch_size=self.config.rejection.sampling_batch,
                )  # fmt: skip

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]],
        texts: Sequence[str],
    ) -> dict[str, Any]:  # fmt: skip
        """What each answer is worth ("reward") and the scores it is made of; `rows` are the prompts', `texts` the answers'.

        "other" is the weighted sum of the scorers that are no reward models, and "scorers" what each of them gave, by name.
        # -> float [n] each
        """
        settings, scores = self.config.rejection, {}
        if self.judges:
            with jax.set_mesh(self.mesh):
                scores = score_responses(
                    self.reward, self.config.compute, self.rewards, prompts, responses, [row["is_safety"] for row in rows],
                    length=self.length, batch_size=settings.sampling_batch, threshold=settings.safety_threshold,
                )  # fmt: skip
        combined = scores.pop("logit", 0.0)
        if not self.scorers:
            return scores
        # A scorer need not say the same twice, and all hosts must choose the same answers.
        each = {name: np.array(values, np.float32) for name, values in from_host_0(lambda: self.others(rows, texts)).items()}
        other = sum(self.weights[name] * values for name, values in each.items())
        total = self.weights.get(REWARD_MODELS, 0.0) * combined + other
        return {**scores, "other": other, "scorers": each, "reward": np.asarray(total, np.float32)}

    def others(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, list[float]]:
        """What each of the scorers that are no reward models gives, by name."""
        return {name: check_scores(scorer(rows, texts), len(rows), name).tolist() for name, scorer in self.scorers.items()}

    def samples(
        self, prompts: Sequence[Prompt], *, temperature: float, seed: int, progress: Tell, first: int = 0
    ) -> list[Row]:
        """K scored answers to each prompt, in prompt order; `first` is the first one's number among all prompts."""
        K = self.config.rejection.answers
        rows = [(number, row, ids) for number, (row, ids) in enumerate(prompts, start=first) for _ in range(K)]
        encoded = [ids for _, _, ids in rows]
        responses = self.respond.ids(
            encoded, choice=Choice(temperature=temperature), seed=seed, numbers=range(first * K, first * K + len(rows)),
            progress=progress,
        )  # fmt: skip
        read = [encode_response(ids, self.tokenizer, limit=self.config.rejection.new_tokens) for ids in responses]
        texts = [decode_response(ids, self.tokenizer) for ids in responses]
        scores = self.score(encoded, read, [row for _, row, _ in rows], [text for text, _ in texts])
        return [
            {
                "prompt": number, "messages": row["messages"], "is_safety": row["is_safety"],
                **of_prompt(row), "response": text, "ended": ended,
                **of_answer(scores, i),
            }
            for i, ((number, row, _), (text, ended)) in enumerate(zip(rows, texts, strict=True))
        ]  # fmt: skip

    def search(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Fig. 8: the curve of each temperature, and which is best at K. An answer that cannot be trained on is worth as little
        as any: 0 of R_c, and beside other scorers, which know no such bound, what the worst one is."""
        settings, tried = self.config.rejection, {}
        few = prompts[: settings.search_prompts]  # in random order already
        for temperature in settings.temperatures:
            label, total = f"rejection: temperature {temperature:g}", len(few) * settings.answers
            with Progress(total, label, "answer", quiet=jax.process_index() > 0) as progress:
                tried[temperature] = self.samples(
                    few, temperature=temperature, seed=self.config.loop.seed + 1, progress=progress.update
                )
        least = min(row["reward"] for found in tried.values() for row in found) if self.scorers else 0.0
        worth = {temperature: choosable_rewards(found, least=least) for temperature, found in tried.items()}
        best, curves = best_temperature({t: np.reshape(some, (len(few), settings.answers)) for t, some in worth.items()})
        shown = {f"{t:g}": {"maximum": curve.maximum.tolist(), "median": curve.median.tolist()} for t, curve in curves.items()}
        return {"temperature": best, "prompts": len(few), "answers": settings.answers, "curves": shown}

    def again(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of earlier versions' pools with this round's rewards; too long ones are left out and counted."""
        if not (self.judges or self.scorers) or not rows:
            return list(rows)
        encoded = []  # (prompt, response): several versions answered the same prompt, which is computed once
        for row in rows:
            dialog = [*row["messages"], {"role": "assistant", "content": row["response"]}]
            ids, begin = encode_dialog(dialog, self.tokenizer).ids, len(encode_prompt(row["messages"], self.tokenizer))
            encoded.append((ids[:begin], ids[begin:]))
        fitting = [(row, ids) for row, ids in zip(rows, encoded, strict=True) if sum(map(len, ids)) <= self.length]
        if len(fitting) < len(rows):
            log.warning(
                "%d of %d pool rows exceed %d tokens and are left out", len(rows) - len(fitting), len(rows), self.length
            )
        kept = [{name: value for name, value in row.items() if name not in SCORES} for row, _ in fitting]
        prompts, responses = ([ids[part] for _, ids in fitting] for part in (0, 1))
        scores = self.score(prompts, responses, kept, [row["response"] for row in kept])
        return [{**row, **of_answer(scores, i)} for i, row in enumerate(kept)]


def of_answer(scores: Mapping[str, Any], i: int) -> Row:
    """What `Round.score` gave answer `i`, as fields of its row."""
    return {
        name: of_answer(values, i) if isinstance(values, Mapping) else float(values[i]) for name, values in scores.items()
    }


def _sized(name: str, model: ModelConfig) -> ModelConfig:
    """The shape of that name with the context of `model`, or `model` where the name is empty."""
    return dataclasses.replace(size(name), max_length=model.max_length) if name else model


def gather(config: RejectionConfig, mesh: Mesh, workdir: Path) -> None:
    """Steps 1 to 4: makes those files of a round that are not there yet."""
    # What is wrong with them is said before a model is loaded.
    earlier = [row for path in config.pools for row in read_pool(path)]
    models, pool = Round(config, mesh), workdir / "pool.jsonl"
    scored = models.again(earlier)  # a scorer that cannot read an old row says so before days of drawing
    if config.rejection.answers and not all(exist([pool])):
        models.check()
        gather_pool(models, workdir)

    def write_best() -> None:
        own = [row for _, row in read_jsonl(pool)] if config.rejection.answers else []
        write_jsonl(workdir / "best.jsonl", dialogs(select([scored, own])))

    on_host_0(write_best)


def gather_pool(models: Round, workdir: Path) -> None:
    """Steps 1 to 3."""
    settings, seed = models.config.rejection, models.config.loop.seed
    searched, sampled = workdir / "temperatures.json", workdir / "samples.jsonl"
    mixed = mixed_prompts(settings, models.tokenizer, seed=seed)
    prompts = choose_prompts(mixed, settings.max_prompts, seed)
    temperature = settings.temperature
    if settings.temperatures:
        if not all(exist([searched])):
            on_host_0(write_json, searched, models.search(prompts))
        temperature = json.loads(searched.read_text())["temperature"]
    if not all(exist([sampled])):
        write_in_portions(
            sampled, prompts, lambda some, first, progress: models.samples(
                some, temperature=temperature, seed=seed, first=first, progress=progress
            ),
            answers=lambda _: settings.answers, label="rejection: sampling",
        )  # fmt: skip

    def write_pool() -> None:
        samples = (row for _, row in read_jsonl(sampled))
        policy = drawn.fingerprints(workdir, "samples")["policy"]
        best = best_samples(samples, version=settings.version, policy=policy, temperature=temperature)
        write_jsonl(workdir / "pool.jsonl", best)

    on_host_0(write_pool)


def put_stale_aside(config: RejectionConfig, workdir: Path) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Puts aside what was drawn or chosen otherwise; returns the present settings and models, by what depends on them."""
    fields = ("policy", "policy_model", "helpfulness", "safety", "reward_model", "reward")
    prompts, shares = config.rejection.prompts, config.rejection.shares
    without = ("repeat", "version") if shares else ("repeat", "version", "shares")  # files from before there were any stay
    settings = drawn.settings_of(config, *fields, "rejection", without=without)
    asked = {"prompts": prompts} if isinstance(prompts, str) else {f"prompts[{i}]": path for i, path in enumerate(prompts)}
    drawn_from = {"policy": config.policy, **{name: drawn.data_file(path) for name, path in asked.items()}}
    models = (drawn_from if config.rejection.answers else {}) | judges_of(config)
    chosen = {"pools": list(config.pools), "version": config.rejection.version}
    under, files = {"samples": (settings, models), "best": (chosen, {})}, ("pool.jsonl", "best.jsonl")
    # First what was chosen otherwise: without it the samples are in use again, and must be of the present models.
    drawn.put_aside(workdir, "best", *under["best"], files)
    drawn.put_aside(workdir, "samples", *under["samples"], ("temperatures.json", "samples", "samples.jsonl", *files))
    return under


def make_stage(config: RejectionConfig, mesh: Mesh, workdir: Path) -> tuple[Stage, LoopConfig]:
    """Gathers the round's best answers unless they are there, and makes the fine-tuning stage on them."""
    check_models(config)
    path, under = workdir / "best.jsonl", put_stale_aside(config, workdir)
    if not all(exist([path])):
        settings, most = config.rejection, sum(len(read_pool(pool)) for pool in config.pools)
        if settings.answers:
            most += min(sum(len(read_prompts(path)) for path in files_of(settings.prompts)), settings.max_prompts)
        check_fine_tuning(config, config.data, mesh, epochs=config.epochs, most=most * settings.repeat)
        for name, of in under.items():
            drawn.note(workdir, name, *of)
        gather(config, mesh, workdir)
    found = any(True for _ in read_jsonl(path))
    if not found and not config.data.train:
        raise ConfigError(f"{path}: no answer ended by itself, so there is nothing to fine-tune on")
    data = config.data.joined(*([str(path)] * config.rejection.repeat if found else []))
    return fine_tuning_stage(config, data, mesh, workdir, name="rejection", epochs=config.epochs)
