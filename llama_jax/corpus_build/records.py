"""Files of records: TFRecord and ArrayRecord, whose records are JSON objects or tf.train.Examples."""

import itertools
import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from llama_jax.corpus_build.damage import BadRow, Rows
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.storage import local_copy
from llama_jax.corpus_build.unpack import open_binary


def tfrecord(path: str) -> Rows:
    crc32c = extra("google_crc32c").value

    def matches(content: bytes, checksum: bytes) -> bool:
        plain = crc32c(content)
        masked = ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF  # as TensorFlow does
        return struct.pack("<I", masked) == checksum

    with open_binary(path) as file:
        for number in itertools.count(1):
            head = file.read(12)  # length and its checksum
            if not head:
                return
            size, where = struct.unpack("<Q", head[:8])[0], f"{path}:{number}"
            if not matches(head[:8], head[8:]):
                raise ValueError(f"record {number}: its length does not match its checksum")
            record = file.read(size + 4)  # and the checksum of the record
            if len(record) < size + 4:
                raise EOFError(f"record {number} of {size:,} bytes is torn")
            record, checksum = record[:size], record[size:]
            if matches(record, checksum):
                yield where, _record(record, where)
            else:
                yield where, BadRow(where, "the record does not match its checksum")


def array_record(path: str) -> Rows:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        with local_copy(path, ".array_record") as name:
            reader = ArrayRecordReader(name)
            # Records are packed in groups, of up to 65,536 by some writers; to read one of them unpacks its whole group.
            packed = re.search(r"group_size:(\d+)", reader.writer_options_string() or "")
            count, group = reader.num_records(), int(packed[1]) if packed else 1
            for start in range(0, count, group):
                for number, record in enumerate(reader.read(start, min(start + group, count)), start=start + 1):
                    yield f"{path}:{number}", _record(record, f"{path}:{number}")
            reader.close()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _record(record: bytes, where: str) -> dict[str, Any] | BadRow:
    """A record as a row: a JSON object, or a tf.train.Example with a feature `text`."""
    try:
        if record[:1] == b"{":
            return json.loads(record)
        return _example(record)
    except (ValueError, IndexError, RecursionError) as error:
        return BadRow(where, f"expected a JSON object or a tf.train.Example: {error}")


def _example(record: bytes) -> dict[str, str]:
    """Byte features of a tf.train.Example, by its wire format: TensorFlow itself is not needed."""
    row = {}
    for features in _fields(record, 1):
        for entry in _fields(features, 1):
            name, value = next(_fields(entry, 1), b"").decode(), next(_fields(entry, 2), b"")  # both may be left out
            for bytes_list in _fields(value, 1):
                for item in _fields(bytes_list, 1):
                    row.setdefault(name, item.decode())
    return row


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    """The length-delimited fields `number` of a protocol buffer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 2:
            size = varint()
            if at + size > len(message):
                raise ValueError("a torn protocol buffer")
            if key >> 3 == number:
                yield message[at : at + size]
            at += size
        elif key & 7 == 0:
            varint()
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise ValueError("not a protocol buffer")
