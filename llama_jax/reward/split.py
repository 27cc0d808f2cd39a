"""Training, validation and held-out comparisons that share no conversation (paper section 3.2.2: the held-out test set).

Rows of one conversation share its first message, whatever turn they are about: whoever has trained on one of them knows part
of the others. So a conversation lies on one side whole, by a hash of that message: the same one in every run, in every order of
rows and whatever other rows there are.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

from llama_jax.data.rows import Row

TRAIN = "train"


def parse_parts(parts: Sequence[str]) -> dict[str, float]:
    """`validation=0.1` and the like as {name: share}; the rest of the rows is "train". ValueError if that cannot be."""
    shares = {}
    for part in parts:
        name, _, share = part.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == TRAIN or name in shares:
            raise ValueError(f"split: expected a new name of small letters (not {TRAIN!r}) before '=', got {part!r}")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"split: expected name=share, got {part!r}") from None
        if not 0 < shares[name] < 1:
            raise ValueError(f"split: expected a share between 0 and 1, got {part!r}")
    if sum(shares.values()) >= 1:
        raise ValueError(f"split: {', '.join(parts)} leave nothing for {TRAIN}")
    return shares


def part_of(row: Row, shares: Mapping[str, float]) -> str:
    """Where a comparison (with `prompt` as messages) belongs: one of the names of `shares`, or "train"."""
    asked = next(message["content"] for message in row["prompt"] if message["role"] == "user")  # many share a system message
    first = " ".join(asked.split()).casefold()
    place = int.from_bytes(hashlib.sha256(first.encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return TRAIN
