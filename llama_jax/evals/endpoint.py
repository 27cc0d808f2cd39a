"""An OpenAI-compatible endpoint as a judge: many requests at a time, tried again where the server asks for patience."""

import concurrent.futures
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from llama_jax.data.dialog import Message

_PATIENCE = (429, 500, 502, 503, 504)


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

    def __call__(self, dialogs: Sequence[list[Message]]) -> Iterator[tuple[int, str]]:
        """See `judges.Ask`. ValueError for an endpoint that does not answer; what came before it has been handed out."""
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(self._reply, dialog): i for i, dialog in enumerate(dialogs)}
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield futures[future], future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _reply(self, messages: list[Message]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self._max_tokens}
        head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._api_key}"} if self._api_key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), head)
        for number in range(self._tries):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return json.load(response)["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
                if error.code not in _PATIENCE:
                    break
            except (OSError, ValueError, LookupError, TypeError) as error:  # unreachable, or no JSON of this API
                problem = f"{type(error).__name__}: {error}"
            time.sleep(self._pause * 2**number)
        raise ValueError(f"judge: {self.url} gave no answer: {problem}")
