"""Duplicates of the corpus: near duplicates by MinHash, repeated paragraphs, leaks of held-out text into training."""

import itertools
import random
import re

import numpy as np
import pytest

from llama_jax.corpus_build.boilerplate import Boilerplate
from llama_jax.corpus_build.components import (
    components,
    ends_of,
    firsts_in_one_process,
    joined,
    large_star,
    settle,
    small_star,
)
from llama_jax.corpus_build.dedup import drop_duplicates
from llama_jax.corpus_build.document import Document
from llama_jax.corpus_build.evaluation import Evaluation
from llama_jax.corpus_build.near_duplicates import (
    NearDuplicates,
    band_keys,
    clusters,
    drop_near_duplicates,
    links,
    signatures,
)
from llama_jax.corpus_build.paragraphs import Cut, drop_leaks, drop_repeats, split_paragraphs
from llama_jax.corpus_build.profile import Profile
from llama_jax.corpus_build.refine import LINES, PAIRS, Deduplication, HeldOut, held_out_repeats, refine
from llama_jax.corpus_build.report import _compared
from llama_jax.corpus_build.samples import SAMPLES, sample
from llama_jax.corpus_build.shingles import _HASHES, ngram_hashes, shingles, word_hashes
from llama_jax.corpus_build.split import is_held_out, split
from llama_jax.data.sources import write_jsonl

VOCABULARY = [f"w{i}" for i in range(5000)]


def words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def changed(text: list[str], share: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(VOCABULARY) if draw.random() < share else word for word in text]


def jaccard(a: str, b: str, n: int = 5) -> float:
    x, y = ({tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)} for t in (a, b))
    return len(x & y) / len(x | y)


# Shingles


def test_shingles_are_the_set_of_word_ngrams():
    text = "One two, three two\n one TWO (three)"
    assert len(word_hashes(text)) == 7 and len(np.unique(word_hashes(text))) == 3
    assert len(ngram_hashes(word_hashes(text), 3)) == 5
    assert len(shingles(text, 3)) == 4  # "one two three" stands twice
    assert shingles(text, 3).tolist() == sorted(shingles(text, 3).tolist())
    assert set(shingles("one two three", 3)) < set(shingles(text, 3))
    assert not set(shingles("two one three", 3)) & set(shingles(text, 3))
    assert len(shingles("", 3)) == 0 and len(shingles("one two", 3)) == 1
    # The same in every process: a constant, not Python's salted hash.
    assert int(word_hashes("one")[0]) == 0xC915768BAADDF234


def test_scripts_without_spaces_are_read_by_characters_and_all_others_as_before():
    for text, expected in (
        ("第3章：ABC_1 を、読む。", "第 3 章 abc_1 を 読 む"),
        ("ภาษาไทย ok", "ภ า ษ า ไ ท ย ok"),
        ("ｱｲ々〇ー𠀀", "ｱ ｲ 々 〇 ー 𠀀"),
        ("ພາສາ ខ្មែរ မြန်မာ བོད", "ພ າ ສ າ ខ ម រ မ န မ བ ད"),  # signs of vowels are no letters to `re`
        ("Straße, ÉTÉ! Ελλάδα привет 한국어 हिन्दी — ok", None),
    ):
        found = word_hashes(text).tolist()
        plain = [_HASHES[word] for word in (expected.split() if expected else re.findall(r"\w+", text.lower()))]
        assert found == plain, text


def test_equal_places_estimate_the_jaccard_similarity():
    settings = NearDuplicates(permutations=1024, bands=1)
    base = words(0, 400)
    for share in (0.02, 0.05, 0.1):
        a, b = " ".join(base), " ".join(changed(base, share, seed=1))
        estimate = float(np.equal(*signatures([a, b], settings)).mean())
        assert estimate == pytest.approx(jaccard(a, b), abs=0.06)  # four sigmas


# Near duplicates


def test_recall_and_precision_on_planted_near_duplicates():
    """200 originals, each with a copy whose similarity is known exactly; the threshold is 0.7."""
    settings = NearDuplicates(threshold=0.7)
    texts, truth = [], []
    for i in range(200):
        base = words(i, 300)
        # From near-identical to clearly different; similarity of word 5-grams falls five times as fast as words change.
        texts += [" ".join(base), " ".join(changed(base, (i % 10) * 0.008, seed=i))]
        truth.append(jaccard(*texts[-2:]))
    first = clusters(texts, settings)
    found = [first[2 * i] == first[2 * i + 1] for i in range(200)]
    assert all(first[2 * i] == 2 * i for i in range(200)), "two originals have nothing in common"
    joined, alike = np.array(found), np.array(truth) >= settings.threshold
    assert alike.sum() == 107 and np.mean(joined[alike]) >= 0.95 and np.mean(alike[joined]) >= 0.95  # recall and precision
    # What is missed or wrong lies near the threshold, where signatures estimate to a few hundredths.
    clear = [f for f, t in zip(found, truth) if t >= 0.8]
    wrong = [f for f, t in zip(found, truth) if t < 0.6]
    assert len(clear) > 50 and np.mean(clear) >= 0.98
    assert len(wrong) > 30 and np.mean(wrong) <= 0.02
    assert min(t for f, t in zip(found, truth) if f) > 0.5


ZH = "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学"
TH = "กขคงจฉชซญดตถทธนบปผพฟมยรลวศสหอฮ"


def clauses(letters: str, count: int, seed: int) -> list[str]:
    """Clauses of twelve letters, as long as most in Chinese."""
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=12)) for _ in range(count)]


@pytest.mark.parametrize("letters", [ZH, TH], ids=["zh", "th"])
def test_near_duplicates_without_spaces_are_found(letters):
    base = clauses(letters, 50, seed=0)
    near = [("X" + clause[1:] if i % 10 == 5 else clause) for i, clause in enumerate(base)]
    texts = ["，".join(base), "，".join(near), "，".join(clauses(letters, 50, seed=1)), "，".join(base[:25] + base[:25])]
    assert clusters(texts[:3], NearDuplicates()) == [0, 0, 2]
    assert clusters(texts[::3], NearDuplicates()) == [0, 1]  # half of it is none


def test_links_and_components_by_hand():
    signature = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 9], [2, 2, 9, 9], [1, 1, 9, 9]])
    assert links([0, 1, 2, 3, 4], signature, 0.75) == [(0, 2), (0, 4)]  # 4 is like 2 alone
    assert links([0, 1, 2, 3, 4], signature, 0.5) == [(0, 2), (1, 3), (0, 1), (0, 4)]  # 4 is like 0, and like 3
    assert components(6, [(4, 5), (0, 2), (2, 5)]) == [0, 1, 0, 3, 0, 0]
    # The third is like the second alone; below, the third joins two that were apart.
    chain = np.array([[1, 1, 1, 1], [1, 1, 1, 9], [1, 1, 9, 9], [5, 5, 5, 5], [5, 5, 5, 7], [1, 1, 9, 7], [5, 5, 7, 7]])
    assert links(range(6), chain, 0.75) == [(0, 1), (0, 2), (3, 4), (0, 5)]
    assert links(range(7), chain, 0.5)[-1:] == [(3, 6)] and links([2, 4, 5], chain, 0.75) == [(2, 5)]
    assert links(range(3), np.array([[1, 1, 2, 2], [3, 3, 3, 3], [1, 1, 3, 3]]), 0.5) == [(0, 1), (0, 2)]
    assert components(2, []) == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_links_join_what_comparing_all_pairs_joins(seed):
    draw = np.random.default_rng(seed)
    signature = draw.integers(0, 3, (60, 8))
    for threshold in (0.5, 0.625, 0.75):
        every = [(a, b) for a, b in itertools.combinations(range(60), 2) if (signature[a] == signature[b]).mean() >= threshold]
        found = links(range(60), signature, threshold)
        assert components(60, found) == components(60, every) and len(found) < 60


def test_texts_without_words_are_told_apart():
    programs = ["++++[>++++<-]>.", ">>+[-<+>]<.", "[.,]", " ++++[>++++<-]>.\n", "** ** ** **"]
    assert clusters(programs, NearDuplicates()) == [0, 1, 2, 0, 4]
    assert set(shingles("+ - x", 2)) == set(shingles("x", 2))  # one word is enough to go by words


def grouped(pairs: list[tuple], step) -> list:
    """What `step` gives of each key and its values: a runner of Beam in three lines."""
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return [result for key, values in groups.items() for result in step(key, values)]


def after(rounds: int, links: list[tuple]) -> list[tuple]:
    for _ in range(rounds):
        links = grouped(grouped([pair for link in links for pair in (link, link[::-1])], large_star), small_star)
    return links


def firsts_after(rounds: int, links: list[tuple]) -> tuple[dict, int]:
    """As `components.firsts_over_workers`, and how many links the rounds have left to one worker."""
    ends = [end for link in after(rounds, links) for end in ends_of(link)]
    found = grouped(ends, lambda node, ends: [(node, *settle(node, ends))])
    left = {link for _, _, rest in found for link in rest}
    heads = joined(sorted(left), rounds)
    return {node: head for node, first, _ in found if (head := heads.get(first, first)) != node}, len(left)


def test_stars_by_hand():
    assert sorted(large_star(3, [5, 1, 4, 2])) == [(4, 1), (5, 1)] and list(large_star(1, [5])) == [(5, 1)]
    assert sorted(small_star(5, [4, 1, 4])) == [(4, 1), (5, 1)] and list(small_star(5, [1, 1])) == [(5, 1)]
    assert settle(5, [1, 1]) == (1, []) and settle(1, [None, None]) == (1, [])
    assert settle(5, [4, 1]) == (1, [(4, 1)]) and settle(5, [1, None]) == (1, [(5, 1)])


@pytest.mark.parametrize("rounds", range(6))
def test_components_over_workers_are_those_of_one_process_after_any_number_of_rounds(rounds):
    draw = random.Random(rounds)
    for links_a_node in (0.3, 0.5, 0.8, 2.0):
        nodes = [(draw.randrange(3), f"d{i}") for i in range(60)]
        links = [tuple(draw.sample(nodes, 2)) for _ in range(int(60 * links_a_node))]
        assert firsts_after(rounds, links)[0] == firsts_in_one_process(links)
        assert firsts_after(rounds, links[::-1]) == firsts_after(rounds, links)


def test_rounds_that_are_too_few_are_seen_and_told(caplog):
    chain = [(i, i + 1) for i in range(40)]
    everyone = dict.fromkeys(range(1, 41), 0)
    assert firsts_after(6, chain) == (everyone, 0) and not caplog.records
    found, left = firsts_after(5, chain)
    assert found == everyone and 0 < left <= 40
    assert f"{left} links between documents were left after 5 rounds: one worker joins them" in caplog.text


def test_rounds_leave_one_link_a_document_and_none_to_join():
    """Clusters as bands make them: in each of 21, documents are linked with the first of their bucket."""
    draw = random.Random(0)
    links = set()
    for cluster, size in enumerate((2, 3, 10, 50, 300)):
        for _ in range(21):
            buckets = [draw.randrange(1 + size // 3) for _ in range(size)]
            links |= {((cluster, buckets.index(b)), (cluster, i)) for i, b in enumerate(buckets) if buckets.index(b) != i}
    assert len(links) > 4 * 360 and len(after(3, sorted(links))) == 365 - 5
    found, left = firsts_after(3, sorted(links))
    assert left == 0 and found == firsts_in_one_process(links)


def test_bands_cover_the_signature():
    settings = NearDuplicates(permutations=8, bands=3)
    keys = band_keys(np.arange(8, dtype=np.uint32), settings)
    assert len(set(keys)) == 3 and settings.rows == 2
    other = band_keys(np.array([0, 1, 9, 3, 9, 9, 6, 7], np.uint32), settings)
    assert [a == b for a, b in zip(keys, other, strict=True)] == [True, False, False]
    # Equal places in different bands must not meet.
    assert len(set(band_keys(np.zeros(8, np.uint32), settings))) == 3


def test_of_a_cluster_the_best_stays_whatever_the_order_of_reading():
    base = words(1, 300)
    a, b, c = (" ".join(changed(base, 0.004, seed=i)) for i in range(3))
    documents = {
        "wiki": [Document("w", b, "wiki"), Document("other", " ".join(words(2, 300)), "wiki")],
        "web": [Document("long", c + " and more words", "web"), Document("short", a, "web"), Document("z", "tiny", "web")],
    }
    kept, dropped = drop_near_duplicates(documents, NearDuplicates())
    assert {s: [d.id for d in of] for s, of in kept.items()} == {"wiki": ["w", "other"], "web": ["z"]}
    assert {s: [(d.id, stays.id) for d, stays in of] for s, of in dropped.items()} == {
        "wiki": [], "web": [("long", "w"), ("short", "w")],
    }  # fmt: skip
    kept, dropped = drop_near_duplicates({"web": documents["web"][::-1]}, NearDuplicates())
    assert [d.id for d in kept["web"]] == ["z", "long"]
    assert [(d.id, stays.id) for d, stays in dropped["web"]] == [("short", "long")]


def test_no_near_duplicates_among_nothing():
    assert drop_near_duplicates({"a": []}, NearDuplicates()) == ({"a": []}, {"a": []})


@pytest.mark.parametrize("wrong", [{"threshold": -0.1}, {"threshold": 1.1}, {"ngram": 0}, {"bands": 0}, {"bands": 129}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        NearDuplicates(**wrong)


# Paragraphs

LONG = "a paragraph that is long enough to count as one of its own"


@pytest.mark.parametrize("text", ["", "\n\n", "a\n\nb", "a\n \n\t\n\nb\n\nc\n", "\n\na", "a\n\n"])
def test_paragraphs_joined_are_the_text(text):
    assert "".join(split_paragraphs(text)) == text
    assert [p.strip() for p in split_paragraphs("a\n \nb\nc\n\n\nd")] == ["a", "b\nc", "d"]


def test_a_repeated_paragraph_stands_once_where_it_came_first():
    documents = {
        "books": [Document(i, f"{LONG}\n\none\n\n{LONG} {i}\n", "books") for i in "12"],
        "web": [Document("3", f"x\n\n  {LONG}\n2\n\nof its own\n", "web"), Document("4", f"{LONG}\n\nx", "web")],
        "code": [Document("5", f"{LONG}\n\nx", "code")],
    }
    kept, cuts = drop_repeats(documents, shortest=40, least=5, whole={"code"})
    texts = {d.id: d.text for of_source in kept.values() for d in of_source}
    # White space does not make a difference, "one" is too short to count, "x" alone is too little, code stays whole.
    assert texts == {
        "1": documents["books"][0].text, "2": f"one\n\n{LONG} 2\n", "3": "x\n\nof its own\n", "5": f"{LONG}\n\nx"
    }  # fmt: skip
    assert cuts == {
        "books": Cut(1, len(LONG) + 2, 0), "web": Cut(2, len(LONG) + 6 + len(LONG) + 3, 1), "code": Cut()
    }  # fmt: skip
    before = sum(len(d.text) for of in documents.values() for d in of)
    assert before == sum(map(len, texts.values())) + sum(cut.bytes for cut in cuts.values())


def test_a_paragraph_whose_first_place_is_a_page_of_copies_is_not_lost():
    own, filling = "a paragraph of its own that stands below the copy of another page", "and so on, " * 30
    texts = [f"{LONG}\n\n{filling} 1", f"{LONG}\n\n{own}", f"{own}\n\n{filling} 2", f"{LONG}\n\nx"]
    documents = {"web": [Document(str(i), text, "web") for i, text in enumerate(texts)]}
    kept, _ = drop_repeats(documents, shortest=40)
    assert [d.id for d in kept["web"]] == ["0", "1", "2"]
    assert sum(own in d.text for d in kept["web"]) == sum(LONG in d.text for d in kept["web"]) == 1


@pytest.mark.parametrize(("similarity", "chance"), [(0.7, 0.93), (0.8, 0.998)])
def test_the_chance_that_near_duplicates_are_compared_is_the_one_that_is_told(similarity, chance):
    rules = NearDuplicates()
    rows = rules.permutations // rules.bands
    assert 1 - (1 - similarity**rows) ** rules.bands == pytest.approx(chance, abs=0.003)


def test_held_out_text_has_lost_its_repeats_as_training_text_has():
    documents = [Document(str(i), f"{i} {4 * LONG}\n\n{LONG}\n\n{LONG}\n", "books") for i in range(20)]
    rules = Deduplication(repeated_paragraph=40)
    refined = refine({"books": documents}, HeldOut(0.5, 0, 10**6), rules)["books"]
    for side in (refined.train, refined.held_out):
        assert len(side) > 3 and sum(d.text.count(f"\n\n{LONG}\n") for d in side) == 1
    assert refined.counts["repeats_paragraphs"] == 38 and refined.counts["repeats"] == 0
    assert len(refined.held_out) == sum(is_held_out(d.text, 0.5) for d in documents)  # one without repeats is not lost
    again = refine({"books": documents[::-1]}, HeldOut(0.5, 0, 10**6), rules)["books"]
    assert again.held_out == refined.held_out
    assert held_out_repeats(documents, Deduplication()) == (documents, Cut())


def test_what_shares_a_run_of_words_with_a_held_out_text_is_cut():
    secret = " ".join(words(0, 40))
    run, short = " ".join(secret.split()[10:18]).upper(), " ".join(secret.split()[10:17])
    own = " ".join(words(1, 30))
    documents = {
        "web": [Document("1", f"{own}\n\nsee: {run}!\n\nend of it\n", "web"), Document("2", f"{own} {short} {own}\n", "web")],
        "code": [Document("3", f"{own} {own} {own} {run}", "code"), Document("4", f"{own}\n\n{secret}", "code")],
    }
    kept, cuts = drop_leaks(documents, [secret, "other"], ngram=8, least=50, whole={"code"})
    assert [d.text for d in kept["web"]] == [f"{own}\n\nend of it\n", documents["web"][1].text]
    assert [d.id for d in kept["code"]] == ["3"]  # 1 of 91 runs; half of the other's
    assert cuts["web"].paragraphs == 1 and cuts["code"] == Cut(0, len(documents["code"][1].text), 1)
    assert drop_leaks(documents, [], ngram=8)[0] == documents


@pytest.mark.parametrize(("question", "own"), [
    ("一个水池有两根水管单开甲管三小时注满单开乙管五小时注满问同时打开要几小时", "春天的早晨我们沿着河边散步"),
    ("ถ้าสมชายมีส้มสิบผลแล้วให้เพื่อนไปสามผลเขาจะเหลือส้มกี่ผล", "เมื่อเช้านี้ฝนตกหนักมากจนถนนหลายสายในเมืองมีน้ำท่วมขัง"),
], ids=["zh", "th"])  # fmt: skip
def test_a_leak_without_spaces_is_cut(question, own):
    text = f"{own}\n\n{own[::-1]}{question}{own}\n\nthe end"
    kept, cuts = drop_leaks({"web": [Document("1", text, "web")]}, [question], ngram=13, least=5)
    assert kept["web"][0].text == f"{own}\n\nthe end" and cuts["web"].paragraphs == 1
    # Twelve letters in common are none.
    letters = re.findall(r"\w", question)
    few = Document("2", f"{own} {''.join(letters[:12])}", "web")
    assert drop_leaks({"web": [few]}, [question], ngram=13, least=5)[0]["web"] == [few]


def test_nothing_left_of_a_leak():
    secret = [" ".join(words(i, 60)) for i in range(5)]
    own = [" ".join(words(9 + i, 60)) for i in range(20)]
    train = [Document(str(i), f"{own[i]}\n\n{secret[i % 5]}\n\n{secret[(i + 1) % 5]}", "s") for i in range(20)]
    kept, _ = drop_leaks({"s": train}, secret, ngram=8)
    runs = {run for text in secret for run in itertools.pairwise(text.split())}
    assert len(kept["s"]) == 20 and not any(runs & set(itertools.pairwise(d.text.split())) for d in kept["s"])


def test_a_leak_over_blank_lines_is_cut_with_all_its_paragraphs():
    question = ["What does the loop do?", "(a) it counts all", "(b) it ends early", "(c) it never ends"]
    own = " ".join(words(3, 40))
    document = Document("1", "\n\n".join([own, *question, own]), "web")
    kept, cuts = drop_leaks({"web": [document]}, ["\n".join(question)], ngram=8, least=50)
    assert kept["web"][0].text == f"{own}\n\n{own}" and cuts["web"].paragraphs == 4


def test_the_report_shows_samples_of_what_comparing_took():
    own = [" ".join(words(i, 60)) for i in range(40)]
    documents = [Document(str(i), f"Accept all <cookies> of the site\n\n{text}", "web") for i, text in enumerate(own)]
    documents += [Document("near", f"{documents[9].text} more", "web")]
    rules = Deduplication(Boilerplate(documents=5), NearDuplicates(), repeated_paragraph=80)

    def shown(documents: list[Document]) -> dict:
        return refine({"web": documents}, HeldOut(0.1, 1, 10**6), rules)["web"].samples

    samples = shown(documents)
    assert samples == shown(documents[::-1])
    assert samples[LINES] == [(-41, "web", "", "accept all <cookies> of the site")]
    ((_, name, stays, dropped, kept),) = samples[PAIRS]
    assert (name, stays) == ("9", "web:near") and kept[:50] == dropped[:50]
    profile = Profile().show(samples).show(samples)
    assert len(profile.samples[PAIRS]) == 2
    counts = dict.fromkeys(("near_duplicates", "boilerplate_lines", "leaks", "evaluation", "repeats"), 7)
    page = _compared(profile, {"web": counts})
    assert "accept all &lt;cookies&gt; of the site" in page and "web:near · stands for it" in page


def test_cuts_keep_a_few_samples_of_themselves():
    texts = [Document(str(i), f"{LONG}\n\n{i} {4 * LONG}", "s") for i in range(20)]
    _, cuts = drop_repeats({"s": texts}, shortest=40)
    assert cuts["s"].paragraphs == 19 and len(cuts["s"].samples) == SAMPLES == len((cuts["s"] + cuts["s"]).samples)
    assert {row[3] for row in cuts["s"].samples} == {LONG}
    _, again = drop_repeats({"s": [texts[0], *texts[:0:-1]]}, shortest=40)
    assert again["s"].samples == cuts["s"].samples
    secret = " ".join(words(0, 40))
    code = Document("c", secret, "code")
    assert drop_leaks({"code": [code]}, [secret], ngram=8, whole={"code"})[1]["code"].samples == [sample(code)]


def test_documents_of_one_id_are_told_apart_by_their_texts():
    documents = {"web": [Document("0", " ".join(words(i, 60)), "web") for i in range(200)]}
    parts = split(documents, fraction=0.05, maximum_bytes=3000)["web"]
    assert 0 < sum(len(d.text) for d in parts.held_out) <= 3000
    assert 160 < len(parts.train) and len(parts.train) + len(parts.held_out) + len(parts.withheld) == 200
    same = [Document("0", "one  two", "web"), Document("0", "one two", "web"), Document("0", "one  two", "web", url="u")]
    assert drop_duplicates({"web": same})[0] == drop_duplicates({"web": same[::-1]})[0]


def test_files_that_count_from_0_each_lose_no_document_from_the_counts():
    base = [words(i, 200) for i in range(20)]
    documents = [Document(str(i), " ".join([*text, str(part)]), "web") for part in range(4) for i, text in enumerate(base)]
    refined = refine({"web": documents}, HeldOut(0.1, 0, 10**6), Deduplication(near=NearDuplicates()))["web"]
    assert refined.unique == 20 and refined.counts["near_duplicates"] == 60


def test_a_program_may_share_a_part_with_samples_where_the_settings_say_so(tmp_path):
    program, sample = " ".join(f"w{i}" for i in range(200)), " ".join(f"w{i}" for i in range(12))
    documents = [Document("p", program, "code"), *(Document(str(i), f"other text {i} " * 9, "code") for i in range(9))]
    path = tmp_path / "samples.jsonl"
    write_jsonl(path, [{"text": sample}])
    for share, stays in ((0.0, False), (0.1, True), (0.01, False)):  # 5 of 193 runs of 8 words
        rules = Deduplication(leak_ngram=8, evaluation=(str(path),), evaluation_share=share)
        refined = refine(
            {"code": documents}, HeldOut(1e-9, 0, 0), rules, evaluation=Evaluation((sample,)), whole={"code"}
        )["code"]  # fmt: skip
        assert (program in [d.text for d in refined.train]) == stays
