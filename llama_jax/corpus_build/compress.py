"""The yardstick of pretraining at small sizes: what a general compressor reaches on the same documents."""

import lzma
from collections.abc import Iterable


def bits_per_byte_of_xz(texts: Iterable[str]) -> float:
    """Bits per byte of `xz -9e` on the concatenation of the texts."""
    data = "".join(texts).encode()
    if not data:
        raise ValueError("texts: expected at least one byte, got none")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
