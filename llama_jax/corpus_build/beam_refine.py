"""The first pipeline of the Beam build: from files to sorted shards of documents, and their counts (see `beam_pipeline`).

The order of the steps and every decision are those of `refine.refine`; what is here is how documents come together.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_jax.corpus_build import beam_functions as fn
from llama_jax.corpus_build.boilerplate import Boilerplate, line_keys, line_rows, without_lines
from llama_jax.corpus_build.build import Settings
from llama_jax.corpus_build.components import firsts_over_workers
from llama_jax.corpus_build.evaluation import Evaluation
from llama_jax.corpus_build.near_duplicates import NearDuplicates, pair_row
from llama_jax.corpus_build.paragraphs import LEAK_LIMIT, Cut, paragraph_keys, secret_ngrams, without_leaks, without_repeats
from llama_jax.corpus_build.profile import SITES_KEPT, Profile
from llama_jax.corpus_build.refine import LINES, PAIRS
from llama_jax.corpus_build.samples import drawn, sample
from llama_jax.corpus_build.split import Candidate, candidate, choose, long_lines, side_of
from llama_jax.corpus_build.stages import Stages
from llama_jax.corpus_build.write import shard_of


class Refinement:
    """The steps from files to sorted shards of documents below `work`, and their counts in `work/summary.pickle`."""

    def __init__(
        self, beam, order: Sequence[str], settings: Settings, evaluation: Evaluation, work: Path, stages: Stages
    ):
        self.beam, self.order, self.settings, self.evaluation = beam, list(order), settings, evaluation
        self.work, self.stages = work, stages
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
            | "Clean" >> beam.FlatMap(fn.read_and_clean, settings, self.stages).with_outputs("profile", main="documents")
        )
        self.profiles.append(read.profile)
        cleaned = read.documents
        self._count("cleaned", cleaned)
        rank = {source: i for i, source in enumerate(self.order)}
        unique = (
            cleaned
            | "Hash" >> beam.Map(fn.hashed, rank)
            | "Unique" >> beam.CombinePerKey(fn.best)
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
                | beam.CombineGlobally(fn.union)
            )
            train = self._leaks(train, "leaks", secret, largest=LEAK_LIMIT)
            if self.evaluation.texts:
                # By a file: a runner such as Dataflow takes 10 MB of job, and these are 10 bytes a word.
                path = fn.write_array(secret_ngrams(self.evaluation.texts, rules.leak_ngram), self.work / "evaluation.npy")
                samples = pipeline | "Samples" >> beam.Create([path]) | "Their n-grams" >> beam.Map(fn.read_array)
                train = self._leaks(train, "evaluation", samples, largest=rules.evaluation_share)
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
            | "Bands" >> beam.FlatMap(fn.bands, settings)
            | "Buckets" >> beam.GroupByKey()
            | "Links" >> beam.FlatMap(fn.bucket_links, settings.threshold)
            | "Each link" >> beam.Distinct()
        )
        named = documents | "Named" >> beam.Map(lambda item: (fn.quality(item), item))

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
            | "By the best" >> beam.Map(fn.by_head)
        )  # fmt: skip

        def pairs(item, shown):
            for source, row in shown.get(fn.quality(item), ()):
                yield source, Profile().show({PAIRS: [pair_row(row, item[1])]})

        self.profiles.append(parts.kept | "Both of a pair" >> beam.FlatMap(pairs, beam.pvalue.AsSingleton(shown)))
        return parts.kept

    def _split(self, documents):
        beam, held_out = self.beam, self.settings.held_out
        candidates = documents | "Candidates" >> beam.Map(
            lambda item: (item[1].source, candidate(item[1], held_out.group_field))
        )
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
            kept_back = held | beyond
            yield source, (held, beyond, {c.group for c in found if c.group is not None and c.key in kept_back})

        choice = (
            candidates
            | "Eligible" >> beam.Filter(eligible, beam.pvalue.AsDict(first))
            | "Together" >> beam.GroupByKey()
            | "Choose" >> beam.FlatMap(chosen, beam.pvalue.AsDict(sizes))
        )

        unseen = (
            choice
            | "Groups held out" >> beam.MapTuple(lambda source, found: found[2])
            | "Of all sources" >> beam.CombineGlobally(lambda groups: set().union(*groups))
        )

        def sides(item, choice, unseen):
            document = item[1]
            held, beyond, _ = choice.get(document.source, (set(), set(), set()))
            side = side_of(document, held, beyond, unseen, held_out.group_field)
            if side == "withheld":
                yield beam.pvalue.TaggedOutput("counts", ((document.source, "withheld"), 1))
                size = len(document.text.encode())
                yield beam.pvalue.TaggedOutput("counts", ((document.source, "withheld_bytes"), size))
            else:
                yield beam.pvalue.TaggedOutput(side, item)

        parts = documents | "Sides" >> beam.FlatMap(
            sides, beam.pvalue.AsDict(choice), beam.pvalue.AsSingleton(unseen)
        ).with_outputs("train", "held_out", "counts")
        self.tallies.append(parts.counts | "Sum withheld" >> beam.CombinePerKey(sum))
        return parts.train, parts.held_out

    def _leaks(self, documents, name: str, secret, *, largest: float):
        beam, ngram, whole = self.beam, self.settings.deduplication.leak_ngram, self.settings.whole

        def cut(item, secret):
            place, document = item
            result, numbers = without_leaks(
                document, secret, ngram=ngram, whole=document.source in whole, largest=largest
            )
            if result is not None:
                yield place, result
            if result is not document:
                yield beam.pvalue.TaggedOutput("cuts", fn.cut(name, document, result, numbers))

        cuts = beam.FlatMap(cut, beam.pvalue.AsSingleton(secret)).with_outputs("cuts", main="kept")
        return self._with_cuts(documents | f"Cut {name}" >> cuts, name)

    def _repeats(self, documents):
        beam, settings = self.beam, self.settings

        def paragraphs(item):
            place, document = item
            if document.source not in settings.whole:
                for number, key in paragraph_keys(document.text, settings.deduplication.repeated_paragraph):
                    yield key, (place, number)

        def later(key, occurrences):
            del key
            first = min(occurrences)  # read twice rather than held: a banner stands on millions of pages
            yield from (occurrence for occurrence in occurrences if occurrence != first)

        repeats = (
            documents
            | "Paragraphs" >> beam.FlatMap(paragraphs)
            | "Same paragraph" >> beam.GroupByKey()
            | "Later ones" >> beam.FlatMapTuple(later)
        )

        def cut(place, groups):
            for document in groups["documents"]:
                numbers = set(groups["repeats"])
                result = without_repeats(document, numbers, shortest=settings.deduplication.repeated_paragraph)
                if result is not None:
                    yield place, result
                if numbers:
                    yield beam.pvalue.TaggedOutput("cuts", fn.cut("repeats", document, result, numbers))

        joined = {"documents": documents, "repeats": repeats} | "Join repeats" >> beam.CoGroupByKey()
        return self._with_cuts(joined | "Cut repeats" >> beam.FlatMapTuple(cut).with_outputs("cuts", main="kept"), "repeats")

    def _with_cuts(self, parts, name: str):
        self.tallies.append(parts.cuts | f"Sum {name}" >> self.beam.CombinePerKey(lambda cuts: sum(cuts, Cut())))
        return parts.kept

    def _sites(self, counts) -> list:
        """Profiles with the most frequent sites of each source, as `Profile.keep_sites` leaves them."""
        beam = self.beam
        summed = counts | "Documents of a site" >> beam.CombinePerKey(sum)
        most = (
            summed
            | "Of the source" >> beam.MapTuple(lambda key, count: (key[0], (count, key[1])))
            | "Most frequent" >> beam.combiners.Top.PerKey(SITES_KEPT, key=lambda row: (-row[0], row[1]), reverse=True)
            | "Sites named" >> beam.MapTuple(lambda source, rows: (source, Profile(sites=Counter({s: n for n, s in rows}))))
        )
        others = (
            summed
            | "Sites" >> beam.MapTuple(lambda key, count: (key[0], 1))
            | "Number of sites" >> beam.CombinePerKey(sum)
            | "Others" >> beam.MapTuple(lambda source, n: (source, Profile(more_sites=max(n - SITES_KEPT, 0))))
        )
        return [most, others]

    def _write(self, pipeline, train, held_out) -> None:
        beam, settings = self.beam, self.settings
        profiled = (
            train
            | "Only documents" >> beam.Values()
            | "Profiled" >> beam.BatchElements(min_batch_size=16, max_batch_size=500)
            | "Profiles" >> beam.FlatMap(fn.profiles, settings).with_outputs("sites", main="profiles")
        )
        self.profiles += [profiled.profiles, *self._sites(profiled.sites)]
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
            | "Write shards" >> beam.Map(fn.write_documents, self.work)
        )
        (
            held_out
            | "Held out by source" >> beam.Map(lambda item: ((item[1].source, "held_out"), item[1]))
            | "Held out" >> beam.GroupByKey()
            | "Write held out" >> beam.Map(fn.write_documents, self.work)
        )
        counted = self.tallies | "All counts" >> beam.Flatten() | "Count list" >> beam.combiners.ToList()
        profiles = (
            self.profiles
            | "All profiles" >> beam.Flatten()
            | "Merge profiles" >> beam.CombinePerKey(fn.merged)
            | "Profile list" >> beam.combiners.ToList()
        )
        (
            pipeline
            | "One" >> beam.Create([None])
            | "Summary" >> beam.Map(
                fn.write_summary, self.work, beam.pvalue.AsSingleton(counted), beam.pvalue.AsSingleton(profiles),
                beam.pvalue.AsList(seen),
            )
        )  # fmt: skip
