"""Dialogs to ids in whatever chat format a model came with: its own template if it has one, else Llama 2's."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.data.dialog import Message, check_messages, encode_prompt
from llama_jax.data.tokenizer import Tokenizer


def encode_chat(messages: Sequence[Message], tokenizer: Tokenizer, *, where: str = "messages") -> list[int]:
    """Ids to answer; the messages must end with the user.

    A template's control pieces are control, so a message that names one could forge a turn and is refused.
    """
    if tokenizer.chat_template is None:
        return encode_prompt(messages, tokenizer, where=where)
    check_messages(messages, where)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: messages: expected the last one from the user, got {messages[-1]['role']!r}")
    for i, message in enumerate(messages):
        for piece in tokenizer.special_pieces():
            if piece in message["content"]:
                raise ValueError(
                    f"{where}: messages[{i}].content: holds the control piece {piece!r}, which could forge a turn"
                )
    text = _compiled(tokenizer.chat_template)(
        messages=[dict(message) for message in messages], add_generation_prompt=True,
        bos_token=tokenizer.piece(tokenizer.bos_id), eos_token=tokenizer.piece(tokenizer.eos_id),
    )  # fmt: skip
    return tokenizer.encode_rendered(text)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Callable[..., str]:
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "rendering this model's chat template needs the package jinja2: pip install 'llama_jax[interop]'"
        ) from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # A template is code from a file that we did not write; the sandbox and its settings are those of transformers.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)

    def render(**values: Any) -> str:
        try:
            return compiled.render(**values)
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from None

    return render
