"""Under which settings, and from which models, the files of a workdir were drawn: a run under others draws them anew.

`drawn.json` beside them says it, models by the fingerprint of their parameters: a path may lead to a newer checkpoint than
when half of the files were drawn. What does not agree is moved into `replaced/`, as all that stands in the way.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import describe, differences
from llama_jax.data.rows import rows_fact
from llama_jax.files import write_json
from llama_jax.interop.restore import fingerprint
from llama_jax.parallel.hosts import on_host_0
from llama_jax.paths import move
from llama_jax.training.workdir import make_aside

log = logging.getLogger(__name__)

_DATA = "data:"


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


def put_aside(
    workdir: Path, name: str, settings: Mapping[str, Any], models: Mapping[str, str], files: Sequence[str]
) -> None:
    """Moves the files (or directories) into `replaced/` that were drawn for `name` under other settings or from other models.

    `models` are their workdirs by field of the config, and files of data as `data_file` names them. They are read until the
    last of `files` is there; what becomes of them later is no reason to draw anew.
    """
    on_host_0(_put_aside, workdir, name, settings, models, files)


def _put_aside(
    workdir: Path, name: str, settings: Mapping[str, Any], models: Mapping[str, str], files: Sequence[str]
) -> None:
    held, there = _read(workdir).get(name), [file for file in files if (workdir / file).exists()]
    if not there or held is None:
        return
    drawn_from = held.pop("fingerprints", {})
    changed = differences(held, json.loads(json.dumps(settings)))
    if files[-1] not in there:
        changed += differences(drawn_from, _fingerprints(models), prefix="fingerprint of ")
    if not changed:
        return
    aside = make_aside(workdir)
    for file in there:
        move(workdir / file, aside / file)
    log.warning(
        "%s: %s: drawn under other settings, or from other models (%s), so they are drawn anew; the old ones are in %s",
        workdir, ", ".join(there), "; ".join(changed), aside,
    )  # fmt: skip


def note(workdir: Path, name: str, settings: Mapping[str, Any], models: Mapping[str, str]) -> None:
    """Writes the settings and models down with which the files of `name` are about to be drawn."""
    on_host_0(_note, workdir, name, settings, models)


def _note(workdir: Path, name: str, settings: Mapping[str, Any], models: Mapping[str, str]) -> None:
    noted = {**settings, "fingerprints": _fingerprints(models)}
    write_json(workdir / "drawn.json", {**_read(workdir), name: noted})


def fingerprints(workdir: Path, name: str) -> dict[str, str]:
    """Of the models that the files of `name` were drawn from, by field of the config."""
    return _read(workdir)[name]["fingerprints"]


def _fingerprints(models: Mapping[str, str]) -> dict[str, str]:
    return {
        field: rows_fact(path.removeprefix(_DATA)) if path.startswith(_DATA) else fingerprint(path)
        for field, path in models.items() if path
    }  # fmt: skip


def data_file(path: str) -> str:
    """Files of rows among the models that something is drawn from: rows that come or go would shift all others."""
    return f"{_DATA}{path}" if path else ""


def _read(workdir: Path) -> dict[str, Any]:
    record = workdir / "drawn.json"
    return json.loads(record.read_text()) if record.exists() else {}
