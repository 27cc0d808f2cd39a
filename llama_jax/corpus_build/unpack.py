"""Compressed files as what was compressed: gzip, bzip2, xz and zstd, torn ones as far as they go, and then EOFError.

How a file is compressed its first bytes tell, whatever its name is; by its name alone damage at its very beginning is seen.
"""

import bz2
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.storage import stored

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SUFFIXES = (*_OPENERS, ".zst")
# A text may begin with the letters of bzip2, so that its first block (or end) is looked at too.
_MAGIC = re.compile(
    rb"(?P<gz>\x1f\x8b\x08)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|(?P<xz>\xfd7zXZ\0)|(?P<zst>\x28\xb5\x2f\xfd)"
)
_LARGEST_WINDOW = 2**31  # of zstd: what `zstd --long=31` writes


def open_binary(path: str) -> BinaryIO:
    """The bytes of a file behind its compression."""
    raw = stored(path)
    suffix = compression(path, raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), 2**20)
    return _OPENERS[suffix](raw, "rb") if suffix in _OPENERS else raw


def compression(path: str, raw: io.BufferedReader) -> str:
    """How a file is compressed, as the suffix (.gz, .bz2, .xz, .zst) that its name should have; "" if it is not."""
    if found := _MAGIC.match(raw.peek(16)):
        return f".{found.lastgroup}"
    suffix = Path(path).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


class _ZstdFile(io.RawIOBase):
    """The content of all frames of a zstd file; EOFError where the last one is torn, which its own reader passes over."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._zstandard = raw, extra("zstandard")
        self._frame: Any = None  # the frame that is being read
        self._data = b""  # of the file, not unpacked yet
        self._left = memoryview(b"")  # content that nobody has taken yet

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            self._data = self._data or self._raw.read(2**17)
            if not self._data:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is torn")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
            try:
                self._left = memoryview(self._frame.decompress(self._data))
            except self._zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
            self._data = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def gzip_members(file: BinaryIO) -> Iterator[BinaryIO]:
    """The content of each gzip member, which holds one record by the standard; EOFError where one is not whole."""
    rest = b""
    while rest := (rest or file.read(2**16)).lstrip(b"\0"):  # gzip allows zeros between members
        unpack = zlib.decompressobj(16 + zlib.MAX_WBITS)
        with tempfile.SpooledTemporaryFile(max_size=2**26) as content:
            while not unpack.eof:
                if not rest:
                    raise EOFError("the last gzip member is torn")
                content.write(unpack.decompress(rest))
                rest = unpack.unused_data if unpack.eof else file.read(2**16)
            content.seek(0)
            yield content
