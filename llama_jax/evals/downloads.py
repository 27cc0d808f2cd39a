"""Rows of sets that are read from where they were published: the hub has them as a script only, or not at all."""

from typing import Any


def json_rows(address: str, *, field: str | None = None) -> Any:
    """The rows of a JSON file, or of one field of it. # -> datasets.Dataset

    Raises:
      ConnectionError: the address was not reached, and nothing of it is in the cache.
    """
    from datasets import load_dataset  # an extra

    inside = {} if field is None else {"field": field}
    try:
        return load_dataset("json", data_files={"rows": address}, split="rows", **inside)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"{address}: not in the cache, and not reached: {error}") from error
