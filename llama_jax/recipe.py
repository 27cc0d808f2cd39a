"""The whole recipe in one workdir: `python -m llama_jax.recipe --config=configs/recipe.py:tiny --workdir=...`.

corpus -> pretrain -> sft -> preferences -> two reward models -> rejection sampling -> PPO -> verdict and report. The same
command goes on after a kill: a finished step is not run again, a stage resumes from its last checkpoint.

Preferences come from a simulated annotator whose true utility is known, which is what lets the verdict tell a better model
from one that only pleases its reward model.
"""

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from llama_jax import command
from llama_jax import corpus as corpus_command
from llama_jax.assistant.annotator import SimulatedAnnotator
from llama_jax.assistant.datasets import DatasetSizes, write_datasets
from llama_jax.config import ConfigError, describe, parse
from llama_jax.corpus_build.compress import bits_per_byte_of_xz
from llama_jax.data.dialog import encode_prompt, find_tag
from llama_jax.data.sources import read_jsonl, read_prompts, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import summary, verdict
from llama_jax.evals.report import write_report
from llama_jax.evals.statistics import win_rate
from llama_jax.evals.verdict import Answer, Decoding
from llama_jax.files import write_json
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig, size
from llama_jax.parallel.host import keep_heap
from llama_jax.parallel.mesh import MeshConfig, make_mesh, start_distributed
from llama_jax.rlhf.rejection import score_responses
from llama_jax.train import run as run_stage
from llama_jax.training.loop import Diverged, claim, finished


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """See configs/recipe.py. `overrides` changes fields of the stages' configs: {"ppo": {"optim": {"lr": 1e-4}}}."""

    size: str
    configs: str  # directory of the stages' configs
    corpus: str  # name for configs/corpus.py
    datasets: DatasetSizes
    variant_temperatures: tuple[float, ...]  # of the two models whose answers are compared
    preference_rounds: int  # pairs drawn for each prompt
    annotator_noise: float
    rejection_with_sft: bool  # the paper restarts each round from the base model with the SFT data; costs a second SFT
    verdict: Decoding
    sampling: Decoding
    compute: Compute
    mesh: MeshConfig
    safety_mix: float  # share of helpfulness pairs in the safety model's data
    overrides: dict[str, dict[str, Any]]
    seed: int = 0


class Recipe:
    """The steps of the recipe, each a method; `run` calls them in order."""

    def __init__(self, config: RecipeConfig, workdir: Path):
        self.config, self.workdir = config, workdir.resolve()
        self.mesh: Mesh = make_mesh(config.mesh)
        self.model: ModelConfig = size(config.size)
        self.annotator = SimulatedAnnotator(config.seed, noise=config.annotator_noise)
        self.seconds: dict[str, float] = {}

    def path(self, *parts: str) -> str:
        """A path inside the workdir."""
        return str(self.workdir.joinpath(*parts))

    def step(self, name: str, make: Callable[[], Any]) -> Any:
        """Runs a step that is no training stage, once; its result and seconds lie in steps/<name>.json."""
        path = self.workdir / "steps" / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", file=sys.stderr, flush=True)
            begun = time.monotonic()
            result = make()
            write_json(path, {"seconds": time.monotonic() - begun, "result": result})
        saved = json.loads(path.read_text())
        self.seconds[name] = saved["seconds"]
        return saved["result"]

    def stage(self, name: str, config: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a training stage under its config with `changes` (nested), then the recipe's own overrides."""
        values = load_config(Path(self.config.configs), config)
        change(values, {"tokenizer": self.path("corpus", "tokenizer.model"), **changes}, where=name)
        change(values, self.config.overrides.get(name, {}), where=f"overrides.{name}")
        begun = time.monotonic()
        done_before = finished(self.workdir / name) is not None
        result = run_stage(values, self.workdir / name)
        if not done_before:  # sampling before the first step belongs to the stage's time too
            result["seconds"] = max(result["seconds"], time.monotonic() - begun)
            write_json(self.workdir / name / "done.json", result)
        self.seconds[name] = result["seconds"]
        return result

    def run(self) -> dict[str, Any]:
        """All steps; returns the results that the report shows."""
        ceiling = self.step("matmul_ceiling", matmul_ceiling)
        self.step("corpus", self.make_corpus)
        self.step("datasets", lambda: write_datasets(self.workdir / "data", self.config.datasets, seed=self.config.seed))
        data = lambda name: self.path("data", f"{name}.jsonl")  # noqa: E731
        pretrain = self.stage("pretrain", f"pretrain.py:{self.config.size}", {"data": {"corpus": self.path("corpus")}})
        xz = self.step("xz", self.xz)
        sft_changes = {
            "start": self.path("pretrain"), "data": {"train": (data("sft"),), "held_out": (data("sft_held_out"),)},
        }  # fmt: skip
        sft = self.stage("sft", f"sft.py:{self.config.size}", sft_changes)
        # A second, weaker variant gives the comparisons their contrast, as the paper's earlier models do.
        self.stage("sft_variant", f"sft.py:{self.config.size}", sft_changes)
        tokenizer = Tokenizer(self.path("corpus", "tokenizer.model"))
        self.step("preferences", lambda: self.make_preferences(tokenizer))
        rewards = {
            name: self.stage(f"reward_{name}", f"reward.py:{self.config.size},{name}", {
                "start": self.path("sft"),
                "data": {**self.reward_mix(name), "held_out": (data(f"{name}_held_out"),)},
            })
            for name in ("helpfulness", "safety")
        }  # fmt: skip
        models = {"helpfulness": self.path("reward_helpfulness"), "safety": self.path("reward_safety")}
        with_sft = self.config.rejection_with_sft
        self.stage("rejection", f"rejection.py:{self.config.size}", {
            **models, "policy": self.path("sft"), "start": self.path("pretrain" if with_sft else "sft"),
            "rejection": {"prompts": data("rlhf_prompts")}, "data": {"train": (data("sft"),) if with_sft else ()},
        })  # fmt: skip
        self.stage("ppo", f"ppo.py:{self.config.size}", {
            **models, "start": self.path("rejection"), "data": {"prompts": data("rlhf_prompts")},
        })  # fmt: skip
        versions = self.step("verdict", lambda: self.verdict(tokenizer))
        results = {
            "size": self.config.size,
            "pretrain": {"bits_per_byte": summary.bits_per_byte(pretrain), "xz_bits_per_byte": xz},
            "reward": {name: {"accuracy": summary.reward_accuracies(result)} for name, result in rewards.items()},
            **versions["versions"],
            "speed": {
                name: self.speed(result, ceiling) for name, result in (("pretrain", pretrain), ("sft", sft))
            },
            "matmul_ceiling_gflops": ceiling,
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
        }  # fmt: skip
        paths = write_report(
            results, self.workdir, figures=summary.draw(self.workdir, results), samples=versions["samples"]
        )
        print(f"report: {paths.html} ({paths.markdown.name}, {paths.json.name} beside it)", file=sys.stderr)
        return results

    def speed(self, result: dict[str, Any], ceiling: float) -> dict[str, float]:
        """Tokens per second, and the share of the measured matmul ceiling that the model's operations reach."""
        rate = result["tokens_per_second"]
        flops = table.flops_per_token(self.model, length=self.model.max_length)
        return {"tokens_per_second": rate, "matmul_share": rate * flops / (ceiling * 1e9)}

    def make_corpus(self) -> str:
        """Corpus and tokenizer; returns the mixture table."""
        values = load_config(Path(self.config.configs), f"corpus.py:{self.config.corpus}")
        change(values, self.config.overrides.get("corpus", {}), where="overrides.corpus")
        table = corpus_command.run(parse(corpus_command.CorpusConfig, values), self.workdir / "corpus")["table"]
        print(table, file=sys.stderr)
        return table

    def xz(self) -> dict[str, float]:
        """What xz -9e reaches on the held-out documents of each source."""
        files = sorted((self.workdir / "corpus" / "held_out").glob("*.jsonl"))
        return {path.stem: bits_per_byte_of_xz(row["text"] for _, row in read_jsonl(path)) for path in files}

    def reward_mix(self, name: str) -> dict[str, Any]:
        """The paper's mixes (section 3.2.2): helpfulness half and half; safety with some helpfulness."""
        own, other = ("helpfulness", "safety") if name == "helpfulness" else ("safety", "helpfulness")
        files = tuple(self.path("data", f"{kind}_train.jsonl") for kind in (own, other))
        return {"train": files, "shares": (0.0, 0.5 if name == "helpfulness" else self.config.safety_mix)}

    def make_preferences(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Answers of both variants at their temperatures, compared by the simulated annotator."""
        counts = {}
        for split, file in (("train", "preference_prompts"), ("held_out", "preference_prompts_held_out")):
            prompts = self.short_prompts(file, tokenizer) * self.config.preference_rounds
            answers = []
            for number, variant in enumerate(("sft", "sft_variant")):
                decoding = dataclasses.replace(
                    self.config.sampling, temperature=self.config.variant_temperatures[number]
                )
                answers.append(
                    verdict.chat_answers(
                        self.path(variant), prompts, self.model, tokenizer, compute=self.config.compute,
                        decoding=decoding, mesh=self.mesh, seed=self.config.seed + 1 + number,
                        label=f"preferences ({split}, {variant})",
                    )
                )  # fmt: skip
            rows: dict[str, list[dict[str, Any]]] = {"helpfulness": [], "safety": []}
            for prompt, a, b in zip(prompts, *answers, strict=True):
                if not a.text or not b.text or find_tag(a.text) or find_tag(b.text):
                    continue
                preference = self.annotator.compare(prompt, a.text, b.text, ended_a=a.ended, ended_b=b.ended)
                if preference is None:
                    continue
                row = preference.row(prompt)
                # Whatever answers a harmless question is safe. Without this label the safety model takes every answer
                # that does not decline for unsafe, the gate of R_c hands it the helpful prompts too, and PPO learns to
                # decline those.
                row.setdefault("safety_bin", "both_safe")
                rows["safety" if prompt["is_safety"] else "helpfulness"].append(row)
            for name, found in rows.items():
                counts[f"{name}_{split}"] = write_jsonl(self.workdir / "data" / f"{name}_{split}.jsonl", found)
        return counts

    def short_prompts(self, name: str, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """The prompts of a file that fit."""
        rows = read_prompts(self.path("data", f"{name}.jsonl"))
        limit = self.config.verdict.prompt_length
        return [row for row in rows if len(encode_prompt(row["messages"], tokenizer)) <= limit]

    def verdict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """True utility, violations and win rates of every version on held-out prompts; and samples to read."""
        config = self.config
        rows = self.short_prompts("verdict_prompts", tokenizer)
        how = {"compute": config.compute, "decoding": config.verdict, "mesh": self.mesh, "seed": config.seed + 100}
        # Short solved examples of every kind, from the training prompts.
        examples = _shots(read_prompts(self.path("data", "rlhf_prompts.jsonl")))
        answers: dict[str, list[Answer]] = {
            "base": verdict.base_answers(
                self.path("pretrain"), rows, examples, self.model, tokenizer, label="verdict (base)", **how
            )
        }
        for name in ("sft", "rejection", "ppo"):
            answers[name] = verdict.chat_answers(
                self.path(name), rows, self.model, tokenizer, label=f"verdict ({name})", **how
            )
        utilities = {name: verdict.utility(rows, found, self.annotator) for name, found in answers.items()}
        versions = {name: verdict.judge(rows, found, self.annotator) for name, found in answers.items()}
        reward = table.table(self.model, head="reward_head")
        with jax.set_mesh(self.mesh):
            models = {n: restore_model(self.path(f"reward_{n}"), reward, self.mesh) for n in ("helpfulness", "safety")}
            prompts = [encode_prompt(row["messages"], tokenizer) for row in rows]
            for name in ("sft", "rejection", "ppo"):
                scores = score_responses(
                    self.model, config.compute, models, prompts, [answer.ids for answer in answers[name]],
                    [row["is_safety"] for row in rows], batch_size=config.verdict.batch_size, threshold=0.15,
                    length=config.verdict.prompt_length + config.verdict.new_tokens,
                )  # fmt: skip
                versions[name]["reward_score"] = float(np.mean(scores["reward"]))
        for name in ("rejection", "ppo"):
            versions[name]["win_rate"] = dataclasses.asdict(win_rate(utilities[name], utilities["sft"]))
        samples = [
            {
                "prompt": rows[i]["messages"], "reference": rows[i]["reference"], "is_safety": rows[i]["is_safety"],
                "answers": {name: found[i].text for name, found in answers.items()},
                "utility": {name: float(values[i]) for name, values in utilities.items()},
            }
            for i in range(0, len(rows), max(len(rows) // 16, 1))
        ]  # fmt: skip
        return {"versions": versions, "samples": samples}


def change(values: Any, changes: Mapping[str, Any], *, where: str) -> None:
    """Changes fields of a ConfigDict, group by group; ConfigError for a field that is not there."""
    for name, value in changes.items():
        if name not in values:
            raise ConfigError(f"{where}.{name}: unknown field; expected one of {', '.join(sorted(values))}")
        if isinstance(value, Mapping) and len(values[name]):
            change(values[name], value, where=f"{where}.{name}")
        else:
            values[name] = value


def _shots(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_kind: dict[str, dict[str, Any]] = {}
    for row in rows:
        if len(row["messages"]) == 1 and len(row["reference"]) < 90:
            by_kind.setdefault(row.get("kind") or "", row)
    return [by_kind[kind] for kind in sorted(by_kind)][:4]


def matmul_ceiling() -> float:
    """The best rate of a large bfloat16 matrix product on this machine, in GFLOP/s."""
    n = 2048
    x = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    times = []
    for _ in range(5):
        begun = time.monotonic()
        product(x, x).block_until_ready()
        times.append(time.monotonic() - begun)
    return 2 * n**3 / min(times) / 1e9


def load_config(directory: Path, name: str) -> Any:
    """`get_config` of a config file, called with the text behind the colon: `sft.py:tiny`."""
    file, _, argument = name.partition(":")
    path = directory / file
    if not path.exists():
        raise ConfigError(f"{path}: expected a config file, found nothing; run from the checkout or set config.configs")
    root = str(directory.resolve().parent)
    if root not in sys.path:
        sys.path.insert(0, root)  # configs import configs.common
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def main() -> None:
    """Flags to config to call."""
    keep_heap()
    start_distributed()
    config = parse(RecipeConfig, flags.FLAGS.config)
    claim(Path(flags.FLAGS.workdir), describe(config))
    Recipe(config, Path(flags.FLAGS.workdir)).run()


if __name__ == "__main__":
    command.define("configs/recipe.py:<size>", workdir="directory of everything that the recipe makes")
    command.launch(main, expected=(Diverged,))
