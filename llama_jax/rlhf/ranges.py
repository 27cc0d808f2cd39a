"""Checks of numbers in settings, each one sentence that names the field, what was expected and what came."""

from typing import Any


def check_least(name: str, settings: Any, **least: float) -> None:
    """ValueError for a field, or one of its numbers if it has several, below its least value, or no number."""
    for field, smallest in least.items():
        value = getattr(settings, field)
        for number in value if isinstance(value, tuple) else (value,):
            if not number >= smallest:
                raise ValueError(f"{name}.{field}: expected at least {smallest}, got {number}")


def check_shares(name: str, settings: Any, *fields: str) -> None:
    """ValueError for a field that is no number from 0 to 1."""
    for field in fields:
        if not 0 <= getattr(settings, field) <= 1:
            raise ValueError(f"{name}.{field}: expected a number from 0 to 1, got {getattr(settings, field)}")
