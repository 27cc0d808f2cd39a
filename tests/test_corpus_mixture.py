"""The mixture: weights, temperature, caps on epochs, and the table before anything runs."""

import dataclasses
import json
from collections import Counter

import pytest

from llama_jax import drawn
from llama_jax.config import ConfigError
from llama_jax.corpus_build.build import Settings
from llama_jax.corpus_build.evaluation import Evaluation
from llama_jax.corpus_build.manifest import FIELDS
from llama_jax.corpus_build.mixture import plan, shares, shortfall, table
from llama_jax.corpus_build.notices import notices
from llama_jax.corpus_build.profile import Profile
from llama_jax.corpus_build.refine import HeldOut
from llama_jax.corpus_build.write import sample_budgets

TOKENS = {"wiki": 1_000, "books": 10_000, "web": 1_000_000}


def test_weights_are_shares():
    assert shares({"a": 1, "b": 3}, {"a": 5, "b": 5}, total_tokens=100) == {"a": 0.25, "b": 0.75}


def test_temperature_by_hand():
    even = dict.fromkeys(TOKENS, 1.0)
    by_size = shares(even, TOKENS, total_tokens=1, temperature=1.0)
    assert by_size["web"] == pytest.approx(1_000_000 / 1_011_000)
    root = shares(even, TOKENS, total_tokens=1, temperature=2.0)
    assert root["wiki"] / root["web"] == pytest.approx(1000**-0.5) and sum(root.values()) == pytest.approx(1)
    alike = shares(even, TOKENS, total_tokens=1, temperature=1e9)
    assert alike["wiki"] == pytest.approx(1 / 3)
    doubled = shares({**even, "wiki": 2.0}, TOKENS, total_tokens=1, temperature=2.0)  # up-sampled on top
    assert doubled["wiki"] / doubled["web"] == pytest.approx(2 * root["wiki"] / root["web"])


def test_the_tokenizer_sees_each_source_by_its_share():
    """Under a temperature sizes count, in bytes, since there are no tokens yet."""
    settings = Settings(300, 32, HeldOut(0.1, 0, 1), {"a": 1.0, "b": 3.0}, tokenizer_bytes=1000)
    sizes = {"a": 100, "b": 10_000}
    assert sample_budgets(settings, sizes) == {"a": 250, "b": 750}
    by_size = dataclasses.replace(settings, weights={"a": 1.0, "b": 1.0}, temperature=2.0)
    assert sample_budgets(by_size, sizes) == pytest.approx({"a": 1000 / 11, "b": 10_000 / 11})


def test_a_cap_on_epochs_hands_its_share_on():
    weights = {"wiki": 0.4, "books": 0.2, "web": 0.4}
    found = shares(weights, TOKENS, total_tokens=100_000, max_epochs=4)
    # wiki: 4 epochs of 1,000 are 4 %; the other 96 % go 1 : 2, of which books can hold 40 %.
    assert found == pytest.approx({"wiki": 0.04, "books": 0.32, "web": 0.64})
    found = shares(weights, TOKENS, total_tokens=1_000_000, max_epochs=4)
    assert found == pytest.approx({"wiki": 0.004, "books": 0.04, "web": 0.956})
    rows = plan(weights, dict.fromkeys(TOKENS, 7), TOKENS, total_tokens=1_000_000, max_epochs=4)
    assert [row.capped for row in rows] == [True, True, False] and rows[0].epochs == pytest.approx(4)
    assert "4.00*" in table(rows)


def test_a_cap_that_cannot_be_met_plans_what_it_leaves_and_says_so():
    weights, documents = {"wiki": 0.4, "books": 0.2, "web": 0.4}, dict.fromkeys(TOKENS, 7)
    rows = plan(weights, documents, TOKENS, total_tokens=10_000_000, max_epochs=4)
    assert [row.planned_tokens for row in rows] == [4_000, 40_000, 4_000_000] and sum(r.share for r in rows) == pytest.approx(1)
    assert all(row.capped and row.epochs == pytest.approx(4) for row in rows)
    said = (
        "max_epochs leaves 4,044,000 of the 10,000,000 tokens of training asked for, which are 9.89 epochs of all sources: "
        "train for less, raise max_epochs, or find more text."
    )
    assert table(rows).splitlines()[-1] == said == shortfall(rows)
    assert shortfall(plan(weights, documents, TOKENS, total_tokens=4_044_000, max_epochs=4)) is None
    nothing = plan({"a": 1.0}, {"a": 0}, {"a": 0}, total_tokens=100, max_epochs=4)  # of which a dry run may tell
    assert (nothing[0].planned_tokens, nothing[0].epochs) == (0, 0)


def test_columns_are_as_wide_as_the_numbers_of_a_large_run():
    sizes = {"encyclopedia_of_all_the_world": 3_000_000_000, "web": 2_000_000_000_000}
    rows = plan({"encyclopedia_of_all_the_world": 0.1, "web": 0.9}, dict.fromkeys(sizes, 7_000_000_000), sizes,
                sizes={name: 4 * size for name, size in sizes.items()}, total_tokens=40_000_000_000_000)  # fmt: skip
    head, *lines = table(rows).splitlines()
    assert [len(line.split()) for line in lines] == [7, 7]
    for name in head.split()[1:-1]:  # every column ends below its head
        end = head.index(name) + len(name)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines)


def test_notices_name_what_is_beyond_the_usual():
    fine = {
        "documents_read": 100, "documents": 80, "filtered": 10, "duplicates": 5, "near_duplicates": 0, "bad_rows": 0,
        "bad_files": 0, "held_out_lines_seen": 0.01,
    }  # fmt: skip
    share = plan({"a": 1.0}, {"a": 80}, {"a": 1000}, total_tokens=2000)
    assert notices({"a": fine}, {"a": Profile()}, share, Evaluation()) == []
    weights = {"a": 7 / 10, "b": 1 / 10, "c": 2 / 10}
    capped = plan(weights, dict.fromkeys(weights, 80), {"a": 3_074_595, "b": 514_845, "c": 353_025},
                  total_tokens=10**8, max_epochs=4)  # fmt: skip
    # Exactly 4 epochs are not beyond 4, whatever rounding makes of it.
    assert notices({"a": fine}, {"a": Profile()}, capped, Evaluation()) == [shortfall(capped)]
    odd = {**fine, "documents": 20, "filtered": 50, "near_duplicates": 20, "bad_rows": 3, "bad_files": 2,
           "held_out_lines_seen": 0.2}  # fmt: skip
    profile = Profile(removed=Counter({("c4", "sentences"): 40, ("gopher", "words"): 10}))
    often = plan({"a": 1.0}, {"a": 80}, {"a": 1000}, total_tokens=9000, max_epochs=5)
    assert notices({"a": odd}, {"a": profile}, often, Evaluation(("one", "two", "three"), 2)) == [
        "a: 20% of the documents are left to train on.",
        "a: c4: sentences alone removed 40% of the documents; read its samples.",
        "a: 50% of what passed the filters were copies.",
        "a: 20% of the held-out lines stand in the training text too.",
        "a: 3 rows could not be read.",
        "a: 2 files could not be read to their ends; nobody knows what they held.",
        "2 of 3 evaluation samples have fewer words than leak_ngram and were not looked for.",
        shortfall(often),
        "a: will be seen 5.0 times; beyond 4 epochs little is learnt.",
    ]


def test_planned_beside_drawn_by_hand(tmp_path):
    run, built = tmp_path / "run", tmp_path / "corpus"
    run.mkdir()
    built.mkdir()
    source = {"documents": 1000, "bytes": 4_000_000, "tokens": 1_000_000}
    sources = {"wiki": {**source, "epochs": 2.0}, "web": {**source, "epochs": 0.5}, "code": {**source, "epochs": 0.1}}
    (built / "manifest.json").write_text(json.dumps(dict.fromkeys(FIELDS) | {"sources": sources}))
    config = {"stage": "pretrain", "data": {"corpus": str(built), "weights": {"wiki": 4.0, "web": 1.0}}, "loop": {"steps": 400}}
    with pytest.raises(ConfigError, match="run/config.json: expected the config of a pretraining run, found nothing"):
        drawn.run(run)
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="run: has no log yet; expected a run of at least one step"):
        drawn.run(run)
    log = [{"step": 0, "loss": 9.0}, {"step": 99, "epochs/wiki": 0.4, "epochs/web": 0.1}, {"step": 149, "loss": 5.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **row}) + "\n" for row in log))
    assert [line.split() for line in drawn.run(run).splitlines()] == [
        ["source", "documents", "planned", "drawn", "MB", "planned", "drawn", "tokens", "planned", "drawn", "epochs", "planned",
         "drawn"],
        ["wiki", "2,000", "600", "8.0", "2.4", "2,000,000", "600,000", "2.00", "0.60"],
        ["web", "500", "150", "2.0", "0.6", "500,000", "150,000", "0.50", "0.15"],
        ["code", "100", "0", "0.4", "0.0", "100,000", "0", "0.10", "0.00"],
        ["after", "150", "of", "400", "steps"],
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 0.0, "loss": 9.0}) + "\n")
    with pytest.raises(ConfigError, match="its log says nothing of the sources of .*corpus"):
        drawn.run(run)
    (run / "config.json").write_text(json.dumps({**config, "stage": "sft"}))
    with pytest.raises(ConfigError, match="config.json: stage: expected pretrain, got sft"):
        drawn.run(run)
