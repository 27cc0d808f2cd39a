"""An OpenAI-compatible endpoint as a judge: many requests at a time, tried again where the server asks for patience.

One request that the endpoint does not take, say because it is longer than the judge's context, is its own affair: it gets no
reply, and the others go on. What is wrong with all of them (a key, a model's name, a role that it does not know, no server)
ends the run: before a refusal counts, something must have been answered, if need be a few words of the same form.
"""

import concurrent.futures
import email.utils
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.data.dialog import Message

_PATIENCE = (429, 500, 502, 503, 504)
_REFUSED = (400, 413, 422)
_LONGEST = 120.0  # seconds that a server may ask us to wait: limits are mostly of a minute
_IN_A_ROW = 8  # so many failures, and none is the fault of its request


def retry_after(header: str | None) -> float:
    """The seconds that a server asks for before another try, which it tells as such or as a date; 0 if it does not."""
    try:
        return max(float(header or 0), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _said(content: Any) -> str:
    """The text of a reply, of which some servers make several parts; "" for what is no text, which no verdict is in."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


class _FailedError(Exception):
    """A request without an answer. `refused`: the endpoint does not take it; `fatal`: nor will it take any other."""

    def __init__(self, problem: str, *, refused: bool = False, fatal: bool = False):
        super().__init__(problem)
        self.refused, self.fatal = refused, fatal


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
                yield from self._sort(futures, dialogs)
            finally:
                for future in futures:
                    future.cancel()

    def _sort(
        self, futures: dict[concurrent.futures.Future, int], dialogs: Sequence[list[Message]]
    ) -> Iterator[tuple[int, str | None]]:
        """Replies as they come, None for what was refused."""
        answered, silent, row = False, [], 0
        for future in concurrent.futures.as_completed(futures):
            try:
                reply = future.result()
            except _FailedError as error:
                if error.refused:
                    answered = answered or self._takes_others_like(dialogs[futures[future]], error)
                    yield futures[future], None
                    continue
                silent.append(error)
                row += 1
                if error.fatal or row == max(_IN_A_ROW, self._workers):
                    raise ValueError(f"judge: {self.url} gave no answer: {error}") from None
                continue
            answered, row = True, 0
            yield futures[future], reply
        if silent:
            again = "" if len(futures) == 1 else f"; of {len(futures)} requests {len(silent)} are left, which the next run asks"
            raise ValueError(f"judge: {self.url} gave no answer: {silent[-1]}{again}")

    def _takes_others_like(self, dialog: Sequence[Message], refusal: _FailedError) -> bool:
        """True if the endpoint answers a few words in the roles of a dialog that it refused; else the ValueError."""
        try:
            self._reply([{**message, "content": "Say yes."} for message in dialog])
        except _FailedError:
            raise ValueError(f"judge: {self.url} gave no answer: {refusal}") from None
        return True

    def _reply(self, messages: list[Message]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self._max_tokens}
        head = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._api_key}"} if self._api_key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), head)
        for number in range(self._tries):
            told = 0.0
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return _said(json.load(response)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
                told = retry_after(error.headers.get("Retry-After"))
                if error.code not in _PATIENCE:
                    refused = error.code in _REFUSED
                    raise _FailedError(problem, refused=refused, fatal=not refused) from None
            except (OSError, ValueError, LookupError, TypeError) as error:  # unreachable, or no JSON of this API
                problem = f"{type(error).__name__}: {error}"
            if number + 1 < self._tries:
                time.sleep(max(self._pause * 2**number, min(told, _LONGEST)))
        raise _FailedError(problem)
