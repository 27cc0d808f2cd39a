"""Steps of a longer job in one workdir: each is done once, and the same command goes on after a kill.

A training stage resumes from its last checkpoint; any other step is done whole or not at all.
"""

import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import jax
from absl import flags

from llama_jax.config import ConfigError, describe, parse
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import write_json
from llama_jax.parallel.host import keep_compiled, keep_heap
from llama_jax.parallel.mesh import start_distributed
from llama_jax.train import run as run_stage
from llama_jax.training.loop import finished
from llama_jax.training.workdir import claim, own


class StepsConfig(Protocol):
    """What the config of every job of steps has.

    Attributes:
      configs: directory of the stages' configs.
      overrides: changes fields of them: {"ppo": {"optim": {"lr": 1e-4}}}.
    """

    configs: str
    overrides: dict[str, dict[str, Any]]


C = TypeVar("C", bound=StepsConfig)


class Steps(Generic[C]):
    """A job whose method `run` calls its steps in order; `seconds` holds what each took, in whichever run it was done.

    `tokenizer_file` is a path, in the workdir where it is relative.
    """

    def __init__(self, config: C, workdir: Path, *, tokenizer_file: str | Path):
        self.config, self.workdir, self.configs = config, workdir.resolve(), Path(config.configs)
        self.tokenizer_file = self.path(str(tokenizer_file))
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All steps; returns what the report shows."""
        raise NotImplementedError

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all stages; a step may have made it."""
        return Tokenizer(self.tokenizer_file)

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

    def values(self, name: str, config: str, changes: Mapping[str, Any]) -> Any:
        """A stage's config with `changes` (nested), then the overrides of its kind: of "rejection" for "v2/rejection"."""
        kind = name.rpartition("/")[2]
        values = load_config(self.configs, config)
        change(values, {"tokenizer": self.tokenizer_file, **changes}, where=name)
        change(values, self.config.overrides.get(kind, {}), where=f"overrides.{kind}")
        return values

    def stage(self, name: str, config: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a training stage in the directory `name`; returns its summary."""
        values = self.values(name, config, changes)
        begun = time.monotonic()
        done_before = finished(self.workdir / name) is not None
        result = run_stage(values, self.workdir / name)
        if not done_before:  # sampling before the first step belongs to the stage's time too
            result["seconds"] = max(result["seconds"], time.monotonic() - begun)
            write_json(self.workdir / name / "done.json", result)
        self.seconds[name] = result["seconds"]
        return result

    def link(self, name: str) -> None:
        """Lets the name of a kind stand for its newest stage: `rejection` for `v2/rejection`."""
        path, target = self.workdir / name.rpartition("/")[2], Path(name)
        if path.is_symlink() and path.readlink() == target:
            return
        new = path.with_name(f".{path.name}.tmp")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(path)


def run_job(config: type[C], job: Callable[[C, Path], Steps[C]]) -> Path:
    """What the command of a job does with its flags `config` and `workdir`; returns the workdir.

    ConfigError on several hosts, which would all write the files of the steps that are no stages.
    """
    keep_heap()
    keep_compiled(flags.FLAGS.workdir)
    start_distributed()
    if jax.process_count() > 1:
        raise ConfigError(
            f"a job of steps runs in one process, got {jax.process_count()}: on several hosts run its stages one by one, with "
            "llama_jax.train"
        )
    parsed, workdir = parse(config, flags.FLAGS.config), Path(flags.FLAGS.workdir)
    with own(workdir):
        claim(workdir, describe(parsed))
        job(parsed, workdir).run()
    return workdir


def change(values: Any, changes: Mapping[str, Any], *, where: str) -> None:
    """Changes fields of a ConfigDict, group by group; ConfigError for a field that is not there."""
    for name, value in changes.items():
        if name not in values:
            raise ConfigError(f"{where}.{name}: unknown field; expected one of {', '.join(sorted(values))}")
        if isinstance(value, Mapping) and len(values[name]):
            change(values[name], value, where=f"{where}.{name}")
        else:
            values[name] = value


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
