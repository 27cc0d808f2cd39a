"""What a request may ask for: the fields of OpenAI's API, checked, as the engine's settings. For the server and for batches."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from llama_jax.data.chat_template import encode_chat
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.keys import small_seed

# Fields that change nothing here; clients send them.
_IGNORED = {
    "model", "user", "metadata", "store", "service_tier", "id", "parallel_tool_calls", "prompt_cache_key", "safety_identifier",
}  # fmt: skip
_NUMBERS = {  # field of a Choice -> (type, default of the API)
    "temperature": (float, 1.0), "top_p": (float, 1.0), "top_k": (int, 0), "min_p": (float, 0.0),
    "repetition_penalty": (float, 1.0), "presence_penalty": (float, 0.0), "frequency_penalty": (float, 0.0),
}  # fmt: skip
_STOP_TEXTS, _STOP_LENGTH = 16, 256
ALTERNATIVES = 20  # the most that the API lets a client ask for
STOP_IDS = 8  # of a request, beside those of the tokenizer
_LENGTHS = ("max_tokens", "max_completion_tokens")  # two names of one limit
_COMMON = {
    *_NUMBERS, *_LENGTHS, "n", "seed", "stop", "stop_token_ids", "stream", "stream_options", "logprobs", "top_logprobs", "echo",
}  # fmt: skip
# What is not offered, and the values that ask for nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "suffix": ("",),
    "response_format": ({"type": "text"},), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
}  # fmt: skip


class RequestError(ValueError):
    """A request that cannot be served as it stands; `field` is at fault."""

    def __init__(self, field: str, message: str):
        within = message.startswith(f"{field}[")  # "messages[0].role: ..." names its field already
        super().__init__(message if within else f"{field}: {message}")
        self.field = field


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked request: one prompt, `n` answers.

    Those of a dialog (`chat`) are stripped; those that continue a text keep the space between the two, and begin with `echo`,
    which is the prompt where that was asked for. Nothing need be drawn then (`max_tokens` = 0).
    """

    prompt: list[int]
    max_tokens: int
    choice: Choice
    stop_ids: tuple[int, ...]
    stops: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    stream: bool = False
    usage: bool = False  # a last chunk of the stream counts the tokens
    logprobs: bool = False
    alternatives: int = 0  # most likely tokens beside each drawn one
    chat: bool = False
    echo: str = ""
    scored: bool = False  # log-probabilities of the prompt's tokens come before those of the answer's


def decode(text: str | bytes) -> Any:
    """The JSON of a request; RequestError for what is none, or what could not be written as JSON again."""
    try:
        body = json.loads(text)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("body", "holds a lone surrogate or a byte outside UTF-8") from None
    except RecursionError:
        raise RequestError("body", "not JSON: nested too deeply") from None
    except ValueError as error:
        raise RequestError("body", f"not JSON: {error}") from None
    return body


def model_name(given: str, place: str) -> str:
    """What the API calls a model: as it was given, or else as the last part of where it lies."""
    return given or os.path.basename(str(place).rstrip("/"))


def check_model(asked: Any, name: str) -> None:
    """RequestError where a request names another model than the one there is, whose answers it would get."""
    if asked not in (None, "", name):
        raise RequestError("model", f"{asked!r} does not exist; there is {name!r}")


def parse(
    body: Any, tokenizer: Tokenizer, *, context: int, default_tokens: int, most_answers: int = 8, scores_prompts: bool = False,
) -> list[Ask]:  # fmt: skip
    """The asks of a request with `messages` (a dialog) or `prompt` (a text, ids, or several of either).

    Args:
      body: the decoded JSON.
      context: tokens that prompt and answer may have together.
      default_tokens: length of an answer where the request does not say; shortened to what the context leaves.
      most_answers: limit of n times the number of prompts.
      scores_prompts: whether log-probabilities of prompts can be told.

    Raises:
      RequestError: names the field, what was expected and what came.
    """
    if not isinstance(body, Mapping):
        raise RequestError("body", f"expected a JSON object, got {type(body).__name__}")
    body = {name: value for name, value in body.items() if value is not None}
    if ("messages" in body) == ("prompt" in body):
        raise RequestError("body", "expected either messages or prompt")
    for name, neutral in _OFF.items():
        if name in body and body.pop(name) not in neutral:
            raise RequestError(name, "is not supported")
    for name in body.keys() - _COMMON - _IGNORED - {"messages", "prompt"}:
        raise RequestError(name, "is unknown")
    chat = "messages" in body
    given = [] if chat else _several(body["prompt"])
    n, answers = _integer(body, "n", 1, least=1), max(len(given), 1)
    if n * answers > most_answers:  # before anything is encoded
        raise RequestError("n", f"expected at most {most_answers} answers a request, got {n * answers}")
    prompts = _dialog(body["messages"], tokenizer) if chat else [_ids(one, tokenizer) for one in given]
    stops, stop_ids = _stops(body, tokenizer)
    options = body.get("stream_options", {})
    if not isinstance(options, Mapping):
        raise RequestError("stream_options", f"expected an object, got {options!r}")
    length, *others = [name for name in _LENGTHS if name in body] or _LENGTHS[:1]
    if others:
        raise RequestError(others[0], f"expected either it or {length}")
    (logprobs, alternatives), echo = _logprobs(body, chat), _boolean(body, "echo")
    if echo and chat:
        raise RequestError("echo", "is offered for completions only")
    scored = echo and logprobs
    if scored and not scores_prompts:
        raise RequestError("echo", "is offered with logprobs by llama_jax.serve --score_prompts only")
    asks = []
    for i, prompt in enumerate(prompts):
        room = context - len(prompt)
        wanted = _integer(body, length, min(default_tokens, max(room, 1)), least=0 if echo else 1)
        if room < min(wanted, 1):
            raise RequestError(
                "messages" if chat else "prompt",
                f"has {len(prompt)} tokens; the maximum context length of {context} leaves no room for an answer",
            )
        if wanted > room:
            limit = f"{room} (a maximum context length of {context} less {len(prompt)} of the prompt)"
            raise RequestError(length, f"expected at most {limit}, got {wanted}")
        asks.append(
            Ask(
                prompt=prompt, max_tokens=wanted, choice=_choice(body), stop_ids=stop_ids, stops=stops, n=n,
                seed=_seed(body), stream=_boolean(body, "stream"),
                usage=_boolean(options, "include_usage"), logprobs=logprobs, alternatives=alternatives, chat=chat,
                echo=_text(given[i], tokenizer) if echo else "", scored=scored,
            )
        )  # fmt: skip
    return asks


def _dialog(messages: Any, tokenizer: Tokenizer) -> list[list[int]]:
    if isinstance(messages, list):
        messages = [_plain(message, i) for i, message in enumerate(messages)]
    try:
        return [encode_chat(messages, tokenizer, names_are_text=True)]
    except ValueError as error:
        raise RequestError("messages", str(error).removeprefix("messages: ").removeprefix("messages: ")) from None


def _plain(message: Any, i: int) -> Any:
    """A message as the chat formats here know it: the parts of its text joined, and "developer" as "system"."""
    if not isinstance(message, Mapping):
        return message  # which encoding refuses
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError("messages", f"messages[{i}].content: expected parts of type text, got {part!r}")
        content = "".join(part["text"] for part in content)
        message = {**message, "content": content}
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _several(prompt: Any) -> list[Any]:
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError("prompt", "expected a text, a list of ids, or a list of either")
    return prompt


def _ids(prompt: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
        except ValueError as error:
            raise RequestError("prompt", str(error)) from None
    elif isinstance(prompt, list) and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in prompt):
        ids = prompt
    else:
        raise RequestError("prompt", f"expected texts or ids in 0..{tokenizer.vocab_size - 1}")
    if not ids:
        raise RequestError("prompt", "is empty")
    return ids


def _text(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


def _logprobs(body: Mapping[str, Any], chat: bool) -> tuple[bool, int]:
    """Whether they are asked for, and of how many alternatives: by two fields in a chat, by one number in completions."""
    if chat or isinstance(body.get("logprobs"), bool):  # batches may have one form for both
        name, wanted = "top_logprobs", _boolean(body, "logprobs")
    else:
        name, wanted = "logprobs", body.get("logprobs") is not None
    alternatives = _integer(body, name, 0, least=0)
    if alternatives > ALTERNATIVES:
        raise RequestError(name, f"expected at most {ALTERNATIVES}, got {alternatives}")
    if body.get("top_logprobs") and name == "logprobs":
        raise RequestError("top_logprobs", "belongs to chats; expected their number in logprobs")
    if alternatives and not wanted:
        raise RequestError("top_logprobs", "expected logprobs: true beside it")
    return wanted, alternatives


def _stops(body: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    stop = body.get("stop", [])
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else None
    if stops is None or not all(isinstance(text, str) and text for text in stops):
        raise RequestError("stop", f"expected a text or a list of texts, got {stop!r}")
    if len(stops) > _STOP_TEXTS or any(len(text) > _STOP_LENGTH for text in stops):  # each token looks for all of them
        limits = f"expected at most {_STOP_TEXTS} texts of at most {_STOP_LENGTH} characters"
        raise RequestError("stop", f"{limits}, got {len(stops)} of up to {max(map(len, stops))}")
    ids = body.get("stop_token_ids", [])
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    if not known or len(ids) > STOP_IDS:
        limits = f"at most {STOP_IDS} ids in 0..{tokenizer.vocab_size - 1}"
        raise RequestError("stop_token_ids", f"expected {limits}, got {ids!r}")
    return stops, (*tokenizer.stop_ids, *ids)


def _choice(body: Mapping[str, Any]) -> Choice:
    values = {}
    for name, (kind, default) in _NUMBERS.items():
        value = body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RequestError(name, f"expected a number, got {value!r}")
        try:
            values[name] = kind(value) if kind is float else value
        except OverflowError:
            raise RequestError(name, f"expected a number, got {value!r}") from None
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


def _seed(body: Mapping[str, Any]) -> int | None:
    try:
        return None if body.get("seed") is None else small_seed(body["seed"])
    except ValueError as error:
        raise RequestError("seed", str(error).removeprefix("seed: ")) from None


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(name, f"expected true or false, got {value!r}")
    return value
