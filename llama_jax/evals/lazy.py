"""A model of the harness that is loaded when it is first needed, and let go of."""

import gc
from collections.abc import Callable
from typing import Any


class Lazy:
    """A model that is opened when something is first asked of it."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made = make, None

    def get(self) -> Any:
        """The model."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __enter__(self) -> "Lazy":
        return self

    def __exit__(self, *_: Any) -> None:
        """Frees it."""
        if self._made is not None and self._made.kept is not None:
            self._made.kept.close()
        self._made = None
        gc.collect()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.get(), name)
