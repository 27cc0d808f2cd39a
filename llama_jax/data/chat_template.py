"""Dialogs to ids in whatever chat format a model came with: its own template if it has one, else Llama 2's."""

import datetime
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from llama_jax.data.dialog import (
    TAGS,
    EncodedDialog,
    Message,
    check_finished,
    check_messages,
    encode_dialog,
    encode_prompt,
    trained_answers,
)
from llama_jax.data.tokenizer import TEMPLATE, Tokenizer


def encode_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, *, where: str = "messages", names_are_text: bool = False
) -> list[int]:
    """Ids to answer; the messages must end with the user.

    A template's control pieces are control, so a message that names one could forge a turn and is refused; with
    `names_are_text` the name is spelled in ordinary pieces there, where that can be done exactly. Which roles may follow each
    other is the template's to say, and Llama 2's tags are refused only where it writes them.
    """
    if tokenizer.chat_template is None:
        return encode_prompt(messages, tokenizer, where=where)
    check_messages(messages, where, tags=[tag for tag in TAGS if tag in tokenizer.chat_template], in_turn=False)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: messages: expected the last one from the user, got {messages[-1]['role']!r}")
    if names_are_text and (ids := _with_names_as_text(messages, tokenizer)) is not None:
        return ids
    _refuse_control(messages, tokenizer, where)
    return _rendered(messages, tokenizer, opens_answer=True)


def encode_example(
    messages: Sequence[Message], tokenizer: Tokenizer, *, train_on: Literal["all", "last"] = "all", prompt_messages: int = 0,
    where: str = "messages",
) -> EncodedDialog:  # fmt: skip
    """`data.dialog.encode_dialog` in the model's own chat format: a finished dialog, and which of its ids are targets.

    An answer is supervised from its first id to its EOS; what the template writes around it is not. Whitespace around an
    answer is no part of it.

    Raises:
      ValueError: also where prompt and answer have no common border, or the template ends answers without EOS.
    """
    if tokenizer.chat_template is None:
        return encode_dialog(messages, tokenizer, train_on=train_on, prompt_messages=prompt_messages, where=where)
    check_finished(messages, train_on, where)
    _refuse_control(messages, tokenizer, where)
    stripped = [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
    ids = _rendered(stripped, tokenizer, opens_answer=False)
    supervised = [False] * len(ids)
    answers = [i for i, message in enumerate(stripped) if message["role"] == "assistant"]
    trained = trained_answers(stripped, train_on=train_on, prompt_messages=prompt_messages)
    for i, trains in zip(answers, trained, strict=True):
        start, end = _answer(ids, stripped, i, tokenizer, where)
        supervised[start:end] = [trains] * (end - start)
    return EncodedDialog(ids, supervised)


def _answer(ids: list[int], messages: Sequence[Message], i: int, tokenizer: Tokenizer, where: str) -> tuple[int, int]:
    """Where message `i`, an answer, lies in the ids of the whole dialog, its EOS included."""
    prompt = _rendered(messages[:i], tokenizer, opens_answer=True)
    upto = len(_rendered(messages[: i + 1], tokenizer, opens_answer=False))
    if ids[: len(prompt)] != prompt:
        raise ValueError(
            f"{where}: messages[{i}]: the chat template of {tokenizer.path} does not begin the dialog as it begins the prompt "
            f"of the answer {messages[i]['content'][:20]!r}, so the two have no common border"
        )
    if tokenizer.eos_id not in ids[len(prompt) : upto]:
        end = tokenizer.piece(tokenizer.eos_id)
        raise ValueError(f"{where}: messages[{i}]: the chat template of {tokenizer.path} does not end an answer with {end!r}")
    return len(prompt), ids.index(tokenizer.eos_id, len(prompt)) + 1


def _refuse_control(messages: Sequence[Message], tokenizer: Tokenizer, where: str) -> None:
    for i, message in enumerate(messages):
        for piece in tokenizer.special_pieces():
            if piece in message["content"]:
                raise ValueError(
                    f"{where}: messages[{i}].content: holds the control piece {piece!r}, which could forge a turn"
                )


def _with_names_as_text(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int] | None:
    """Ids to answer, in which the control pieces that messages name are text. None where that is not exact.

    The template sees a stand-in for each name. What it writes is cut at its own control pieces, as encoding cuts it, and only
    what lies between gets the names back. It is exact if the template does to stand-ins what it does to names, the cuts give
    the ids of the whole, and no name is spelled with a control piece.
    """
    control = tokenizer.special_pieces()
    longest_first = sorted(control, key=len, reverse=True)
    names = [name for name in longest_first if any(name in message["content"] for message in messages)]
    stand_ins = {name: f"\ue000{i}\ue001" for i, name in enumerate(names)}  # of a range that no text has in common use
    if not names or any(mark in message["content"] for message in messages for mark in "\ue000\ue001"):
        return None

    def put(text: str, swaps: dict[str, str]) -> str:
        return re.sub("|".join(map(re.escape, swaps)), lambda found: swaps[found[0]], text)

    back = {stand_in: name for name, stand_in in stand_ins.items()}
    hidden = [{**message, "content": put(message["content"], stand_ins)} for message in messages]
    text = _render(hidden, tokenizer, opens_answer=True)
    if put(text, back) != _render(messages, tokenizer, opens_answer=True):
        return None
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    cut = [[control[part]] if part in control else tokenizer.encode(part) for part in parts if part]
    if [i for ids in cut for i in ids] != tokenizer.encode_rendered(text):
        return None
    spelled = [[control[part]] if part in control else tokenizer.encode(put(part, back)) for part in parts if part]
    of_texts = [ids for part, ids in zip(filter(None, parts), spelled, strict=True) if part not in control]
    if any(i in control.values() for ids in of_texts for i in ids):
        return None
    return [i for ids in spelled for i in ids]


def _rendered(messages: Sequence[Message], tokenizer: Tokenizer, *, opens_answer: bool) -> list[int]:
    return tokenizer.encode_rendered(_render(messages, tokenizer, opens_answer=opens_answer))


def _render(messages: Sequence[Message], tokenizer: Tokenizer, *, opens_answer: bool) -> str:
    return _compiled(tokenizer.chat_template, f"tokenizer {tokenizer.path}")(
        messages=[dict(message) for message in messages], add_generation_prompt=opens_answer, tools=None, documents=None,
        bos_token=tokenizer.piece(tokenizer.bos_id), eos_token=tokenizer.piece(tokenizer.eos_id),
    )  # fmt: skip


def check_template(tokenizer: Tokenizer) -> None:
    """ValueError naming the file if a tokenizer's chat template is none; without the package jinja2 that is not known yet."""
    if tokenizer.chat_template is not None and importlib.util.find_spec("jinja2") is not None:
        _compiled(tokenizer.chat_template, str(_template_file(tokenizer)))


def _template_file(tokenizer: Tokenizer) -> Path:
    """Where the chat template of a tokenizer stands."""
    if tokenizer.path.suffix != ".gguf":
        for name in (TEMPLATE, "tokenizer_config.json"):
            if (beside := tokenizer.path.parent / name).is_file():
                return beside
    return tokenizer.path


@functools.lru_cache(maxsize=8)
def _compiled(template: str, where: str) -> Callable[..., str]:
    try:
        import jinja2.ext
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "rendering this model's chat template needs the package jinja2: pip install 'llama_jax[interop]'"
        ) from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks answers for training; what it holds is rendered as it stands."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def tojson(x: Any, ensure_ascii: bool = False, **how: Any) -> str:  # Jinja's own escapes for HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    # A template is code from a file that we did not write; the sandbox, its settings and its functions are those of
    # transformers.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template is no Jinja template: {error}") from None

    def render(**values: Any) -> str:
        try:
            return compiled.render(**values)
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them: {error}") from None
        except Exception as error:  # it is a program, and can fail in any way
            raise ValueError(f"messages: the chat template fails on them: {type(error).__name__}: {error}") from None

    return render
