"""What a process does when JAX's coordination service aborts it, as it does when another host has died or never came.

The service prints a stack of C++ that names no host, and ends with a code (134) on which no launcher starts again.
"""

import ctypes
import signal
from collections.abc import Callable

EXIT_HOST_LOST = 69  # another host failed, died, stopped or never came (EX_UNAVAILABLE)

_handlers: list[object] = []  # kept alive: C holds no references


def on_abort(end: Callable[[], None]) -> Callable[[], None]:
    """Calls `end`, which ends the process, at SIGABRT from here on; returns what restores the way before.

    It is C that is told: a handler of Python's runs between two steps of the main thread, to which an abort never returns.
    """
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    _handlers.append(handler := ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: end()))
    before = library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    return lambda: library.signal(signal.SIGABRT, before)
