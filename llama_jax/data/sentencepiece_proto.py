"""The message of a SentencePiece model file, with the fields that this library reads or writes; others are kept as they are.

The package brings generated code too, which refuses a protobuf runtime older than the one it was generated for, as Apache Beam
asks for. Messages that are described here work with any.
"""

import functools
from typing import Any

# number, name, type, default; enumerations are read as the numbers that they are
_PIECE = ((1, "piece", "string", ""), (2, "score", "float", ""), (3, "type", "int32", "1"))
_TRAINER = (
    (3, "model_type", "int32", "1"), (4, "vocab_size", "int32", "8000"), (10, "character_coverage", "float", "0.9995"),
    (20, "max_sentencepiece_length", "int32", "16"), (21, "split_by_unicode_script", "bool", "true"),
    (22, "split_by_whitespace", "bool", "true"), (23, "split_by_number", "bool", "true"), (25, "split_digits", "bool", ""),
    (26, "allow_whitespace_only_pieces", "bool", ""), (35, "byte_fallback", "bool", ""), (40, "unk_id", "int32", "0"),
    (41, "bos_id", "int32", "1"), (42, "eos_id", "int32", "2"), (43, "pad_id", "int32", "-1"),
    (45, "unk_piece", "string", "<unk>"), (46, "bos_piece", "string", "<s>"), (47, "eos_piece", "string", "</s>"),
)  # fmt: skip
_NORMALIZER = (
    (1, "name", "string", ""), (2, "precompiled_charsmap", "bytes", ""), (3, "add_dummy_prefix", "bool", "true"),
    (4, "remove_extra_whitespaces", "bool", "true"), (5, "escape_whitespaces", "bool", "true"),
)  # fmt: skip

BPE = 2  # a TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece.type


@functools.cache
def model_class() -> Any:
    """The message class `ModelProto`: `pieces`, `trainer_spec`, `normalizer_spec`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # tensorflow-datasets brings it

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="llama_jax/sentencepiece.proto", package="llama_jax", syntax="proto2")
    for message, fields in (("SentencePiece", _PIECE), ("TrainerSpec", _TRAINER), ("NormalizerSpec", _NORMALIZER)):
        made = file.message_type.add(name=message)
        for number, name, kind, default in fields:
            kind = getattr(field, f"TYPE_{kind.upper()}")
            added = made.field.add(name=name, number=number, label=field.LABEL_OPTIONAL, type=kind)
            if default:
                added.default_value = default
    model = file.message_type.add(name="ModelProto")
    parts = (("pieces", "SentencePiece"), ("trainer_spec", "TrainerSpec"), ("normalizer_spec", "NormalizerSpec"))
    for number, (name, message) in enumerate(parts, start=1):
        label = field.LABEL_REPEATED if name == "pieces" else field.LABEL_OPTIONAL
        model.field.add(name=name, number=number, label=label, type=field.TYPE_MESSAGE, type_name=f".llama_jax.{message}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("llama_jax.ModelProto"))
