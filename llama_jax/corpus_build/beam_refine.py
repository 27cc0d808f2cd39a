"""The first pipeline of the Beam build: from files to sorted shards of documents, and their counts (see `beam_pipeline`).

The order of the steps and every decision are those of `refine.refine`; what is here is how documents come together.
"""

import dataclasses
import functools
import os
import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.corpus_build.boilerplate import Boilerplate, line_keys, line_rows, without_lines
from llama_jax.corpus_build.build import Settings, analyse, cleaned_documents
from llama_jax.corpus_build.components import firsts_over_workers
from llama_jax.corpus_build.dedup import checked_hash, preference
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.near_duplicates import NearDuplicates, band_keys, links, pair_row, signatures
from llama_jax.corpus_build.paragraphs import Cut, paragraph_keys, secret_ngrams, without_leaks, without_paragraphs
from llama_jax.corpus_build.profile import Profile
from llama_jax.corpus_build.readers import read_file
from llama_jax.corpus_build.refine import LINES, PAIRS, evaluation_texts
from llama_jax.corpus_build.samples import Row, drawn, sample
from llama_jax.corpus_build.split import Candidate, candidate, choose, long_lines, side_of
from llama_jax.corpus_build.stages import Stages
from llama_jax.corpus_build.write import shard_of
from llama_jax.data.sources import write_jsonl
from llama_jax.files import atomic_write
from llama_jax.paths import place

# A document travels with the place it had among the unique ones: rank of its source, hash of its text before any cut.
Place = tuple[int, bytes]


class Refinement:
    """The steps from files to sorted shards of documents below `work`, and their counts in `work/summary.pickle`."""

    def __init__(self, beam, order: Sequence[str], settings: Settings, work: Path, stages: Stages):
        self.beam, self.order, self.settings, self.work, self.stages = beam, list(order), settings, work, stages
        self.tallies: list = []  # collections of ((source, name), number)
        self.profiles: list = []  # collections of (source, Profile)

    def expand(self, pipeline, files: Mapping[str, Sequence[str]]) -> None:
        """Adds all steps to `pipeline`."""
        beam, settings, rules = self.beam, self.settings, self.settings.deduplication
        paths = [(source, i, path) for source, of_source in files.items() for i, path in enumerate(of_source)]
        read = (
            pipeline
            | "Files" >> beam.Create(paths)
            | beam.Reshuffle()
            | "Clean" >> beam.FlatMap(_read_and_clean, settings, self.stages).with_outputs("profile", main="documents")
        )
        self.profiles.append(read.profile)
        cleaned = read.documents
        self._count("cleaned", cleaned)
        rank = {source: i for i, source in enumerate(self.order)}
        unique = (
            cleaned
            | "Hash" >> beam.Map(_hashed, rank)
            | "Unique" >> beam.CombinePerKey(_best)
            | "Placed" >> beam.MapTuple(lambda key, found: ((found[0], key), found[2]))
        )
        self._count("exact", unique)
        if rules.boilerplate:
            unique = self._boilerplate(unique, rules.boilerplate)
        if rules.near:
            unique = self._near(unique, rules.near)
        self._count("unique", unique)
        train, held_out = self._split(unique)
        if rules.leak_ngram:
            secret = (
                held_out
                | "Secret" >> beam.Map(lambda item: secret_ngrams([item[1].text], rules.leak_ngram))
                | beam.CombineGlobally(_union)
            )
            train = self._leaks(train, "leaks", beam.pvalue.AsSingleton(secret))
            if rules.evaluation:
                samples = evaluation_texts(rules.evaluation, rules.leak_ngram)
                train = self._leaks(train, "evaluation", secret_ngrams(samples, rules.leak_ngram))
        if rules.repeated_paragraph:
            train = self._repeats(train)
        self._write(pipeline, train, held_out)

    def _count(self, name: str, documents, measure=lambda document: 1) -> None:
        beam = self.beam
        self.tallies.append(
            documents
            | f"Count {name}" >> beam.Map(lambda item: ((item[1].source, name), measure(item[1])))
            | f"Sum {name}" >> beam.CombinePerKey(sum)
        )

    def _boilerplate(self, documents, settings: Boilerplate):
        beam, whole = self.beam, self.settings.whole
        totals = documents | "Sources" >> beam.Map(lambda item: (item[1].source, 1)) | "Total" >> beam.CombinePerKey(sum)
        frequent = (
            documents
            | "Lines" >> beam.FlatMap(lambda item: [((item[1].source, k), 1) for k in line_keys(item[1].text, settings)])
            | "Line counts" >> beam.CombinePerKey(sum)
            | "Often" >> beam.Filter(
                lambda item, totals: item[1] >= settings.threshold(totals[item[0][0]]), beam.pvalue.AsDict(totals)
            )
            | "Frequent" >> beam.Keys()
            | "By source" >> beam.GroupByKey()
            | beam.MapTuple(lambda source, keys: (source, frozenset(keys)))
        )  # fmt: skip

        def cut(item, frequent):
            place, document = item
            if document.source in whole:
                yield item
                return
            result, lines = without_lines(document, frequent.get(document.source, frozenset()), settings)
            if result.text.strip():
                yield place, result
                yield beam.pvalue.TaggedOutput("lines", ((document.source, "lines"), len(lines)))
                for line in set(lines):
                    yield beam.pvalue.TaggedOutput("lost", ((document.source, line), 1))
            else:
                yield item

        parts = documents | "Cut lines" >> beam.FlatMap(cut, beam.pvalue.AsDict(frequent)).with_outputs(
            "lines", "lost", main="kept"
        )
        self.tallies.append(parts.lines | "Sum lines" >> beam.CombinePerKey(sum))
        self.profiles.append(
            parts.lost
            | "Lost by" >> beam.CombinePerKey(sum)
            | "Line rows" >> beam.MapTuple(lambda key, count: (key[0], line_rows([(key[1], count)], key[0])))
            | "Draw lines" >> beam.CombinePerKey(drawn)
            | "Lines shown" >> beam.MapTuple(lambda source, rows: (source, Profile().show({LINES: rows})))
        )
        return parts.kept

    def _near(self, documents, settings: NearDuplicates):
        beam = self.beam
        links = (
            documents
            | beam.BatchElements(min_batch_size=64, max_batch_size=1000)
            | "Bands" >> beam.FlatMap(_bands, settings)
            | "Buckets" >> beam.GroupByKey()
            | "Links" >> beam.FlatMap(_bucket_links, settings.threshold)
            | "Each link" >> beam.Distinct()
        )
        named = documents | "Named" >> beam.Map(lambda item: (_quality(item), item))

        def keep(name, group):
            del name
            (item,), heads = group["documents"], group["heads"]
            if not heads:
                yield item
            for head in heads:
                yield beam.pvalue.TaggedOutput("dropped", (item[1].source, [(sample(item[1]), head)]))

        joined = {"documents": named, "heads": firsts_over_workers(beam, links)} | "Join heads" >> beam.CoGroupByKey()
        parts = joined | "Keep one" >> beam.FlatMapTuple(keep).with_outputs("dropped", main="kept")
        shown = (
            parts.dropped | "Draw pairs" >> beam.CombinePerKey(drawn) | "Pairs shown" >> beam.combiners.ToList()
            | "By the best" >> beam.Map(_by_head)
        )  # fmt: skip

        def pairs(item, shown):
            for source, row in shown.get(_quality(item), ()):
                yield source, Profile().show({PAIRS: [pair_row(row, item[1])]})

        self.profiles.append(parts.kept | "Both of a pair" >> beam.FlatMap(pairs, beam.pvalue.AsSingleton(shown)))
        return parts.kept

    def _split(self, documents):
        beam, held_out = self.beam, self.settings.held_out
        candidates = documents | "Candidates" >> beam.Map(lambda item: (item[1].source, candidate(item[1])))
        sizes = candidates | beam.MapTuple(lambda source, c: (source, c.size)) | "Bytes" >> beam.CombinePerKey(sum)

        def first_size(source, c):
            return source, c.size if c.position < held_out.fraction and c.size <= held_out.maximum_bytes else 0

        first = candidates | "First" >> beam.MapTuple(first_size) | "First bytes" >> beam.CombinePerKey(sum)

        def eligible(item: tuple[str, Candidate], first: Mapping[str, int]) -> bool:
            # Of a large source only the documents of the fraction need to come together.
            return item[1].position < held_out.fraction or first[item[0]] < held_out.minimum_bytes

        def chosen(item, sizes):
            source, found = item[0], list(item[1])
            held, beyond = choose(
                found, sizes[source], fraction=held_out.fraction,
                minimum_bytes=held_out.minimum_bytes, maximum_bytes=held_out.maximum_bytes,
            )  # fmt: skip
            yield source, (held, beyond, {c.group for c in found if c.group is not None and c.key in held | beyond})

        choice = (
            candidates
            | "Eligible" >> beam.Filter(eligible, beam.pvalue.AsDict(first))
            | "Together" >> beam.GroupByKey()
            | "Choose" >> beam.FlatMap(chosen, beam.pvalue.AsDict(sizes))
        )

        def sides(item, choice):
            document = item[1]
            held, beyond, _ = choice.get(document.source, (set(), set(), set()))
            unseen = set().union(*(groups for _, _, groups in choice.values()))
            side = side_of(document, held, beyond, unseen)
            if side == "withheld":
                yield beam.pvalue.TaggedOutput("counts", ((document.source, "withheld"), 1))
                size = len(document.text.encode())
                yield beam.pvalue.TaggedOutput("counts", ((document.source, "withheld_bytes"), size))
            else:
                yield beam.pvalue.TaggedOutput(side, item)

        parts = documents | "Sides" >> beam.FlatMap(sides, beam.pvalue.AsDict(choice)).with_outputs(
            "train", "held_out", "counts"
        )
        self.tallies.append(parts.counts | "Sum withheld" >> beam.CombinePerKey(sum))
        return parts.train, parts.held_out

    def _leaks(self, documents, name: str, secret):
        beam, settings = self.beam, self.settings

        def cut(item, secret):
            place, document = item
            result, numbers = without_leaks(
                document, secret, ngram=settings.deduplication.leak_ngram, whole=document.source in settings.whole
            )
            if result is not None:
                yield place, result
            if result is not document:
                yield beam.pvalue.TaggedOutput("cuts", _cut(name, document, result, numbers))

        return self._with_cuts(documents | f"Cut {name}" >> beam.FlatMap(cut, secret).with_outputs("cuts", main="kept"), name)

    def _repeats(self, documents):
        beam, settings = self.beam, self.settings

        def paragraphs(item):
            place, document = item
            if document.source not in settings.whole:
                for number, key in paragraph_keys(document.text, settings.deduplication.repeated_paragraph):
                    yield key, (place, number)

        def later(key, occurrences):
            del key
            yield from sorted(occurrences)[1:]

        repeats = (
            documents
            | "Paragraphs" >> beam.FlatMap(paragraphs)
            | "Same paragraph" >> beam.GroupByKey()
            | "Later ones" >> beam.FlatMapTuple(later)
        )

        def cut(place, groups):
            for document in groups["documents"]:
                numbers = set(groups["repeats"])
                result = without_paragraphs(document, numbers)
                if result is not None:
                    yield place, result
                if numbers:
                    yield beam.pvalue.TaggedOutput("cuts", _cut("repeats", document, result, numbers))

        joined = {"documents": documents, "repeats": repeats} | "Join repeats" >> beam.CoGroupByKey()
        return self._with_cuts(joined | "Cut repeats" >> beam.FlatMapTuple(cut).with_outputs("cuts", main="kept"), "repeats")

    def _with_cuts(self, parts, name: str):
        self.tallies.append(parts.cuts | f"Sum {name}" >> self.beam.CombinePerKey(lambda cuts: sum(cuts, Cut())))
        return parts.kept

    def _write(self, pipeline, train, held_out) -> None:
        beam, settings = self.beam, self.settings
        self.profiles.append(
            train
            | "Only documents" >> beam.Values()
            | "Profiled" >> beam.BatchElements(min_batch_size=16, max_batch_size=500)
            | "Profiles" >> beam.FlatMap(_profiles, settings)
        )
        wanted = held_out | "Held-out lines" >> beam.FlatMap(lambda item: long_lines(item[1].text)) | "Each" >> beam.Distinct()
        seen = (
            train
            | "Seen lines" >> beam.FlatMap(
                lambda item, wanted: wanted.keys() & set(long_lines(item[1].text)),
                beam.pvalue.AsDict(wanted | "As keys" >> beam.Map(lambda line: (line, True))),
            )
            | "Each seen" >> beam.Distinct()
        )  # fmt: skip
        (
            train
            | "By shard" >> beam.Map(lambda item: ((item[1].source, shard_of(item[1], settings.shards)), item[1]))
            | "Shards" >> beam.GroupByKey()
            | "Write shards" >> beam.Map(_write_documents, self.work)
        )
        (
            held_out
            | "Held out by source" >> beam.Map(lambda item: ((item[1].source, "held_out"), item[1]))
            | "Held out" >> beam.GroupByKey()
            | "Write held out" >> beam.Map(_write_documents, self.work)
        )
        counted = self.tallies | "All counts" >> beam.Flatten() | "Count list" >> beam.combiners.ToList()
        profiles = (
            self.profiles
            | "All profiles" >> beam.Flatten()
            | "Merge profiles" >> beam.CombinePerKey(_merged)
            | "Profile list" >> beam.combiners.ToList()
        )
        (
            pipeline
            | "One" >> beam.Create([None])
            | "Summary" >> beam.Map(
                _write_summary, self.work, beam.pvalue.AsSingleton(counted), beam.pvalue.AsSingleton(profiles),
                beam.pvalue.AsList(seen),
            )
        )  # fmt: skip


def _read_and_clean(item: tuple[str, int, str], settings: Settings, stages: Stages) -> Iterator:
    tagged = extra("apache_beam").pvalue.TaggedOutput
    source, number, path = item
    name = f"cleaned/{source}-{number:05d}"
    documents, profile = stages.once(name, functools.partial(_cleaned_file, source, path, settings))
    yield from ((None, document) for document in documents)
    yield tagged("profile", (source, profile))


def _cleaned_file(source: str, path: str, settings: Settings) -> tuple[list[Document], Profile]:
    profile = Profile()
    return list(cleaned_documents(source, read_file(path, source), settings, profile, limited=False)), profile


def _hashed(item: tuple[None, Document], rank: Mapping[str, int]) -> tuple[bytes, tuple[int, str, Document]]:
    document = item[1]
    return checked_hash(document), (rank[document.source], document.id, document)


def _best(copies: Iterable[tuple[int, str, Document]]) -> tuple[int, str, Document]:
    return min(copies, key=lambda found: (found[0], preference(found[2])))


def _quality(item: tuple[Place, Document]) -> tuple[int, int, str, str]:
    """The order in which a document of a cluster is chosen: as in `near_duplicates.drop_near_duplicates`."""
    place, document = item
    return place[0], -len(document.text), document.id, place[1]


def _bands(items: Sequence[tuple[Place, Document]], settings: NearDuplicates) -> Iterator:
    for item, signature in zip(items, signatures([d.text for _, d in items], settings), strict=True):
        for key in band_keys(signature, settings):
            yield key, (_quality(item), signature.tobytes())


def _bucket_links(bucket: tuple[bytes, Iterable[tuple[tuple, bytes]]], threshold: float) -> Iterator[tuple[tuple, tuple]]:
    members = sorted(bucket[1])
    if len(members) > 1:
        matrix = np.stack([np.frombuffer(signature, np.uint32) for _, signature in members])
        for a, b in links(range(len(members)), matrix, threshold):
            yield members[a][0], members[b][0]


def _by_head(shown: Sequence[tuple[str, list]]) -> dict[tuple, list[tuple[str, Row]]]:
    """Of the dropped documents that the report shows, (source, row) by the one that stays instead."""
    found: dict[tuple, list[tuple[str, Row]]] = {}
    for source, rows in shown:
        for row, head in rows:
            found.setdefault(head, []).append((source, row))
    return found


def _union(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def _cut(name: str, before: Document, after: Document | None, numbers: Collection[int]) -> tuple[tuple[str, str], Cut]:
    cut = Cut()
    cut.add(numbers, before, after)
    return (before.source, name), cut


def _profiles(documents: Sequence[Document], settings: Settings) -> Iterator[tuple[str, Profile]]:
    for source in {document.source for document in documents}:
        profile = Profile()
        of_source = [d for d in documents if d.source == source]
        for document in of_source:
            profile.keep(document)
        analyse(profile, of_source, settings)
        yield source, profile


def _merged(profiles: Iterable[Profile]) -> Profile:
    whole = Profile()
    for profile in profiles:
        whole.merge(profile)
    return whole


# Beam holds the types of these arguments against what it is given: an address in a bucket is no pathlib.Path.


def _write_documents(group: tuple[tuple[str, int | str], Iterable[Document]], work: str | os.PathLike) -> None:
    """Documents as `source/shard.jsonl`, in whole or not at all: a worker that is tried again writes the same."""
    key, documents = group
    name = key[1] if isinstance(key[1], str) else f"{key[1]:05d}"
    folder = place(work) / key[0] if isinstance(key[1], int) else place(work) / "held_out" / key[0]
    write_jsonl(folder / f"{name}.jsonl", (dataclasses.asdict(d) for d in sorted(documents, key=lambda d: (d.text, d.id))))


def _write_summary(_, work: str | os.PathLike, counted: list, profiles: list, seen: list) -> None:
    summary = {"counts": dict(counted), "profiles": dict(profiles), "seen": frozenset(seen)}
    with atomic_write(place(work) / "summary.pickle") as file:
        file.write(pickle.dumps(summary))
