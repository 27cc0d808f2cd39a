"""Steps of a longer job in one workdir: each is done once, and the same command goes on after a kill.

A training stage resumes from its last checkpoint; any other step is done whole or not at all. The seconds of a step are those
of all attempts at it, killed ones too.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import jax
from absl import flags

from llama_jax import command
from llama_jax.config import ConfigError, describe, differences, parse, suggestion, with_defaults
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.files import write_json
from llama_jax.model import params as table
from llama_jax.model.config import size
from llama_jax.parallel.axes import shardings
from llama_jax.parallel.host import keep_compiled, keep_heap
from llama_jax.parallel.mesh import start_distributed
from llama_jax.train import parse_stage
from llama_jax.train import run as run_stage
from llama_jax.training.loop import finished
from llama_jax.training.step import check_batch, mesh_for
from llama_jax.training.workdir import claim, own

_BEAT = 5.0  # seconds between notes of how long a step has taken: what a kill loses of them


class StepsConfig(Protocol):
    """What the config of every job of steps has.

    Attributes:
      configs: directory of the stages' configs.
      overrides: changes fields of them: {"ppo": {"optim": {"lr": 1e-4}}}.
      seed: of all stages that have none of their own in `overrides`.
    """

    configs: str
    overrides: dict[str, dict[str, Any]]
    seed: int


C = TypeVar("C", bound=StepsConfig)


class Steps(Generic[C]):
    """A job whose method `run` calls its steps in order; `seconds` holds what each took, in all runs that worked on it.

    `tokenizer_file` is a path, in the workdir where it is relative.
    """

    def __init__(self, config: C, workdir: Path, *, tokenizer_file: str | Path):
        self.config, self.workdir, self.configs = config, workdir.resolve(), Path(config.configs)
        self.tokenizer_file = self.path(str(tokenizer_file))
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All steps; returns what the report shows."""
        raise NotImplementedError

    def files(self) -> dict[str, str]:
        """The stages that the job may have, by their kind, and their config files: {"sft_variant": "sft.py:tiny"}."""
        raise NotImplementedError

    def parts(self) -> tuple[str, ...]:
        """What `overrides` may change beside stages."""
        return ()

    def common(self) -> dict[str, Any]:
        """What the job says to all of its stages."""
        return {"tokenizer": self.tokenizer_file, "loop": {"seed": self.config.seed}}

    def check(self) -> None:
        """ConfigError for overrides of nothing, and for a stage that could not run: the last one may be hours away."""
        files = self.files()
        for kind in self.config.overrides:
            if kind not in (known := [*files, *self.parts()]):
                raise ConfigError(f"config.overrides.{kind}: unknown stage{suggestion(kind, known)}")
        for kind, file in files.items():
            try:
                self.check_stage(parse_stage(self.values(kind, file, {})))
            except ValueError as error:
                said = str(error)
                raise ConfigError(said if said.startswith("overrides.") else f"{kind}: {said}") from None

    def check_stage(self, config: Any) -> None:
        """ValueError for a stage that this machine's devices cannot run."""
        mesh = mesh_for(config.mesh, config.loop)
        check_batch(config.loop, mesh)
        shardings(table.table(size(config.model), head="lm_head"), mesh)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all stages; a step may have made it."""
        return Tokenizer(self.tokenizer_file)

    def path(self, *parts: str) -> str:
        """A path inside the workdir."""
        return str(self.workdir.joinpath(*parts))

    def step(self, name: str, make: Callable[[], Any], *, config: Any = None) -> Any:
        """Runs a step that is no training stage, once; its result and seconds lie in steps/<name>.json.

        `config`, a dataclass, is what the step is made with: the result of another one is refused.
        """
        path = self.workdir / "steps" / f"{name}.json"
        described = None if config is None else json.loads(json.dumps(describe(config)))
        if not path.exists():
            print(f"{name} ...", file=sys.stderr, flush=True)
            with timed(self._attempts(name)):
                result = make()
            write_json(path, {"seconds": self._spent(name), "result": result, "config": described})
        saved = json.loads(path.read_text())
        if described is not None and saved.get("config") is not None:
            before = json.loads(json.dumps(with_defaults(type(config), saved["config"])))
            if changed := differences(before, described):
                raise ConfigError(
                    f"{self.workdir}: {name} was made with another config; use a new workdir, or undo:\n  "
                    + "\n  ".join(changed)
                )
        self.seconds[name] = saved["seconds"]
        return saved["result"]

    def values(self, name: str, config: str, changes: Mapping[str, Any]) -> Any:
        """A stage's config with what is `common`, `changes` (nested), and the overrides of its kind: "ppo" of "v2/ppo"."""
        kind = name.rpartition("/")[2]
        values = load_config(self.configs, config)
        change(values, self.common(), where=name)
        change(values, changes, where=name)
        change(values, self.config.overrides.get(kind, {}), where=f"overrides.{kind}")
        return values

    def stage(self, name: str, config: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a training stage in the directory `name`; returns its summary."""
        values, workdir = self.values(name, config, changes), self.workdir / name
        if finished(workdir) is not None:
            result = run_stage(values, workdir)
        else:
            with timed(self._attempts(name)):
                result = run_stage(values, workdir)
            result["seconds"] = self._spent(name)  # reading and sampling before the first step too
            write_json(workdir / "done.json", result)
        self.seconds[name] = result["seconds"]
        return result

    def _attempts(self, name: str) -> Path:
        return self.workdir / "steps" / f"{name}.seconds.json"

    def _spent(self, name: str) -> float:
        return sum(json.loads(self._attempts(name).read_text()))

    def link(self, name: str) -> None:
        """Lets the name of a kind stand for its newest stage: `rejection` for `v2/rejection`."""
        path, target = self.workdir / name.rpartition("/")[2], Path(name)
        if path.is_symlink() and path.readlink() == target:
            return
        new = path.with_name(f".{path.name}.tmp")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(path)


@contextlib.contextmanager
def timed(path: Path) -> Iterator[None]:
    """Adds the seconds of the block to the list in a file, from time to time while it lasts, since a kill gives no notice."""
    before = json.loads(path.read_text()) if path.exists() else []
    begun, done = time.monotonic(), threading.Event()

    def note() -> None:
        write_json(path, [*before, time.monotonic() - begun])

    def beat() -> None:
        while not done.wait(_BEAT):
            note()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        note()


def define_job(config: str, *, workdir: str) -> None:
    """Defines the flags of a job's command."""
    command.define(config, workdir=workdir)
    flags.DEFINE_multi_string("set", [], "STAGE.FIELD=VALUE, a field of a stage's config: ppo.optim.lr=1e-5; may be repeated")


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
    parsed = with_overrides(parsed, flags.FLAGS["config"].config_filename, flags.FLAGS.set)
    made = job(parsed, workdir)
    made.check()
    with own(workdir):
        claim(workdir, describe(parsed))
        made.run()
    return workdir


def with_overrides(config: C, file: str | Path, assignments: Sequence[str]) -> C:
    """A job's config whose overrides are those of its file, then its own, then those of `--set`.

    `--config.overrides={...}` on the command line would else take the place of all that the file has.
    """
    file = Path(file)
    overrides = merged(load_config(file.parent, file.name).overrides.to_dict(), config.overrides)
    for text in assignments:
        overrides = merged(overrides, assignment(text))
    return dataclasses.replace(config, overrides=overrides)


def assignment(text: str) -> dict[str, Any]:
    """`ppo.optim.lr=1e-5` as nested dicts; a value that is no Python literal is text."""
    path, equals, value = text.partition("=")
    names = path.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError(f"--set={text}: expected STAGE.FIELD=VALUE, as in ppo.optim.lr=1e-5")
    try:
        found: Any = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        found = value.strip()
    for name in reversed(names):
        found = {name: found}
    return found


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, the values of the second before those of the first."""
    both = {**old, **new}
    for name in old.keys() & new.keys():
        if isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            both[name] = merged(old[name], new[name])
    return both


def change(values: Any, changes: Mapping[str, Any], *, where: str) -> None:
    """Changes fields of a ConfigDict, group by group; ConfigError for a field that is not there or of another type."""
    for name, value in changes.items():
        if name not in values:
            raise ConfigError(f"{where}.{name}: unknown field{suggestion(name, sorted(values))}")
        group = hasattr(values[name], "to_dict")
        if group and isinstance(value, Mapping) and len(values[name]):
            change(values[name], value, where=f"{where}.{name}")
            continue
        try:
            values[name] = value
        except TypeError:  # a ConfigDict keeps the types of its fields
            expected = "fields" if group else f"a {type(values[name]).__name__}"
            raise ConfigError(f"{where}.{name}: expected {expected}, got {value!r}") from None


def load_config(directory: Path, name: str) -> Any:
    """`get_config` of a config file, called with the text behind the colon: `sft.py:tiny`."""
    file, colon, argument = name.partition(":")
    path = directory / file
    if not path.exists():
        raise ConfigError(f"{path}: expected a config file, found nothing; run from the checkout or set config.configs")
    root = str(directory.resolve().parent)
    if root not in sys.path:
        sys.path.insert(0, root)  # configs import configs.common
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if colon else module.get_config()
