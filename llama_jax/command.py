"""How every command begins and ends: its flags, quiet logs, and wrong input as one line instead of a traceback."""

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llama_jax.config import ConfigError, parse_flags
from llama_jax.paths import is_remote


def define(config: str, *, buckets: bool = False, **directories: str) -> None:
    """Defines the required flags --config (a config file; `config` shows its form) and one for each directory.

    With `buckets` the directories may be addresses in Google Cloud Storage.
    """
    from absl import flags  # importing a command defines and changes nothing
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, config)
    for name, description in directories.items():
        flags.DEFINE_string(name, None, description)
        # A path object would make a local directory "s3:" of it, and a pod's checkpoints would be lost with its disks.
        flags.register_validator(
            name, lambda value: "://" not in (value or "") or (buckets and is_remote(value)),
            "expected a directory, on several hosts one that all of them share"
            + (", or gs://bucket/directory" if buckets else "; this command writes no buckets, mount one to use it"),
        )  # fmt: skip
    flags.mark_flags_as_required(["config", *directories])


def named(flag: str, items: Sequence[str], what: str = "file") -> dict[str, str]:
    """{name: place} of a flag `--flag=name=place,...`.

    Raises:
      ValueError: a place without a name, or a name that stands for two.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, place = item.partition("=")
        if not (name and equals and place):
            raise ValueError(f"--{flag}: expected name={what}, got {item!r}")
        if name in found:
            raise ValueError(f"--{flag}: two are named {name!r}, {found[name]} and {place}; expected a name for each")
        found[name] = place
    return found


def check_directories(flag: str, names: Iterable[str]) -> None:
    """ValueError for a name of `--flag=name=place` that no directory can have."""
    for name in names:
        if Path(name).name != name or name == "..":
            raise ValueError(f"--{flag}: {name!r}: expected a name that a directory can have")


def define_cluster() -> None:
    """Defines the flags that name the processes of a run on several hosts."""
    from absl import flags

    from llama_jax.parallel.mesh import MEET_SECONDS

    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; TPU pods need none of these three")
    flags.DEFINE_integer("processes", None, "how many processes there are")
    flags.DEFINE_integer("process_id", None, "which of them this one is, from 0")
    flags.DEFINE_float("meet_seconds", MEET_SECONDS, "the longest until all of them have come; then this one ends")


def join_cluster() -> None:
    """Joins this process to those that the flags of `define_cluster`, the environment or a TPU's metadata name."""
    from absl import flags

    from llama_jax.parallel.mesh import start_distributed

    values = flags.FLAGS
    start_distributed(
        coordinator=values.coordinator, processes=values.processes, process_id=values.process_id,
        meet_seconds=values.meet_seconds,
    )  # fmt: skip


def launch(main: Callable[[], None], *, expected: tuple[type[Exception], ...] = ()) -> None:
    """Parses the flags and runs `main`. Input errors, and those that are `expected`, end it with one line and code 1 (or the
    error's `exit_code`), and Ctrl-C with one and code 130."""
    from absl import app, flags, logging

    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("llama_jax"):  # --help shows those of the command alone, which may share their definition
            for flag in found:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def run(argv: list[str]) -> None:
        if argv[1:]:  # the value of `--flag false`, too, which would else be on
            sys.exit(f"error: unexpected argument {argv[1]!r}; expected flags alone, with a value behind '=': --flag=value")
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            sys.exit(f"error: {' '.join(str(error).split())}")  # a service's words may come in several lines
        except (ConfigError, ModuleNotFoundError, *expected) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 1))
        except ValueError as error:
            if not _raised_by_us(error):
                raise  # a bug, or a library's complaint: where it happened is what helps
            sys.exit(f"error: {error}")

    app.run(run, flags_parser=parse_flags)


def _raised_by_us(error: Exception) -> bool:
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return innermost.f_globals.get("__name__", "").split(".")[0] in ("llama_jax", "__main__")
