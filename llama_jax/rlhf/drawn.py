"""Under which settings the files of a workdir were drawn: a run that goes back under others draws them anew.

`drawn.json` beside them says it. What is not of these settings is moved into `replaced/`, as all that stands in the way.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import describe, differences
from llama_jax.files import write_json
from llama_jax.parallel.hosts import on_host_0
from llama_jax.paths import move
from llama_jax.training.workdir import make_aside

log = logging.getLogger(__name__)


def settings_of(config: Any, *names: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """What draws depend on: the fields `names` of a stage's config but for fields `without` of theirs, and the model's.

    How many are drawn at a time, on which mesh and in which types moves them by rounding only, and is no reason to draw anew.
    """
    described = describe(config)
    found = {name: described[name] for name in ("model", "context", "tokenizer", *names)}
    for name, value in found.items():
        if isinstance(value, dict):
            found[name] = {key: item for key, item in value.items() if key not in ("sampling_batch", *without)}
    return {**found, "seed": config.loop.seed}


def put_aside(workdir: Path, name: str, settings: Mapping[str, Any], files: Sequence[str]) -> None:
    """Moves the files (or directories) into `replaced/` that were drawn for `name` under other settings."""
    on_host_0(_put_aside, workdir, name, settings, files)


def _put_aside(workdir: Path, name: str, settings: Mapping[str, Any], files: Sequence[str]) -> None:
    held, there = _read(workdir), [file for file in files if (workdir / file).exists()]
    if not there or name not in held:
        return
    changed = differences(held[name], json.loads(json.dumps(settings)))
    if not changed:
        return
    aside = make_aside(workdir)
    for file in there:
        move(workdir / file, aside / file)
    log.warning(
        "%s: %s: drawn under other settings (%s), so they are drawn anew; the old ones are in %s",
        workdir, ", ".join(there), "; ".join(changed), aside,
    )  # fmt: skip


def note(workdir: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Writes the settings down under which the files of `name` are about to be drawn."""
    on_host_0(_note, workdir, name, settings)


def _note(workdir: Path, name: str, settings: Mapping[str, Any]) -> None:
    write_json(workdir / "drawn.json", {**_read(workdir), name: settings})


def _read(workdir: Path) -> dict[str, Any]:
    record = workdir / "drawn.json"
    return json.loads(record.read_text()) if record.exists() else {}
