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
from llama_jax.sampling.generate import make_sampler, pad_left, row_keys

_SHORTEST = 64  # prompt slots; longer prompts take the next power of two, so that few shapes are compiled


class Responder:
    """Draws answers. Answer i of a call depends on its conversation and (seed, i), not on what is asked beside it."""

    def __init__(
        self, workdir: str, model: ModelConfig, tokenizer: Tokenizer, *, compute: Compute, mesh: Mesh, new_tokens: int,
        temperature: float, batch_size: int, top_p: float = 1.0,
    ):  # fmt: skip
        self.tokenizer, self.mesh, self.batch_size = tokenizer, mesh, batch_size
        self.room = model.max_length - new_tokens
        if self.room < 1:
            raise ConfigError(f"new_tokens={new_tokens}: model {model.name} takes {model.max_length} tokens in all")
        specs = table.table(model, head="lm_head")
        with jax.set_mesh(mesh):
            self._params = restore_model(workdir, specs, mesh)
            self._sample = make_sampler(
                model, specs, compute=compute, eos_id=tokenizer.eos_id, max_new_tokens=new_tokens, temperature=temperature,
                top_p=top_p,
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
        answers: list[list[int]] = [[] for _ in prompts]
        groups: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            if len(prompt) > self.room:
                raise ConfigError(f"conversation {number} has {len(prompt)} tokens; expected at most {self.room}")
            slots = min(max(1 << (len(prompt) - 1).bit_length(), _SHORTEST), self.room)
            groups.setdefault(slots, []).append(number)
        for slots, numbers in sorted(groups.items()):
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                filled = part + part[:1] * (self.batch_size - len(part))
                tokens, valid = pad_left([prompts[n] for n in filled], slots)
                with jax.set_mesh(self.mesh):
                    samples = jax.device_get(self._sample(self._params, tokens, valid, row_keys(seed, filled)))
                for row, n in enumerate(part):
                    answers[n] = samples.tokens[row][samples.mask[row]].tolist()
                if progress:
                    progress(len(part))
        return answers

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
