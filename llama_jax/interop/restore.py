"""A model from any stage's checkpoint. Adapters (`model.lora`) are merged into the checkpoint that they were trained on.

A stage that trains adapters stores them and a reference to its base: where it lies, and a fingerprint of its parameters, so
that adapters are never laid on another model than their own. Of other models that a run only reads it notes the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.model.lora import LoraConfig, adapter_specs, merged, scale_specs
from llama_jax.model.params import Params, Specs, init
from llama_jax.parallel.axes import shardings
from llama_jax.paths import absolute, place, relative
from llama_jax.training.fingerprint import CheckpointError
from llama_jax.training.saved import POLICY, named, read_meta, saved_parts
from llama_jax.training.saved import restore_model as restore_plain


def restore_model(workdir: str | Path, specs: Specs, mesh: Mesh) -> Params:
    """Parameters of one model, or of a part of it; of a stage that trains several (PPO), those of its policy.

    `specs` is the table of the model without adapters.
    """
    lora = read_meta(workdir).get("lora")
    if not specs:
        return {}
    if lora is None:
        return restore_plain(workdir, specs, mesh)
    own = _own_parts(workdir)
    config = adapter_config(lora)
    base = restore_model(base_of(workdir), {name: part for name, part in specs.items() if name not in own}, mesh)
    saved = {name: specs[name] for name in own if name in specs}
    if "trunk" not in specs:
        return {**base, **restore_plain(workdir, saved, mesh)}
    found = restore_plain(workdir, {**saved, "lora": adapter_specs(specs, config)}, mesh)
    scale = init(scale_specs(config), jax.random.key(0))
    layout = shardings(specs, mesh)
    # The base is donated: where nothing else holds it, a merged matrix takes its place.
    return jax.jit(
        lambda base, found: merged({**base, **found, "lora": {**found["lora"], **scale}}), out_shardings=layout,
        donate_argnums=0,
    )(base, found)  # fmt: skip


def model_parts(workdir: str | Path) -> set[str]:
    """Which parts `restore_model` can give: "trunk" and heads."""
    parts = _own_parts(workdir)
    if read_meta(workdir).get("lora") is None:
        return parts
    return (parts | model_parts(base_of(workdir))) - {"lora"}


def _own_parts(workdir: str | Path) -> set[str]:
    parts = saved_parts(workdir)
    return set(parts.get(POLICY, parts.keys()))


def adapter_config(lora: Mapping[str, Any]) -> LoraConfig:
    """The adapters of a checkpoint, from what its meta says of them."""
    return LoraConfig(rank=lora["rank"], alpha=lora["alpha"], targets=tuple(lora["targets"]))


def describe_base(config: LoraConfig, base: str | Path, workdir: str | Path) -> dict[str, Any]:
    """What a checkpoint of adapters says of them and of their base, under "lora" in its meta."""
    return {
        "rank": config.rank, "alpha": config.alpha, "targets": list(config.targets), "base": describe_model(base, workdir),
    }  # fmt: skip


def describe_model(model: str | Path, workdir: str | Path) -> dict[str, str]:
    """Where a model lies that the run in `workdir` does not train, from there too, and which one it is."""
    directory, step = named(model)
    at = "" if step is None else f"@{step}"
    return {
        "workdir": f"{absolute(directory)}{at}", "relative": f"{relative(directory, workdir)}{at}",
        "fingerprint": fingerprint(model),
    }  # fmt: skip


def fingerprint(workdir: str | Path) -> str:
    """One value for the parameters of a checkpoint's model (of several, of the policy) and of the base that they stand on.

    It is read from the meta of the checkpoint, and no parameter is.
    """
    meta = read_meta(workdir)
    saved = {name: value for name, value in meta["fingerprints"].items() if name.startswith("['params']")}
    policy = {name: value for name, value in saved.items() if name.startswith(f"['params']['{POLICY}']")}
    facts: list[Any] = [sorted((policy or saved).items())]
    if "lora" in meta:
        facts.append({**meta["lora"], "base": meta["lora"]["base"]["fingerprint"]})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def base_of(workdir: str | Path) -> Path:
    """Where the base of a checkpoint of adapters lies (`WORKDIR` or `WORKDIR@STEP`), also after both were moved together.

    Raises:
      CheckpointError: it is not there, or its parameters are not those that the adapters were trained on.
    """
    base = read_meta(workdir)["lora"]["base"]
    places = [place(named(workdir)[0] / base["relative"]), place(base["workdir"])]
    present = [path for path in places if (named(path)[0] / "checkpoints").is_dir()]
    if not present:
        raise CheckpointError(f"{workdir} holds adapters of {base['workdir']}, which is not there (nor {places[0]})")
    for path in present:
        if fingerprint(path) == base["fingerprint"]:
            return path
    raise CheckpointError(
        f"{workdir} holds adapters of a model with fingerprint {base['fingerprint'][:12]}; {present[0]} is another "
        f"({fingerprint(present[0])[:12]})"
    )


