"""What a request may ask for: the fields of OpenAI's API, checked, as the engine's settings. For the server and for batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.data.chat_template import encode_chat
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.slots import STOPS

# Fields that change nothing here; clients send them.
_IGNORED = {"model", "user", "metadata", "store", "service_tier", "stream_options", "id"}
_NUMBERS = {  # field of a Choice -> (type, default of the API)
    "temperature": (float, 1.0), "top_p": (float, 1.0), "top_k": (int, 0), "min_p": (float, 0.0),
    "repetition_penalty": (float, 1.0),
}  # fmt: skip
_COMMON = {*_NUMBERS, "max_tokens", "n", "seed", "stop", "stop_token_ids", "stream", "logprobs"}
_OFF = {"presence_penalty": 0, "frequency_penalty": 0, "top_logprobs": 0, "best_of": 1, "echo": False, "suffix": None}


class RequestError(ValueError):
    """A request that cannot be served as it stands; `field` is at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked request: one prompt, `n` answers."""

    prompt: list[int]
    max_tokens: int
    choice: Choice
    stop_ids: tuple[int, ...]
    stops: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    stream: bool = False
    logprobs: bool = False


def parse(
    body: Any, tokenizer: Tokenizer, *, context: int, default_tokens: int, most_answers: int = 8,
) -> list[Ask]:  # fmt: skip
    """The asks of a request with `messages` (a dialog) or `prompt` (a text, ids, or several of either).

    Args:
      body: the decoded JSON.
      context: tokens that prompt and answer may have together.
      default_tokens: length of an answer where the request does not say; shortened to what the context leaves.
      most_answers: limit of n times the number of prompts.

    Raises:
      RequestError: names the field, what was expected and what came.
    """
    if not isinstance(body, Mapping):
        raise RequestError("body", f"expected a JSON object, got {type(body).__name__}")
    body = {name: value for name, value in body.items() if value is not None}
    if ("messages" in body) == ("prompt" in body):
        raise RequestError("body", "expected either messages or prompt")
    if "max_completion_tokens" in body:
        body.setdefault("max_tokens", body.pop("max_completion_tokens"))
    for name, off in _OFF.items():
        if body.pop(name, off) != off:
            raise RequestError(name, "is not supported")
    for name in body.keys() - _COMMON - _IGNORED - {"messages", "prompt"}:
        raise RequestError(name, "is unknown")
    prompts = _dialog(body["messages"], tokenizer) if "messages" in body else _prompts(body["prompt"], tokenizer)
    n = _integer(body, "n", 1, least=1)
    if n * len(prompts) > most_answers:
        raise RequestError("n", f"expected at most {most_answers} answers a request, got {n * len(prompts)}")
    stops, stop_ids = _stops(body, tokenizer)
    asks = []
    for prompt in prompts:
        room = context - len(prompt)
        if room < 1:
            raise RequestError("prompt", f"has {len(prompt)} tokens; the context of {context} leaves no room for an answer")
        wanted = _integer(body, "max_tokens", min(default_tokens, room), least=1)
        if wanted > room:
            raise RequestError(
                "max_tokens", f"expected at most {room} (a context of {context} less {len(prompt)} of the prompt), got {wanted}"
            )
        asks.append(
            Ask(
                prompt=prompt, max_tokens=wanted, choice=_choice(body), stop_ids=stop_ids, stops=stops, n=n,
                seed=_integer(body, "seed", None, least=0), stream=_boolean(body, "stream"),
                # Chat asks for true, completions for a number of alternatives, of which we give the drawn one.
                logprobs=body.get("logprobs", False) is not False,
            )
        )  # fmt: skip
    return asks


def _dialog(messages: Any, tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return [encode_chat(messages, tokenizer)]
    except ValueError as error:
        raise RequestError("messages", str(error).removeprefix("messages: ")) from None


def _prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError("prompt", "expected a text, a list of ids, or a list of either")
    return [_ids(one, tokenizer) for one in prompt]


def _ids(prompt: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    elif isinstance(prompt, list) and all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in prompt):
        ids = prompt
    else:
        raise RequestError("prompt", f"expected texts or ids in 0..{tokenizer.vocab_size - 1}")
    if not ids:
        raise RequestError("prompt", "is empty")
    return ids


def _stops(body: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    stop = body.get("stop", [])
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else None
    if stops is None or not all(isinstance(text, str) and text for text in stops):
        raise RequestError("stop", f"expected a text or a list of texts, got {stop!r}")
    ids = body.get("stop_token_ids", [])
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids) or len(ids) >= STOPS:
        raise RequestError("stop_token_ids", f"expected fewer than {STOPS} ids, got {ids!r}")
    return stops, (tokenizer.eos_id, *ids)


def _choice(body: Mapping[str, Any]) -> Choice:
    values = {}
    for name, (kind, default) in _NUMBERS.items():
        value = body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RequestError(name, f"expected a number, got {value!r}")
        values[name] = kind(value) if kind is float else value
    try:
        return Choice(**values).check()
    except ValueError as error:
        field, _, message = str(error).partition(": ")
        raise RequestError(field, message) from None


def _integer(body: Mapping[str, Any], name: str, default: int | None, *, least: int) -> int | None:
    value = body.get(name, default)
    if value is default:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise RequestError(name, f"expected an integer of at least {least}, got {value!r}")
    return value


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(name, f"expected true or false, got {value!r}")
    return value
