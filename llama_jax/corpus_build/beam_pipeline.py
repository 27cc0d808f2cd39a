"""The build on Apache Beam: the same functions, carried by its runners over one machine or many (paper section 2.1).

Two pipelines. The first reads, cleans, compares, splits and leaves sorted shards of documents; the second makes token blocks of
them. Between them one process trains the tokenizer. The result is that of `build.build_corpus`, byte for byte, whatever the
runner and the number of its workers. The output directory must be one that all workers see; sources may be any path that
fsspec opens.
"""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.corpus_build.boilerplate import Boilerplate, line_keys, without_lines
from llama_jax.corpus_build.build import Settings, check_bad_rows, unfinished
from llama_jax.corpus_build.dedup import checked_hash
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.extras import extra
from llama_jax.corpus_build.near_duplicates import NearDuplicates, band_keys, components, links, signatures
from llama_jax.corpus_build.paragraphs import Cut, paragraph_keys, secret_ngrams, without_leaks, without_paragraphs
from llama_jax.corpus_build.profile import Profile, in_sample
from llama_jax.corpus_build.readers import BadRow, read_file
from llama_jax.corpus_build.refine import Refined, counts, evaluation_texts
from llama_jax.corpus_build.split import Candidate, candidate, choose, long_lines, side_of
from llama_jax.corpus_build.steps import clean, make_steps
from llama_jax.corpus_build.write import (
    check_split,
    finish,
    make_tokenizer,
    sample_budget,
    shard_name,
    shard_of,
    source_counts,
    summed,
    write_held_out,
    write_shard,
)
from llama_jax.data.tokenizer import Tokenizer

# A document travels with the place it had among the unique ones: rank of its source, hash of its text before any cut.
Place = tuple[int, bytes]


def build_with_beam(
    files: Mapping[str, Sequence[str]],
    output: str | os.PathLike,
    settings: Settings,
    *,
    options: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """As `build.build_corpus`, from the files of each source (in the order of the sources) and with Beam's `options`."""
    beam = extra("apache_beam")
    pipeline_options = extra("apache_beam.options.pipeline_options").PipelineOptions(list(options))
    with unfinished(output) as directory:
        work = directory / "work"
        work.mkdir()
        with beam.Pipeline(options=pipeline_options) as pipeline:
            _Refinement(beam, list(files), settings, work).expand(pipeline, files)
        summary = pickle.loads((work / "summary.pickle").read_bytes())
        profiles = {source: summary["profiles"].get(source, Profile()) for source in files}
        for source, profile in profiles.items():
            check_bad_rows(source, sorted(profile.bad_rows), settings.max_bad_rows)
        refined = {source: _refined(source, summary, work) for source in files}
        for source, part in refined.items():
            check_split(source, part.unique, profiles[source].documents, len(part.held_out), settings)

        tokenizer = make_tokenizer(_Samples(work, files, settings), directory, settings)
        shards = [(source, path.name) for source in files for path in sorted((work / source).glob("*.jsonl"))]
        with beam.Pipeline(options=pipeline_options) as pipeline:
            (
                pipeline
                | beam.Create(shards)
                | beam.Reshuffle()
                | beam.Map(_write_shard, work, directory / "blocks", str(tokenizer.path), settings)
            )
        rows = {}
        for source, part in refined.items():
            names = [shard_name(source, int(Path(name).stem), settings.shards) for s, name in shards if s == source]
            written = [pickle.loads((work / f"{name}.pickle").read_bytes()) for name in names]
            rows[source] = {
                **source_counts(part, profiles[source]),
                "bytes": profiles[source].bytes,
                "withheld_documents": summary["counts"].get((source, "withheld"), 0),
                "withheld_bytes": summary["counts"].get((source, "withheld_bytes"), 0),
                **summed(written),
                "shards": [f"blocks/{name}" for name in names],
                **write_held_out(part.held_out, directory / "held_out", source, tokenizer, settings.block_length),
            }
        shutil.rmtree(work)
        return finish(rows, profiles, directory, tokenizer, settings, config=dict(config or {}))


class _Refinement:
    """The first pipeline: from files to sorted shards of documents below `work`, and their counts."""

    def __init__(self, beam, order: Sequence[str], settings: Settings, work: Path):
        self.beam, self.order, self.settings, self.work = beam, list(order), settings, work
        self.tallies: list = []  # collections of ((source, name), number)
        self.profiles: list = []  # collections of (source, Profile)

    def expand(self, pipeline, files: Mapping[str, Sequence[str]]) -> None:
        """Adds all steps to `pipeline`."""
        beam, settings, rules = self.beam, self.settings, self.settings.deduplication
        paths = [(source, path) for source, of_source in files.items() for path in of_source]
        read = (
            pipeline
            | "Files" >> beam.Create(paths)
            | beam.Reshuffle()
            | "Clean" >> beam.FlatMap(_read_and_clean, settings).with_outputs("profile", main="documents")
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
                train = self._leaks(train, "evaluation", secret_ngrams(evaluation_texts(rules.evaluation), rules.leak_ngram))
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
                yield beam.pvalue.TaggedOutput("lines", ((document.source, "lines"), lines))
            else:
                yield item

        parts = documents | "Cut lines" >> beam.FlatMap(cut, beam.pvalue.AsDict(frequent)).with_outputs("lines", main="kept")
        self.tallies.append(parts.lines | "Sum lines" >> beam.CombinePerKey(sum))
        return parts.kept

    def _near(self, documents, settings: NearDuplicates):
        beam = self.beam
        dropped = (
            documents
            | beam.BatchElements(min_batch_size=64, max_batch_size=1000)
            | "Bands" >> beam.FlatMap(_bands, settings)
            | "Buckets" >> beam.GroupByKey()
            | "Links" >> beam.FlatMap(_bucket_links, settings.threshold)
            | beam.Distinct()
            # Pairs are few beside documents: one worker holds them all.
            | "Pairs" >> beam.combiners.ToList()
            | "Components" >> beam.Map(_losers)
        )
        return documents | "Keep one" >> beam.Filter(
            lambda item, dropped: _quality(item) not in dropped, beam.pvalue.AsSingleton(dropped, default_value=frozenset())
        )

    def _split(self, documents):
        beam, held_out = self.beam, self.settings.held_out
        candidates = documents | "Candidates" >> beam.Map(lambda item: (item[1].source, candidate(item[1])))
        sizes = candidates | beam.MapTuple(lambda source, c: (source, c.size)) | "Bytes" >> beam.CombinePerKey(sum)
        first = (
            candidates
            | "First" >> beam.MapTuple(lambda source, c: (source, c.size * (c.position < held_out.fraction)))
            | "First bytes" >> beam.CombinePerKey(sum)
        )

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
            result, paragraphs = without_leaks(
                document, secret, ngram=settings.deduplication.leak_ngram, whole=document.source in settings.whole
            )
            if result is not None:
                yield place, result
            if result is not document:
                yield beam.pvalue.TaggedOutput("cuts", _cut(name, document, result, paragraphs))

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
                    yield beam.pvalue.TaggedOutput("cuts", _cut("repeats", document, result, len(numbers)))

        joined = {"documents": documents, "repeats": repeats} | "Join repeats" >> beam.CoGroupByKey()
        return self._with_cuts(joined | "Cut repeats" >> beam.FlatMapTuple(cut).with_outputs("cuts", main="kept"), "repeats")

    def _with_cuts(self, parts, name: str):
        beam = self.beam

        def numbers(key, cut):
            return [((*key, field), value) for field, value in dataclasses.asdict(cut).items()]

        self.tallies.append(
            parts.cuts
            | f"{name} numbers" >> beam.FlatMapTuple(numbers)
            | f"Sum {name}" >> beam.CombinePerKey(sum)
        )
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


def _read_and_clean(item: tuple[str, str], settings: Settings) -> Iterator:
    tagged = extra("apache_beam").pvalue.TaggedOutput
    source, path = item
    steps = make_steps(settings.steps.get(source, ()), settings.clean)
    profile = Profile()  # of one file
    for row in read_file(path, source):
        if isinstance(row, BadRow):
            profile.bad_rows.append(f"{row.where}: {row.problem}")
            continue
        result = clean(row, steps)
        if isinstance(result, Removed):
            profile.remove(result)
        else:
            yield None, result
    yield tagged("profile", (source, profile))


def _hashed(item: tuple[None, Document], rank: Mapping[str, int]) -> tuple[bytes, tuple[int, str, Document]]:
    document = item[1]
    return checked_hash(document), (rank[document.source], document.id, document)


def _best(copies: Iterable[tuple[int, str, Document]]) -> tuple[int, str, Document]:
    return min(copies, key=lambda found: found[:2])


def _quality(item: tuple[Place, Document]) -> tuple[int, int, str]:
    """The order in which a document of a cluster is chosen: as in `near_duplicates.drop_near_duplicates`."""
    place, document = item
    return place[0], -len(document.text), document.id


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


def _losers(pairs: Sequence[tuple[tuple, tuple]]) -> frozenset:
    """The documents of all clusters but the best of each."""
    names = sorted({name for pair in pairs for name in pair})
    number = {name: i for i, name in enumerate(names)}
    heads = components(len(names), [(number[a], number[b]) for a, b in sorted(pairs)])
    return frozenset(name for i, name in enumerate(names) if heads[i] != i)


def _union(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def _cut(name: str, before: Document, after: Document | None, paragraphs: int) -> tuple[tuple[str, str], Cut]:
    cut = Cut()
    cut.add(paragraphs, before, after)
    return (before.source, name), cut


def _profiles(documents: Sequence[Document], settings: Settings) -> Iterator[tuple[str, Profile]]:
    for source in {document.source for document in documents}:
        profile = Profile()
        of_source = [d for d in documents if d.source == source]
        for document in of_source:
            profile.keep(document)
        profile.analyse([d for d in of_source if in_sample(d, settings.analysed_share)], settings.analyses)
        yield source, profile


def _merged(profiles: Iterable[Profile]) -> Profile:
    whole = Profile()
    for profile in profiles:
        whole.merge(profile)
    return whole


def _write_documents(group: tuple[tuple[str, int | str], Iterable[Document]], work: Path) -> None:
    """Documents as `source/shard.jsonl`, in whole or not at all: a worker that is tried again writes the same."""
    key, documents = group
    from llama_jax.data.sources import write_jsonl

    name = key[1] if isinstance(key[1], str) else f"{key[1]:05d}"
    folder = work / key[0] if isinstance(key[1], int) else work / "held_out" / key[0]
    write_jsonl(folder / f"{name}.jsonl", (dataclasses.asdict(d) for d in sorted(documents, key=lambda d: (d.text, d.id))))


def _read_documents(path: Path) -> list[Document]:
    with open(path, encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def _write_summary(_, work: Path, counted: list, profiles: list, seen: list) -> None:
    summary = {"counts": dict(counted), "profiles": dict(profiles), "seen": frozenset(seen)}
    (work / "summary.pickle").write_bytes(pickle.dumps(summary))


def _refined(source: str, summary: Mapping[str, Any], work: Path) -> Refined:
    """The counts and held-out documents of a source. Its train documents stay on disk."""
    path = work / "held_out" / source / "held_out.jsonl"
    held_out = _read_documents(path) if path.exists() else []
    number = summary["counts"].get
    lines = [line for document in held_out for line in long_lines(document.text)]
    cleaned, exact, unique = (number((source, name), 0) for name in ("cleaned", "exact", "unique"))
    cuts = {
        kind: Cut(*(number((source, kind, field.name), 0) for field in dataclasses.fields(Cut)))
        for kind in ("leaks", "evaluation", "repeats")
    }
    return Refined(
        train=[], held_out=held_out, withheld=[], unique=unique,
        lines_seen=sum(line in summary["seen"] for line in lines) / max(len(lines), 1),
        counts=counts(cleaned - exact, exact - unique, number((source, "lines"), 0), cuts),
    )  # fmt: skip


class _Samples(Mapping):
    """For each source the first of its train documents, as many as the tokenizer's sample needs; read when asked for."""

    def __init__(self, work: Path, sources: Iterable[str], settings: Settings):
        self._work, self._sources, self._settings = work, list(sources), settings

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, source: str) -> list[Document]:
        documents: list[Document] = []
        left = sample_budget(self._settings, source)
        for path in sorted((self._work / source).glob("*.jsonl")):  # ranges of the hash, in their order
            if left <= 0:
                break
            documents += _read_documents(path)
            left -= sum(len(d.text.encode()) for d in documents)
        return documents


def _write_shard(shard: tuple[str, str], work: Path, blocks: Path, model: str, settings: Settings) -> None:
    """Token blocks of one shard of documents, and their counts for the manifest."""
    source, file = shard
    name = shard_name(source, int(Path(file).stem), settings.shards)
    written = write_shard(_read_documents(work / source / file), blocks / name, Tokenizer(model), settings.block_length)
    (work / f"{name}.pickle").write_bytes(pickle.dumps(written))
