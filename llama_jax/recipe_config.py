"""What the whole recipe may be told (configs/recipe.py)."""

import dataclasses
from typing import Any, Literal

from llama_jax.assistant.datasets import DatasetSizes
from llama_jax.evals.verdict import Decoding
from llama_jax.model.config import Compute
from llama_jax.parallel.mesh import MeshConfig
from llama_jax.rlhf.versions import VersionPlan, check_plans


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """See configs/recipe.py.

    Attributes:
      overrides: changes fields of the stages' configs, {"ppo": {"optim": {"lr": 1e-4}}}, and those of `corpus` and
        `ghost_study`. They win over what follows.
      compute, mesh, seed: of all stages. Devices along a `fsdp` of -1 that the rows of a batch leave over go to `tensor`.
      configs: directory of the stages' configs.
      corpus: name for configs/corpus.py.
      variant_temperatures: of the two models whose answers are compared, the newest one first.
      restart: what a version's fine-tuning starts from: the base model with the SFT data in the mix, as in the paper, or the
        SFT model with the best answers alone, which is cheaper.
      safety_mix: share of helpfulness pairs in the safety model's data.
      ghost_study: config of the study of Ghost Attention (configs/ghost_study.py) that the policy before the first version
        with its dialogs is put to; empty: none.
      distillation: whether the newest policy goes through safety context distillation, beside the versions.
      minutes: what it should take at most on two CPU cores; the report says whether it did.
    """

    size: str
    configs: str
    corpus: str
    datasets: DatasetSizes
    versions: tuple[VersionPlan, ...]
    restart: Literal["base", "sft"]
    variant_temperatures: tuple[float, ...]
    annotator_noise: float
    verdict: Decoding
    sampling: Decoding
    compute: Compute
    mesh: MeshConfig
    safety_mix: float
    ghost_study: str
    distillation: bool
    minutes: float
    overrides: dict[str, dict[str, Any]]
    seed: int = 0

    def __post_init__(self):
        prompts = self.datasets.preferences + self.datasets.preferences_safety
        check_plans(self.versions, preference_prompts=prompts)
        if self.ghost_study and not any(plan.ghost for plan in self.versions):
            raise ValueError(f"ghost_study={self.ghost_study}: expected a version with ghost=True")
        for name, fields in self.overrides.items():
            if fields.get("data", {}).get("shares"):
                raise ValueError(f"overrides.{name}.data.shares: expected none, the recipe chooses the files of a stage's mix")
        if len(self.variant_temperatures) != 2:
            raise ValueError(f"variant_temperatures: expected two, got {self.variant_temperatures}")
