"""The body of a page without what its server packed it with (Content-Encoding): gzip, deflate, brotli and zstd, one or several.

Servers and crawlers say more than they do: many bodies come unpacked under a header that stayed. So a coding that does not fit
the body is passed over, and what is left must be text. warcio, which reads the records, knows fewer codings, hands the others
through as they are, and fails on brotli's own newer releases.
"""

import re
import zlib
from collections.abc import Callable

from llama_jax.corpus_build.extras import extra

# Control characters that text in no encoding has, UTF-16 apart, which begins with its mark; ESC is ISO-2022's.
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_LOOKED_AT = 1000  # bytes


def unpacked(body: bytes, codings: str) -> bytes:
    """A body without its codings, the value of its header; of a torn one, which crawlers cut at a size, what can be had.

    Raises:
      ValueError: no text comes out.
    """
    names = [name.strip().lower() for name in codings.split(",")]
    fits, missing = True, ""
    for name in reversed(names):  # they stand in the order in which they were put on
        if name in ("", "identity"):
            continue
        try:
            body = _CODINGS[name](body)
        except ModuleNotFoundError as error:
            fits, missing = False, f" (the package {error.name} is not installed)"
        except Exception:  # each library has errors of its own, and a coding that is none of ours is a KeyError
            fits = False
    if not fits and not body.startswith((b"\xff\xfe", b"\xfe\xff")) and _BINARY.search(body[:_LOOKED_AT]):
        known = ", ".join(_CODINGS)
        raise ValueError(f"Content-Encoding: expected some of {known} that fit the body, got {codings!r}{missing}")
    return body


def _gzip(body: bytes) -> bytes:
    parts = []
    while body[:2] == b"\x1f\x8b" or not parts:  # it may have several members; what follows them is padding
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        parts.append(member.decompress(body))
        body = member.unused_data
    return b"".join(parts)


def _deflate(body: bytes) -> bytes:
    """By the standard with zlib's header; some servers send none."""
    try:
        return zlib.decompressobj().decompress(body)
    except zlib.error:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(body)


def _brotli(body: bytes) -> bytes:
    return extra("brotli").Decompressor().process(body)


def _zstd(body: bytes) -> bytes:
    return extra("zstandard").ZstdDecompressor().decompressobj(read_across_frames=True).decompress(body)


_CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd,
}  # fmt: skip
