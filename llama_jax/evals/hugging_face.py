"""Hugging Face's models in lm-evaluation-harness's own class, which here counts what it cuts, chats, and keeps its results.

The harness's class (torch) runs them, so that any rival stands in the same table. It cuts what exceeds the context and says so
to nobody, knows no chat format of a single prompt, and has sampled answers of a killed run drawn again; hence the subclass.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from llama_jax.evals import request_file
from llama_jax.evals.request_file import RequestFile
from llama_jax.training.metrics import Progress

_PORTION = {"loglikelihood": 1024, "loglikelihood_rolling": 64, "generate_until": 64}  # requests after which results are kept


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """How a Hugging Face model is run: its type ("auto": that of its files), rows that are computed together, and whether code
    that comes with it may be run."""

    dtype: str = "auto"
    batch_size: int = 8
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"hf: expected a batch_size of at least 1, got {self.batch_size}")


def open_model(place: str, settings: HuggingFace, *, chat: bool, seed: int, quiet: bool = False) -> Any:
    """A model of the harness; it has `cut`, `less_room` and `kept` as `evals.harness.HarnessModel` has them.

    Raises:
      ModuleNotFoundError: torch, transformers or accelerate is missing.
      ValueError: `chat` without a chat template of its tokenizer.
    """
    try:
        import torch

        made = _subclass()(
            pretrained=place, device="cuda" if torch.cuda.is_available() else "cpu", **dataclasses.asdict(settings)
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"hf:{place}: needs {error.name}: pip install torch transformers accelerate") from None
    if chat and not getattr(made.tokenizer, "chat_template", None):
        raise ValueError(f"hf:{place}: decoding.chat is set, but its tokenizer has no chat template")
    made.chat, made.seed, made.quiet = chat, seed, quiet
    return made


def check_model(place: str, settings: HuggingFace) -> None:
    """Looks for the model that `open_model` opens, without reading its weights.

    Raises:
      ModuleNotFoundError: torch, transformers or accelerate is missing.
      ValueError: nothing that transformers knows is there.
    """
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoConfig, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"hf:{place}: needs {error.name}: pip install torch transformers accelerate") from None
    try:
        for part in (AutoConfig, AutoTokenizer):
            part.from_pretrained(place, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{place}: expected a model with its tokenizer: {error}") from error


@functools.cache
def _subclass() -> type:
    """Made when it is asked for: importing the harness imports torch and changes the environment."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Rival(HFLM):
        """See the top of the file."""

        chat, seed, quiet = False, 0, False
        kept: RequestFile | None = None

        def __init__(self, **settings: Any):
            super().__init__(**settings)
            self.cut: collections.Counter = collections.Counter()  # requests that lost their beginning, by kind
            self.less_room: collections.Counter = collections.Counter()  # answers that may not be as long as was asked

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(log p(continuation | context), is it greedy) for each request."""
            for request in requests:
                context, continuation = request.args
                if context:
                    length = sum(map(len, self._encode_pair(context, continuation)))
                else:
                    length = 1 + len(self.tok_encode(continuation, add_special_tokens=False))
                self.cut["loglikelihood"] += length - 1 > self.max_length
            found = self._in_portions("loglikelihood", requests, super().loglikelihood)
            return [tuple(score) for score in found]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """log p of whole texts; their windows fit."""
            return self._in_portions("loglikelihood_rolling", requests, super().loglikelihood_rolling)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Texts that continue each request's context, in the chat format if `chat`."""
            shown = []
            for request in requests:
                context, arguments = request.args
                if self.chat:
                    context = self.apply_chat_template([{"role": "user", "content": context}])
                most = normalize_gen_kwargs(arguments, self.max_gen_toks)["max_gen_toks"]
                if most >= self.max_length:  # the harness's class stops at this
                    most = self.max_length * 3 // 4
                    arguments = {**arguments, "max_gen_toks": most}
                    self.less_room["generate_until"] += 1
                self.cut["generate_until"] += len(self.tok_encode(context)) > self.max_length - most
                shown.append(_Shown((context, arguments)))
            return self._in_portions("generate_until", shown, super().generate_until)

        def _in_portions(self, kind: str, requests: list[Any], run: Callable[..., list[Any]]) -> list[Any]:
            """The results of requests, those that are kept and others, a portion at a time."""
            keys = [
                request_file.key(kind, request.args, *([self.seed, i] if _sampled(request) else []))
                for i, request in enumerate(requests)
            ]
            known = self.kept.known(keys) if self.kept is not None else {}
            left = [i for i, key in enumerate(keys) if key not in known]
            label = {"generate_until": "answers"}.get(kind, "log-likelihoods")
            with Progress(len(keys), label, "request", done=len(keys) - len(left), quiet=self.quiet) as progress:
                for start in range(0, len(left), _PORTION[kind]):
                    some = left[start : start + _PORTION[kind]]
                    torch.manual_seed(self.seed + some[0])  # a portion that comes after a kill draws nothing twice
                    for i, result in zip(some, run([requests[i] for i in some], disable_tqdm=True), strict=True):
                        known[keys[i]] = result
                        if self.kept is not None:
                            self.kept.put(keys[i], result)
                    if self.kept is not None:
                        self.kept.commit()
                    progress.update(len(some))
            return [known[key] for key in keys]

    return Rival


@dataclasses.dataclass(frozen=True)
class _Shown:
    """A request as the model is shown it."""

    args: tuple[str, dict[str, Any]]
    task_name: str | None = None


def _sampled(request: Any) -> bool:
    return len(request.args) > 1 and isinstance(request.args[1], dict) and bool(request.args[1].get("do_sample"))
