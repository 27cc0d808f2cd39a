"""What the report and the manifest say of a corpus: counts that mean what stands beside them (paper section 4.1)."""

import dataclasses
import random
import re

import pytest

from llama_jax.corpus_build import report, report_page
from llama_jax.corpus_build.build import Settings, build_corpus, cleaned_documents
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.manifest import check_manifest
from llama_jax.corpus_build.mixture import plan
from llama_jax.corpus_build.profile import Profile, in_sample
from llama_jax.corpus_build.refine import HeldOut
from llama_jax.corpus_build.samples import SAMPLES, excerpt, shown
from llama_jax.corpus_build.steps import CleanConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evals import corpus_figures, plots

WORDS = "the river that runs past an old mill is wide and slow in the summer months of her long year with him".split()


def prose(i: int, count: int = 60) -> str:
    return f"Number {i} " + " ".join(random.Random(i).choices(WORDS, k=count)) + "."


def cells(page: str) -> list[list[str]]:
    """The rows of all tables of a section, bars left out."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows if "<td>" in row]


# Scales


def test_personal_information_is_counted_in_all_documents_and_languages_of_a_sample_are_not_added_to_all():
    documents = [Document(str(i), prose(i), "web", findings={"language": "en", "private": {"email": 1}}) for i in range(200)]
    profile = Profile()
    for document in documents:
        profile.keep(document)
    sampled = [d for d in documents if in_sample(d, 0.1)]
    profile.analyse(sampled, ["language"])
    for i in range(50):
        findings = {"language": "de", "private": {"email": 2, "phone": 1}}
        profile.remove(Removed(Document(str(i), prose(i), "web", findings=findings), "language", "other"))
    assert 0 < len(sampled) < 50 and profile.languages == {"en": len(sampled)} and profile.removed_languages == {"de": 50}
    assert profile.private == {"email": 200} and profile.removed_private == {"email": 100, "phone": 50}
    assert cells(report._privacy(profile)) == [["email", "100", "200"], ["phone", "50", "0"]]
    page = report._languages(profile)
    assert cells(page) == [["en", str(len(sampled)), "100.00", "89.7"], ["de", "50", "100.00"]]
    assert f"{len(sampled)} of the 200 documents to train on, and on all 50 that" in page


def test_table_9_is_of_what_is_known_to_be_english_or_not_known_at_all():
    findings = [{"language": "de"}, {"language": "en"}, {}]
    documents = [Document(str(i), "she said it", "web", findings=found) for i, found in enumerate(findings)]
    profile = Profile()
    profile.analyse(documents, ["demographics"])
    assert (profile.analysed, profile.english, profile.mentions["she"], profile.languages) == (3, 2, 2, {})


def test_the_manifest_has_personal_information_by_kind(tmp_path):
    documents = [Document(str(i), f"{prose(i)} Write to user{i}@example.org.", "web") for i in range(40)]
    documents += [Document(f"d{i}", "\n".join(f"user{j}@site{i}.org" for j in range(9)), "web") for i in range(3)]
    settings = Settings(300, 32, HeldOut(0.1, 1, 10**5), {"web": 1.0}, steps={"web": ("privacy",)}, analysed_share=0.1)
    counts = build_corpus({"web": documents}, tmp_path / "out", settings)["sources"]["web"]
    assert counts["private"] == {"email": counts["documents"]} and counts["removed_private"] == {"email": 27}


# What documents that stay have lost


def cleaned(documents: list[Document], *steps: str) -> tuple[list[Document], Profile]:
    clean = CleanConfig(mask="privacy" in steps)
    settings = Settings(300, 32, HeldOut(0.1, 1, 10**5), {"web": 1.0}, steps={"web": steps}, clean=clean)
    profile = Profile()
    return list(cleaned_documents("web", documents, settings, profile)), profile


def page(i: int) -> str:
    sentences = "\n".join(prose(3 * i + k) for k in range(3))
    return f"Home | About <{i}>\n{sentences}\nPage {i} of 9\nMail me{i}@site.org, as many do.\n"


def test_lines_that_steps_take_from_documents_that_stay_are_counted_and_shown():
    documents = [Document(str(i), page(i), "web") for i in range(30)] + [Document("short", "One.\nTwo", "web")]
    kept, profile = cleaned(documents, "c4", "privacy")
    assert len(kept) == 30 and "[email]" in kept[0].text and "Home" not in kept[0].text
    size = sum(len(d.text.encode()) for d in documents)
    assert profile.bytes_read == size and profile.removed == {("c4", "sentences"): 1}
    assert profile.trimmed == {"c4": 30, "privacy": 30}  # nothing of the one that was removed
    assert profile.trimmed_lines == {"c4": 90, "privacy": 0}  # two lines and the end of the last one
    lost = sum(profile.trimmed_bytes.values())
    assert size - lost - len("One.\nTwo") == sum(len(d.text.encode()) for d in kept)
    rows = profile.samples["trimmed", "c4"]
    assert len(rows) == SAMPLES and {text for *_, text in rows} <= {f"Home | About <{i}>\nPage {i} of 9" for i in range(30)}
    assert all(text.startswith("Mail me") for *_, text in profile.samples["trimmed", "privacy"])
    _, again = cleaned(documents[::-1], "c4", "privacy")
    parts = [cleaned(documents[i::3], "c4", "privacy")[1] for i in range(3)]
    assert again == profile == parts[2].merge(parts[0]).merge(parts[1])
    shown = report._trimmed(profile, {"web": profile})
    assert cells(shown)[0][:3] == ["c4", "30", "90"] and "Home | About &lt;" in shown
    assert "Mail [email], as many do." in shown and "@site.org" not in shown


def test_samples_are_shown_with_masks():
    """Those of a step before the mask, those that were too dense for one, and what the end of an excerpt cuts through."""
    private = ["jane.doe@example.org", "123-45-6789", "DE89 3704 0044 0532 0130 00"]
    profile = Profile()
    profile.remove(Removed(Document("a", f"Write to {private[0]}.", "web"), "gopher", "words"))
    profile.remove(Removed(Document("b", "\n".join(private), "web"), "privacy", "dense"))
    page = report._filters({"web": profile})
    assert not any(value in page for value in private) and "Write to [email]." in page
    assert "[email]\n[identity number]\n[iban]" in page
    for start in range(570, 605):  # the e-mail ends before, at and after the end of what is shown
        text = "x " * (start // 2) + "." * (start % 2) + private[0] + " and more " * 50
        part = shown(excerpt(text))
        assert "jane" not in part and "example" not in part
        assert part == text.replace(private[0], "[email]")[: len(part)]
    assert shown(excerpt("plain " * 200)) == ("plain " * 200)[:600]


def test_sites_of_addresses_without_a_scheme_are_named():
    profile = Profile()
    for i, url in enumerate(("www.a.org/x", "https://a.org/y", "b.org/x//y", "http://[broken/x")):
        profile.keep(Document(str(i), prose(i), "web", url=url))
    assert profile.sites == {"a.org": 2, "b.org": 1, "?": 1}


def test_the_report_says_what_its_figures_may_not_be_compared_with_and_what_was_asked():
    profile = Profile()
    profile.analyse([Document("a", "she is a woman", "web")], ["demographics"])
    assert "are not to be compared with those of another list" in report._demographics(profile, None)
    shares = plan({"a": 3.0, "b": 1.0}, {"a": 9, "b": 9}, {"a": 100, "b": 900}, total_tokens=1000, max_epochs=2)
    rows = cells(report._mixture(shares))
    assert [row[:3] for row in rows] == [["a", "75.0%", "20.0%"], ["b", "25.0%", "80.0%"]]


def test_of_pages_the_text_is_shown_that_extraction_left_out():
    pytest.importorskip("resiliparse")
    body = "".join(f"<p>{prose(k)}</p>" for k in range(3))
    frame = "<nav><a href='/'>Home and news</a></nav><article>{}</article><footer>All rights kept</footer>"
    html = f"<html><body>{frame.format(body)}</body></html>"
    (kept,), profile = cleaned([Document("p", html, "web")], "extract")
    ((_, _, _, text),) = profile.samples["trimmed", "extract"]
    assert "All rights kept" in text and "<" not in text and "Number 1" not in text and "Number 1" in kept.text
    assert profile.trimmed_bytes == {"extract": len(html) - len(kept.text)}


def test_the_manifest_and_the_funnel_have_what_was_read_and_what_was_lost(tmp_path):
    documents = [Document(str(i), page(i), "web") for i in range(40)]
    settings = Settings(300, 32, HeldOut(0.1, 1, 10**5), {"web": 1.0}, steps={"web": ("c4",)})
    counts = build_corpus({"web": documents}, tmp_path / "out", settings)["sources"]["web"]
    size = sum(len(d.text.encode()) for d in documents)
    lost = size - counts["bytes"] - counts["held_out_bytes"]
    assert counts["bytes_read"] == size and counts["trimmed_by"] == {"c4": {"documents": 40, "lines": 120, "bytes": lost}}
    written = (tmp_path / "out" / "report.html").read_text()
    assert f"<td>40</td><td>{report._bytes(size)}</td>" in written and "What the steps took from documents that stay" in written


# Charts


def test_charts_have_the_colours_of_the_figures_in_light_and_dark_and_readable_text_on_them():
    light, dark = report_page.STYLE.split("@media (prefers-color-scheme: dark)")
    for css, theme in ((light, plots.LIGHT), (dark, plots.DARK)):
        parts = re.findall(r"--part-\w+: (#\w+); --on-\w+: (#\w+);", css)
        assert [colour for colour, _ in parts] == [*theme.cycle, theme.grey]  # a cycle that test_evals tells apart
        assert all(contrast(*pair) >= 4.5 for pair in parts)
        assert f"--card: {theme.page};" in css and f"--ink: {theme.ink};" in css
    stacks = report_page.stacks({"web": dict.fromkeys(report._FATES, 10)}, list(report._FATES), striped="withheld")
    curves = report_page.lines({str(i): [(0, i), (1, i)] for i in range(32)}, x="x", y="y")
    assert not re.search(r"[\"'(: ]#[0-9a-f]{3}", stacks + curves)  # no colour but those
    assert len(set(re.findall(r'class="(part-\w+)"', stacks))) == len(report._FATES) == 9
    assert len(set(re.findall(r'dasharray="[^>]*part-\d', curves))) == 32
    with pytest.raises(ValueError, match="names: expected at most 8 parts beside a striped one, got 9"):
        report_page.stacks({}, list("abcdefghi"))


def contrast(*colours: str) -> float:
    """WCAG 2.1's ratio of two colours."""
    luminances = []
    for colour in colours:
        colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear)))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_charts_tell_their_values_in_words():
    stacks = report_page.stacks({"web": {"kept": 75, "gone": 25}, "books": {"kept": 100}}, ["kept", "gone"])
    assert 'aria-label="web: kept 75 (75.0%), gone 25 (25.0%)"' in stacks and "</i>kept 175 (87.5%)</span>" in stacks
    bins = [("1 kB", "1 kB to 2 kB", 1234), ("", "2 kB to 3 kB", 7), ("", "3 kB to 4 kB", 0)]
    columns = report_page.histogram("lengths", bins)
    assert 'role="img" aria-label="lengths: 1 kB to 2 kB 1,234; 2 kB to 3 kB 7"' in columns
    assert ">1.23k</text>" in columns and columns.count('class="number"') == 2
    gains = report_page.intervals([("clean", {"mean": 0.1, "low": 0.05, "high": 0.15})])
    assert gains.count("+0.1000 (+0.0500 to +0.1500)") == 2  # as a label and for those who cannot see it
    bands = {"raw": [(2.9, 3.1), (2.4, 2.6)]}
    curve = report_page.lines({"raw": [(1000, 3.0), (2000, 2.5)]}, x="tokens", y="bits", bands=bands)
    assert 'aria-label="bits over tokens: raw from 3.000 at 1k to 2.500 at 2k"' in curve and curve.count("<polygon") == 1


def test_figure_13_lies_beside_the_report_where_toxicity_was_scored(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("profanity_check")
    documents = {name: [Document(f"{name}{i}", prose(i + 99 * len(name)), name) for i in range(40)] for name in ("a", "web")}
    settings = Settings(300, 32, HeldOut(0.1, 1, 10**5), dict.fromkeys(documents, 1.0), analyses=("toxicity",))
    manifest = build_corpus(documents, tmp_path / "corpus", settings)
    rows = manifest["sources"].values()
    assert all(sum(row["toxicity"]) == row["documents"] for row in rows)
    (figure,) = corpus_figures.corpus_figures(manifest)
    assert f"of {sum(row['documents'] for row in rows):,} at 0.5 or more" in figure.alt
    corpus_figures.save_figures([figure], tmp_path / "corpus")
    assert {path.name for path in (tmp_path / "corpus" / "figures").iterdir()} == {
        f"toxicity.{ending}" for ending in ("png", "svg", "dark.svg")
    }
    assert check_manifest(tmp_path / "corpus", Tokenizer(tmp_path / "corpus" / "tokenizer.model")) == manifest
    counts = [6, *[0] * 10, 2, *[0] * 8]
    assert corpus_figures.toxicity(counts).alt.endswith("25.00 % of 8 at 0.5 or more. 0 to 0.05: 6; 0.55 to 0.6: 2.")
    monkeypatch.setattr(corpus_figures.importlib.util, "find_spec", lambda name: None)
    corpus_figures.save_figures([figure], tmp_path / "none")
    assert not (tmp_path / "none").exists()  # the page does without matplotlib
    unscored = build_corpus(documents, tmp_path / "plain", dataclasses.replace(settings, analyses=()))
    assert corpus_figures.corpus_figures(unscored) == []
