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
    """What a host said last (of one that has said nothing yet: {}), and for how many seconds it has said nothing else."""

    status: Mapping[str, Any]
    silent: float


class Peers:
    """The hosts' words. `tell` and `ask` talk to the coordination service and may block when host 0 is in trouble.

    All hosts make theirs at the same moment, right after they have met: one that says nothing from then on has died.
    """

    def __init__(self):
        from jax._src import distributed  # the service that JAX, Orbax and the preemption notice use; no public name

        self.client, self.me, self.hosts = distributed.global_state.client, jax.process_index(), jax.process_count()
        self.heard: dict[int, tuple[str, float]] = {}  # host -> (its word, when it was new)
        self.begun = self.answered = time.monotonic()  # `answered`: when the service did so last
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

    def words(self) -> dict[int, Word]:
        """The last words of all other hosts but those that have taken leave."""
        found = {}
        for host in range(self.hosts):
            word, since = self.heard.get(host, ("{}", self.begun))
            status = json.loads(word)
            if host != self.me and "left" not in status:
                # A host cannot be called silent while it is the service that does not answer.
                found[host] = Word(status, max(self.answered - since, 0.0))
        return found

    def leave(self) -> None:
        """Says that from now on nobody need wait for this host."""
        self.tell(left=True)


def lost(words: Mapping[int, Word], *, service_silent: float, me: int, limit: float, grace: float = 0.0) -> str | None:
    """Which host has failed, died or stopped, in one sentence; None while all are well.

    A host that says that it failed counts after `grace` seconds: most errors are those of all hosts, each of which then ends
    with its own words.
    """
    for host, word in words.items():
        if "failed" in word.status and word.silent >= grace:
            return f"{_named(host, word)} failed in {_where(word)}: {word.status['failed']}"
    silent = [(host, word) for host, word in words.items() if word.silent > limit]
    if silent:
        return "; ".join(
            f"{_named(host, word)} has been silent for {word.silent:.0f} s, {_last(word)}" for host, word in silent
        )
    if service_silent > limit and me != 0:
        word = words.get(0)
        return f"{_named(0, word)}, the coordinator, has not answered for {service_silent:.0f} s"
    return None


def places(words: Mapping[int, Word]) -> str:
    """Where every other host is, for the report of one that waits."""
    return "; ".join(f"{_named(host, word)} is in {_where(word)}" for host, word in words.items())


def _named(host: int, word: Word | None) -> str:
    return f"host {host}" + (f" ({word.status['name']}, pid {word.status['pid']})" if word and word.status else "")


def _where(word: Word) -> str:
    return word.status["at"] if word.status else "an unknown place"


def _last(word: Word) -> str:
    return f"last heard of in {_where(word)}" if word.status else "and was never heard of after all had met"
