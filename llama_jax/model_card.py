"""The paper's model card (Table 52) of any checkpoint: `python -m llama_jax.model_card --checkpoint=... --output=...`.

    python -m llama_jax.model_card --checkpoint=runs/chat --evaluation=out/academic,out/safety --plan=plan.json \\
        --license=llama2 --output=my-chat-model/README.md

Every fact is read from a file: of the checkpoint, of the runs before it (`start` of their configs, as far as they are still
there), of `llama_jax.evaluate` and of `llama_jax.plan --json --carbon=WATTS`. What a reader looks for and no file says is "not
said". An output called README.md begins with what the Hugging Face hub reads; `llama_jax.convert --to=huggingface` writes one,
and the command above puts results and a license into it. Of paths the last two parts are shown: cards are published.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from llama_jax import command
from llama_jax.evals import card_facts
from llama_jax.evals.card_facts import Facts
from llama_jax.evals.card_text import MARK, card
from llama_jax.files import atomic_write
from llama_jax.interop import huggingface
from llama_jax.interop.formats import open_source
from llama_jax.interop.source import Source
from llama_jax.paths import place

README = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def run(
    checkpoint: str | os.PathLike, output: str | os.PathLike, *, evaluation: Sequence[str] = (), plan: str = "",
    name: str = "", license_: str = "",
) -> str:  # fmt: skip
    """Writes the card of a checkpoint and returns its text; with the hub's header if `output` is a README.md.

    Args:
      evaluation: outputs of `llama_jax.evaluate` that hold results of this checkpoint, known by its weights.
      plan: JSON of `llama_jax.plan`.
      name: what it is called; "": as its directory.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: one sentence; nothing is written then.
    """
    check_license(license_)
    file = place(output)
    if file.exists() and (not file.is_file() or MARK not in file.read_text(encoding="utf-8", errors="replace")):
        raise FileExistsError(f"{output}: exists already and is no model card of ours; expected a new file")
    facts = card_facts.gather(open_source(checkpoint))
    results = [card_facts.evaluation(directory, checkpoint) for directory in evaluation]
    text = card(
        facts, name=name or Path(checkpoint).absolute().name, license_=license_, results=results,
        planned=card_facts.plan(plan, facts.source) if plan else {},
    )  # fmt: skip
    if file.name == README:
        text = _header(facts, license_=license_) + text
    with atomic_write(output) as opened:
        opened.write(text.encode())
    return text


def readme(source: Source, *, name: str) -> str:
    """The README.md of a model in Hugging Face's layout: the hub's header, and its card."""
    facts = card_facts.gather(source)
    return _header(facts) + card(facts, name=name)


def _header(facts: Facts, *, license_: str = "") -> str:
    """The header that the hub reads."""
    return huggingface.readme_header(facts.source.head, license_=license_, base_model=facts.hub_model)


def check_license(license_: str) -> None:
    """ValueError for what the hub would not take as a license."""
    if license_ and not _LICENSE.fullmatch(license_):
        raise ValueError(f"license: expected an identifier of the Hugging Face hub, such as llama2 or other, got {license_!r}")


def main() -> None:
    """Flags to call."""
    jax.config.update("jax_platforms", "cpu")  # files are read, and chips are somebody else's
    values = flags.FLAGS
    run(
        values.checkpoint, values.output, evaluation=values.evaluation, plan=values.plan, name=values.name,
        license_=values.license,
    )  # fmt: skip
    print(values.output)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "workdir, WORKDIR@STEP, or weights of any format")
    flags.DEFINE_string("output", None, f"the card's file; called {README} it has the hub's header")
    flags.DEFINE_list("evaluation", [], "outputs of llama_jax.evaluate with results of this checkpoint")
    flags.DEFINE_string("plan", "", "JSON of llama_jax.plan --json, for chip hours and tCO2eq")
    flags.DEFINE_string("name", "", "what the model is called; as its directory unless given")
    flags.DEFINE_string("license", "", "an identifier of the Hugging Face hub, such as llama2")
    flags.mark_flags_as_required(["checkpoint", "output"])
    command.launch(main)
