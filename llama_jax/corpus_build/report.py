"""The report of a corpus: one HTML file that a data team reads in the morning (paper section 4.1, Tables 9 and 10, Fig. 13)."""

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.corpus_build import demographics
from llama_jax.corpus_build import report_page as html
from llama_jax.corpus_build.evaluation import Evaluation
from llama_jax.corpus_build.mixture import Share
from llama_jax.corpus_build.notices import notices
from llama_jax.corpus_build.profile import LENGTH_BINS, TOXICITY_BINS, Profile, ranked
from llama_jax.corpus_build.samples import shown
from llama_jax.files import atomic_write

# Table 10, percent of documents.
PAPER_LANGUAGES = {
    "en": 89.70, "unknown": 8.38, "de": 0.17, "fr": 0.16, "sv": 0.15, "zh": 0.13, "es": 0.13, "ru": 0.13, "nl": 0.12,
    "it": 0.11, "ja": 0.10, "pl": 0.09, "pt": 0.09, "vi": 0.08, "uk": 0.07, "ko": 0.06, "ca": 0.04, "sr": 0.04, "id": 0.03,
    "cs": 0.03, "fi": 0.03, "hu": 0.03, "no": 0.03, "ro": 0.03, "bg": 0.02, "da": 0.02, "sl": 0.01, "hr": 0.01,
}  # fmt: skip
PAPER_TOXIC = 0.2  # percent of documents with a score of 0.5 or more, Fig. 13
_FATES = {
    "to train on": "documents", "held out": "held_out_documents", "withheld": "withheld_documents", "filtered": "filtered",
    "exact copies": "duplicates", "near duplicates": "near_duplicates", "leaks of held-out text": "leaks",
    "evaluation samples": "evaluation", "repeated paragraphs": "repeats",
}  # fmt: skip
_CUTS = {
    "leaks": "Paragraphs shared with held-out documents", "evaluation": "Paragraphs shared with evaluation samples",
    "repeats": "Repeated paragraphs",
}  # fmt: skip
_SITES = 20


def write_report(
    path: str | os.PathLike,
    counts: Mapping[str, Mapping[str, Any]],
    profiles: Mapping[str, Profile],
    shares: Sequence[Share],
    evaluation: Evaluation,
    *,
    identities: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Writes the report.

    Args:
      path: of the HTML file.
      counts: by source, as in the manifest.
      profiles: of each source.
      shares: the mixture.
      evaluation: the samples that were looked for.
      identities: the file of descriptors that was used instead of Table 9's.
      checkpoint: of the classifier of toxicity that was used instead of the built-in one.
    """
    whole = Profile()
    for profile in profiles.values():
        whole.merge(profile)
    sections = [
        _worth_a_look(notices(counts, profiles, shares, evaluation)), _funnel(counts), _mixture(shares), _filters(profiles),
        _trimmed(whole, profiles), _compared(whole, counts), _lengths(profiles), _languages(whole),
        _demographics(whole, identities), _toxicity(whole, checkpoint), _privacy(whole), _sites(whole), _bad_rows(whole),
    ]  # fmt: skip
    with atomic_write(path) as file:
        file.write(
            html.page(
                "What is in the corpus",
                f"{', '.join(counts)}: what was read, what was left out and why, and what the models will train on.",
                _tiles(counts, shares),
                [part for part in sections if part],
            ).encode()
        )


def _total(counts: Mapping[str, Mapping[str, Any]], name: str) -> int:
    return sum(row[name] for row in counts.values())


def _tiles(counts: Mapping[str, Mapping[str, Any]], shares: Sequence[Share]) -> list[tuple[str, str]]:
    read, kept, tokens = (_total(counts, name) for name in ("documents_read", "documents", "tokens"))
    worst = max(counts, key=lambda name: counts[name]["held_out_lines_seen"])
    planned = sum(share.planned_tokens for share in shares)
    return [
        ("documents read", f"{read:,}"),
        ("of them to train on", f"{kept / max(read, 1):.1%}"),
        ("of text to train on", _bytes(_total(counts, "bytes"))),
        ("tokens in the corpus", _count(tokens)),
        ("tokens of training planned", _count(planned)),
        ("epochs on average", f"{planned / max(tokens, 1):.2f}"),
        ("bytes a token", f"{_total(counts, 'bytes') / max(tokens, 1):.2f}"),
        (f"held-out lines seen in training ({worst})", f"{counts[worst]['held_out_lines_seen']:.1%}"),
    ]


def _worth_a_look(found: Sequence[str]) -> str:
    words = found or ["Nothing is beyond its limit (llama_jax/corpus_build/notices.py)."]
    note = "Facts beyond the usual, to be judged before a model trains on this."
    return html.section("Worth a look", note, html.bullets(words))


def _funnel(counts: Mapping[str, Mapping[str, Any]]) -> str:
    fates = {source: {name: row[key] for name, key in _FATES.items()} for source, row in counts.items()}
    shown = [name for name in _FATES if any(row[name] for row in fates.values())]
    rows = [
        [source, f"{counts[source]['documents_read']:,}", _bytes(counts[source]["bytes_read"]),
         *(f"{fate[name]:,}" for name in shown)]
        for source, fate in fates.items()
    ]
    cuts = [
        [source, *(f"{row[f'{kind}_paragraphs']:,}" for kind in ("leaks", "evaluation", "repeats")),
         f"{row['boilerplate_lines']:,}", _bytes(sum(row[f"{kind}_bytes"] for kind in ("leaks", "evaluation", "repeats"))),
         f"{row['held_out_lines_seen']:.1%}"]
        for source, row in counts.items()
    ]  # fmt: skip
    return html.section(
        "What became of the documents",
        "Every document that was read has exactly one of these fates. Withheld are documents that are neither trained on nor "
        "evaluated on, because they belong to a held-out one or because evaluation has enough.",
        html.stacks(fates, list(_FATES), striped="withheld"),
        html.table(["source", "read", "text read", *shown], rows),
        "<h3>Cut paragraphs and lines</h3>",
        html.table(
            ["source", "leaking paragraphs", "evaluation paragraphs", "repeated paragraphs", "boilerplate lines",
             "text, whole documents too", "held-out lines seen"],
            cuts,
        ),
    )  # fmt: skip


def _mixture(shares: Sequence[Share]) -> str:
    tokens = sum(share.tokens for share in shares) or 1
    rows = [
        (
            share.source, share.share,
            [f"{share.asked_share:.1%}", f"{share.share:.1%}", f"{share.tokens / tokens:.1%}", f"{share.documents:,}",
             _bytes(share.bytes), _count(share.tokens), _count(share.planned_tokens),
             f"{share.epochs:.2f}{' (cap)' if share.capped else ''}"],
        )
        for share in shares
    ]  # fmt: skip
    heads = ["source", "asked", "share of training", "share of corpus", "documents", "text", "tokens", "planned", "epochs"]
    return html.section(
        "The mixture",
        "Asked is what the weights (and the temperature) ask for, the share of training what the cap on epochs leaves of it. A "
        "source whose share of training exceeds its share of the corpus is up-sampled: its text is seen more often.",
        html.bars(heads, rows),
    )


def _filters(profiles: Mapping[str, Profile]) -> str:
    whole = Profile()
    for profile in profiles.values():
        whole.merge(profile)
    if not whole.removed:
        return ""
    gone = sum(whole.removed.values())
    rows = [
        (
            f"{step}: {rule}", count,
            [f"{count:,}", f"{count / gone:.1%}", _bytes(whole.removed_bytes[step, rule]),
             ", ".join(source for source, profile in profiles.items() if profile.removed[step, rule])],
        )
        for (step, rule), count in ranked(whole.removed)
    ]  # fmt: skip
    folds = [
        _samples(
            f"{step}: {rule}", f"{count:,} document{'s' * (count > 1)}",
            [(f"{key} · {detail}" if detail else key, text) for _, key, detail, text in whole.samples[step, rule]],
        )
        for (step, rule), count in ranked(whole.removed)
    ]  # fmt: skip
    return html.section(
        "What the filters removed",
        "A document is counted at the first rule that it failed. Below are samples of each, drawn by hash: read them before "
        "trusting a rule. In these and all samples below what looks like personal information is masked.",
        html.bars(["rule", "documents", "of removed", "text", "sources"], rows),
        "<h3>Samples</h3>",
        *folds,
    )


def _trimmed(whole: Profile, profiles: Mapping[str, Profile]) -> str:
    if not whole.trimmed:
        return ""
    rows = [
        (
            step, count,
            [f"{count:,}", f"{whole.trimmed_lines[step]:,}", _bytes(whole.trimmed_bytes[step]),
             ", ".join(source for source, profile in profiles.items() if profile.trimmed[step])],
        )
        for step, count in ranked(whole.trimmed)
    ]  # fmt: skip
    folds = [
        _samples(step, f"{count:,} document{'s' * (count > 1)}", [(key, text) for _, key, _, text in texts])
        for step, count in ranked(whole.trimmed)
        if (texts := whole.samples.get(("trimmed", step)))
    ]
    return html.section(
        "What the steps took from documents that stay",
        "Documents that passed all steps but lost text to one of them (lines that C4 drops, markup and navigation of pages, "
        "what a mask hides), and the lines and bytes by which they are shorter. Below are such lines, drawn by hash, with "
        "masks over personal information; of pages, those with text.",
        html.bars(["step", "documents", "lines", "text", "sources"], rows),
        "<h3>Samples</h3>",
        *folds,
    )


def _compared(whole: Profile, counts: Mapping[str, Mapping[str, Any]]) -> str:
    folds = []
    if rows := whole.samples.get(("compared", "near")):
        texts = []
        for _, name, stays, dropped, kept in rows:
            texts += [(f"{name} · dropped", dropped), (f"{stays} · stands for it", kept)]
        folds.append(_samples("Near duplicates", f"{_total(counts, 'near_duplicates'):,} documents", texts))
    if rows := whole.samples.get(("compared", "boilerplate")):
        texts = [(f"{source} · cut from {-count:,} documents", line) for count, source, _, line in rows]
        found = f"{_total(counts, 'boilerplate_lines'):,} lines"
        folds.append(_samples("Boilerplate, the most frequent lines", found, texts))
    for kind, title in _CUTS.items():
        if rows := whole.samples.get(("compared", kind)):
            found = f"{_total(counts, f'{kind}_paragraphs'):,} paragraphs, {_total(counts, kind):,} whole documents"
            folds.append(_samples(title, found, [(name, text) for _, name, _, text in rows]))
    if not folds:
        return ""
    return html.section(
        "What comparing documents took",
        "Samples, drawn by hash: of near duplicates the beginnings of both documents, of what was cut the paragraphs, or the "
        "documents where nothing could be cut. Lines are in lower case, as they were compared.",
        *folds,
    )


def _lengths(profiles: Mapping[str, Profile]) -> str:
    charts = []
    for source, profile in profiles.items():
        if not profile.lengths:
            continue
        low, high = min(profile.lengths), max(profile.lengths)
        low -= low % LENGTH_BINS
        bins = [
            (_bytes(10 ** (i // LENGTH_BINS)) if i % LENGTH_BINS == 0 else "",
             f"{_bytes(10 ** (i / LENGTH_BINS))} to {_bytes(10 ** ((i + 1) / LENGTH_BINS))}", profile.lengths[i])
            for i in range(low, high + 1)
        ]  # fmt: skip
        charts.append(html.histogram(f"{source}: {profile.documents:,} documents, mean "
                                     f"{_bytes(profile.bytes / max(profile.documents, 1))}", bins))  # fmt: skip
    return html.section(
        "Lengths",
        "Documents to train on by bytes of text, on a logarithmic axis.",
        f'<div class="grid">{"".join(charts)}</div>',
    )


def _languages(whole: Profile) -> str:
    total, removed = sum(whole.languages.values()), sum(whole.removed_languages.values())
    if not total and not removed:
        return ""
    kept = [
        (name, count, [f"{count:,}", f"{100 * count / total:.2f}", _paper(PAPER_LANGUAGES.get(name))])
        for name, count in ranked(whole.languages)[:28]
    ]
    gone = [
        (name, count, [f"{count:,}", f"{100 * count / removed:.2f}"]) for name, count in ranked(whole.removed_languages)[:28]
    ]
    charts = [html.bars(["to train on", "documents", "%", "paper %"], kept)] if kept else []
    charts += [html.bars(["removed", "documents", "%"], gone)] if gone else []
    return html.section(
        "Languages (Table 10)",
        f"fastText's verdict on {total:,} of the {whole.documents:,} documents to train on, and on all {removed:,} that the "
        "language step removed: each with a scale of its own. Unknown is below its probability, and code is part of that.",
        f'<div class="grid">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>',
    )


def _demographics(whole: Profile, path: str | None) -> str:
    if not whole.mentions:
        return ""
    axes = demographics.identities_of(path)
    shares = demographics.shares(whole.mentions, whole.english, axes)
    pronouns = ["any gendered", "she", "he", "unspecified", "any person", "1st person", "2nd person", "3rd person"]
    of_axis = {d: axis for axis, names in axes.items() for d in names}
    listed = f"{len(of_axis):,} of {path}" if path else "the five of each axis that the paper prints"

    def rows(names: Sequence[str]) -> list[list[str]]:
        paper = {name: _paper(demographics.PAPER.get(name)) for name in names}
        return [[name, f"{whole.mentions[name]:,}", f"{shares[name]:.2f}", paper[name]] for name in names]

    identities = [name for name in shares if name not in pronouns]
    heads = ["documents that name", "documents", "%", "paper %"]
    return html.section(
        "Pronouns and identities (Table 9)",
        f"{whole.english:,} documents in English, or in a language that nothing has identified, were read. She, he and "
        "unspecified are shares of the documents with any of them; a descriptor is a share of the documents of its axis; all "
        f"else is of all documents. Descriptors: {listed}. The paper prints five of an axis but counts all that HolisticBias "
        "has, some hundreds, and a document of an axis is one with any of them: the paper's shares of identities are not to be "
        "compared with those of another list.",
        '<div class="grid"><div>' + html.table(heads, rows(pronouns), parts=[1, 2, 3, 5, 6, 7]) + "</div><div>"
        + html.table(heads, rows(identities), parts=[i for i, name in enumerate(identities) if name in of_axis])
        + "</div></div>",
    )  # fmt: skip


def _toxicity(whole: Profile, checkpoint: str | None) -> str:
    if not whole.scored:
        return ""
    classifier = checkpoint or "the built-in one of words (alt-profanity-check)"
    half = TOXICITY_BINS // 2
    toxic = sum(count for i, count in whole.toxicity.items() if i >= half)
    ends = [f"{i / TOXICITY_BINS:g}" for i in range(TOXICITY_BINS + 1)]
    bins = [
        (low if i % 5 == 0 else "", f"{low} to {high}", whole.toxicity[i])
        for i, (low, high) in enumerate(itertools.pairwise(ends))
    ]
    return html.section(
        "Toxicity (Fig. 13)",
        f"Scores of lines averaged to documents, {whole.scored:,} of them in English. {100 * toxic / whole.scored:.2f} % score "
        f"0.5 or more; the paper finds {PAPER_TOXIC} % with its own classifier. Classifier here: {classifier}. Nothing is "
        "filtered by this score.",
        html.histogram("documents by score", bins, log=True, mark=half, mark_text="0.5", width=720),
    )


def _privacy(whole: Profile) -> str:
    both = whole.private + whole.removed_private
    if not both:
        return ""
    rows = [
        (kind, count, [f"{whole.removed_private[kind]:,}", f"{whole.private[kind]:,}"]) for kind, count in ranked(both)
    ]
    return html.section(
        "Personal information",
        "What the privacy step found, by kind, in all documents that it removed and in all to train on.",
        html.bars(["kind", "removed", "to train on"], rows),
    )


def _sites(whole: Profile) -> str:
    if not whole.sites:
        return ""
    total: Counter = whole.sites
    rows = [
        (site, count, [f"{count:,}", f"{100 * count / whole.documents:.2f}"]) for site, count in ranked(total)[:_SITES]
    ]
    return html.section(
        "Sites",
        f"The {min(_SITES, len(total))} most frequent of {len(total) + whole.more_sites:,} sites among the documents to train "
        + ("on; one of several sources may be counted for each of them." if whole.more_sites else "on."),
        html.bars(["site", "documents", "%"], rows),
    )


def _bad_rows(whole: Profile) -> str:
    if not whole.bad_rows.count and not whole.bad_files.count:
        return ""
    folds = [
        html.samples(f"The first {what}", "", [("file, place and problem", "".join(f"{row}\n" for row in problems.first[:50]))])
        for what, problems in (("files", whole.bad_files), ("rows", whole.bad_rows))
        if problems.count
    ]
    return html.section(
        "What could not be read",
        f"{whole.bad_rows.count:,} rows were skipped, and of {whole.bad_files.count:,} files what follows the damage.",
        *folds,
    )


def _samples(summary: str, detail: str, texts: Sequence[tuple[str, str]]) -> str:
    """Texts of documents behind a fold, without the personal information in them."""
    return html.samples(summary, detail, [(head, shown(text)) for head, text in texts])


def _paper(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _bytes(count: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
