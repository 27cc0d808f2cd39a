"""The whole recipe in one workdir: `python -m llama_jax.recipe --config=configs/recipe.py:tiny --workdir=...`.

corpus -> pretrain -> sft -> versions V1, V2, ... -> verdict and report. A version is: comparisons by the newest policies -> two
reward models -> rejection sampling over the pools of all versions -> in the last one PPO (`rlhf.versions`). The same command
goes on after a kill: a finished step is not run again, a stage resumes from its last checkpoint.

Preferences come from a simulated annotator whose true utility is known, which is what lets the verdict tell a better model
from one that only pleases its reward model.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import command, ghost_study
from llama_jax import corpus as corpus_command
from llama_jax.assistant.annotator import SimulatedAnnotator
from llama_jax.assistant.datasets import write_datasets
from llama_jax.config import describe, parse
from llama_jax.corpus_build.compress import bits_per_byte_of_xz
from llama_jax.data.dialog import encode_prompt, encode_response
from llama_jax.data.sources import read_jsonl, read_prompts, write_jsonl
from llama_jax.evals import distillation_figure, progress, summary, verdict
from llama_jax.evals.ghost import by_family, held_out_contexts, keeps_instructions
from llama_jax.evals.report import write_report
from llama_jax.evals.speed import matmul_ceiling, operations, speed
from llama_jax.evals.verdict import Answer, Decoding
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import ModelConfig, size
from llama_jax.parallel.mesh import fitting_mesh, make_mesh
from llama_jax.pretrain.base import load_tokenizer
from llama_jax.recipe_config import RecipeConfig
from llama_jax.reward.score import SAFETY_THRESHOLD
from llama_jax.rlhf import ghost
from llama_jax.rlhf.annotate import TRACKS, compare_answers
from llama_jax.rlhf.rollout import check_size
from llama_jax.rlhf.scoring import score_responses
from llama_jax.rlhf.versions import (
    VersionPlan,
    checkpoint_entry,
    complete,
    file_entry,
    portion,
    record,
)
from llama_jax.steps import Steps, change, define_job, load_config, merged, run_job
from llama_jax.train import parse_stage
from llama_jax.training.loop import Diverged
from llama_jax.training.workdir import claim


class Recipe(Steps[RecipeConfig]):
    """The steps of the recipe, each a method; `run` calls them in order."""

    def __init__(self, config: RecipeConfig, workdir: Path):
        super().__init__(config, workdir, tokenizer_file="corpus/tokenizer.model")
        self.mesh_config = config.mesh  # until it is known what has to be divided
        loops = [self.values(kind, file, {}).loop for kind, file in self.files().items()]
        rows = math.gcd(*(loop.batch_size // loop.microbatches for loop in loops))
        self.mesh_config = fitting_mesh(config.mesh, devices=jax.device_count(), rows=rows)
        self.mesh: Mesh = make_mesh(self.mesh_config)
        self.model: ModelConfig = size(config.size)
        self.annotator = SimulatedAnnotator(config.seed, noise=config.annotator_noise)
        self.results: dict[str, Any] = {}  # summaries of the stages by name
        self.operations: dict[str, int] = {}  # of the models that a stage trains, for each token
        self.policies = ["sft_variant", "sft"]  # from the oldest to the newest
        self.rewards: dict[str, str] = {}  # the newest reward model of each track
        self.batches: list[str] = []  # versions that collected comparisons
        self.pools: list[str] = []  # rounds of rejection sampling
        self.judged = {"base": "pretrain", "sft": "sft"}  # name in the report -> stage
        self.standing: dict[str, Any] = {}  # what the annotator found, by name in the report

    def run(self) -> dict[str, Any]:
        """All steps; returns the results that the report shows."""
        self.make_base()
        for number, plan in enumerate(self.config.versions, start=1):
            self.make_version(number, plan)
        studies = {}
        if any(plan.ghost for plan in self.config.versions):
            studies["ghost_versions"] = self.ask_versions()
        if self.config.ghost_study:
            studies["ghost_attention"] = self.study_ghost()
        if self.config.distillation:
            studies["distillation"] = self.distil()
        return self.report(studies)

    def files(self) -> dict[str, str]:
        """Also those that this recipe's versions do not come to."""
        size, reward = self.config.size, {f"reward_{track}": f"reward.py:{self.config.size},{track}" for track in TRACKS}
        kinds = ("pretrain", "sft", "rejection", "ppo", "ghost", "distill")
        return {**{kind: f"{kind}.py:{size}" for kind in kinds}, "sft_variant": f"sft.py:{size}", **reward}

    def parts(self) -> tuple[str, ...]:
        """These two have configs of their own."""
        return ("corpus", "ghost_study")

    def common(self) -> dict[str, Any]:
        """All stages compute alike, on one mesh."""
        return {**super().common(), "mesh": describe(self.mesh_config), "compute": describe(self.config.compute)}

    def check(self) -> None:
        """Corpus and study have overrides too."""
        super().check()
        self.corpus_config()
        if self.config.ghost_study:
            self.make_study(self.path("sft")).check()

    def check_stage(self, config: Any) -> None:
        """PPO rolls more out than it trains on at once."""
        super().check_stage(config)
        if config.stage == "ppo":
            check_size(config.ppo.rollout_size, config.loop.batch_size, make_mesh(config.mesh))

    def stage(self, name: str, config: str, changes: dict[str, Any]) -> dict[str, Any]:
        """A training stage, whose summary the report may want."""
        self.operations[name] = operations(parse_stage(self.values(name, config, changes)), self.model)
        self.results[name] = super().stage(name, config, changes)
        return self.results[name]

    def data(self, name: str) -> str:
        """A file of the data sets."""
        return self.path("data", f"{name}.jsonl")

    def make_base(self) -> None:
        """Corpus, data sets, the base model and the SFT models."""
        config = self.config
        self.ceiling = self.step("matmul_ceiling", lambda: matmul_ceiling(config.compute))
        built = self.corpus_config()
        self.step("corpus", lambda: self.make_corpus(built), config=built)
        self.step("datasets", lambda: write_datasets(self.workdir / "data", config.datasets, seed=config.seed))
        self.stage("pretrain", f"pretrain.py:{config.size}", {"data": {"corpus": self.path("corpus")}})
        self.xz = self.step("xz", self.measure_xz)
        sft = {
            "start": self.path("pretrain"),
            "data": {"train": (self.data("sft"),), "held_out": (self.data("sft_held_out"),)},
        }
        self.stage("sft", f"sft.py:{config.size}", sft)
        # A second, weaker variant gives the first comparisons their contrast, as the paper's earlier models do.
        self.stage("sft_variant", f"sft.py:{config.size}", sft)
        for name in ("base", "sft"):
            self.answer(name)

    def make_version(self, number: int, plan: VersionPlan) -> None:
        """One version: comparisons, reward models, rejection sampling, perhaps PPO; its answers; its entry in the ledger."""
        name = f"v{number}"
        if plan.preferences:
            self.step(f"{name}/preferences", lambda: self.collect(number))
            self.batches.append(name)
            for track in TRACKS:
                self.rewards[track] = f"{name}/reward_{track}"
                self.stage(self.rewards[track], f"reward.py:{self.config.size},{track}", self.reward_changes(track))
                self.link(self.rewards[track])
        mix = [self.data("sft")] if self.config.restart == "base" else []
        seed = self.config.seed + number
        if plan.ghost and self.make_ghost(name, seed):
            mix.append(self.path(name, "ghost", "ghost.jsonl"))
        models = {track: self.path(stage) for track, stage in self.rewards.items()}
        prompts = self.data("rlhf_prompts")
        self.stage(f"{name}/rejection", f"rejection.py:{self.config.size}", {
            **models, "policy": self.path(self.policies[-1]),
            "start": self.path("pretrain" if self.config.restart == "base" else "sft"),
            "rejection": {"prompts": prompts, "max_prompts": plan.prompts, "answers": plan.answers, "version": name},
            "pools": tuple(self.path(pool, "pool.jsonl") for pool in self.pools), "data": {"train": tuple(mix)},
            "loop": {"seed": seed},
        })  # fmt: skip
        self.pools.append(f"{name}/rejection")
        self.finish(name, f"{name}/rejection")
        if plan.ppo:
            changes = {**models, "start": self.path(f"{name}/rejection"), "data": {"prompts": prompts}}
            self.stage(f"{name}/ppo", f"ppo.py:{self.config.size}", changes)
            self.finish(f"{name}_ppo", f"{name}/ppo")
        record(self.workdir / "ledger.json", name, self.entry(name, plan, mix))

    def finish(self, name: str, stage: str) -> None:
        """A new policy: it is the one that others begin from, and it answers the verdict's prompts."""
        self.link(stage)
        self.policies.append(stage)
        self.judged[name] = stage
        self.answer(name)

    def corpus_config(self) -> corpus_command.CorpusConfig:
        """The corpus's config."""
        values = load_config(self.configs, f"corpus.py:{self.config.corpus}")
        change(values, {"seed": self.config.seed, **self.config.overrides.get("corpus", {})}, where="overrides.corpus")
        return parse(corpus_command.CorpusConfig, values, where="corpus")

    def make_corpus(self, config: corpus_command.CorpusConfig) -> str:
        """Corpus and tokenizer; returns the mixture table."""
        text = corpus_command.run(config, self.workdir / "corpus")["table"]
        print(text, file=sys.stderr)
        return text

    def measure_xz(self) -> dict[str, float]:
        """What xz -9e reaches on the held-out documents of each source."""
        files = sorted((self.workdir / "corpus" / "held_out").glob("*.jsonl"))
        return {path.stem: bits_per_byte_of_xz(row["text"] for _, row in read_jsonl(path)) for path in files}

    def collect(self, number: int) -> dict[str, int]:
        """Fresh comparisons: the newest policy and the one before it answer, each at its temperature; counts by file."""
        config, counts = self.config, {}
        for split, file in (("train", "preference_prompts"), ("held_out", "preference_prompts_held_out")):
            prompts = read_prompts(self.data(file))
            if split == "train":
                sizes = [plan.preferences for plan in config.versions]
                prompts = portion(prompts, sizes, number - 1, seed=config.seed)
            prompts = self.fitting(prompts)
            answers = [
                self.chat(
                    stage, prompts, dataclasses.replace(config.sampling, temperature=temperature),
                    seed=config.seed + 10 * number + variant, label=f"v{number} preferences ({split}, {stage})",
                )
                for variant, (stage, temperature) in enumerate(
                    zip(self.policies[:-3:-1], config.variant_temperatures, strict=True)
                )
            ]  # fmt: skip
            texts = [[(answer.text, answer.ended) for answer in found] for found in answers]
            for track, rows in compare_answers(prompts, *texts, self.annotator, batch=number).items():
                path = self.workdir / f"v{number}" / "preferences" / f"{track}_{split}.jsonl"
                counts[path.stem] = write_jsonl(path, rows)
        return counts

    def reward_changes(self, track: str) -> dict[str, Any]:
        """The paper's mixes (section 3.2.2) of all batches: helpfulness half and half; safety with some helpfulness."""

        def files(name: str, split: str) -> list[str]:  # a small batch may hold no pair of a track
            paths = [self.workdir / version / "preferences" / f"{name}_{split}.jsonl" for version in self.batches]
            return [str(path) for path in paths if path.stat().st_size]

        (other,) = (name for name in TRACKS if name != track)
        data = {
            "train": tuple(files(track, "train")), "rest": tuple(files(other, "train")),
            "held_out": tuple(files(track, "held_out")),
        }  # fmt: skip
        if len(self.batches) == sum(plan.preferences > 0 for plan in self.config.versions):  # the last ones are reported
            data["others"] = tuple(files(other, "held_out"))
        if track == "safety":
            data["rest_share"] = self.config.safety_mix
        return {"start": self.path(self.policies[-1]), "data": data}

    def make_ghost(self, name: str, seed: int) -> int:
        """Ghost Attention's dialogs, drawn from the newest policy; their number."""
        # Other contexts and instructions than the version before trained on.
        config = self.ghost_config({"policy": self.path(self.policies[-1]), "loop": {"seed": seed}})
        workdir = self.workdir / name / "ghost"
        claim(workdir, describe(config), kind=type(config))  # it is no stage's run, which would do that
        return self.step(f"{name}/ghost", lambda: len(ghost.gather(config, self.mesh, workdir)))

    def ghost_config(self, changes: dict[str, Any]) -> ghost.GhostConfig:
        """What Ghost Attention's dialogs are drawn with."""
        changes = {"start": self.path("sft"), "ghost": {"contexts": (self.data("sft"),)}, **changes}
        return parse_stage(self.values("ghost", f"ghost.py:{self.config.size}", changes))

    def ask_versions(self) -> dict[str, Any]:
        """How the versions keep an instruction of the first turn (Table 30): the last one before Ghost Attention's dialogs
        entered, and all after it. {version: {family: {turn: interval}}}"""
        first = next(number for number, plan in enumerate(self.config.versions, start=1) if plan.ghost)
        names = list(self.judged)
        names = names[max(names.index(f"v{first}") - 1, 0) :]
        return {name: self.step(f"recall/{name}", lambda name=name: self.recall(name, f"v{first}")) for name in names}

    def recall(self, name: str, first: str) -> dict[str, dict[str, Any]]:
        """A version's recall on held-out dialogs by kind of instruction; lists of values are of the version `first`."""
        config = self.ghost_config({})
        settings, (model, _) = config.ghost, load_tokenizer(config)
        most, lists = settings.turns[1], settings.values or self.path(first, "ghost", "values.jsonl")
        contexts = held_out_contexts(
            self.data("sft_held_out"), ghost.read_values(lists, settings.families), self.tokenizer, turns=most,
            room=model.max_length - settings.new_tokens, place=settings.place, seed=self.config.seed,
        )  # fmt: skip
        found = keeps_instructions(
            self.path(self.judged[name]), contexts, model, self.tokenizer, compute=config.compute, mesh=self.mesh,
            turns=range(1, most + 1), new_tokens=settings.new_tokens, batch_size=settings.sampling_batch,
            seed=self.config.seed, label=f"recall ({name})", place=settings.place,
        )  # fmt: skip
        write_jsonl(self.workdir / "recall" / f"{name}.jsonl", map(dataclasses.asdict, found))
        return by_family(found, contexts)

    def make_study(self, start: str) -> ghost_study.GhostStudy:
        """The study of Ghost Attention from a policy's workdir; its own overrides win over what all stages have in common."""
        config = self.config
        values = load_config(self.configs, f"ghost_study.py:{config.ghost_study}")
        own = dict(config.overrides.get("ghost_study", {}))
        everywhere = {name: self.common()[name] for name in ("mesh", "compute")}
        overrides = merged({"baseline": everywhere, "ghost": everywhere}, values.overrides.to_dict())
        overrides = merged(overrides, own.pop("overrides", {}))
        change(values, {
            "size": config.size, "configs": str(self.configs), "start": start, "tokenizer": self.tokenizer_file,
            "dialogs": self.data("sft"), "seed": config.seed, **own,
        }, where="overrides.ghost_study")  # fmt: skip
        values.overrides = type(values)(overrides)
        parsed = parse(ghost_study.GhostStudyConfig, values, where="ghost_study")
        return ghost_study.GhostStudy(parsed, self.workdir / "ghost_study")

    def study_ghost(self) -> dict[str, Any]:
        """How long an instruction is kept, without and with Ghost Attention (Table 30)."""
        before = next(number for number, plan in enumerate(self.config.versions) if plan.ghost)  # V1 is number 0
        study = self.make_study(self.path(f"v{before}", "rejection"))
        claim(study.workdir, describe(study.config))
        found = study.run()
        self.seconds["ghost_study"] = sum(study.seconds.values())
        return found

    def distil(self) -> dict[str, Any]:
        """Safety context distillation of the newest policy (section 4.2.4, Fig. 16); what it was before and after.

        The last round's best answers keep it what it is otherwise.
        """
        policy = self.policies[-1]
        self.stage("distill", f"distill.py:{self.config.size}", {
            "policy": self.path(policy), "start": self.path(policy), "safety": self.path(self.rewards["safety"]),
            "distill": {"prompts": self.data("rlhf_prompts")},
            "data": {"train": (self.path(self.pools[-1], "best.jsonl"),)},
        })  # fmt: skip
        self.judged["distilled"] = "distill"
        self.answer("distilled")
        before = next(name for name, stage in self.judged.items() if stage == policy)
        return {
            **distillation_figure.described(*distillation_figure.read_run(self.workdir / "distill")),
            "before": self.standing[before], "after": self.standing["distilled"],
        }  # fmt: skip

    def fitting(self, prompts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The prompts that are not too long."""
        return verdict.fitting(prompts, self.tokenizer, length=self.config.verdict.prompt_length)

    def chat(self, stage: str, prompts: list[dict[str, Any]], decoding: Decoding, **how: Any) -> list[Answer]:
        """A stage's answers to prompts."""
        return verdict.chat_answers(
            self.path(stage), prompts, self.model, self.tokenizer, compute=self.config.compute, decoding=decoding,
            mesh=self.mesh, **how,
        )  # fmt: skip

    def answer(self, name: str) -> None:
        """A model's answers to the verdict's prompts (`answers/<name>.jsonl`), judged by the annotator."""
        self.standing[name] = self.step(f"answers/{name}", lambda: self.make_answers(name))

    def make_answers(self, name: str) -> dict[str, Any]:
        """Draws and judges them; a base model is shown short solved examples of every kind, from the training prompts."""
        config, stage = self.config, self.judged[name]
        rows = self.fitting(read_prompts(self.data("verdict_prompts")))
        how = {"decoding": config.verdict, "seed": config.seed + 100, "label": f"verdict ({name})"}
        if name == "base":
            examples = verdict.short_examples(read_prompts(self.data("rlhf_prompts")))
            answers = verdict.base_answers(
                self.path(stage), rows, examples, self.model, self.tokenizer, compute=config.compute, mesh=self.mesh, **how
            )
        else:
            answers = self.chat(stage, rows, **how)
        progress.write_answers(self.workdir / "answers" / f"{name}.jsonl", rows, answers, self.annotator)
        return verdict.judge(rows, answers, self.annotator)

    def score_answers(self) -> None:
        """Scores of all chat models' answers by the newest reward models (`scores/<name>.jsonl`)."""
        rows = self.fitting(read_prompts(self.data("verdict_prompts")))
        prompts = [encode_prompt(row["messages"], self.tokenizer) for row in rows]
        reward, how = table.table(self.model, head="reward_head"), self.config.verdict
        with jax.set_mesh(self.mesh):
            models = {track: restore_model(self.path(stage), reward, self.mesh) for track, stage in self.rewards.items()}

            def score(answers: list[list[int]]) -> dict[str, np.ndarray]:
                return score_responses(
                    self.model, self.config.compute, models, prompts,
                    [encode_response(ids, self.tokenizer, limit=how.new_tokens) for ids in answers],
                    [row["is_safety"] for row in rows], length=how.prompt_length + how.new_tokens,
                    batch_size=how.batch_size, threshold=SAFETY_THRESHOLD,
                )  # fmt: skip

            progress.write_scores(self.workdir, [name for name in self.judged if name != "base"], score)

    def entry(self, name: str, plan: VersionPlan, mix: list[str]) -> dict[str, Any]:
        """What the ledger says of a version."""
        root, own = self.workdir, self.workdir / name
        before = self.policies[: self.policies.index(f"{name}/rejection")]
        stages = sorted({*self.rewards.values(), *(s for s in self.policies if s.startswith(f"{name}/"))})
        files = [*sorted((own / "preferences").glob("*.jsonl")), own / "rejection" / "pool.jsonl",
                 own / "rejection" / "best.jsonl", *map(Path, mix)]  # fmt: skip
        names = [n for n in self.judged if n in (name, f"{name}_ppo")]
        return {
            "plan": dataclasses.asdict(plan),
            "compared": [
                {"temperature": temperature, **checkpoint_entry(root / stage, root=root)}
                for stage, temperature in zip(before[:-3:-1], self.config.variant_temperatures, strict=True)
            ] if plan.preferences else [],
            "sampled_from": before[-1],
            "pools": self.pools,
            "data": [file_entry(path, root=root) for path in files if path.exists()],
            "checkpoints": [checkpoint_entry(root / stage, root=root) for stage in stages],
            "reward_accuracy": {
                track: summary.reward_accuracies(self.results[s]).get("all") for track, s in self.rewards.items()
            },
            "scores": {n: {**self.standing[n], **progress.win_rates(root, n, "sft"), "against": "sft"} for n in names},
        }  # fmt: skip

    def report(self, studies: dict[str, Any]) -> dict[str, Any]:
        """Judges all versions, completes the ledger, writes report and figures; returns the results that the report shows,
        `studies` among them."""
        self.step("scores", self.score_answers)
        last, names = f"v{len(self.config.versions)}", [name for name in self.judged if name != "distilled"]
        versions = {name: {**self.standing[name], **progress.compare(self.workdir, name)} for name in names}
        complete(self.workdir / "ledger.json", versions, judges=self.rewards)
        results = {
            "size": self.config.size,
            "minutes": self.config.minutes,
            "pretrain": {
                "bits_per_byte": summary.bits_per_byte(self.results["pretrain"]), "xz_bits_per_byte": self.xz,
                "held_out_lines_seen": summary.held_out_lines_seen(self.workdir / "corpus"),
            },
            "reward": {
                t: {"accuracy": summary.reward_accuracies(self.results[s]), **summary.reward_report(self.workdir / s)}
                for t, s in self.rewards.items()
            },
            "base": versions["base"], "sft": versions["sft"], "rejection": versions[last],
            **({"ppo": versions[f"{last}_ppo"]} if f"{last}_ppo" in versions else {}),
            "versions": {name: found for name, found in versions.items() if name != "base"},
            "reward_batches": summary.reward_batches(self.workdir, self.batches),
            "ghost": summary.ghost_samples(self.workdir), **studies,
            "speed": {name: speed(found, self.operations[name], self.ceiling) for name, found in self.results.items()},
            **({"ppo_seconds": found} if (found := summary.ppo_seconds(self.workdir / last / "ppo")) else {}),
            "matmul_ceiling_gflops": self.ceiling,
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
        }  # fmt: skip
        shown = {"base": "base", "sft": "sft", "rejection": last, "ppo": f"{last}_ppo"}
        samples = progress.samples(
            self.fitting(read_prompts(self.data("verdict_prompts"))), self.workdir,
            {label: name for label, name in shown.items() if name in names},
        )  # fmt: skip
        paths = write_report(results, self.workdir, figures=summary.draw(self.workdir, results), samples=samples)
        print(f"report: {paths.html} ({paths.markdown.name}, {paths.json.name} beside it)", file=sys.stderr)
        return results


if __name__ == "__main__":
    define_job("configs/recipe.py:<size>[,versions=N]", workdir="directory of everything that the recipe makes")
    command.launch(lambda: run_job(RecipeConfig, Recipe), expected=(Diverged,))
