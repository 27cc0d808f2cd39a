"""Engines as answerers of the desk: draws go to a model's worker, text comes back as it is settled."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from llama_jax.annotation.drawing import Deliver, Draw
from llama_jax.data.chat_template import encode_chat
from llama_jax.data.dialog import Message
from llama_jax.data.text_stream import TextStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals.answer_files import answer_room, under
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.worker import QueueFull, Worker


@dataclasses.dataclass(frozen=True)
class Served:
    """A model behind a worker."""

    worker: Worker
    tokenizer: Tokenizer


class Engines:
    """Answers draws by the model that each names; `systems` has the system messages that some answer under."""

    def __init__(
        self, models: Mapping[str, Served], *, max_tokens: int, top_p: float, systems: Mapping[str, str] | None = None
    ):
        self.models, self.max_tokens, self.top_p, self.systems = dict(models), max_tokens, top_p, dict(systems or {})

    def start(self, draw: Draw, deliver: Deliver) -> Callable[[], None]:
        """See `drawing.Answerer`."""
        served = self.models[draw.model]
        prompt, room = self._prompt(draw.model, draw.messages)
        if not room:
            length = served.worker.engine.settings.max_length
            raise ValueError(f"The dialog has become too long: {len(prompt)} tokens and an answer for a context of {length}.")
        stream = TextStream(served.tokenizer)
        ends = served.tokenizer.stop_ids

        def on_token(token: int | None, log_p: float, finish: str) -> None:
            del log_p
            text = stream.push(token) if token is not None and token not in ends else ""
            deliver(text + (stream.finish() if finish else ""), finish)

        job = {
            "prompt": prompt, "max_tokens": room, "seed": draw.seed, "index": draw.index,
            "choice": Choice(temperature=draw.temperature, top_p=self.top_p), "stop_ids": ends, "deliver": on_token,
        }  # fmt: skip
        try:
            (ticket,) = served.worker.submit([job])
        except QueueFull as error:
            raise ValueError(f"The model is busy: {error}.") from None
        return lambda: served.worker.cancel(ticket)

    def fits(self, model: str, messages: Sequence[Message]) -> bool:
        """See `drawing.Answerer`."""
        return self._prompt(model, messages)[1] > 0

    def less_room(self, model: str, messages: Sequence[Message]) -> bool:
        """Whether an answer may not be as long as `max_tokens`."""
        return self._prompt(model, messages)[1] < self.max_tokens

    def _prompt(self, model: str, messages: Sequence[Message]) -> tuple[list[int], int]:
        """The ids of a dialog, and how many tokens its answer may have: 0 if it is too long."""
        served = self.models[model]
        prompt = encode_chat(under(self.systems.get(model, ""), messages), served.tokenizer)
        length = served.worker.engine.settings.max_length
        return prompt, answer_room(len(prompt), max_tokens=self.max_tokens, max_length=length)
