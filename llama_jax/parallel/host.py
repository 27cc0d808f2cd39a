"""What makes a process fast on its host: memory and arithmetic of a CPU, compiled programs everywhere."""

import ctypes
import functools
import hashlib
import os
import platform
import re
import sys
from pathlib import Path

from llama_jax.paths import place

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_heap() -> bool:
    """Makes glibc keep freed memory instead of returning it to the kernel; True if that worked.

    XLA's CPU backend allocates each large temporary anew. By default glibc maps and unmaps those one by one, and the page
    faults cost more than the arithmetic: `x + 1` on 64 MB takes 30 ms with them and 4 ms without (2 cores). The price is
    that the process keeps its peak memory. Call it at the start of a command, before the first large allocation.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 << 20), (_M_ARENA_MAX, 1))
    return all(mallopt(option, value) for option, value in settings)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this host's CPU has bfloat16 products of its own (AMX or AVX-512 of x86, BF16 of Arm), as Linux tells.

    Elsewhere XLA converts operands to float32 for each product, which is slower than float32 from the start: a step of
    `tiny` takes 1.25 times as long (`tests/benchmarks/training.py --sizes tiny`, 2 cores without them).
    """
    return re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", _cpu_flags()) is not None


def _cpu_flags() -> str:
    """What the first CPU can do, as Linux tells; "" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if re.match(r"(flags|Features)\s*:", line)), "")


def device_memory() -> int:
    """Bytes of memory that a device has for arrays; 0 if the backend does not tell, as on a CPU."""
    import jax  # the heap is settled before it is there

    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def keep_compiled(workdir: str | Path) -> None:
    """Keeps compiled programs in the workdir, so that a restart does not compile again; a cache chosen by the user stays."""
    import jax  # the heap is settled before it is there

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(place(workdir) / "compiled"))


def keep_compiled_at_home() -> None:
    """The same for commands without a workdir, in the user's cache: a chat starts in a third of the time once it was there.

    Homes are shared between machines, and programs for a CPU know its instructions, so that each kind has its own place.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llama_jax"
    keep_compiled(home / f"{platform.machine()}-{hashlib.sha256(_cpu_flags().encode()).hexdigest()[:12]}")
