"""What a corpus will hold, from samples: the table of `--dry_run`, printed before anything runs.

Of each source some files are read, small, middle and large ones of each kind (format and compression), and of each of them the
beginning. Files of a kind are taken to hold documents and text in proportion to what measures them: rows of Parquet, examples
of TFDS, bytes of all others; a plain text is one document, whatever its size.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llama_jax.corpus_build import mixture, tfds
from llama_jax.corpus_build.build import Settings, check_bad_rows
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document, Removed, Step
from llama_jax.corpus_build.formats import ONE_DOCUMENT, format_of, parquet_rows
from llama_jax.corpus_build.profile import Profile
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.source_files import file_size, plain_path
from llama_jax.corpus_build.stages import SettingsError
from llama_jax.corpus_build.steps import clean, make_steps
from llama_jax.corpus_build.storage import watched
from llama_jax.data.tokenizer import Tokenizer

SAMPLED_BYTES = 20_000_000  # of text, of a source
SAMPLED_FILES, SAMPLED_TEXTS = 8, 128  # of each kind; the second where a file is one document
# Without a tokenizer: English text in 32,000 pieces has about 4 bytes a token, and in 4,096 about 3.1 (the demo's corpus).
BYTES_A_TOKEN, FEWER_A_HALVING = 4.0, 0.3
_COMPRESSION = {".gz": 3.0, ".zst": 3.2, ".xz": 3.8, ".bz2": 3.5}  # of text, where the sample does not tell
_BY_OFFSET = ("array_record", "arrayrecord")


def estimate_table(
    sources: Mapping[str, tuple[Iterable[Document | BadRow], Sequence[str] | None, float]], settings: Settings
) -> str:
    """The mixture table of a build that has not run.

    Args:
      sources: name -> (documents, the files they come from or None, bytes that are read at most).

    Raises:
      SettingsError: the build of a source would end for sure, as all of the sample is unreadable.
    """
    tokenizer = Tokenizer(settings.tokenizer_path) if settings.tokenizer_path else None
    documents, sizes, tokens, notes = {}, {}, {}, []
    for name, (rows, files, budget) in sources.items():
        steps = make_steps(settings.steps.get(name, ()), settings.clean)
        if files is None:
            sample = _Sample()
            sample.take(rows, steps, math.inf)
            whole = sample.amounts
        else:
            sample, whole = _estimate(name, files, steps)
        _check(name, sample, settings)
        factor = min(1.0, budget / max(whole.read, 1)) * (1 - settings.held_out.fraction)
        documents[name], sizes[name] = round(whole.kept * factor), round(whole.left * factor)
        if tokenizer and sample.texts:
            ratio = sample.amounts.left / max(sum(map(len, tokenizer.encode_many(sample.texts))) + 2 * len(sample.texts), 1)
        else:
            ratio = assumed_bytes_a_token(settings.vocab_size)
        tokens[name] = round(sizes[name] / ratio)
        found, of_files = sample.amounts, "" if files is None else f" from {sample.files:,} of {len(files):,} file(s)"
        notes.append(
            f"{name}: {found.documents:,.0f} documents ({found.read / 1e6:,.1f} MB) sampled{of_files}, "
            f"{found.kept / max(found.documents, 1):.1%} pass the filters, "
            f"{ratio:.2f} bytes a token{'' if tokenizer else ' (assumed)'}"
        )
        notes += _problems(name, sample.profile, settings)
    shares = mixture.plan(
        settings.weights, documents, tokens, sizes=sizes, total_tokens=settings.total_tokens or sum(tokens.values()),
        temperature=settings.temperature, max_epochs=settings.max_epochs,
    )  # fmt: skip
    head = "Estimated from samples, before duplicates are taken out; nothing was written."
    return "\n".join([head, "", mixture.table(shares), "", *notes])


def assumed_bytes_a_token(pieces: int) -> float:
    """Bytes of UTF-8 that a token of a vocabulary of that many pieces is assumed to stand for."""
    return max(BYTES_A_TOKEN + FEWER_A_HALVING * math.log2(pieces / 32_000), 1.0)


@dataclasses.dataclass(frozen=True)
class _Amounts:
    """Documents and bytes of text, read and left by the steps."""

    documents: float = 0
    kept: float = 0
    read: float = 0
    left: float = 0

    def __add__(self, other: "_Amounts") -> "_Amounts":
        return _Amounts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, documents: float, text: float) -> "_Amounts":
        return _Amounts(self.documents * documents, self.kept * documents, self.read * text, self.left * text)


@dataclasses.dataclass
class _Sample:
    """What was read of a source."""

    amounts: _Amounts = _Amounts()
    files: int = 0
    texts: list[str] = dataclasses.field(default_factory=list)  # that pass
    profile: Profile = dataclasses.field(default_factory=Profile)  # of what could not be read

    def take(self, rows: Iterable[Document | BadRow], steps: Sequence[Step], most: float) -> "_Taken":
        """Reads up to so many bytes of text."""
        documents = kept = read = left = number = 0
        complete, seen, piece = True, 0, (0, 0)
        with watched() as file:
            for row in rows:
                if read > most:
                    complete = False
                    break
                if file.bytes > seen:  # only now is all that came before used up
                    seen, piece = file.bytes, (seen, read)
                number += 1
                if isinstance(row, BadRow):
                    self.profile.lose(row)
                    continue
                size = len(row.text.encode())
                documents, read = documents + 1, read + size
                if not isinstance(result := clean(row, steps), Removed):
                    self.texts.append(result.text)
                    kept, left = kept + 1, left + len(result.text.encode())
        amounts = _Amounts(documents, kept, read, left)
        self.amounts += amounts
        self.files += 1
        return _Taken(amounts, number, complete, *piece)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What was read of one file."""

    amounts: _Amounts
    rows: int  # bad ones too
    complete: bool
    piece: int  # bytes of the file as it lies there, up to where it is known what text they held
    piece_read: int  # bytes of that text


def _estimate(name: str, files: Sequence[str], steps: Sequence[Step]) -> tuple[_Sample, _Amounts]:
    """A sample of the files of a source, and what all of them hold by it."""
    kinds: dict[tuple[str | None, str], list[tuple[int, str]]] = {}
    for path in files:
        if (size := file_size(path)) != 0:  # distributed writers leave empty parts
            suffix = Path(plain_path(path)).suffix.lower()
            kinds.setdefault((_kind(path), suffix if suffix in _COMPRESSION else ""), []).append((size or 0, path))
    chosen = {
        kind: _spread(sorted(of_kind), SAMPLED_TEXTS if kind[0] in ONE_DOCUMENT else SAMPLED_FILES)
        for kind, of_kind in kinds.items()
    }
    most = SAMPLED_BYTES / max(sum(map(len, chosen.values())), 1)
    sample, whole = _Sample(), _Amounts()
    for (kind, suffix), of_kind in kinds.items():
        amounts, measured = _Amounts(), 0.0
        for size, path in chosen[kind, suffix]:
            taken = sample.take(read_file(path, name), steps, most)
            amounts += taken.amounts
            measured += _measured(taken, kind, size, path, _COMPRESSION.get(suffix, 1.0))
        text = sum(_measure(kind, size, path) for size, path in of_kind) / max(measured, 1)
        count = len(of_kind) / len(chosen[kind, suffix]) if kind in ONE_DOCUMENT else text
        whole += amounts.times(count, text)
    return sample, whole


def _spread(files: Sequence[tuple[int, str]], most: int) -> Sequence[tuple[int, str]]:
    """So many of them, from the first to the last at equal steps."""
    if len(files) <= most:
        return files
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


def _kind(path: str) -> str | None:
    return "tfds" if tfds.is_name(path) else format_of(plain_path(path))


def _measure(kind: str | None, size: int, path: str) -> float:
    """What the documents and the text of a file are taken to be in proportion to."""
    if kind == "tfds":
        return tfds.size(path)
    return parquet_rows(plain_path(path)) if kind == "parquet" else size


def _measured(taken: _Taken, kind: str | None, size: int, path: str, compression: float) -> float:
    """How much of that measure was read."""
    if taken.complete:
        return _measure(kind, size, path)
    if kind in ("tfds", "parquet"):
        return taken.rows
    # Array records are read by offset, or as a whole copy; of others too little may have been read to tell.
    packed = taken.piece / taken.piece_read if taken.piece_read and kind not in _BY_OFFSET else 1 / compression
    return min(taken.amounts.read * packed, size)


def _check(name: str, sample: _Sample, settings: Settings) -> None:
    """SettingsError if a build of the source could not go on, whatever the rest of it holds."""
    problems = sample.profile
    if problems.foreign.count:
        check_bad_rows(name, problems, settings)
    if not sample.amounts.documents and (first := [*problems.bad_rows.first, *problems.bad_files.first]):
        raise SettingsError(f"{first[0]} (source {name!r}: all that was sampled is as bad)")


def _problems(name: str, profile: Profile, settings: Settings) -> list[str]:
    """Lines on what could not be read of the sample."""
    lines = []
    for what, problems in (("row", profile.bad_rows), ("file", profile.bad_files)):
        if problems.count:
            limit = getattr(settings, f"max_bad_{what}s")
            end = f"; the build will end, max_bad_{what}s is {limit:,}" if problems.count > limit else ""
            lines.append(f"{name}: {problems.count:,} bad {what}(s) in the sample, the first {problems.first[0]}{end}")
    return lines
