"""A desk at which people compare the answers of one or two models (paper 3.2.1, 3.4.2, 4.4): `python -m llama_jax.desk`.

    python -m llama_jax.desk --checkpoint=runs/v1 --checkpoint=runs/v2 --output=preferences.jsonl

In the browser raters give a name, write a message (or are given those of `--prompts`), see two answers grow side by side, not
knowing which model wrote which, and choose. With `--mode=preference` rows are what `configs/reward.py` trains on; `comparison`
and `safety` are the protocols that `llama_jax.human_evaluation` reports on. Each judgement is on the disk before the page goes
on; a reload or a kill goes on where it was, with what was chosen or written and not sent. Prompts that do not fit a context
with an answer are counted and left out, never cut; rows say which answers ended by themselves.

The paper's evaluations are of given prompts, of one or several turns, of which the last answer is judged (3.4.2, 4.4): those of
`--prompts`. Each model may answer them under a system message of its own, which raters do not see (`--system=v1=v1.txt`; Table
31). Dialogs that raters write go on with the answer that they prefer, on the safety scale with the only one.

Listens on 127.0.0.1; on any other address raters log in: with a password that all share (`--password`, or
LLAMA_JAX_DESK_PASSWORD in the environment), under any name, or each with their own (`--passwords`). Needs the extra [web].
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
from absl import flags

from llama_jax import command
from llama_jax.annotation import forms
from llama_jax.annotation.session import Desk, rater_name
from llama_jax.annotation.streams import Engines, Served
from llama_jax.annotation.tasks import Settings, read_prompt_list
from llama_jax.chat import open_engine, settings_of
from llama_jax.convert import one_process
from llama_jax.evals.origin import claim
from llama_jax.evals.words import tokenizer_of
from llama_jax.kept_answers import check_prompts, check_systems, read_systems
from llama_jax.parallel.host import keep_heap
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.worker import Worker
from llama_jax.serve import LOCAL


def name_checkpoints(places: Sequence[str]) -> dict[str, str]:
    """{name: path} of `path` or `name=path`; a path alone is named by its end."""
    found: dict[str, str] = {}
    for place in places:
        name, given, path = place.partition("=")
        if not given:
            name, path = os.path.basename(place.rstrip("/")), place
        if name in found:
            raise ValueError(f"--checkpoint: two are named {name!r}; name them: --checkpoint=first=... --checkpoint=second=...")
        found[name] = path
    return found


def serve_models(
    places: Mapping[str, str], *, tokenizer: str | None, slots: int, max_length: int, int8_cache: bool = False,
    mesh_tensor: int = 0, queue: int = 64,
) -> dict[str, Served]:  # fmt: skip
    """Loads and compiles the models, each behind a worker that has been started."""
    settings = functools.partial(settings_of, slots=slots, max_length=max_length, steps=2, int8_cache=int8_cache)
    served = {}
    for name, place in places.items():
        engine, model = open_engine(place, settings, tokenizer=tokenizer_of(place, tokenizer), mesh_tensor=mesh_tensor)
        served[name] = Served(Worker(engine, model.mesh, queue=queue), model.tokenizer)
        served[name].worker.start()
    return served


def check_kept(desk: Desk, places: Mapping[str, str], systems: Mapping[str, str], **how: Any) -> None:
    """Refuses answers that other checkpoints gave under these names, or these otherwise, where raters are shown kept ones."""
    if desk.listed and desk.settings.mode != "preference":
        for name, path in places.items():
            file = desk.directory / "models" / f"{quote(name, safe='')}.json"
            own = {"system": systems[name]} if name in systems else {}
            claim(file, path, temperature=desk.settings.temperatures[0], **how, **own)


def read_passwords(path: str) -> dict[str, str]:
    """{rater: password} of a file with a line `name:password` for each; ValueError naming file and line."""
    found: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        given, colon, password = (part.strip() for part in line.partition(":"))
        try:
            name = rater_name(given)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {given!r}: {error}") from None
        if not (colon and password) or name in found:
            raise ValueError(f"{path}:{number}: expected name:password, each name once")
        found[name] = password
    if not found:
        raise ValueError(f"{path}: no names in it; expected lines of name:password")
    return found


def main() -> None:
    """Checks everything cheap first, then loads, compiles, listens."""
    one_process("desk")
    values = flags.FLAGS
    password = values.password or os.environ.get("LLAMA_JAX_DESK_PASSWORD", "")
    passwords = read_passwords(values.passwords) if values.passwords else {}
    if values.host not in LOCAL and not (password or passwords):
        raise ValueError(
            f"--host={values.host}: others can reach it, which needs --password, --passwords or LLAMA_JAX_DESK_PASSWORD"
        )
    raters = tuple(map(rater_name, values.raters))
    if passwords and (strangers := [name for name in raters if name not in passwords]):
        raise ValueError(f"--raters: {strangers[0]} has no password in {values.passwords}")
    from llama_jax.annotation import page

    page.require()
    places = name_checkpoints(values.checkpoint)
    settings = Settings(
        mode=values.mode, models=tuple(places), temperatures=tuple(map(float, values.temperatures)), source=values.source,
        batch=values.batch, raters=raters, safety_track=values.safety,
    )  # fmt: skip
    for temperature in settings.temperatures:
        Choice(temperature, top_p=values.top_p).check()
    prompts = read_prompt_list(values.prompts) if values.prompts else []
    systems = read_systems(values.system, places)
    if systems and (settings.mode == "preference" or not prompts):  # rows do not say what was drawn under it
        raise ValueError("--system: is for the evaluations of 3.4.2, 4.4: expected --prompts, and --mode=comparison or safety")
    check_systems(systems, prompts)
    engines = Engines({}, max_tokens=values.max_tokens, top_p=values.top_p, systems=systems)
    desk = Desk(values.output, settings, engines, prompts=prompts)  # opens the output before anything is loaded
    keep_heap()
    try:
        if (hosts := jax.process_count()) > 1:  # those of a TPU VM know each other without the environment
            raise ValueError(f"desk runs in one process, and this TPU has {hosts} hosts: ask for one of a single host")
        for name, place in places.items() if prompts else ():
            check_prompts(place, prompts, tokenizer=values.tokenizer, system=systems.get(name, ""))
        check_kept(desk, places, systems, top_p=values.top_p, max_tokens=values.max_tokens, int8_cache=values.int8_cache)
        engines.models |= serve_models(
            places, tokenizer=values.tokenizer, slots=values.slots, max_length=values.max_length,
            int8_cache=values.int8_cache, mesh_tensor=values.mesh_tensor,
        )  # fmt: skip
        if desk.listed and not desk.tasks:
            raise ValueError(f"{values.prompts}: none of its prompts fits --max_length={values.max_length} with an answer")
        if desk.too_long:
            print(f"{values.prompts}: {desk.too_long} of {len(desk.listed)} are too long for a model and left out", flush=True)
        if less := sum(any(engines.less_room(name, task.messages) for name in task.models) for task in desk.tasks):
            print(f"{values.prompts}: {less} leave an answer less room than --max_tokens={values.max_tokens}", flush=True)
        page.serve(desk, host=values.host, port=values.port, password=password, passwords=passwords)
    finally:
        desk.close()
        for served in engines.models.values():
            served.worker.stop()


if __name__ == "__main__":
    flags.DEFINE_multi_string("checkpoint", None, "a model, or name=model; once or twice")
    flags.DEFINE_string("output", None, "JSONL file that judgements are added to")
    flags.DEFINE_enum("mode", "preference", list(forms.MODES), "what raters are asked")
    flags.DEFINE_string("prompts", "", "JSONL file of prompts to be judged; without it raters write their own")
    flags.DEFINE_list("system", [], "name=file of the system message that a model answers under, for --prompts (Table 31)")
    flags.DEFINE_list("raters", [], "names of those who may take part; default: everybody")
    flags.DEFINE_bool("safety", False, "the messages that raters write are of the safety track at first")
    flags.DEFINE_string("source", "desk", "source of the rows")
    flags.DEFINE_string("batch", None, "batch of the rows")
    flags.DEFINE_list("temperatures", ["0.6", "1.0"], "one is drawn for each answer of a preference; other modes use the first")
    flags.DEFINE_float("top_p", 0.9, "nucleus")
    flags.DEFINE_integer("max_tokens", 512, "longest answer", lower_bound=1)
    flags.DEFINE_integer("max_length", 2048, "tokens of a dialog; 0: the model's context", lower_bound=0)
    flags.DEFINE_integer("slots", 8, "answers of each model drawn together", lower_bound=1)
    flags.DEFINE_bool("int8_cache", False, "keep keys and values in 8 bits")
    flags.DEFINE_integer("mesh_tensor", 0, "devices that share each matrix; 0: as few as hold the models")
    flags.DEFINE_string("tokenizer", None, "the tokenizer, where none lies beside the weights")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
    flags.DEFINE_integer("port", 7860, "port to listen on")
    flags.DEFINE_string("password", "", "what all raters must type; this or --passwords is required outside of 127.0.0.1")
    flags.DEFINE_string("passwords", "", "file of lines name:password: who may take part, each with a password of their own")
    flags.mark_flags_as_required(["checkpoint", "output"])
    command.launch(main)
