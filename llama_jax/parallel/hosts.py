"""What all hosts of a run must have in common, compared before any compute is spent; and stopping on the same step.

One host with yesterday's code, another corpus or a missing chip does not fail: it computes something else, or hangs the
others. `preflight` names it.
"""

import collections
import contextlib
import contextvars
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

import llama_jax
from llama_jax.paths import place, reason


class HostsDiffer(RuntimeError):
    """The hosts of a run do not agree; the message names fact, hosts and values."""


def preflight(facts: Mapping[str, str]) -> None:
    """Compares `facts`, the code and the devices of all hosts.

    Raises:
      HostsDiffer: on every host, if they differ in anything.
    """
    if jax.process_count() == 1:
        return
    differences = compare([json.loads(text) for text in _gather(json.dumps({**machine_facts(), **facts}))])
    differences += clocks([float(text) for text in _gather(repr(time.time()))])  # right after they have met
    if differences:
        raise HostsDiffer("the hosts of this run differ; " + "; ".join(differences))


def machine_facts() -> dict[str, str]:
    """What makes this host's programs: the code, the compilers and what they are told, the devices."""
    device = jax.local_devices()[0]
    return {
        "code": code_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "compiler": " ".join(device.client.platform_version.split()),  # libtpu's build
        "local devices": f"{jax.local_device_count()} x {device.device_kind}",
        **{name: " ".join(sorted(os.environ.get(name, "").split())) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    }


def compare(hosts: list[dict[str, str]]) -> list[str]:
    """One line for each fact that not all hosts share: the hosts that have another value than most, and both values."""
    lines = []
    for name in sorted({name for facts in hosts for name in facts}):
        values = [facts.get(name, "(absent)") for facts in hosts]
        common, count = collections.Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        others = ", ".join(f"host {host} has {value}" for host, value in enumerate(values) if value != common)
        lines.append(f"{name}: {others}, {'the others have' if count > 1 else f'host {values.index(common)} has'} {common}")
    return lines


def clocks(times: list[float], *, tolerance: float = 60.0) -> list[str]:
    """One line if hosts that read their clocks at once read other times than most: logs and goodput would be nonsense."""
    middle = statistics.median_low(times)
    off = [f"host {host} is {time - middle:+.0f} s off" for host, time in enumerate(times) if abs(time - middle) > tolerance]
    return [f"clock: {', '.join(off)}"] if off else []


_decides = contextvars.ContextVar("decides", default=False)


@contextlib.contextmanager
def _deciding() -> Iterator[None]:
    """Host 0 does something that the others wait for: what it calls meanwhile asks nobody."""
    token = _decides.set(True)
    try:
        yield
    finally:
        _decides.reset(token)


def _alone() -> bool:
    """Whether there is nobody to ask. Without a cluster JAX is not asked either: its answer would take the chips."""
    return _decides.get() or not jax.distributed.is_initialized() or jax.process_count() == 1


def first_problem(problem: str) -> str:
    """What went wrong on any host ("" if nothing did), told to all: an error of one must not leave the others waiting."""
    if _alone():
        return problem
    found = [(host, text) for host, text in enumerate(_gather(problem)) if text]
    return f"host {found[0][0]}: {found[0][1]}" if found else ""


def from_host_0(make: Callable[[], Any]) -> Any:
    """What `make` gives on host 0, on every host, by way of JSON. Where it fails all do, with a ValueError; host 0 itself with
    what it was, if that was neither a ValueError nor an OSError."""
    if _alone():
        return make()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data, unexpected = b"", None
    if jax.process_index() == 0:
        try:
            with _deciding():
                answer = [make(), ""]
        except (ValueError, OSError) as error:
            answer = [None, str(error)]
        except Exception as error:  # the others wait for an answer
            answer, unexpected = [None, f"{type(error).__name__}: {error}"], error
        data = json.dumps(answer).encode()
    size = int(broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros((1 << size.bit_length(),), np.uint8)  # so that few programs are compiled
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    found, problem = json.loads(np.asarray(broadcast_one_to_all(padded)).astype(np.uint8)[:size].tobytes())
    if problem:
        raise unexpected or ValueError(problem)
    return found


def exist(paths: Sequence[Path]) -> list[bool]:
    """Which of these files there are, as host 0 sees it: hosts that saw different ones would wait for each other for ever."""
    return from_host_0(lambda: [path.exists() for path in paths])


def gather_numbers(numbers: np.ndarray) -> np.ndarray:
    """The rows of numbers that all hosts have, by process index."""
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(numbers)).reshape(jax.process_count(), *numbers.shape)


def on_every_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy's, whole, on every host, of which each may have had a part only."""
    from jax.experimental.multihost_utils import process_allgather

    def whole(x: Any) -> np.ndarray:
        return np.asarray(x if getattr(x, "is_fully_addressable", True) else process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def on_host_0(act: Callable[..., Any], *arguments: Any) -> None:
    """Calls `act` on host 0, which alone writes files; the others wait, and end with it if it fails."""
    if _alone():
        act(*arguments)
        return
    failed: Exception | None = None
    if jax.process_index() == 0:
        try:
            with _deciding():
                act(*arguments)
        except Exception as error:  # whatever it is, the others must hear of it
            failed = error
    problem = first_problem(f"{type(failed).__name__}: {failed}" if failed else "")
    if failed:
        raise failed
    if problem:
        raise RuntimeError(problem)


def code_version() -> str:
    """A fingerprint of this package's sources, which need not lie in a repository."""
    root = Path(llama_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def file_fact(path: str | Path) -> str:
    """A fingerprint of what lies at a path: a file's content, a directory's manifest, or that nothing can be read there."""
    path = place(path)
    try:
        if path.is_dir():
            path = path / "manifest.json"
        if not path.is_file():
            return "missing"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:  # of one host: it is to be named, and not to leave the others waiting
        return f"unreadable ({reason(error)})"


_asked = itertools.count(1)


def stop_agreed() -> bool:
    """Whether all hosts stop here because one of them got SIGTERM. All must ask at the same points of a run.

    JAX's coordination service takes the signal and finds a point that no host has passed: the one after the last that any has
    asked at. Points are numbered as they come, and not by step, since a run that resumes leaves many steps out, perhaps the
    very one that was found. Asking costs no communication.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_asked))


def _gather(text: str) -> list[str]:
    """The texts of all hosts, by process index."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = gather_numbers(np.array([data.size], np.int32))[:, 0]
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: data.size] = data
    return [bytes(row[:size]).decode() for row, size in zip(gather_numbers(padded), sizes, strict=True)]
