"""What the Beam build does with one document, one file or one group of them (see `beam_refine`, which brings them together)."""

import dataclasses
import functools
import io
import os
import pickle
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from llama_jax.corpus_build.build import Settings, analyse, cleaned_documents
from llama_jax.corpus_build.dedup import checked_hash, preference
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.near_duplicates import NearDuplicates, band_keys, links, signatures
from llama_jax.corpus_build.paragraphs import Cut
from llama_jax.corpus_build.profile import Profile
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.samples import Row
from llama_jax.corpus_build.stages import Stages
from llama_jax.data.sources import write_jsonl
from llama_jax.files import atomic_write
from llama_jax.paths import place

# A document travels with the place it had among the unique ones: rank of its source, hash of its text before any cut.
Place = tuple[int, bytes]


def read_and_clean(item: tuple[str, int, str], settings: Settings, stages: Stages) -> Iterator:
    tagged = extra("apache_beam").pvalue.TaggedOutput
    source, number, path = item
    name = f"cleaned/{source}-{number:05d}"
    documents, profile = stages.once(name, functools.partial(cleaned_file, source, path, settings))
    yield from ((None, document) for document in documents)
    yield tagged("profile", (source, profile))


def cleaned_file(source: str, path: str, settings: Settings) -> tuple[list[Document], Profile]:
    profile = Profile()
    return list(cleaned_documents(source, read_file(path, source), settings, profile, limited=False)), profile


def hashed(item: tuple[None, Document], rank: Mapping[str, int]) -> tuple[bytes, tuple[int, str, Document]]:
    document = item[1]
    return checked_hash(document), (rank[document.source], document.id, document)


def best(copies: Iterable[tuple[int, str, Document]]) -> tuple[int, str, Document]:
    return min(copies, key=lambda found: (found[0], preference(found[2])))


def quality(item: tuple[Place, Document]) -> tuple[int, int, str, str]:
    """The order in which a document of a cluster is chosen: as in `near_duplicates.drop_near_duplicates`."""
    place, document = item
    return place[0], -len(document.text), document.id, place[1]


def bands(items: Sequence[tuple[Place, Document]], settings: NearDuplicates) -> Iterator:
    for item, signature in zip(items, signatures([d.text for _, d in items], settings), strict=True):
        for key in band_keys(signature, settings):
            yield key, (quality(item), signature.tobytes())


def bucket_links(bucket: tuple[bytes, Iterable[tuple[tuple, bytes]]], threshold: float) -> Iterator[tuple[tuple, tuple]]:
    members = sorted(bucket[1])
    if len(members) > 1:
        matrix = np.stack([np.frombuffer(signature, np.uint32) for _, signature in members])
        for a, b in links(range(len(members)), matrix, threshold):
            yield members[a][0], members[b][0]


def by_head(shown: Sequence[tuple[str, list]]) -> dict[tuple, list[tuple[str, Row]]]:
    """Of the dropped documents that the report shows, (source, row) by the one that stays instead."""
    found: dict[tuple, list[tuple[str, Row]]] = {}
    for source, rows in shown:
        for row, head in rows:
            found.setdefault(head, []).append((source, row))
    return found


def union(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def write_array(values: np.ndarray, path: str | os.PathLike) -> str:
    """Puts an array where all workers see it; the address, as plain text."""
    with atomic_write(path) as file:
        np.save(file, values)
    return str(path)


def read_array(path: str) -> np.ndarray:
    return np.load(io.BytesIO(place(path).read_bytes()))


def cut(name: str, before: Document, after: Document | None, numbers: Collection[int]) -> tuple[tuple[str, str], Cut]:
    cut = Cut()
    cut.add(numbers, before, after)
    return (before.source, name), cut


def profiles(documents: Sequence[Document], settings: Settings) -> Iterator:
    TaggedOutput = extra("apache_beam").pvalue.TaggedOutput
    for source in {document.source for document in documents}:
        profile = Profile()
        of_source = [d for d in documents if d.source == source]
        for document in of_source:
            profile.keep(document)
        analyse(profile, of_source, settings)
        sites, profile.sites = profile.sites, Counter()  # no worker holds all of a crawl's
        yield from (TaggedOutput("sites", ((source, site), count)) for site, count in sites.items())
        yield source, profile


def merged(profiles: Iterable[Profile]) -> Profile:
    whole = Profile()
    for profile in profiles:
        whole.merge(profile)
    return whole


# Beam holds the types of these arguments against what it is given: an address in a bucket is no pathlib.Path.


def write_documents(group: tuple[tuple[str, int | str], Iterable[Document]], work: str | os.PathLike) -> None:
    """Documents as `source/shard.jsonl`, in whole or not at all: a worker that is tried again writes the same."""
    key, documents = group
    name = key[1] if isinstance(key[1], str) else f"{key[1]:05d}"
    folder = place(work) / key[0] if isinstance(key[1], int) else place(work) / "held_out" / key[0]
    write_jsonl(folder / f"{name}.jsonl", (dataclasses.asdict(d) for d in sorted(documents, key=lambda d: (d.text, d.id))))


def write_summary(_, work: str | os.PathLike, counted: list, profiles: list, seen: list) -> None:
    summary = {"counts": dict(counted), "profiles": dict(profiles), "seen": frozenset(seen)}
    with atomic_write(place(work) / "summary.pickle") as file:
        file.write(pickle.dumps(summary))
