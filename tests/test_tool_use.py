"""Tools and time: calculator, readers and numbers by hand; calls in answers; a run that is stopped; the report; a command."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import pytest
import small_models
from small_models import made, opened, trained_tokenizer, written

from llama_jax import tool_use
from llama_jax.config import ConfigError
from llama_jax.data.sources import write_jsonl
from llama_jax.evals import tool_prompts, tool_scores, word_problems
from llama_jax.evals.published import TABLE_15
from llama_jax.evals.tool_answers import Answer, answer_all, continued, text_behind
from llama_jax.evals.tool_calls import Call, CallError, Search, calculator, carry_out, marked, readable, result_text
from llama_jax.evals.word_problems import Problem, read_number
from llama_jax.parallel.mesh import make_mesh
from llama_jax.sampling.choose import Choice


class Letters:
    """A tokenizer with a token for each character, and a few for more of them."""

    bos_id, eos_id, stop_ids, chat_template, vocab_size = 1, 2, (2,), None, 10_000
    more = {9000: ">\n", 9001: "</calc"}

    def encode(self, text, *, bos=False, eos=False):
        return [1] * bos + [*map(ord, text)] + [2] * eos

    def decode(self, ids):
        return "".join(self.more.get(i) or chr(i) for i in ids if i > 2)


class Engine:
    """Answers by a script {a word of the question: pieces of an answer}; what follows a result is the next piece.

    Pieces are texts or token ids. `seen` has all prompts as texts, `dies_after` as many pieces.
    """

    settings = types.SimpleNamespace(max_length=6000)

    def __init__(self, script, dies_after=10**9):
        self.script, self.left, self.queue, self.seen = script, dies_after, [], []

    def submit(self, ids, *, max_tokens, choice, stop_ids, on_token):
        assert choice == Choice(0.0) and len(ids) + max_tokens <= self.settings.max_length
        self.queue.append((list(ids), on_token, types.SimpleNamespace(
            max_tokens=max_tokens, stop_ids=stop_ids, tokens=[], finish=""
        )))  # fmt: skip

    def cancel(self, request):
        request.finish = "cancelled"

    def step(self):
        if not self.queue:
            return False
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        ids, on_token, request = self.queue.pop(0)
        text = Letters().decode(ids)
        self.seen.append(text)
        question, _, answer = text.partition(" [/INST]")
        pieces = next((pieces for word, pieces in self.script.items() if word in question), ["no"])
        piece = pieces[answer.count("<result>")]
        drawn = [*(Letters().encode(piece) if isinstance(piece, str) else piece), 2]
        for i, token in enumerate(drawn):
            request.tokens.append(token)
            if token == 2:
                request.finish = "stop"
            elif i + 1 == request.max_tokens:
                request.finish = "length"
            on_token(request, token)
            if request.finish:
                break
        return True


def answered(script, *questions, tools=("calculator",), max_tokens=200, max_calls=3):
    """The answers to questions, in their order, and the engine."""
    engine, found = Engine(script), {}
    prompts = [Letters().encode(f"[INST] {question} [/INST]", bos=True) for question in questions]
    known = {"calculator": calculator, "search": lambda query: f"found {query}"}
    answer_all(
        engine, Letters(), prompts, [{tool: known[tool] for tool in tools}] * len(prompts), max_tokens=max_tokens,
        max_calls=max_calls, done=found.__setitem__,
    )  # fmt: skip
    return [found[i] for i in range(len(questions))], engine


# ---- the tools ----


@pytest.mark.parametrize("expression, value", [
    ("(17 + 5) * 3", "66"), ("1,250.50 - 250", "1000.5"), ("$5 * 3 =", "15"), ("7 / 2", "3.5"), ("6 / 3", "2"),
    ("7 // 2 + 7 % 4", "6"), ("-3 ** 2", "-9"), ("2^10", "1024"), ("3 x 4", "12"), ("6 × 7 − 2 ÷ 4", "41.5"),
    ("1 / 3", "0.3333333333"), ("0.1 + 0.2", "0.3"), ("sqrt(16) + round(2.567, 1)", "6.6"), ("-0.0 * 1", "0"),
    ("round(7 / 2)", "4"), ("10 ** 15", "1000000000000000"), ("12,345,678 + 1", "12345679"), ("4 ** -1", "0.25"),
])  # fmt: skip
def test_the_calculator(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize("expression, why", [
    ("1 / 0", "division by zero"), ("5 % 0", "division by zero"), ("10 ** 16", "too large"), ("9 ** 9 ** 9", "too large"),
    ("2 ** 1000", "exponent is too large"), ("(-8) ** 0.5", "root of a negative"), ("sqrt(0 - 4)", "root of a negative"),
    ("__import__('os')", "not an arithmetic"), ("x + 1", "not an arithmetic"), ("", "not an arithmetic"),
    ("1 +", "not an arithmetic"), ("(" * 90 + "1" + ")" * 90, None), ("(" * 150, "not an arithmetic"), ("1" * 300, "not an"),
    ("3(4)", "not an arithmetic"), ("round(1, 2.5)", "whole number"), ("sqrt(1, 2)", "number of arguments"), ("1, 2", "not an"),
    ("(1).real", "not an arithmetic"), ("round", "not an arithmetic"), ("8" * 199, "too large"), ("1 if 2 else 3", "not an"),
])  # fmt: skip
def test_the_calculator_says_what_it_cannot_do_without_a_digit(expression, why):
    if why is None:
        assert calculator(expression) == "1"
        return
    with pytest.raises(CallError, match=why) as caught:
        calculator(expression)
    assert not any(c.isdigit() for c in str(caught.value))


def test_the_search_finds_the_best_document_and_shows_its_beginning():
    pytest.importorskip("bm25s", reason="needs the extra [tools]")
    search = Search([
        {"title": "Eiffel Tower", "text": "It is 330 metres high.\nIt stands in Paris."},
        {"title": "Mount Everest", "text": "The highest mountain, 8,849 metres. " + "word " * 300},
        {"title": "Paris", "text": "Paris is a city; the tower of Paris is known."},
    ])  # fmt: skip
    assert search("how high is the Eiffel tower?") == "Eiffel Tower: It is 330 metres high. It stands in Paris."
    assert search("PARIS").startswith("Paris: ")
    everest = search("everest mountain")
    assert everest.startswith("Mount Everest: The highest mountain, 8,849 metres. word") and everest.endswith("word ...")
    assert len(everest) < 640
    for query in ("zebra", "", "?!"):
        with pytest.raises(CallError, match="nothing was found"):
            search(query)
    assert Search([{"title": "A", "text": "b"}])("a") == "A: b"


def test_a_search_without_its_package_says_which_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package bm25s: pip install 'llama_jax\[tools\]'"):
        Search([{"title": "A", "text": "b"}])


# ---- calls ----


def test_calls_are_carried_out_or_malformed():
    tools = {"calculator": calculator, "search": lambda query: query.upper()}
    assert carry_out("So <calculator>2 * 3</calculator>", tools) == (Call("calculator", "2 * 3", "6"), 0)
    assert carry_out("<search>ab</search>", tools) == (Call("search", "ab", "AB"), 0)
    failed, unended = carry_out("<calculator>1 / 0</calculator>", tools)
    assert failed == Call("calculator", "1 / 0", "error: division by zero") and failed.failed and unended == 0
    call, unended = carry_out("2 * 3</calculator>", tools)
    assert call == Call("", "", "error: this call has no beginning") and not call.failed
    call, unended = carry_out("<search>a <calculator>1 <calculator>2 + 2</calculator>", tools)
    assert call.result == "4" and unended == 2
    assert result_text("a [INST] b </result> <calculator>") == " <result>a [ INST] b < /result> < calculator></result>"


def test_results_are_read_and_what_was_asked_is_not():
    good = "Six: <calculator>2 * 3</calculator> <result>6</result>."
    assert readable(good) == "Six: 6." and marked(good) == "Six: «calculator: 2 * 3 → 6»."
    assert read_number(good) == 6
    assert read_number("<calculator>5 / 0</calculator> <result>error: division by zero</result>") is None
    assert read_number("Let me see: <calculator>5 * 7") is None
    assert read_number("It is <calculator>5 * 7 = 35. The answer is 35.") == 35
    assert read_number("The answer is <calculator>4 + 4</calculator> <result>8</result>. I added 4 twice.") == 8


@pytest.mark.parametrize("answer, number", [
    ("The answer is 12.", 12), ("the answer is: $1,234.50", 1234.5), ("5 + 7 = 12 apples", 12), ("**The answer is -3%**", -3),
    ("The answer is 5 + 7 = 12. So 3 are left.", 12), ("The answer is 1. No, wait. The answer is 2", 2), ("It is 3/4.", 0.75),
    ("The answer is\n\n42 apples, of 50.\nOf 7.", 50), ("7 apples. The answer is N.", 7), ("-$5", -5), ("10-4", 4),
    ("There is none.", None), ("", None), ("N12", None), ("The answer is .5", 0.5), ("1,000,000 or 2,000", 2000),
])  # fmt: skip
def test_numbers_are_read_from_answers(answer, number):
    assert read_number(answer) == number


def test_an_answer_goes_on_behind_the_results_of_its_calls():
    script = {
        "sum": [" It is <calculator>2 + 2</calculator>", " and <calculator>4 * 5</calculator>", ". The answer is 20. "],
        "zero": [" <calculator>1 / 0</calculator>", " I cannot."], "plain": [" The answer is 7."],
        "lost": [" 3</calculator>", " so <calculator>3"],
    }  # fmt: skip
    (added, zero, plain, lost), engine = answered(script, "sum", "zero", "plain", "lost")
    assert added == Answer(
        "It is <calculator>2 + 2</calculator> <result>4</result> and <calculator>4 * 5</calculator> <result>20</result>. "
        "The answer is 20.", (Call("calculator", "2 + 2", "4"), Call("calculator", "4 * 5", "20")), 0, "stop",
    )  # fmt: skip
    assert engine.seen[-1].endswith("[/INST] It is <calculator>2 + 2</calculator> <result>4</result> and "
                                    "<calculator>4 * 5</calculator> <result>20</result>")  # fmt: skip
    assert zero.text.endswith("<result>error: division by zero</result> I cannot.") and zero.failed == 1
    assert (plain.text, plain.calls, plain.end) == ("The answer is 7.", (), "stop")
    assert lost.malformed == 2 and lost.failed == 0 and "<result>error: this call has no beginning</result> so" in lost.text
    for question, one in zip(("sum", "zero", "plain", "lost"), (added, zero, plain, lost)):
        assert answered(script, question)[0] == [one]  # whoever stands beside it


def test_an_answer_ends_when_calls_tokens_or_context_are_used_up():
    script = {"again": [" <calculator>1 + 1</calculator>"] * 9}
    (one,), engine = answered(script, "again", max_calls=2)
    assert one.end == "calls" and [call.result for call in one.calls] == ["2", "2"] and len(engine.seen) == 3
    assert one.text.endswith("<result>2</result> <calculator>1 + 1</calculator>")
    call = len(script["again"][0])
    (one,), engine = answered(script, "again", max_tokens=2 * call + 5, max_calls=9)
    assert one.end == "length" and len(one.calls) == 2 and one.text.endswith("<result>2</result> <cal")
    (one,), _ = answered(script, "again", max_tokens=2 * call, max_calls=9)
    assert one.end == "length" and len(one.calls) == 2  # the last token ended a call
    (one,), engine = answered(script, "again" + "x" * 5990)
    assert one == Answer("", (), 0, "too long") and not engine.seen


def test_a_tool_that_a_model_was_not_told_of_is_text():
    (one,), _ = answered({"q": [" <calculator>1 + 1</calculator> is 2"]}, "q", tools=())
    assert one == Answer("<calculator>1 + 1</calculator> is 2", (), 0, "stop")
    script = {"q": [" <search>a</search>", " <calculator>2 * 2</calculator>", " The answer is 4."]}
    (one,), _ = answered(script, "q", tools=("search", "calculator"))
    assert [call.result for call in one.calls] == ["found a", "4"]


def test_a_token_that_says_more_than_the_call_is_encoded_anew():
    words = Letters()
    drawn = [*words.encode("<calculator>1"), 9001, *words.encode("ulator"), 9000]
    before = words.encode("[INST] q [/INST]", bos=True)
    assert text_behind(words, before, drawn) == "<calculator>1</calculator>\n"
    ids = continued(words, before, drawn, keep="<calculator>1</calculator>", more=" <result>1</result>")
    assert ids == [*drawn[:-1], *words.encode("> <result>1</result>")]  # the other drawn ones stay
    (one,), engine = answered({"q": [[*drawn], " The answer is 1."]}, "q")
    assert one.text == "<calculator>1</calculator> <result>1</result> The answer is 1."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return trained_tokenizer(tmp_path_factory.mktemp("words"))


def test_drawn_tokens_stay_and_results_join_them_without_a_seam(tokenizer):
    before = tokenizer.encode("[INST] what is it? [/INST]", bos=True)
    call, more = " counts <calculator>2 + 2</calculator>", " <result>4</result>"
    # Not the pieces that encoding gives: characters one by one, as bytes.
    drawn = [3 + byte for byte in call.encode()]
    assert text_behind(tokenizer, before, drawn) == call
    ids = continued(tokenizer, before, drawn, keep=call, more=more)
    assert ids[: len(drawn)] == drawn and text_behind(tokenizer, before, ids) == call + more
    whole = tokenizer.encode("it counts" + call + more)
    assert ids[len(drawn) :] == whole[-len(ids[len(drawn) :]) :]  # as in a text that holds both


# ---- sets ----


SETS = {
    "svamp.json": [{"ID": "1", "Body": "Dan had $ 4 left.", "Question": "How much\nis half?", "Answer": 2.0, "Type": "x"}],
    "asdiv.jsonl": [{"body": "Dan had $ 4 left.", "question": "How much is half?", "answer": "2 (dollars)"}],
    "mawps.jsonl": [{"Question": "Dan had $ N_00 left. How much is half?", "Numbers": "4.0 2.0", "Answer": "2.0"}],
    "old.json": [{"sQuestion": "Dan had $ 4 left. How much is half?", "lEquations": ["X=4/2"], "lSolutions": [2.0]}],
    "plain.jsonl": [{"question": "Dan had $ 4 left. How much is half?", "answer": 2}],
}  # fmt: skip


def put(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("name", SETS)
def test_every_layout_gives_the_same_problem(tmp_path, name):
    found = word_problems.read(put(tmp_path / name, SETS[name]))
    assert found.asked == (Problem("Dan had $ 4 left. How much is half?", 2.0),) and found.not_numeric == 0


def test_sets_are_read_from_parquet_and_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra [data]")
    rows = datasets.Dataset.from_list(SETS["asdiv.jsonl"] * 2)
    rows.to_parquet(tmp_path / "asdiv.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "asdiv.parquet", tmp_path / "saved"):
        assert [problem.answer for problem in word_problems.read(path).asked] == [2.0, 2.0]


def test_answers_that_are_no_single_number_are_counted_and_left_out(tmp_path):
    answers = ["9 (apples)", "Sally", "5 (red); 3 (blue)", "1,200", "3/4 (cup)", "$2.50", "25%", "3:4", "-1", ""]
    path = put(tmp_path / "x.jsonl", [{"question": "q", "answer": answer} for answer in answers])
    found = word_problems.read(path)
    assert [problem.answer for problem in found.asked] == [9, 1200, 0.75, 2.5, 25, -1]
    assert (found.found, found.not_numeric) == (10, 4)
    assert len(word_problems.read(path, limit=2).asked) == 2
    both = put(tmp_path / "old.json", [{"sQuestion": "q", "lSolutions": of} for of in ([1.0, 2.0], [3])])
    assert [problem.answer for problem in word_problems.read(both).asked] == [3]


@pytest.mark.parametrize("rows, message", [
    ([{"Body": "b", "Quest": "q", "Answer": 1}], "x.jsonl:1: Question: missing; expected Body, Question, Answer .SVAMP.; or"),
    ([SETS["asdiv.jsonl"][0], {"question": "q", "answer": "1"}], "x.jsonl:2: body: missing; expected body, question, answer"),
    ([{"question": 3, "answer": 1}], "x.jsonl:1: question: expected a text, got 3"),
    ([{"question": "q", "answer": {"a": 1}}], "x.jsonl:1: answer: expected a number or a text, got dict"),
    ([{"question": "[INST] q", "answer": 1}], "x.jsonl:1: the question holds the chat tag '.INST.'"),
    ([{"question": "q", "answer": "Sally"}], "x.jsonl: expected problems with a number for an answer, found none in 1 rows"),
    ([{"Question": "N_02", "Numbers": "1 2", "Answer": 1}], "x.jsonl:1: Question: names N_02, but Numbers has 2"),
    ([], "x.jsonl: expected problems"),
])  # fmt: skip
def test_wrong_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        word_problems.read(put(tmp_path / "x.jsonl", rows))


def test_a_json_list_that_is_broken_is_named(tmp_path):
    (tmp_path / "x.json").write_text('[{"question": "q", ]')
    with pytest.raises(ValueError, match="x.json: expected JSON"):
        word_problems.read(tmp_path / "x.json")
    with pytest.raises(ValueError, match="x.json: row 2: answer: missing"):
        word_problems.read(put(tmp_path / "x.json", [{"question": "q", "answer": 1}, {"question": "q"}]))


# ---- runs ----


SCRIPT = {
    "apples": [" <calculator>3 * 4</calculator>", " apples. The answer is 12."],
    "pears": [" <calculator>1 / 0</calculator>", " Who knows."],
    "Wright": [" <search>Wright brothers</search>", " <search>Moon</search>", " <calculator>1969 - 1903</calculator>",
               " The answer is 66."],
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    asked = {"apples?": 12.0, "pears?": 5.0, "figs?": 0}
    put(tmp_path / "svamp.json", [{"Body": "b", "Question": question, "Answer": asked[question]} for question in asked])
    put(tmp_path / "own.jsonl", [{"question": "plums?", "answer": "no"}, {"question": "apples and pears?", "answer": 12}])
    write_jsonl(tmp_path / "documents.jsonl", [
        {"title": "Wright brothers", "text": "First flight in 1903."}, {"title": "Moon", "text": "First landing in 1969."},
    ])  # fmt: skip
    return tmp_path


def run(files, engine, places=None, **changes):
    model = types.SimpleNamespace(tokenizer=Letters(), mesh=make_mesh(devices=jax.devices()[:1]))
    how = {"max_tokens": 300, "max_calls": 3, "open_model": lambda place: (engine, model), **changes}
    data = {"svamp": str(files / "svamp.json"), "own": str(files / "own.jsonl")}
    return tool_use.run(places or {"a": "runs/a", "b": "runs/b"}, data, files / "out", **how)


def test_the_report_has_both_ways_the_calls_and_the_papers_rows(files):
    pytest.importorskip("bm25s", reason="needs the extra [tools]")
    engine = Engine(SCRIPT)
    values = run(files, engine, search=str(files / "documents.jsonl"))
    svamp = values["accuracy"]["a"]["svamp"]
    assert svamp["calculator"]["share"] == pytest.approx(1 / 3) and svamp["calculator"]["n"] == 3
    counted = ("no_number", "with_call", "calls", "malformed", "failed")
    assert [svamp["calculator"][key] for key in counted] == [2, 2, 2, 0, 1]
    # Without the tool nobody answers a call.
    assert svamp["plain"]["share"] == 0.0 and svamp["plain"]["calls"] == 0 and svamp["plain"]["no_number"] == 3
    assert values["data"]["own"] == {
        "file": str(files / "own.jsonl"), "problems": 2, "not_numeric": 1, "asked": 1
    }  # fmt: skip
    chain = values["chains"][0]["answers"]["a"]
    assert chain.startswith("«search: Wright brothers → Wright brothers: First flight in 1903.»")
    assert chain.endswith("«calculator: 1969 - 1903 → 66» The answer is 66.")
    assert len(values["times"]) == 16 and values["times"][0]["year"] == 1940
    asked = [text for text in engine.seen if "Second World War" in text]
    assert any("The year is 1940." in text for text in asked) and any("Knowledge cut-off: 2023." in text for text in asked)
    text, html = ((files / "out" / f"report.{ending}").read_text() for ending in ("md", "html"))
    assert "| a | with a calculator | 33.3 (6.1 to 79.2) | 100.0 (20.7 to 100.0) |" in text
    assert "| a | added | +33.3 (+0.0 to +100.0) | +100.0 |" in text
    for paper in ("Llama 2-Chat | with a calculator | 69.2 | - |", "GPT-3 | without | 10.0 | - |"):
        assert f"| the paper's {paper}" in text
    assert "66.7 % (2 of 3)" in text and "50.0 % (1 of 2)" in text and "2 documents are searched" in text
    assert "«calculator: 3 * 4 → 12»" in html and "wrong" in html and tool_prompts.WITHOUT_TOOLS in html
    written_ = json.loads((files / "out" / "results.json").read_text())
    assert written_["accuracy"] == values["accuracy"] and written_["paper"]["Toolformer"]["mawps"] == 44.0
    assert {path.name for path in (files / "out" / "figures").iterdir()} == {
        "tool_accuracy.png", "tool_accuracy.svg", "tool_accuracy.dark.svg"
    }  # fmt: skip
    assert "Not run: without --search" not in text
    run(files, None)  # nothing is asked again, and no model loaded
    assert "Not run: without --search" in (files / "out" / "report.md").read_text()


def test_a_stopped_run_goes_on_with_what_it_lacks(files, tmp_path_factory):
    whole = run(files, Engine(SCRIPT), {"a": "runs/a"}, search="")
    lines = (files / "out" / "a" / "answers.jsonl").read_text().splitlines()
    os.rename(files / "out", files / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(files, Engine(SCRIPT, dies_after=7), {"a": "runs/a"})
    kept = (files / "out" / "a" / "answers.jsonl").read_text().splitlines()
    assert 0 < len(kept) < len(lines) and not (files / "out" / "results.json").exists()
    with open(files / "out" / "a" / "answers.jsonl", "a") as file:
        file.write('{"key": "torn')
    again = Engine(SCRIPT)
    assert run(files, again, {"a": "runs/a"}) == whole
    firsts = [text for text in again.seen if text.endswith("[/INST]")]
    assert len(firsts) == len(lines) - len(kept)
    # Fewer problems need none; another limit of calls asks those with tools anew, and no others.
    run(files, None, {"a": "runs/a"}, limit=1)
    more = Engine(SCRIPT)
    run(files, more, {"a": "runs/a"}, max_calls=2)
    assert {tool_prompts.WITH_CALCULATOR in text for text in more.seen} == {True}


def test_answers_of_another_model_or_another_length_are_refused_before_one_is_loaded(files):
    run(files, Engine(SCRIPT), {"a": "runs/a"})
    for places, changes, words in (({"a": "runs/c"}, {}, "path"), ({"a": "runs/a"}, {"max_tokens": 9}, "max_tokens: 300 -> 9")):
        with pytest.raises(ConfigError, match=f"model.json: results under this name are of another model.*{words}"):
            run(files, None, places, **changes)
    with pytest.raises(ValueError, match="--checkpoint: '../x': expected a name that a directory can have"):
        run(files, None, {"../x": "runs/a"})
    seen = []
    run(files, None, {"a": "runs/a"}, check=lambda place, prompts: seen.extend(prompts))
    assert seen[0]["where"] == "svamp: problem 1" and seen[0]["messages"][1]["content"] == "b apples?" and len(seen) == 24
    write_jsonl(files / "bad.jsonl", [{"title": "A", "body": "b"}])
    with pytest.raises(ValueError, match="bad.jsonl:1: text: expected a text, got None; documents have title and text"):
        run(files, None, search=str(files / "bad.jsonl"))


def test_table_15_is_the_papers():
    assert TABLE_15["Llama 2-Chat"] == {"asdiv": 67.1, "svamp": 69.2, "mawps": 82.4} and len(TABLE_15) == 6
    found = tool_scores.compared(tool_scores.Solved(
        [Problem("q", 1.0), Problem("q", 2.0)], [Answer("1", (), 0, "stop"), Answer("2.0005", (), 1, "length")],
        [Answer("", (), 0, "too long"), Answer("2.01", (), 0, "calls")],
    ))  # fmt: skip
    assert (found["calculator"]["share"], found["plain"]["share"], found["added"]["mean"]) == (1.0, 0.0, 1.0)
    assert (found["calculator"]["malformed"], found["calculator"]["unfinished"]) == (1, 1)
    assert (found["plain"]["no_number"], found["plain"]["too_long"], found["plain"]["too_many_calls"]) == (1, 1, 1)


# ---- the real engine ----


@pytest.fixture
def long_model(monkeypatch):
    monkeypatch.setattr(small_models, "CONFIG", dataclasses.replace(small_models.CONFIG, max_length=2048))


def test_the_engine_goes_on_as_if_the_result_had_been_in_the_prompt(tokenizer, monkeypatch):
    engine, bare = opened(made(tokenizer, "lm_head"))
    prompt = tokenizer.encode("[INST] what is it? [/INST]", bos=True)

    def greedy(ids, count):
        with jax.set_mesh(bare.mesh):
            request = engine.submit(ids, max_tokens=count, choice=Choice(0.0), stop_ids=tokenizer.stop_ids)
            (request,) = engine.run([request])
        return [token for token in request.tokens if token not in tokenizer.stop_ids]

    # A random model writes no tags: what it says anyway begins a call and ends it.
    drawn = greedy(prompt, 16)
    said = text_behind(tokenizer, prompt, drawn[:8])
    begin, end = said.strip()[0], said[-2:]
    monkeypatch.setattr("llama_jax.evals.tool_calls.opening", lambda name: begin)
    for module in ("tool_answers", "tool_calls"):
        monkeypatch.setattr(f"llama_jax.evals.{module}.closing", lambda name: end)
    found, compiled = {}, engine.compilations
    with jax.set_mesh(bare.mesh):
        answer_all(
            engine, tokenizer, [prompt] * 3, [{"calculator": lambda argument: "7"}, {}, {"calculator": lambda argument: "8"}],
            max_tokens=16, max_calls=1, done=found.__setitem__,
        )  # fmt: skip
    assert found[1].text == text_behind(tokenizer, prompt, drawn).strip() and not found[1].calls
    count = next(n for n in range(1, 9) if end in text_behind(tokenizer, prompt, drawn[:n]))
    for i, result in ((0, "7"), (2, "8")):
        assert found[i].calls[0].result == result
        keep = text_behind(tokenizer, prompt, drawn[:count])
        spliced = [*prompt, *continued(tokenizer, prompt, drawn[:count], keep=keep, more=f" <result>{result}</result>")]
        whole = text_behind(tokenizer, prompt, [*spliced[len(prompt) :], *greedy(spliced, 16 - count)])
        # A second call would end it.
        assert whole.strip().startswith(found[i].text) and len(found[i].text) > len(f"{keep.strip()} <result>7</result>")
    assert engine.compilations == compiled


def test_the_command(tokenizer, long_model, files):
    pytest.importorskip("bm25s", reason="needs the extra [tools]")
    written(files / "chat", tokenizer)
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.tool_use", f"--checkpoint=chat={files}/chat", f"--output={files}/out",
         f"--data=svamp={files}/svamp.json", f"--search={files}/documents.jsonl", "--max_tokens=4", "--limit=2", "--slots=4"],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(line.startswith("answers of chat: ") for line in done.stderr.splitlines()), done.stderr
    assert done.stdout.strip() == f"{files}/out/report.html" and (files / "out" / "report.html").exists()
    rows = [json.loads(line) for line in (files / "out" / "chat" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 + 16 + 3 and all(row["end"] in ("stop", "length") for row in rows)
