"""An HTTP endpoint with OpenAI's interface: `python -m llama_jax.serve --checkpoint=smollm2-135m`.

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="smollm2-135m", messages=[{"role": "user", "content": "Hello!"}], stream=True)

`/v1/chat/completions` and `/v1/completions` (streaming too), `/v1/models`, `/health`, `/metrics` for Prometheus. Listens on
127.0.0.1; on any other address an API key is required (`--api_key`, or LLAMA_JAX_API_KEY in the environment). `/health` and
`/metrics` answer without it, since load balancers and Prometheus expect that; they tell of no prompt and no answer. Requests
beyond the queue get 429; a client that leaves frees its slot. With `--score_prompts` texts are scored too, as
lm-evaluation-harness's `local-completions` asks for it. SIGTERM ends the server when it has finished what it is answering, at
the latest after `--grace` seconds. One process serves; it may have many devices.
"""

import asyncio
import contextlib
import functools
import hmac
import itertools
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jax
from absl import flags

from llama_jax import command, requests
from llama_jax.chat import open_engine, settings_of
from llama_jax.convert import one_process
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.parallel.host import keep_compiled_at_home, keep_heap
from llama_jax.requests import Ask, RequestError
from llama_jax.sampling.prompt_scores import PromptScorer
from llama_jax.sampling.worker import EngineStopped, QueueFull, Worker
from llama_jax.serve_answer import Answer, Field, usage

log = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "::1", "localhost")
_FAILED = "the engine failed; the server's log says how"


class Server:
    """The endpoint's routes over a worker."""

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, *, name: str, api_key: str = "", default_tokens: int = 256,
        body_limit: int = 1 << 20, origins: Sequence[str] = (),
    ):  # fmt: skip
        self.worker, self.tokenizer, self.name = worker, tokenizer, name
        self.api_key, self.default_tokens, self.body_limit = api_key, default_tokens, body_limit
        self.origins = list(origins)  # of pages whose scripts may ask
        # Programs that score texts send them in batches. More than ever fit could be tried again for ever.
        self.most_answers = min(8 if worker.scorer is None else 64, worker.capacity)
        self.started = int(time.time())

    def app(self) -> Any:
        """The Starlette application; it starts and ends the worker."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Route

        async def no_route(request, error):  # a path or a method that is none
            return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)

        @contextlib.asynccontextmanager
        async def lifespan(app):
            self.worker.start()
            yield
            await asyncio.to_thread(self.worker.stop)

        pages = Middleware(CORSMiddleware, allow_origins=self.origins, allow_methods=["*"], allow_headers=["*"])
        return Starlette(
            middleware=[pages] if self.origins else [],
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.models), Route("/v1/models/{name:path}", self.one_model),
                Route("/health", self.health), Route("/metrics", self.metrics),
            ],
            lifespan=lifespan, exception_handlers={HTTPException: no_route},
        )  # fmt: skip

    async def health(self, request: Any) -> Any:
        """200 while the engine's thread lives. Asks for no key: load balancers send none."""
        alive = self.worker.alive
        return _json({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def models(self, request: Any) -> Any:
        """The one model there is."""
        if refused := self._refuse(request):
            return refused
        return _json({"object": "list", "data": [self._described_model()]})

    async def one_model(self, request: Any) -> Any:
        """GET /v1/models/NAME"""
        if not request.path_params["name"]:  # /v1/models/
            return await self.models(request)
        return self._refuse(request) or self._unknown(request.path_params["name"]) or _json(self._described_model())

    async def metrics(self, request: Any) -> Any:
        """Counters and gauges in Prometheus' text format. Asks for no key, and tells of no prompt or answer."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        from starlette.responses import Response

        return Response(generate_latest(self.worker.registry), media_type=CONTENT_TYPE_LATEST)

    async def chat(self, request: Any) -> Any:
        """POST /v1/chat/completions"""
        return await self._answer(request, "messages")

    async def complete(self, request: Any) -> Any:
        """POST /v1/completions"""
        return await self._answer(request, "prompt")

    # ---- the way of a request ----

    async def _answer(self, request: Any, field: Field) -> Any:
        from starlette.responses import StreamingResponse

        if refused := self._refuse(request):
            return refused
        try:
            body = requests.decode(await self._body(request))
            if isinstance(body, dict) and field not in body:
                raise RequestError(field, "missing")
            if isinstance(body, dict) and (unknown := self._unknown(body.get("model"))):
                return unknown
            asks = await asyncio.to_thread(  # long prompts take long to encode, and others are answered meanwhile
                requests.parse, body, self.tokenizer, context=self.worker.engine.settings.max_length,
                default_tokens=self.default_tokens, most_answers=self.most_answers,
                scores_prompts=self.worker.scorer is not None,
            )  # fmt: skip
        except RequestError as error:
            too_large = error.field == "content-length"
            return _error(413 if too_large else 400, str(error), param=error.field)
        each = itertools.chain.from_iterable([ask] * ask.n for ask in asks)
        answers = [Answer(self.worker, self.tokenizer, ask, i) for i, ask in enumerate(each)]
        try:
            for answer, ticket in zip(answers, self.worker.submit([answer.job() for answer in answers]), strict=True):
                answer.ticket = ticket
        except EngineStopped as error:
            return _error(503, str(error), kind="server_error")
        except QueueFull as error:
            return _error(429, str(error), kind="rate_limit_error", headers={"Retry-After": "1"})
        head = {
            "id": f"{'chatcmpl' if field == 'messages' else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": self.name,
        }  # fmt: skip
        if asks[0].stream:
            return StreamingResponse(self._stream(asks, answers, head, field), media_type="text/event-stream")
        try:
            if not await self._finish(request, answers):
                return _error(499, "the client has left")
        finally:
            self._cancel(answers)
        if any(answer.finish == "error" for answer in answers):
            return _error(500, _FAILED, kind="server_error")
        kind = "chat.completion" if field == "messages" else "text_completion"
        choices = [answer.choice(field) for answer in answers]
        return _json({**head, "object": kind, "choices": choices, "usage": usage(asks, answers)})

    async def _finish(self, request: Any, answers: list[Answer]) -> bool:
        """Waits for all answers; False if the client left before."""

        async def drain(answer):
            async for _ in answer.pieces():
                pass

        # At once: an answer looks for its stop strings, and leaves its slot, while it is drained.
        work = asyncio.gather(*map(drain, answers))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=0.2)
                if not work.done() and await request.is_disconnected():
                    return False
            work.result()
            return True
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work  # asyncio logs an end that nobody waited for as an error

    async def _stream(self, asks: list[Ask], answers: list[Answer], head: dict, field: Field) -> AsyncIterator[str]:
        kind = "chat.completion.chunk" if field == "messages" else "text_completion"
        queue: asyncio.Queue = asyncio.Queue()

        async def pump(answer):
            try:
                async for piece in answer.pieces():
                    await queue.put((answer, piece))
            except Exception:  # else the client would wait for ever
                log.exception("an answer could not be told")
                if not answer.finish:
                    self.worker.cancel(answer.ticket)
                    answer.finish = "error"
            await queue.put((answer, None))

        def chunk(choices, **more):
            return f"data: {json.dumps({**head, 'object': kind, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

        pumps = [asyncio.ensure_future(pump(answer)) for answer in answers]
        try:
            if field == "messages":
                for answer in answers:
                    yield chunk([{"index": answer.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            left = len(answers)
            while left:
                answer, piece = await queue.get()
                if piece is None and answer.finish == "error":
                    yield f"data: {json.dumps(_described(500, _FAILED, kind='server_error'))}\n\n"
                    return
                left -= piece is None
                yield chunk([answer.delta(field, piece)])
            if answers[0].ask.usage:
                yield chunk([], usage=usage(asks, answers))
            yield "data: [DONE]\n\n"
        finally:  # also when the client leaves
            self._cancel(answers)
            for task in pumps:
                task.cancel()

    def _cancel(self, answers: list[Answer]) -> None:
        for answer in answers:
            if not answer.finish:
                self.worker.cancel(answer.ticket)

    async def _body(self, request: Any) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self.body_limit:
                raise RequestError("content-length", f"expected at most {self.body_limit} bytes")
        return body

    def _described_model(self) -> dict[str, Any]:
        length = self.worker.engine.settings.max_length
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "llama_jax", "max_model_len": length}

    def _unknown(self, model: Any) -> Any:
        """404 where a request names another model than the one there is, whose answers it would get."""
        try:
            requests.check_model(model, self.name)
        except RequestError as error:
            return _error(404, str(error), param=error.field)
        return None

    def _refuse(self, request: Any) -> Any:
        if not self.api_key:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        if known and scheme.lower() == "bearer":  # the case of a scheme says nothing (RFC 9110)
            return None
        return _error(401, "expected the header Authorization: Bearer <API key>", kind="authentication_error")


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status, headers=headers)


def _error(
    status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Any:  # fmt: skip
    return _json(_described(status, message, kind=kind, param=param), status, headers)


def _described(status: int, message: str, *, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the port, and does not listen yet; ValueError if it is taken, or the address is not this machine's."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does: a port is free once its server has ended
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host={host} --port={port}: cannot be listened on: {error}") from None
    return found


def context_told(held: int, asked: int) -> str:
    """How many tokens prompt and answer may have together, and why that is fewer than --max_length asked for."""
    return f"{held} tokens" + (f": the model's context, which is less than --max_length={asked}" if held < asked else "")


def main() -> None:
    """Takes the port, loads, compiles, listens."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"serving needs the package {error.name}: pip install 'llama_jax[serve]'") from None
    one_process("serve")
    keep_heap()
    keep_compiled_at_home()
    values = flags.FLAGS
    key = values.api_key or os.environ.get("LLAMA_JAX_API_KEY", "")
    if values.host not in LOCAL and not key:
        raise ValueError(f"--host={values.host}: others can reach it, which needs an API key: --api_key or LLAMA_JAX_API_KEY")
    if (hosts := jax.process_count()) > 1:  # those of a TPU VM know each other without the environment
        raise ValueError(f"serve runs in one process, and this TPU has {hosts} hosts: ask for one of a single host")

    listening = bound(values.host, values.port)  # a port that is taken is said before the weights are read
    settings = functools.partial(
        settings_of, slots=values.slots, max_length=values.max_length, steps=values.steps, int8_cache=values.int8_cache,
        alternatives=requests.ALTERNATIVES,
    )  # fmt: skip
    engine, model = open_engine(
        values.checkpoint, settings, tokenizer=values.tokenizer, int8=values.int8_weights, mesh_tensor=values.mesh_tensor
    )
    scorer = None
    if values.score_prompts:
        longest = engine.settings.max_length
        scorer = PromptScorer(model.config, compute=model.compute, longest=longest, alternatives=requests.ALTERNATIVES)
        with jax.set_mesh(model.mesh):
            scorer.warm_up(engine.weights)
    worker = Worker(engine, model.mesh, queue=values.queue, scorer=scorer)
    name = requests.model_name(values.name, values.checkpoint)
    server = Server(
        worker, model.tokenizer, name=name, api_key=key, default_tokens=values.max_tokens, origins=values.allow_origin
    )
    listening.listen()  # from here on nobody is refused
    host, port, *_ = listening.getsockname()
    print(
        f"serving model {name!r} at http://{f'[{host}]' if ':' in host else host}:{port}/v1, prompt and answer of at most "
        f"{context_told(engine.settings.max_length, values.max_length)}", flush=True,
    )  # fmt: skip
    config = uvicorn.Config(
        server.app(), host=values.host, port=values.port, log_level="info", timeout_graceful_shutdown=values.grace
    )
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises once more when it has shut down
        uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "a workdir, a directory of weights, a .gguf, or smollm2-135m")
    flags.DEFINE_string("tokenizer", None, "its tokenizer, where none lies beside the weights")
    flags.DEFINE_string("name", "", "the model's name in the API; unless given, the last part of --checkpoint")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
    flags.DEFINE_integer("port", 8000, "port to listen on; 0: any that is free", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string(
        "api_key", "", "the key that clients must send, but to /health and /metrics; required on other addresses than 127.0.0.1"
    )
    flags.DEFINE_integer(
        "slots", 8, "requests answered together, rounded up to a multiple of the devices that share them", lower_bound=1
    )
    flags.DEFINE_integer("queue", 64, "requests that may wait; more get 429", lower_bound=0)
    flags.DEFINE_integer("max_length", 2048, "tokens of prompt and answer together; 0: the model's context", lower_bound=0)
    flags.DEFINE_integer("max_tokens", 256, "length of an answer where the request does not say", lower_bound=1)
    flags.DEFINE_list("allow_origin", [], "pages whose scripts may ask, as http://localhost:3000; *: all (CORS)")
    flags.DEFINE_integer("grace", 60, "seconds that answers have to end after SIGTERM", lower_bound=0)
    flags.DEFINE_integer("mesh_tensor", 0, "devices that share each matrix; 0: as few as hold the model", lower_bound=0)
    flags.DEFINE_bool("int8_weights", False, "round the weights to 8 bits")
    flags.DEFINE_bool("int8_cache", False, "keep keys and values in 8 bits")
    flags.DEFINE_bool("score_prompts", False, "tell prompts' log-probabilities too, to completions with echo and logprobs")
    flags.DEFINE_integer("steps", 4, "tokens drawn between two looks of the host", lower_bound=1)
    flags.mark_flags_as_required(["checkpoint"])
    command.launch(main)
