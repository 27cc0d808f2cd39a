"""What a corpus will hold, from samples: the table of `--dry_run`, printed before anything runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llama_jax.corpus_build import mixture, tfds
from llama_jax.corpus_build.build import Settings
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.formats import format_of, parquet_rows
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.source_files import file_size, plain_path
from llama_jax.corpus_build.steps import clean, make_steps
from llama_jax.data.tokenizer import Tokenizer

SAMPLED_BYTES = 20_000_000  # of text, from the smallest file of a source
# Without a tokenizer: English text in 32,000 pieces has about 4 bytes a token, and in 4,096 about 3.1 (the demo's corpus).
BYTES_A_TOKEN, FEWER_A_HALVING = 4.0, 0.3
_COMPRESSION = {".gz": 3.0, ".zst": 3.2, ".xz": 3.8, ".bz2": 3.5}  # of text, where the sample does not tell


def estimate_table(
    sources: Mapping[str, tuple[Iterable[Document | BadRow], Sequence[str] | None, float]], settings: Settings
) -> str:
    """The mixture table of a build that has not run.

    Args:
      sources: name -> (documents, the files they come from or None, bytes that are read at most).
    """
    tokenizer = Tokenizer(settings.tokenizer_path) if settings.tokenizer_path else None
    documents, sizes, tokens, notes = {}, {}, {}, []
    for name, (rows, files, budget) in sources.items():
        sampled, kept, read, left, texts, complete = _sample(name, rows if files is None else None, files, settings)
        if files is None:
            whole = read
        elif tfds.is_name(files[0]):  # it tells how many examples it has, not how large they are
            whole = read if complete else read * tfds.size(files[0]) / max(sampled, 1)
        elif all(format_of(plain_path(path)) == "parquet" for path in files):  # as does Parquet, whose columns are compressed
            whole = read * sum(parquet_rows(plain_path(path)) for path in files) / max(sampled, 1)
        elif complete:  # the smallest file tells how much text a byte of file holds
            whole = read * sum(map(file_size, files)) / max(file_size(_smallest(files)), 1)
        else:
            whole = max(read, sum(file_size(path) * _COMPRESSION.get(Path(plain_path(path)).suffix, 1.0) for path in files))
        factor = min(whole, budget) / max(read, 1) * (1 - settings.held_out.fraction)
        documents[name] = round(kept * factor)
        sizes[name] = round(left * factor)
        if tokenizer:
            ratio = left / max(sum(map(len, tokenizer.encode_many(texts))) + 2 * len(texts), 1)
        else:
            ratio = assumed_bytes_a_token(settings.vocab_size)
        tokens[name] = round(sizes[name] / ratio)
        notes.append(
            f"{name}: {'all' if files is None else len(files)} file(s), {sampled:,} documents ({read / 1e6:,.1f} MB) sampled, "
            f"{kept / max(sampled, 1):.1%} pass the filters, {ratio:.2f} bytes a token{'' if tokenizer else ' (assumed)'}"
        )
    shares = mixture.plan(
        settings.weights, documents, tokens, sizes=sizes, total_tokens=settings.total_tokens or sum(tokens.values()),
        temperature=settings.temperature, max_epochs=settings.max_epochs,
    )  # fmt: skip
    head = "Estimated from samples, before duplicates are taken out; nothing was written."
    return "\n".join([head, "", mixture.table(shares), "", *notes])


def assumed_bytes_a_token(pieces: int) -> float:
    """Bytes of UTF-8 that a token of a vocabulary of that many pieces is assumed to stand for."""
    return max(BYTES_A_TOKEN + FEWER_A_HALVING * math.log2(pieces / 32_000), 1.0)


def _sample(
    name: str, rows: Iterable[Document | BadRow] | None, files: Sequence[str] | None, settings: Settings
) -> tuple[int, int, int, int, list[str], bool]:
    """Documents sampled, those that pass, bytes of both, the texts that pass, and whether the file (or source) is complete."""
    steps = make_steps(settings.steps.get(name, ()), settings.clean)
    if rows is None:
        rows = read_file(_smallest(files), name)
    sampled = read = left = 0
    texts = []
    for row in rows:
        if isinstance(row, BadRow):
            continue
        if files and read > SAMPLED_BYTES:
            return sampled, len(texts), read, left, texts, False
        sampled += 1
        read += len(row.text.encode())
        result = clean(row, steps)
        if not isinstance(result, Removed):
            texts.append(result.text)
            left += len(result.text.encode())
    return sampled, len(texts), read, left, texts, True


def _smallest(files: Sequence[str]) -> str:
    """The smallest file that is not empty: distributed writers leave empty parts."""
    return min(files, key=lambda path: file_size(path) or math.inf)
