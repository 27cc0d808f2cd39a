"""An OpenAI-compatible endpoint as a judge: many requests at a time, tried again where the server asks for patience.

One request that the endpoint does not take, say because it is longer than the judge's context, is its own affair: it gets no
reply, and the others go on. What is wrong with all of them (a key, a model's name, no server) ends the run.
"""

import concurrent.futures
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from llama_jax.data.dialog import Message

_PATIENCE = (429, 500, 502, 503, 504)
_REFUSED = (400, 413, 422)
_TOO_LONG = re.compile(r"context|too (long|large)|maximum.{0,40}length", re.IGNORECASE | re.DOTALL)
_IN_A_ROW = 8  # so many failures, and none is the fault of its request


class _FailedError(Exception):
    """A request without an answer. `refused`: the endpoint does not take it; `certain`: and says that it is too long."""

    def __init__(self, problem: str, *, refused: bool = False, certain: bool = False, fatal: bool = False):
        super().__init__(problem)
        self.refused, self.certain, self.fatal = refused, certain, fatal


class Endpoint:
    """`url` is the part before /chat/completions, say http://127.0.0.1:8000/v1."""

    def __init__(
        self, url: str, *, model: str, api_key: str = "", workers: int = 8, tries: int = 5, timeout: float = 120.0,
        max_tokens: int = 512, pause: float = 1.0,
    ):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge: expected an address that begins with http:// or https://, got {url!r}")
        self.url, self.model, self._api_key = url.rstrip("/"), model, api_key
        self._workers, self._tries, self._timeout, self._pause = workers, tries, timeout, pause
        self._max_tokens = max_tokens

    def __call__(self, dialogs: Sequence[list[Message]]) -> Iterator[tuple[int, str | None]]:
        """See `judges.Ask`; None for a request that was refused.

        Raises:
          ValueError: the endpoint does not know us, refuses everything, or left requests without an answer for other reasons;
            what came before has been handed out.
        """
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(self._reply, dialog): i for i, dialog in enumerate(dialogs)}
            try:
                yield from self._sort(futures)
            finally:
                for future in futures:
                    future.cancel()

    def _sort(self, futures: dict[concurrent.futures.Future, int]) -> Iterator[tuple[int, str | None]]:
        """Replies as they come. Refusals wait for the first reply: until then they may be the fault of all requests alike."""
        answered, waiting, silent, row = False, [], [], 0
        for future in concurrent.futures.as_completed(futures):
            try:
                reply = future.result()
            except _FailedError as error:
                if error.refused and (answered or error.certain):
                    yield futures[future], None
                    continue
                (waiting if error.refused else silent).append((futures[future], error))
                row += 1
                if error.fatal or row == max(_IN_A_ROW, self._workers):
                    raise ValueError(f"judge: {self.url} gave no answer: {error}") from None
                continue
            answered, row = True, 0
            yield futures[future], reply
            yield from ((i, None) for i, _ in waiting)
            waiting.clear()
        yield from ((i, None) for i, _ in waiting)
        if silent:
            again = "" if len(futures) == 1 else f"; of {len(futures)} requests {len(silent)} are left, which the next run asks"
            raise ValueError(f"judge: {self.url} gave no answer: {silent[-1][1]}{again}")

    def _reply(self, messages: list[Message]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self._max_tokens}
        head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._api_key}"} if self._api_key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), head)
        for number in range(self._tries):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return json.load(response)["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                text = error.read(500).decode(errors="replace")
                problem = f"HTTP {error.code}: {text}"
                if error.code in _REFUSED:
                    certain = error.code == 413 or bool(_TOO_LONG.search(text))
                    raise _FailedError(problem, refused=True, certain=certain) from None
                if error.code not in _PATIENCE:
                    raise _FailedError(problem, fatal=True) from None
            except (OSError, ValueError, LookupError, TypeError) as error:  # unreachable, or no JSON of this API
                problem = f"{type(error).__name__}: {error}"
            if number + 1 < self._tries:
                time.sleep(self._pause * 2**number)
        raise _FailedError(problem)
