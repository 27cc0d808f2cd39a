"""A loaded model as lm-evaluation-harness asks one: log-likelihoods, rolling log-likelihoods, generation (paper section 2.3).

    lm = HarnessModel(llama_jax.load(path))
    lm_eval.evaluator.simple_evaluate(lm, tasks=["hellaswag"])

The harness brings tasks, prompts and metrics, we bring the arithmetic: `evals/likelihood.py` and the engine of `sampling/`.
Text becomes tokens as in the harness's own Hugging Face model, so that both give the same numbers. What exceeds the context
is cut from the left as there, and counted in `cut`; answers that find less room than was asked for are, in `less_room`.
Finished requests may be kept, and are taken from there when asked again. On several hosts all of them ask the same; the first
one keeps.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.data.chat_template import encode_chat
from llama_jax.data.text_stream import TextStream
from llama_jax.evals import request_file
from llama_jax.evals.likelihood import Pair, Score, Scorer, ScoringConfig
from llama_jax.evals.request_file import RequestFile
from llama_jax.model.cache import empty_cache
from llama_jax.parallel.axes import batch_shards, shards_of
from llama_jax.parallel.hosts import first_problem, from_host_0
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.engine import Engine, EngineConfig, Request
from llama_jax.training.metrics import Progress

_SLICE = 4096  # log-likelihoods that are planned together; each is kept when its batch of rows has been read
_ANSWER = 256  # tokens of an answer where a task does not say: the harness's default
_SLOTS = 16  # answers that are drawn together at most, on each shard of the batch
_REUSE = 32  # prompts that share so many tokens compute them once


class HarnessModel:
    """`model` is what `llama_jax.load` gives, best with dtype="compute": then its weights are those that are read here. Of
    training's parameters a copy is made as generation reads them, and they are not held.

    It counts as one of the harness's models without being derived from their class: importing the harness changes the
    environment of the process, which an import of ours must not.

    Args:
      scoring: shapes of the log-likelihoods.
      slots: answers drawn together; default: 16 on each shard of the batch, or as many as the memory leaves room for.
      int8_cache: generation keeps keys and values in 8 bits.
      memory: bytes of a device; 0 if they are not known.
      chat: a prompt to continue is put into the chat format, as the user's only message.
      seed: of sampled answers.
      kept: results of finished requests, put there as they come, on host 0. The harness's own cache has sampled answers drawn
        again and hides from `cut` what it knows; here an answer depends on its seed and place alone, and `cut` is that of
        all requests.
    """

    def __init__(
        self, model: Any, *, scoring: ScoringConfig | None = None, slots: int = 0, int8_cache: bool = False, memory: int = 0,
        chat: bool = False, seed: int = 0, quiet: bool = False, kept: RequestFile | None = None,
    ):  # fmt: skip
        try:
            from lm_eval.api.model import LM, CacheHook
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"benchmarks need the package {error.name}: pip install 'llama_jax[eval]'") from None
        LM.register(type(self))
        self.cache_hook = CacheHook(None)
        if model.head != "lm_head":
            raise ValueError(f"{model.path}: benchmarks need a language model, this is a reward model")
        if model.tokenizer is None:
            raise ValueError(f"{model.path}: missing tokenizer: benchmarks are texts")
        self.words, self.chat, self.seed, self.kept = model.tokenizer, chat, seed, kept
        self.quiet = quiet or jax.process_index() > 0
        self._weights = model.prepared()
        self.scorer = Scorer(model.config, self._weights, model.mesh, compute=model.compute, settings=scoring)
        self.model = dataclasses.replace(model, params={}, weights=None)
        self._slots, self._int8_cache, self._memory = slots, int8_cache, memory
        self._engine: Engine | None = None
        self.cut: collections.Counter = collections.Counter()  # requests that lost their beginning, by kind
        self.less_room: collections.Counter = collections.Counter()  # answers that may not be as long as was asked, by kind

    # ---- what the harness asks about the model ----

    rank, world_size, device = 0, 1, None  # one model over all devices and hosts

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Where the harness's own cache wants finished requests to be told."""
        self.cache_hook = cache_hook

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        return self.words.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.model.config.max_length

    @property
    def tokenizer_name(self) -> str:
        """The fingerprint, under which the harness caches encoded requests."""
        return self.words.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, with BOS where the model expects it."""
        return self.words.encode(string, bos=self.words.adds_bos and add_special_tokens is not False)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's result file says about the model."""
        return {
            "checkpoint": self.model.path, "tokenizer": self.words.fingerprint, "cut_requests": dict(self.cut),
            "answers_with_less_room": dict(self.less_room),
        }  # fmt: skip

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused: our tokenizers never read control tokens out of text."""
        raise ValueError("--apply_chat_template: expected model_args with chat=True, which encodes prompts in the chat format")

    # ---- log-likelihoods ----

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Score]:
        """(log p(continuation | context), is it greedy) for each request's (context, continuation)."""
        results: list[Score] = []
        with Progress(len(requests), "log-likelihoods", "request", quiet=self.quiet or disable_tqdm) as progress:
            for start in range(0, len(requests), _SLICE):
                asked = [request.args for request in requests[start : start + _SLICE]]
                pairs = [self._fitting(*pair, "loglikelihood") for pair in self._encode_all(asked)]
                known = self._known([request_file.key("loglikelihood", args) for args in asked])
                progress.update(len(known))
                open_ones = [i for i in range(len(asked)) if i not in known]

                def keep(place: int, score: Score, asked=asked, known=known, open_ones=open_ones) -> None:
                    known[open_ones[place]] = self._keep("loglikelihood", asked[open_ones[place]], score)

                try:
                    self.scorer([pairs[i] for i in open_ones], progress=progress.update, keep=keep)
                finally:
                    self._commit()
                results += [tuple(known[i]) for i in range(len(asked))]
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each token once, under as much context as fits."""
        from lm_eval import utils

        windows = [
            [utils.make_disjoint_window(window) for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )]
            for request in requests
        ]  # fmt: skip
        windows = [[self._fitting(*window, "loglikelihood_rolling") for window in group] for group in windows]
        known = self._known([request_file.key("loglikelihood_rolling", request.args) for request in requests])
        open_ones = [i for i in range(len(requests)) if i not in known]
        flat = [(i, window) for i in open_ones for window in windows[i]]
        found: dict[int, dict[int, float]] = {i: {} for i in open_ones}  # of each text its windows so far, by place

        def keep(place: int, score: Score) -> None:
            i = flat[place][0]
            found[i][place] = score[0]
            if len(found[i]) == len(windows[i]):
                total = sum(found[i][window] for window in sorted(found[i]))
                known[i] = self._keep("loglikelihood_rolling", requests[i].args, total)

        with Progress(len(flat), "rolling log-likelihoods", "window", quiet=self.quiet or disable_tqdm) as progress:
            try:
                self.scorer([window for _, window in flat], progress=progress.update, keep=keep)
            finally:
                self._commit()
        return [known.get(i, 0.0) for i in range(len(requests))]  # a text of no token has no window

    def _known(self, keys: Sequence[str]) -> dict[int, Any]:
        """{place: result} of the requests that are kept.

        Raises:
          ValueError: on every host, if one of them asks something else: they would wait for each other for ever.
        """
        asked = request_file.key("asked", tuple(keys)) if jax.process_count() > 1 else ""
        same = from_host_0(lambda: asked) == asked
        if problem := first_problem("" if same else "its questions differ from those of host 0; expected the same data sets"):
            raise ValueError(problem)
        known = from_host_0(lambda: {} if self.kept is None else self.kept.known(keys))
        return {i: known[key] for i, key in enumerate(keys) if key in known}

    def _keep(self, kind: str, args: tuple, result: Any, *more: Any) -> Any:
        if self.kept is not None:
            self.kept.put(request_file.key(kind, args, *more), result)
        self.cache_hook.add_partial(kind, args, result)
        return result

    def _commit(self) -> None:
        if self.kept is not None:
            self.kept.commit()

    def _fitting(self, context: Sequence[int], continuation: Sequence[int], kind: str) -> Pair:
        over = len(context) + len(continuation) - 1 - self.max_length
        if over <= 0:
            return context, continuation
        if over >= len(context):
            raise ValueError(
                f"{self.model.path}: a continuation of {len(continuation)} tokens does not fit the context of {self.max_length}"
            )
        self.cut[kind] += 1
        return context[over:], continuation

    def _encode_all(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Each (context, continuation) as ids, split as the harness does; distinct texts once, on several threads."""
        moved = []
        for context, continuation in texts:
            kept = context.rstrip()  # spaces at the end of a context belong to the next word
            moved.append((kept, context[len(kept) :] + continuation) if kept else (context, continuation))
        wanted = {text: None for context, continuation in moved for text in (context, context + continuation) if text}
        ids = dict(zip(wanted, self.words.encode_many(list(wanted))))
        bos = [self.words.bos_id] if self.words.adds_bos else []
        out = []
        for context, continuation in moved:
            whole = ids[context + continuation]
            if context:
                out.append((bos + ids[context], whole[len(ids[context]) :]))
            else:  # BOS is the context, unless the text brings it
                out.append(([self.prefix_token_id], whole))
        return out

    # ---- generation ----

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue each request's context, up to a stop string, EOS or the greatest length."""
        from lm_eval.models.utils import normalize_gen_kwargs

        jobs, draws = [], []
        for index, request in enumerate(requests):
            context, arguments = request.args
            arguments = normalize_gen_kwargs(arguments, _ANSWER)
            prompt, room = self._prompt(context, arguments["max_gen_toks"])
            jobs.append((index, prompt, room, arguments))
            draws.append((self.seed, index) if arguments.get("do_sample") else ())  # what an answer depends on, too
        keys = [request_file.key("generate_until", request.args, *draw) for request, draw in zip(requests, draws)]
        answers = self._known(keys)
        jobs = [job for job in jobs if job[0] not in answers]
        if not jobs:
            return [answers[index] for index in range(len(requests))]

        def done(index: int, text: str) -> None:
            answers[index] = self._keep("generate_until", requests[index].args, text, *draws[index])

        with (
            jax.set_mesh(self.model.mesh),
            Progress(len(requests), "answers", "answer", done=len(answers), quiet=self.quiet or disable_tqdm) as progress,
        ):
            engine = self._engine_for(max(len(prompt) + room for _, prompt, room, _ in jobs))
            submitted = []
            for index, prompt, room, arguments in sorted(jobs, key=lambda job: job[1]):  # what begins alike, side by side
                stops = [stop for stop in arguments["until"] if stop]
                answer = _Answer(engine, TextStream(self.words, stops, after=prompt), functools.partial(done, index))
                submitted.append(engine.submit(
                    prompt, max_tokens=room, choice=_choice(arguments), seed=self.seed, index=index,
                    stop_ids=self.words.stop_ids, on_token=answer.push,
                ))  # fmt: skip
            try:
                engine.run(submitted, progress=progress.update)
            finally:
                self._commit()
        return [answers[index] for index in range(len(requests))]

    def _prompt(self, context: str, most: int) -> tuple[list[int], int]:
        """Ids of a prompt, and how many tokens its answer may have."""
        if self.chat:
            prompt = encode_chat([{"role": "user", "content": context}], self.words)
        else:
            prompt = self.tok_encode(context) or [self.prefix_token_id]
        least = min(most, max(self.max_length // 4, 1))  # of the context, for the answer
        if len(prompt) > self.max_length - least:
            self.cut["generate_until"] += 1
            prompt = prompt[-(self.max_length - least) :]
        room = min(most, self.max_length - len(prompt))
        if room < most:
            self.less_room["generate_until"] += 1
        return prompt, room

    def _engine_for(self, length: int) -> Engine:
        """An engine that holds so many tokens, the last one if it does."""
        if self._engine is None or self._engine.settings.max_length < length:
            self._engine = None  # its cache, before the next is made
            length = min(1 << (length - 1).bit_length(), self.max_length)
            settings = EngineConfig(
                slots=self._slots_for(length), max_length=max(length, 2), chunks=((64, 4), (512, 1)), reuse=_REUSE,
                int8_cache=self._int8_cache,
            )  # fmt: skip
            self._engine = Engine(self.model.config, self._weights, settings, compute=self.model.compute).warm_up()
        return self._engine

    def _slots_for(self, length: int) -> int:
        """How many answers of so many tokens are drawn together: as many on each shard of the batch.

        Where nobody says, the cache takes half of what the weights leave of the memory; steps need the rest.
        """
        shards = batch_shards(self.model.mesh)
        each = -(-self._slots // shards) or _SLOTS
        if self._memory and not self._slots:
            config, heads = self.model.config, shards_of("act_kv_heads")
            dtype = jnp.dtype("int8") if self._int8_cache else self.model.compute.activation_dtype
            row = jax.eval_shape(lambda: empty_cache(config, batch=1, slots=length, dtype=dtype))
            size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(row))
            size //= heads if config.kv_heads % heads == 0 else 1
            weights = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(self._weights))
            each = min(max((self._memory - weights) // 2 // size, 1), each)
        return each * shards


class _Answer:
    """An answer on its way: it ends itself at a stop string, and is told, without that, when it has ended."""

    def __init__(self, engine: Engine, stream: TextStream, done: Callable[[str], None]):
        self._engine, self._stream, self._done, self._pieces = engine, stream, done, []

    def push(self, request: Request, token: int) -> None:
        """Takes a token."""
        if token not in request.stop_ids:
            self._pieces.append(self._stream.push(token))
        if self._stream.stopped and not request.finish:
            self._engine.cancel(request)
        if request.finish:
            self._done("".join([*self._pieces, self._stream.finish()]))


def _choice(arguments: dict[str, Any]) -> Choice:
    """The harness's generation settings as ours; greedy unless they say otherwise."""
    if not arguments.get("do_sample"):
        return Choice(temperature=0.0)
    return Choice(
        temperature=float(arguments.get("temperature") or 1.0), top_k=int(arguments.get("top_k") or 0),
        top_p=float(arguments.get("top_p") or 1.0), min_p=float(arguments.get("min_p") or 0.0),
    )  # fmt: skip
