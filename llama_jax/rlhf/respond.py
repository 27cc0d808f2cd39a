"""Answers of one checkpoint to many conversations of any lengths, again and again: what data synthesis needs of sampling."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from llama_jax.config import ConfigError
from llama_jax.data.dialog import Message, decode_response, encode_prompt, find_tag
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.interop.restore import restore_model
from llama_jax.model import params as table
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.sampling.answers import Answerer
from llama_jax.sampling.choose import Choice


class Responder:
    """Draws answers. Answer i of a call depends on its conversation and (seed, i), not on what is asked beside it."""

    def __init__(
        self, workdir: str, model: ModelConfig, tokenizer: Tokenizer, *, compute: Compute, mesh: Mesh, new_tokens: int,
        temperature: float, batch_size: int, top_p: float = 1.0,
    ):  # fmt: skip
        """`batch_size` answers are drawn at a time."""
        self.tokenizer, self.mesh, self._choice = tokenizer, mesh, Choice(temperature=temperature, top_p=top_p).check()
        self.room = model.max_length - new_tokens
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
        self, prompts: Sequence[Sequence[int]], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Sampled ids for encoded prompts, in their order."""
        for number, prompt in enumerate(prompts):
            if len(prompt) > self.room:
                raise ConfigError(f"conversation {number} has {len(prompt)} tokens; expected at most {self.room}")
        with jax.set_mesh(self.mesh):
            answers = self._answerer(prompts, choice=self._choice, seed=seed, progress=progress)
        return [answer.tokens for answer in answers]

    def __call__(
        self, conversations: Sequence[Sequence[Message]], *, seed: int, progress: Callable[[int], None] | None = None
    ) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) for each conversation, in their order."""
        prompts = [self.encode(messages) for messages in conversations]
        return [decode_response(ids, self.tokenizer) for ids in self.ids(prompts, seed=seed, progress=progress)]


def usable(text: str, ended: bool) -> bool:
    """Whether a sampled answer may enter a dialog: it ended by itself, says something, and holds no chat tag."""
    return ended and bool(text) and find_tag(text) is None


def one_process(what: str) -> None:
    """ConfigError on several hosts, where every process would draw its own samples."""
    if jax.process_count() > 1:
        raise ConfigError(f"{what} draws its samples in one process so far; expected 1, got {jax.process_count()}")
