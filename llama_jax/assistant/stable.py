"""Choices that depend on their arguments alone: the same parts give the same draw in every process and Python
version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def stable_int(*parts: str | int) -> int:
    """A 64-bit integer from the parts. (`hash()` is salted per process, so it would not do.)"""
    # The separator keeps ("ab", "c") and ("a", "bc") apart.
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def stable_unit(*parts: str | int) -> float:
    """A number in the open interval (0, 1); both its logarithm and its logit are finite."""
    return ((stable_int(*parts) >> 12) + 0.5) / 2**52


def stable_choice(options: Sequence[T], *parts: str | int) -> T:
    """One of the options, each equally likely over different parts."""
    return options[stable_int(*parts) % len(options)]


def stable_order(items: Iterable[T], *parts: str | int, key=str) -> list[T]:
    """The items shuffled by the hash of their key; adding an item never reorders the others."""
    return sorted(items, key=lambda item: (stable_int(*parts, key(item)), key(item)))
