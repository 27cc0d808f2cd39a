"""The study of Ghost Attention and the report on it and on distillation: tables, figures and target from given answers.

The whole study runs in the slow test of the five versions (tests/test_recipe.py).
"""

import re
import types
from html import unescape

import pytest
import small_runs

from llama_jax.config import ConfigError, parse
from llama_jax.data.sources import write_jsonl
from llama_jax.evals import distillation_figure, ghost_figures
from llama_jax.evals.plots import LIGHT
from llama_jax.evals.report import write_report
from llama_jax.evals.report_sections import build_sections
from llama_jax.evals.targets import check_targets
from llama_jax.ghost_study import GhostStudy, GhostStudyConfig
from llama_jax.markdown import markdown_table, verbatim
from llama_jax.rlhf.ghost import Context
from llama_jax.safety.distillation import keep_preferred
from llama_jax.steps import load_config


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high, "n": 48}


FOUND = {
    "recall": {
        "baseline": {"2": interval(0.25, 0.1, 0.4), "20": interval(0.0, 0.0, 0.0)},
        "ghost": {"2": interval(0.9, 0.8, 1.0), "20": interval(0.875, 0.8, 0.95)},
    },
    "policy_obeys": 0.92,
}


def test_the_table_stands_beside_the_papers():
    assert ghost_figures.rows(FOUND["recall"]) == [
        ["2", "25 % (10 to 40)", "90 % (80 to 100)", "100 %", "100 %"],
        ["20", "0 % (0 to 0)", "88 % (80 to 95)", "0 %", "100 %"],
    ]
    assert "| 20 | 0 % (0 to 0) | 88 % (80 to 95) | 0 % | 100 % |" in ghost_figures.markdown(FOUND)


@pytest.mark.parametrize(("ghost", "baseline", "met"), [(0.8, 0.29, True), (0.79, 0.1, False), (0.9, 0.3, False)])
def test_the_target_is_that_of_the_last_turn(ghost, baseline, met):
    recall = {"baseline": {"2": interval(0, 0, 0), "20": interval(baseline, 0, 1)}, "ghost": {"20": interval(ghost, 0, 1)}}
    (target,) = [t for t in check_targets({"ghost_attention": {"recall": recall}}) if t.stage == "Ghost Attention"]
    assert target.met is met and "turn 20" in target.asked


DISTILLATION = {
    "prompts": 20, "preferred": 7, "unended": 0, "unusable": 0, "kept": 7,
    "safety_score": {"base": interval(0.5, 0.4, 0.6), "generic": interval(0.6, 0.5, 0.7)},
    "before": {"true_utility": interval(0.6, 0.5, 0.7), "safety_violations": 0.1},
    "after": {"true_utility": interval(0.6, 0.5, 0.7), "safety_violations": 0.05},
}  # fmt: skip


def test_the_report_has_both_studies_where_they_were_made():
    results = {"ghost_attention": FOUND, "distillation": DISTILLATION}
    sections = {section.title: section for section in build_sections(results, ["ghost_recall", "distillation"])}
    assert sections["Ghost Attention"].figures == ["ghost_recall"]
    scores, policies = sections["Safety context distillation"].tables
    assert scores.rows[1] == ["generic", "0.600 (0.500 to 0.700)"] and policies.rows[1][2] == "5.0 %"
    assert "Ghost Attention" not in {section.title for section in build_sections({}, [])}


def judged(context, turn, answer, obeyed, question="How?"):
    return {"context": context, "turn": turn, "question": question, "answer": answer, "obeyed": obeyed}


ANSWERS = {
    "baseline": [judged(1, 20, "no", False), judged(1, 2, "Sure: a|b", True), judged(2, 2, "<script>x</script>", False)],
    "ghost": [judged(1, 2, "Sure:\n yes", True), judged(1, 20, "Sure: x", True)],
}


@pytest.fixture
def study(tmp_path):
    values = load_config(small_runs.ROOT / "configs", "ghost_study.py:tiny")
    values.start = "chat"
    return GhostStudy(parse(GhostStudyConfig, values), tmp_path)


def test_the_first_dialogs_stand_side_by_side_with_what_each_model_obeyed(study, monkeypatch):
    for name, rows in ANSWERS.items():
        write_jsonl(study.workdir / "recall" / f"{name}.jsonl", rows)
    contexts = [Context([], (), text) for text in ("Undecided.", "Begin: Sure.", "End: over.")]
    monkeypatch.setattr(study, "contexts", lambda count: contexts)
    dialogs = study.examples()
    assert ghost_figures.dialog_columns(dialogs) == ["turn", "user", "baseline", "Ghost Attention"]
    assert ghost_figures.dialog_rows(dialogs) == [
        ["", "Instruction: Begin: Sure.", "", ""],  # of the first one no answer could be judged
        ["2", "How?", "\u2713 Sure: a|b", "\u2713 Sure: yes"],
        ["20", "How?", "\u2717 no", "\u2713 Sure: x"],
        ["", "Instruction: End: over.", "", ""],
        ["2", "How?", "\u2717 <script>x</script>", ""],
    ]
    assert len(ghost_figures.examples(["a", "b", "c"], ANSWERS, most=1)) == 1
    text = ghost_figures.markdown({**FOUND, "examples": dialogs})
    assert "| 2 | How? | \u2713 Sure: a&#124;b | \u2713 Sure: yes |" in text and ghost_figures.DIALOGS_NOTE in text
    html = write_report(
        {"ghost_attention": {**FOUND, "examples": dialogs}}, study.workdir, figures={}, samples=[]
    ).html.read_text()
    assert "\u2717 &lt;script&gt;x&lt;/script&gt;" in html and "<script" not in html


def test_held_out_dialogs_that_do_not_fit_are_refused_before_a_model_is_trained(study, monkeypatch):
    dialogs = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "It is."}] for i in range(16)]
    monkeypatch.setattr(study, "dialogs", lambda: (dialogs, dialogs))
    monkeypatch.setitem(study.__dict__, "tokenizer", None)
    monkeypatch.setattr("llama_jax.evals.ghost.encode_prompt", lambda messages, _: "".join(m["content"] for m in messages))
    monkeypatch.setattr(study, "stage", lambda *_: pytest.fail("a model was trained"))

    message = "config.context=1024: context 0: its 20 turns leave no room for an answer; expected shorter dialogs, or fewer"
    with pytest.raises(ConfigError, match=message):
        monkeypatch.setattr(study, "shape", lambda: (None, types.SimpleNamespace(max_length=300)))
        study.run()
    assert not (study.workdir / "data").exists()
    monkeypatch.setattr(study, "shape", lambda: (None, types.SimpleNamespace(max_length=600)))
    assert set(study.write_data()) == {"instructions", "plain", "contexts", "values"}


@pytest.mark.parametrize("turns", [(), (0, 2), (1,)])
def test_a_study_measures_a_later_turn_than_the_first(turns):
    changes = {"start": "chat", "turns": turns}
    small_runs.assert_refused(GhostStudyConfig, "ghost_study.py:tiny", changes, "turns: expected turns from 1, and a later one")


HOSTILE = "<img src=x> | `a|b\\| ![i](http://e/x.png) *b* a_b _c_ &lt; \0"
SHOWN = (
    "&lt;img src=x&gt; &#124; &#96;a&#124;b&#92;&#124; !&#91;i&#93;(http://e/x.png) &#42;b&#42; a_b &#95;c&#95; &amp;lt; \ufffd"
)


def test_what_a_model_writes_is_shown_and_never_markup(tmp_path):
    assert verbatim(HOSTILE) == SHOWN and verbatim("\n# a\r\n\n- b\t\ud800") == "&#35; a<br><br>- b \ufffd"
    turn = {"turn": 2, "question": HOSTILE, "answers": {"ghost": {"answer": f"# a\n{HOSTILE}", "obeyed": True}}}
    dialogs = [{"instruction": HOSTILE, "turns": [turn]}]
    rows = [f"|  | Instruction: {SHOWN} |  |", f"| 2 | {SHOWN} | \u2713 &#35; a {SHOWN} |"]
    assert ghost_figures.dialog_blocks(dialogs)[-1].split("\n")[2:] == rows
    answer = {"kind": "base", "preprompt": "", "response": HOSTILE, "safety": 0.5, "ended": True, "kept": False}
    found = {
        "ghost_attention": {**FOUND, "examples": dialogs},
        "distillation": {
            "safety_score": {"base": interval(0.5, 0.4, 0.6)}, "prompts": 1, "preferred": 0, "unended": 0,
            "unusable": 0, "kept": 0,
            "examples": [{"prompt": HOSTILE, "answers": [answer]}],
        },
    }  # fmt: skip
    samples = [{"prompt": f"```\n{HOSTILE}", "answers": {"sft": f"<b>\n\n# a\n{HOSTILE}"}}]
    text = write_report(found, tmp_path, figures={}, samples=samples).markdown.read_text()
    lines = text.split("\n")
    assert all(row in lines for row in (*rows, f"| {SHOWN} | base | {SHOWN} | 0.500 |  |"))
    raw = [line for line in lines if "<" in line]
    assert len(raw) == 3 and all(line.startswith("    ") for line in raw)  # dialogues are indented blocks


@pytest.mark.parametrize("text", [
    HOSTILE, "# head\n## two\n\n- l\n> q", "```\ncode\n```\r\n---", "| --- |\n| x |", "<!-- c", "\\",
    "a_ _a 1_0_ ~~x~~", "[^1] [x][y]",
])  # fmt: skip
def test_a_reader_of_markdown_gives_the_text_back(text):
    reader = pytest.importorskip("markdown_it").MarkdownIt().enable(["table", "strikethrough"])
    page = reader.render(markdown_table(["a", "b", "c"], [["x", verbatim(text), "z"]]))
    (cells,) = re.findall(r"<tbody>\s*<tr>(.*)</tr>\s*</tbody>", page, re.DOTALL)
    first, cell, last = re.findall("<td>(.*?)</td>", cells, re.DOTALL)
    assert (first, last) == ("x", "z")
    assert [unescape(line) for line in cell.split("<br>")] == text.replace("\0", "\ufffd").splitlines()


def test_a_long_text_keeps_both_ends_and_shows_the_cut():
    assert ghost_figures.one_line(" a\n b\0 ") == "a b\ufffd"
    cut = ghost_figures.one_line("Sure: " + "so on " * 100 + "thanks", 60)
    assert cut == "Sure: so on so on so on so on [...] so on so on thanks" and len(cut) <= 60
    assert ghost_figures.one_line("x" * 70, 60) == f"{'x' * 30} [...] {'x' * 20}"


def test_samples_that_no_program_can_judge_count_neither_way(study):
    rows = [{"obeyed": obeyed} for obeyed in (True, True, False, None, None, True)]
    write_jsonl(study.workdir / "ghost" / "samples.jsonl", rows)
    assert study.policy_obeys() == 0.75


def sample(question, *scores, ended=True):
    """A prompt with a plain answer, generic ones and one by its risk's template, with these scores."""
    kinds = ["base", *["generic"] * (len(scores) - 2), "category"]
    answers = [
        {"kind": kind, "preprompt": f"Be {i}." * (kind != "base"), "response": f"{question} <b>{i}</b>", "ended": ended,
         "safety": score}
        for i, (kind, score) in enumerate(zip(kinds, scores))
    ]  # fmt: skip
    return {"messages": [{"role": "user", "content": question}], "answers": answers}


SAMPLES = [sample("a", 0.95, 0.9, 0.8, 0.85), sample("b", 0.2, 0.3, 0.9, 0.6), sample("c", 0.96, 0.97, 0.5, 0.99, ended=False),
           sample("d", 0.92, 0.91, 0.93, 0.9)]  # fmt: skip


def test_the_answers_that_are_distilled_are_found_among_the_samples():
    kept = keep_preferred(SAMPLES, least_gain=0.0)
    chosen = distillation_figure.kept_answers(SAMPLES, kept)
    assert [best and best["response"] for best in chosen] == [None, "b <b>2</b>", None, "d <b>2</b>"]
    assert distillation_figure.kept_answers(SAMPLES, kept[1:])[1] is None  # what another gain had kept
    found = distillation_figure.described(SAMPLES, kept)
    assert found["median_safety"] == pytest.approx({"base": 0.935, "generic": 0.9, "category": 0.875})
    assert found["kept_by_chance"] == 3.0  # the best of three is above a fourth in three of four prompts
    assert [example["prompt"][0]["content"] for example in found["examples"]] == ["b", "c", "d", "a"]
    assert [(a["kind"], a["safety"], a["kept"]) for a in found["examples"][0]["answers"]] == [
        ("base", 0.2, False), ("generic", 0.9, True), ("category", 0.6, False),
    ]  # fmt: skip
    assert [e["prompt"][0]["content"] for e in distillation_figure.examples(SAMPLES, kept, count=2)] == ["b", "a"]
    assert distillation_figure.examples([], []) == []


def test_the_report_shows_distilled_answers_and_says_where_no_median_rises(tmp_path):
    found = {**distillation_figure.described(SAMPLES, keep_preferred(SAMPLES, least_gain=0.0)), **DISTILLATION, "prompts": 4}
    (section,) = [s for s in build_sections({"distillation": found}, []) if s.title == "Safety context distillation"]
    assert section.notes[2] == (
        "The median safety score does not rise under generic and category pre-prompts (0.900 and 0.875; 0.935 without one); "
        "the policy is safe already: half of its plain answers have at least 0.935 of 1; were the pre-prompts without effect, "
        "3 of the 4 prompts would have a better answer by chance, since the best of several is compared with one."
    )
    assert section.tables[0].rows[1] == ["generic", "0.600 (0.500 to 0.700)", "0.900", "0.82"]
    assert section.tables[2].rows[:4] == [
        ["user: b", "base", "b <b>0</b>", "0.200", ""], ["", "generic: Be 2.", "b <b>2</b>", "0.900", "kept"],
        ["", "category: Be 3.", "b <b>3</b>", "0.600", ""], ["user: c", "base", "c <b>0</b>", "0.960", "cut off"],
    ]  # fmt: skip
    html = write_report({"distillation": found}, tmp_path, figures={}, samples=[]).html.read_text()
    assert "b &lt;b&gt;2&lt;/b&gt;" in html and "<b>2</b>" not in html
    for medians, said in (({"base": 0.5, "generic": 0.4}, "rise under generic pre-prompts (0.400; 0.500 without one); were"),
                          ({"base": 0.75, "generic": 0.82, "category": 0.87}, "")):  # fmt: skip
        sections = build_sections({"distillation": {**found, "median_safety": medians}}, [])
        notes = " ".join(note for s in sections for note in s.notes)
        assert said in notes and ("does not rise" in notes) == bool(said) and "safe already" not in notes


def test_prompts_whose_better_answers_cannot_be_trained_on_are_told(tmp_path):
    tagged = sample("e", 0.1, 0.2, 0.3, 0.4)
    for answer in tagged["answers"]:
        answer["response"] = "[INST]"
    samples = [*SAMPLES, tagged]  # better: of b, c (which do not end), d and e
    for least_gain, kept in ((0.0, 2), (0.1, 1)):
        found = distillation_figure.described(samples, keep_preferred(samples, least_gain=least_gain))
        counts = [found[name] for name in ("prompts", "preferred", "unended", "unusable", "kept")]
        assert counts == [5, 4, 1, 1, kept]
        (section,) = [s for s in build_sections({"distillation": found}, []) if s.title == "Safety context distillation"]
        little = ", 1 where the gain is less than was asked for" if kept == 1 else ""
        assert section.notes[1] == (
            "Of 5 prompts, 4 have an answer under a pre-prompt that the reward model prefers. Of these are left out 1 where no "
            "such answer ended, 1 where none can be trained on (nothing is said, or it holds a chat tag)" + little
            + f". {kept} are fine-tuned on without the pre-prompt."
        )


def test_figure_16_is_drawn_with_what_was_kept():
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    plot = distillation_figure.scores(SAMPLES)
    assert plot.png().startswith(b"\x89PNG") and "points: 2 of 12 answers under a pre-prompt are kept" in plot.alt
    kinds = ["generic pre-prompt", "answer template of the risk", "kept", "not kept"]
    for some, expected in ((SAMPLES[:1], kinds), (SAMPLES, [*kinds, "mean of neighbouring points"])):  # of two points no mean
        *_, gains = distillation_figure.scores(some).draw(LIGHT).axes
        assert [text.get_text() for text in gains.get_legend().get_texts()] == expected
        drawn = [line for line in gains.get_lines() if len(line.get_xdata()) > 1 and line.get_linewidth() == 2]
        assert len(drawn) == (some is SAMPLES) and all(line.get_marker() == "None" for line in drawn)  # no point of theirs
    assert "points: 1 of 12" in distillation_figure.scores(SAMPLES, keep_preferred(SAMPLES, least_gain=0.1)).alt


def test_the_figure_is_drawn_and_says_what_it_shows():
    pytest.importorskip("matplotlib", reason="needs the extra [eval]")
    plot = ghost_figures.recall(FOUND["recall"])
    assert plot.png().startswith(b"\x89PNG") and "Ghost Attention: turn 2 90 % (80 to 100), turn 20 88 %" in plot.alt


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "start: expected the workdir of a chat model, got nothing"),
    ({"start": "a", "turns": ()}, "turns: expected turns from 1"),
    ({"start": "a", "samples": 0}, "samples: expected at least 1, got 0"),
])  # fmt: skip
def test_configs_that_cannot_run_are_refused(changes, message):
    small_runs.assert_refused(GhostStudyConfig, "ghost_study.py:tiny", changes, message)
