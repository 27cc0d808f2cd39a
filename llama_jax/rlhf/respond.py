"""Answers of one checkpoint to many conversations of any lengths, again and again: what data synthesis needs of sampling.

On several hosts every process draws the same answers and calls everything here with the same arguments; host 0 alone looks for
files and writes them.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.dialog import Message, decode_response, encode_prompt, find_tag
from llama_jax.data.rows import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.parallel.hosts import exist, on_host_0
from llama_jax.paths import remove_tree
from llama_jax.sampling.answers import Answerer
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.keys import key_data
from llama_jax.training.attempt import waypoint
from llama_jax.training.metrics import Progress

# Prompts that are drawn, scored and written together. With 20 answers to each, the slots that stand idle at the end of such a
# portion cost less than one percent.
PORTION = 2000

T = TypeVar("T")
Tell = Callable[[int], None]  # is told how many answers were just finished


class Responder:
    """Draws answers. Answer i of a call depends on its conversation and (seed, i), not on what is asked beside it."""

    def __init__(
        self, workdir: str, model: ModelConfig, tokenizer: Tokenizer, *, compute: Compute, mesh: Mesh, new_tokens: int,
        temperature: float, batch_size: int, top_p: float = 1.0, prompt_length: int = 0,
    ):  # fmt: skip
        """Draws `batch_size` answers at a time; prompts have at most `prompt_length` tokens, or (0) what the model takes."""
        self.tokenizer, self.mesh, self._choice = tokenizer, mesh, Choice(temperature=temperature, top_p=top_p).check()
        self.room, self._new_tokens = prompt_length or model.max_length - new_tokens, new_tokens
        if self.room < 1:
            raise ConfigError(f"new_tokens={new_tokens}: model {model.name} takes {model.max_length} tokens in all")
        with jax.set_mesh(mesh):
            self._answerer = Answerer(
                restore_model(workdir, table.table(model, head="lm_head"), mesh), model, compute=compute,
                prompt_length=self.room, new_tokens=new_tokens, eos_id=tokenizer.eos_id, slots=batch_size,
            )  # fmt: skip

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that ends with the user."""
        return encode_prompt(messages, self.tokenizer)

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation leaves room for an answer."""
        return len(self.encode(messages)) <= self.room

    def ids(
        self, prompts: Sequence[Sequence[int]], *, seed: int, numbers: Iterable[int] | None = None,
        choice: Choice | None = None, progress: Tell | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """Sampled ids for encoded prompts, in their order.

        `numbers` stand for the i of (seed, i) where the prompts are some of a longer list; `choice` for the temperature.

        Raises:
          Preempted: SIGTERM came to the run that these are drawn for.
        """
        for number, prompt in enumerate(prompts):
            if len(prompt) > self.room:
                raise ConfigError(f"conversation {number} has {len(prompt)} tokens; expected at most {self.room}")

        def told(count: int) -> None:
            waypoint()
            if progress is not None:
                progress(count)

        with jax.set_mesh(self.mesh):
            keys = key_data(seed, list(range(len(prompts)) if numbers is None else numbers))
            requests = self._answerer.engine.answer(
                prompts, keys=keys, max_tokens=self._new_tokens, choice=choice or self._choice,
                stop_ids=(self.tokenizer.eos_id,), progress=told,
            )  # fmt: skip
        return [request.tokens for request in requests]

    def __call__(
        self, conversations: Sequence[Sequence[Message]], *, seed: int, numbers: Iterable[int] | None = None,
        progress: Tell | None = None,
    ) -> list[tuple[str, bool]]:  # fmt: skip
        """(text, whether it ended by itself) for each conversation, in their order."""
        prompts = [self.encode(messages) for messages in conversations]
        found = self.ids(prompts, seed=seed, numbers=numbers, progress=progress)
        return [decode_response(ids, self.tokenizer) for ids in found]


def usable(text: str, ended: bool) -> bool:
    """Whether a sampled answer may enter a dialog: it ended by itself, says something, and holds no chat tag."""
    return ended and bool(text) and find_tag(text) is None


def write_in_portions(
    path: Path, items: Sequence[T], draw: Callable[[Sequence[T], int, Tell], list[dict[str, Any]]], *,
    answers: Callable[[T], int], label: str, size: int = PORTION,
) -> None:  # fmt: skip
    """Writes what is drawn for all items to `path`, whole, in their order; after a kill or SIGTERM one portion is drawn again.

    Each portion of `size` items is a file in a directory beside `path` until all are there.

    Args:
      draw: (items, the number of the first one, progress) -> rows. They must not depend on the other items, or what is drawn
        would depend on where it was killed.
      answers: how many answers an item gets, for the progress bar; its label is `label`.
    """
    directory = path.parent / path.name.partition(".")[0]
    ends = [(start, min(start + size, len(items))) for start in range(0, len(items), size)]
    files = [directory / f"{start}-{end}.jsonl" for start, end in ends]
    there = exist(files)
    counts = [sum(answers(item) for item in items[start:end]) for start, end in ends]
    done = sum(count for count, is_there in zip(counts, there) if is_there)
    with Progress(sum(counts), label, "answer", done=done, quiet=jax.process_index() > 0) as progress:
        for number, ((start, end), file, is_there) in enumerate(zip(ends, files, there)):
            if not is_there:
                waypoint("sampling", number, of="portion")
                rows = draw(items[start:end], start, progress.update)
                on_host_0(write_jsonl, file, rows)
    on_host_0(write_jsonl, path, (row for file in files for _, row in read_jsonl(file)))
    on_host_0(remove_tree, directory)
