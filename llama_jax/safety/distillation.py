"""Context distillation (paper section 4.2.4): what a model answers under a safety pre-prompt, it learns to answer without.

1. Each adversarial prompt is answered as it is, under a generic pre-prompt, and, where its risk category is known, under the
   template of that category.
2. The safety reward model scores all answers as answers to the prompt *without* pre-prompt.
3. An answer is kept only where it is scored above the one without pre-prompt; the best of them is fine-tuned on, again without.

Prompts that are not marked `is_safety` are never distilled: on helpful prompts pre-prompts teach vague answers and false
refusals (Table 40). `samples.jsonl` holds every answer and score, written whole once (they are drawn in portions, none of which
a kill draws again): the data of Fig. 16.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ConfigError, check_least
from llama_jax.data.dialog import decode_response, encode_prompt, encode_response
from llama_jax.data.mixture import check_files
from llama_jax.data.sources import read_jsonl, read_prompts, write_jsonl
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.parallel.hosts import exist, on_host_0
from llama_jax.pretrain.base import StageConfig, check_language_model, check_reward_model, load_tokenizer
from llama_jax.rlhf import drawn
from llama_jax.rlhf.chips import check_generates
from llama_jax.rlhf.reinforce import encode_prompts
from llama_jax.rlhf.rejection import choose_prompts
from llama_jax.rlhf.respond import Responder, Tell, usable, write_in_portions
from llama_jax.rlhf.scoring import check_scorer, sigmoid_scores
from llama_jax.safety.prompts import (
    ATTACKS,
    RISKS,
    category_preprompt,
    generic_preprompts,
    with_preprompt,
    without_template,
)
from llama_jax.sft.stage import DialogData, check_fine_tuning, fine_tuning_stage
from llama_jax.training.stage import LoopConfig, Stage

log = logging.getLogger(__name__)

KINDS = ("base", "generic", "category")


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """What is sampled and what is kept.

    Attributes:
      prompts: JSONL; those with `is_safety` serve. `risk` (a name of `prompts.RISKS`) and `attack` (of `ATTACKS`) are optional.
      generic: different generic pre-prompts that each prompt is answered under.
      category: whether prompts of a known risk are answered under its template as well.
      least_gain: by how much the safety score must rise; the paper keeps every rise.
    """

    prompts: str
    prompt_length: int
    max_prompts: int
    generic: int
    category: bool
    least_gain: float
    new_tokens: int
    temperature: float
    sampling_batch: int

    def __post_init__(self):
        check_files("distill.prompts", (self.prompts,))
        most = len(generic_preprompts())
        if not 0 <= self.generic <= most or (self.generic == 0 and not self.category):
            raise ValueError(f"distill.generic: expected 1 to {most} pre-prompts (0 with category=True), got {self.generic}")
        check_least("distill", self, least_gain=0)
        check_least("distill", self, prompt_length=1, max_prompts=1, new_tokens=1, sampling_batch=1, temperature=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(StageConfig):
    """See configs/distill.py. `policy` answers; `start` is fine-tuned on `data.train` and the kept answers."""

    data: DialogData
    distill: DistillSettings
    policy: str
    safety: str
    epochs: float = 2.0


def preprompts_of(row: Mapping[str, Any], settings: DistillSettings, *, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(kind, pre-prompt) of each answer that a prompt gets; the first is ("base", "")."""
    found = [("base", "")]
    generic = generic_preprompts()
    found += [("generic", generic[i]) for i in rng.choice(len(generic), size=settings.generic, replace=False)]
    if settings.category and row.get("risk") in RISKS:
        attack = row.get("attack")
        found.append(("category", category_preprompt(row["risk"], attack if attack in ATTACKS else "other")))
    return found


def warn_of_labels(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Tells of the prompts that get no template for their risk or, where they name an attack, for that."""
    of_attacks = [row for row in rows if row.get("attack")]
    for sentence in (without_template(rows, "risk"), without_template(of_attacks, "attack")):
        if sentence:
            log.warning("%s: %s", path, sentence)


def keep_preferred(samples: Sequence[Mapping[str, Any]], *, least_gain: float) -> list[dict[str, Any]]:
    """Dialog rows: of each prompt the answer with the highest safety score, if it is above that of the plain answer."""
    rows = []
    for sample in samples:
        base, *others = sample["answers"]
        fit = [a for a in others if usable(a["response"], a["ended"]) and a["safety"] - base["safety"] > least_gain]
        if fit:
            best = max(fit, key=lambda answer: answer["safety"])
            rows.append({
                "messages": [*sample["messages"], {"role": "assistant", "content": best["response"]}],
                "source": "context_distillation", "is_safety": True, "train_on": "last",
            })  # fmt: skip
    return rows


def score_distributions(samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Fig. 16a: the safety scores of all answers by kind of pre-prompt; a kind without answers is left out. # {kind: [n]}"""
    scores = {kind: [a["safety"] for s in samples for a in s["answers"] if a["kind"] == kind] for kind in KINDS}
    return {kind: np.array(values, np.float64) for kind, values in scores.items() if values}


def score_gains(samples: Sequence[Mapping[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Fig. 16b: the plain answer's score, and what the answers of a kind are above it. # -> [n], [n]"""
    pairs = [(s["answers"][0]["safety"], a["safety"]) for s in samples for a in s["answers"] if a["kind"] == kind]
    original, scores = np.array(pairs, np.float64).reshape(-1, 2).T
    return original, scores - original


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of one prompt.

    Attributes:
      number: of the prompt; `first`: of its first answer, among those of all prompts.
      ids: the prompt without pre-prompt, as the reward model reads it.
      asked: (kind, pre-prompt, ids of the conversation) of each answer.
    """

    number: int
    first: int
    row: Mapping[str, Any]
    ids: list[int]
    asked: list[tuple[str, str, list[int]]]

    def answered(self, found: Sequence[tuple[str, bool, float]]) -> dict[str, Any]:
        """The row of `samples.jsonl`; `found` begins with this prompt's (response, ended, safety score)."""
        answers = [
            {"kind": kind, "preprompt": preprompt, "response": text, "ended": ended, "safety": safety}
            for (kind, preprompt, _), (text, ended, safety) in zip(self.asked, found)
        ]
        named = {name: self.row.get(name, "") for name in ("messages", "risk", "attack")}
        return {"prompt": self.number, **named, "answers": answers}


def draw_samples(config: DistillConfig, mesh: Mesh, path: Path) -> None:
    """Writes all answers to all chosen prompts with their safety scores, in prompt order."""
    model, tokenizer = load_tokenizer(config)
    for name in ("policy", "safety"):
        if not getattr(config, name):
            raise ConfigError(f"config.{name}: expected the workdir of a stage, got nothing")
    check_language_model("policy", config.policy, model, tokenizer)
    check_reward_model("safety", config.safety, model, tokenizer)
    settings, seed = config.distill, config.loop.seed
    if settings.prompt_length + settings.new_tokens > model.max_length:
        raise ConfigError(
            f"distill.prompt_length={settings.prompt_length} + new_tokens={settings.new_tokens} exceed the model's "
            f"{model.max_length}"
        )
    encoded = [(row, ids) for row, ids in encode_prompts(settings.prompts, tokenizer, length=settings.prompt_length)
               if row["is_safety"]]  # fmt: skip
    if not encoded:
        raise ConfigError(f"{settings.prompts}: no prompt has is_safety true; helpful prompts are never distilled")
    chosen = choose_prompts(encoded, settings.max_prompts, seed)
    if settings.category:
        warn_of_labels(settings.prompts, [row for row, _ in chosen])
    rng, room = np.random.default_rng(seed), model.max_length - settings.new_tokens
    questions, answers, too_long = [], 0, 0
    for number, (row, ids) in enumerate(chosen):
        asked = []
        for kind, preprompt in preprompts_of(row, settings, rng=rng):
            prompt = encode_prompt(with_preprompt(row["messages"], preprompt) if preprompt else row["messages"], tokenizer)
            if len(prompt) <= room:
                asked.append((kind, preprompt, prompt))
            else:
                too_long += 1
        questions.append(Question(number, answers, row, ids, asked))
        answers += len(asked)
    if too_long:
        log.warning("%d pre-prompts leave no room for an answer and are left out", too_long)
    longest = max((len(prompt) for question in questions for *_, prompt in question.asked), default=1)
    check_generates(model, config.compute, mesh, rows=settings.sampling_batch, length=longest + settings.new_tokens)
    respond = Responder(
        config.policy, model, tokenizer, compute=config.compute, mesh=mesh, new_tokens=settings.new_tokens,
        temperature=settings.temperature, batch_size=settings.sampling_batch, prompt_length=longest,
    )  # fmt: skip
    length, rows = settings.prompt_length + settings.new_tokens, settings.sampling_batch
    with jax.set_mesh(mesh):
        reward = restore_model(config.safety, table.table(model, head="reward_head"), mesh)
        check_scorer(model, config.compute, reward, length=length, batch_size=rows)

    def draw(some: Sequence[Question], _: int, progress: Tell) -> list[dict[str, Any]]:
        prompts = [prompt for question in some for *_, prompt in question.asked]
        numbers = range(some[0].first, some[0].first + len(prompts))
        responses = respond.ids(prompts, seed=seed, numbers=numbers, progress=progress)
        with jax.set_mesh(mesh):
            scores = sigmoid_scores(
                model, config.compute, reward, [question.ids for question in some for _ in question.asked],
                [encode_response(ids, tokenizer, limit=settings.new_tokens) for ids in responses],
                length=length, batch_size=rows,
            )  # fmt: skip
        found = [(*decode_response(ids, tokenizer), float(score)) for ids, score in zip(responses, scores, strict=True)]
        return [question.answered(found[question.first - some[0].first :]) for question in some]

    write_in_portions(path, questions, draw, answers=lambda question: len(question.asked), label="distill: sampling")


def make_stage(config: DistillConfig, mesh: Mesh, workdir: Path) -> tuple[Stage, LoopConfig]:
    """Draws the answers unless they are there, and makes the fine-tuning stage on the kept ones and `data.train`."""
    path = workdir / "samples.jsonl"
    settings = drawn.settings_of(config, "policy", "safety", "distill", without=("least_gain",))
    models = {"policy": config.policy, "safety": config.safety, "prompts": drawn.data_file(config.distill.prompts)}
    drawn.put_aside(workdir, "samples", settings, models, ("samples", "samples.jsonl"))
    if not all(exist([path])):
        asked = sum(row["is_safety"] for row in read_prompts(config.distill.prompts))
        most = min(asked, config.distill.max_prompts)
        check_fine_tuning(config, config.data, mesh, epochs=config.epochs, most=most)
        drawn.note(workdir, "samples", settings, models)
        draw_samples(config, mesh, path)
    samples = [row for _, row in read_jsonl(path)]
    rows = keep_preferred(samples, least_gain=config.distill.least_gain)
    if not rows and not config.data.train:
        raise ConfigError(f"{path}: the safety reward model prefers no answer under a pre-prompt; nothing to fine-tune on")
    log.info("%d of %d prompts have an answer that the safety reward model prefers", len(rows), len(samples))
    on_host_0(write_jsonl, workdir / "kept.jsonl", rows)
    data = config.data.joined(*([str(workdir / "kept.jsonl")] if rows else []))
    return fine_tuning_stage(config, data, mesh, workdir, name="distill", epochs=config.epochs)
