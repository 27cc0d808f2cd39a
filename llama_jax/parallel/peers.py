"""Whether the other hosts of a run are alive: each leaves word with JAX's coordination service and reads the others'.

No clocks are compared: a host is silent for as long as its word has not changed, measured by whoever reads it.
"""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax

_DIRECTORY = "llama_jax/hosts/"


@dataclasses.dataclass(frozen=True)
class Word:
    """What a host said last, and for how many seconds it has said nothing else."""

    status: Mapping[str, Any]
    silent: float


class Peers:
    """The hosts' words. `tell` and `ask` talk to the coordination service and may block when host 0 is in trouble."""

    def __init__(self):
        from jax._src import distributed  # the service that JAX, Orbax and the preemption notice use; no public name

        self.client, self.me = distributed.global_state.client, jax.process_index()
        self.heard: dict[int, tuple[str, float]] = {}  # host -> (its word, when it was new)
        self.answered = time.monotonic()  # when the service answered last
        self.count = 0

    def tell(self, **status: Any) -> None:
        """Leaves word of this host."""
        self.count += 1
        word = {"count": self.count, "name": socket.gethostname(), "pid": os.getpid(), **status}
        self.client.key_value_set(f"{_DIRECTORY}{self.me}", json.dumps(word), allow_overwrite=True)

    def ask(self) -> None:
        """Reads the words of all hosts."""
        words = {int(key.rpartition("/")[2]): word for key, word in self.client.key_value_dir_get(_DIRECTORY)}
        self.answered = now = time.monotonic()
        for host, word in words.items():
            if self.heard.get(host, ("",))[0] != word:
                self.heard[host] = (word, now)
        for host in self.heard.keys() - words.keys():  # it has taken leave
            del self.heard[host]

    def words(self) -> dict[int, Word]:
        """The other hosts' last words, as far as they have begun and not taken leave."""
        # A host cannot be called silent while it is the service that does not answer.
        return {
            host: Word(json.loads(word), max(self.answered - since, 0.0))
            for host, (word, since) in sorted(self.heard.items())
            if host != self.me
        }

    def leave(self) -> None:
        """Takes this host's word back: from now on nobody waits for it."""
        self.client.key_value_delete(f"{_DIRECTORY}{self.me}")


def lost(words: Mapping[int, Word], *, service_silent: float, me: int, limit: float) -> str | None:
    """Which host has failed, died or stopped, in one sentence; None while all are well."""
    for host, word in words.items():
        if "failed" in word.status:
            return f"{_named(host, word)} failed in {_where(word)}: {word.status['failed']}"
    silent = [(host, word) for host, word in words.items() if word.silent > limit]
    if silent:
        return "; ".join(
            f"{_named(host, word)} has been silent for {word.silent:.0f} s, last heard of in {_where(word)}"
            for host, word in silent
        )
    if service_silent > limit and me != 0:
        word = words.get(0)
        return f"{_named(0, word)}, the coordinator, has not answered for {service_silent:.0f} s"
    return None


def places(words: Mapping[int, Word]) -> str:
    """Where every other host is, for the report of one that waits."""
    return "; ".join(f"{_named(host, word)} is in {_where(word)}" for host, word in words.items())


def _named(host: int, word: Word | None) -> str:
    return f"host {host}" + (f" ({word.status['name']}, pid {word.status['pid']})" if word else "")


def _where(word: Word) -> str:
    return f"{word.status['phase']} of step {word.status['step']}"
