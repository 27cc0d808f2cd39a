"""Human evaluation: rating files to outcomes and splits, by hand and through the command; blinded sheets and back."""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from llama_jax.data.sources import write_jsonl
from llama_jax.evals import human, sheets
from llama_jax.evals.answer_files import Answered, pair_up, read_answers
from llama_jax.evals.human_figures import comparison_plots
from llama_jax.evals.plots import LIGHT
from llama_jax.evals.ratings import PairRating, SafetyRating, read_key, read_pair_ratings, read_safety_ratings
from llama_jax.human_evaluation import export, report


def test_three_raters_become_one_outcome():
    cases = {  # ratings -> by majority of signs, by sign of the mean
        (3, 1, -1): ("win", "win"), (1, 1, -3): ("win", "loss"), (1, 0, -1): ("tie", "tie"), (3, 0, 0): ("tie", "win"),
        (0, 0, 0): ("tie", "tie"), (-1, -1, 3): ("loss", "win"), (2, -2): ("tie", "tie"), (-1,): ("loss", "loss"),
    }  # fmt: skip
    for ratings, (majority, mean) in cases.items():
        assert (human.outcome(ratings), human.outcome(ratings, "mean")) == (majority, mean), ratings
    with pytest.raises(ValueError, match="one of majority, mean, got 'vote'"):
        human.outcome([1], "vote")


def test_a_violation_needs_more_than_half_of_the_raters():
    assert human.violates([1, 2, 5]) and human.violates([2]) and not human.violates([1, 3, 4]) and not human.violates([2, 3])


def pairs(outcomes, **fields):
    """Three equal ratings of each outcome."""
    return [PairRating(f"{i}{fields}", r, "ours", "theirs", o, **fields) for i, o in enumerate(outcomes) for r in "abc"]


def test_comparisons_overall_and_in_splits():
    rows = [
        *pairs([1, 1, -2, 0], turns=1, category="facts", words=10),
        *pairs([3, 3], turns=3, category="writing", words=20),
    ]
    (found,) = human.compare(rows)
    assert (found["first"], found["second"], found["overall"]["n"]) == ("ours", "theirs", 6)
    assert found["overall"]["win"]["share"] == pytest.approx(4 / 6) and found["overall"]["tie"]["share"] == pytest.approx(1 / 6)
    # Wilson's interval of 4 in 6 by hand: centre (p + z²/2n) / (1 + z²/n).
    z2 = 1.959964**2
    middle = (4 / 6 + z2 / 12) / (1 + z2 / 6)
    assert (found["overall"]["win"]["low"] + found["overall"]["win"]["high"]) / 2 == pytest.approx(middle)
    assert {name: row["n"] for name, row in found["turns"].items()} == {"single turn": 4, "multi turn": 2}
    assert list(found["turn_count"]) == ["1", "3"] and found["category"]["writing"]["win"]["share"] == 1.0
    assert found["agreement"]["AC1 of win, tie, loss"]["coefficient"] == 1.0
    assert found["raters"] == {"people": 3, "ratings_per_case": {"3": 6}}
    (turned,) = human.compare(rows, first="theirs")
    assert turned["first"] == "theirs" and turned["overall"]["win"] == found["overall"]["loss"]
    with pytest.raises(ValueError, match="'nobody' is in no comparison; found ours, theirs"):
        human.compare(rows, first="nobody")


def test_lengths_fall_into_fifths():
    assert human.quintile_edges(range(1, 101)) == [20, 40, 60, 80, 100]
    assert human.quintile_edges([7] * 50) == [7]
    rows = [PairRating(str(n), "a", "ours", "theirs", 1, words=n) for n in range(1, 101)]
    split = human.compare(rows)[0]["length"]
    assert list(split) == ["1-20", "21-40", "41-60", "61-80", "81-100"] and {row["n"] for row in split.values()} == {20}
    *_, plot = comparison_plots(human.compare(rows))
    assert plot.draw(LIGHT).axes[0].get_ylabel() == "words of the prompt" and "by words of the prompt" in plot.alt


def test_words_of_answers_count_where_every_row_holds_them(tmp_path):
    def read(**last):
        rows = [
            {"id": str(i), "rater": "Ann", "rating": 1, "model_a": "ours", "model_b": "theirs", "words": i,
             "answer_a": "one two", "answer_b": "a\nb  c" if i % 2 else ""} | (last if i == 10 else {})
            for i in range(1, 11)
        ]  # fmt: skip
        write_jsonl(tmp_path / "r.jsonl", rows)
        return read_pair_ratings(tmp_path / "r.jsonl")

    rows = read()
    assert [(row.words, row.answer_words) for row in rows[:2]] == [(1, 5), (2, 2)]
    (found,) = human.compare(rows)
    # i + 5 of odd, i + 2 of even numbers: 4, 6, 6, 8, 8, 10, 10, 12, 12, 14.
    assert found["length_of"] == "prompt and answers"
    assert {name: row["n"] for name, row in found["length"].items()} == {"4-6": 3, "7-8": 2, "9-10": 2, "11-12": 2, "13-14": 1}
    (found,) = human.compare(read(answer_a=None, answer_b=None))
    assert found["length_of"] == "the prompt" and list(found["length"]) == ["1-2", "3-4", "5-6", "7-8", "9-10"]
    *_, plot = comparison_plots([found])
    assert plot.draw(LIGHT).axes[0].get_ylabel() == "words of the prompt" and "by words of the prompt" in plot.alt
    with pytest.raises(ValueError, match="r.jsonl:10: answer_a: expected a string, got list"):
        read(answer_a=["x"])


def test_safety_by_risk_and_turns():
    rows = [
        SafetyRating(f"{risk}{turns}{i}", rater, "ours", rating, turns, risk)
        for risk, turns, ratings in (("hateful", 1, [1, 2, 5]), ("hateful", 2, [5, 5, 5]), ("advice", 1, [2, 3, 4]))
        for i in range(2) for rater, rating in zip("abc", ratings)
    ]  # fmt: skip
    (found,) = human.safety(rows)
    assert found["overall"]["violation"]["share"] == pytest.approx(2 / 6) and found["overall"]["n"] == 6
    assert found["overall"]["rating"]["mean"] == pytest.approx((8 / 3 + 5 + 3) / 3)
    assert found["risk"]["hateful"]["violation"]["share"] == 0.5 and found["risk"]["advice"]["violation"]["share"] == 0.0
    assert list(found["turns"]) == ["single turn", "multi turn"] and found["turns"]["multi turn"]["rating"]["mean"] == 5.0


def answers(name, count=12):
    return [
        Answered(({"role": "user", "content": f"question {i}"},), f"{'=' if i == 3 else ''}{name} says {i}", category="facts")
        for i in range(count)
    ]


def test_sheets_are_blind_random_and_complete():
    made = sheets.comparison_sheets({"ours": answers("x"), "theirs": answers("y")}, ["Ann", "Bo"], seed=1)
    shown = {rater: [row["prompt"] for row in rows] for rater, rows in made.by_rater.items()}
    assert sorted(shown["Ann"]) == sorted(shown["Bo"]) and shown["Ann"] != shown["Bo"]
    assert "ours" not in json.dumps(made.by_rater) and "theirs" not in json.dumps(made.by_rater)
    first = [row["model_a"] for row in made.key if row["rater"] == "Ann"]
    assert first.count("ours") == first.count("theirs") == 6
    assert made == sheets.comparison_sheets({"ours": answers("x"), "theirs": answers("y")}, ["Ann", "Bo"], seed=1)
    assert made.key != sheets.comparison_sheets({"ours": answers("x"), "theirs": answers("y")}, ["Ann", "Bo"], seed=2).key
    assert "\n'=x says 3" in sheets.as_csv([{"a": "'=x says 3"}])
    assert any("'=" in line for line in sheets.as_csv(made.by_rater["Ann"]).splitlines())
    with pytest.raises(ValueError, match="raters: expected names"):
        sheets.comparison_sheets({"ours": answers("x"), "theirs": answers("y")}, ["Ann", "../Bo"], seed=1)
    with pytest.raises(ValueError, match="same prompts"):
        pair_up(answers("x"), answers("y", 11), ("ours", "theirs"))


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_what_raters_write_on_sheets_comes_back_unblinded(tmp_path, form):
    for name, letter in (("ours", "x"), ("theirs", "y")):
        rows = [{"messages": list(a.messages), "answer": a.answer, "category": a.category} for a in answers(letter)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert read_answers(tmp_path / "ours.jsonl") == answers("x")
    export({name: tmp_path / f"{name}.jsonl" for name in ("ours", "theirs")}, ["Ann", "Bo", "Cy"], tmp_path / "sheets")
    for rater in ("Ann", "Bo", "Cy"):  # everybody likes x, whichever side it is on; Cy skips a row
        path = tmp_path / "sheets" / f"{rater}.{form}"
        if form == "csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["rating"] = 1 if "x says" in row["answer_a"] else 7
        rows[0]["rating"] = None if rater == "Cy" else rows[0]["rating"]
        if form == "csv":
            path.write_text(sheets.as_csv(rows), encoding="utf-8-sig")
        else:
            write_jsonl(path, rows)
    files = [str(tmp_path / "sheets" / f"{rater}.{form}") for rater in ("Ann", "Bo", "Cy")]
    values = report(tmp_path / "report", comparisons=files, key=str(tmp_path / "sheets" / "key.jsonl"), model="ours")
    (pair,) = values["comparisons"]
    assert pair["first"] == "ours" and pair["overall"]["win"]["share"] == 1.0 and pair["overall"]["n"] == 12
    assert pair["raters"] == {"people": 3, "ratings_per_case": {"2": 1, "3": 11}} and list(pair["category"]) == ["facts"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == values
    html = (tmp_path / "report" / "report.html").read_text()
    assert "ours against theirs" in html and "http" not in html.replace("http://www.w3.org", "")
    for plot in values["figures"]:
        assert (tmp_path / "report" / "figures" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "report" / "figures" / f"{plot}.svg").read_bytes()


def test_one_prompt_has_no_interval_and_its_report_is_strict_json(tmp_path):
    rows = [{"id": "1", "rater": rater, "rating": 3, "model_a": "ours", "model_b": "theirs"} for rater in "abc"]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    report(tmp_path / "report", comparisons=[str(tmp_path / "pairs.jsonl")])
    text = (tmp_path / "report" / "report.json").read_text()
    (pair,) = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["comparisons"]
    for found in pair["agreement"].values():
        assert (found["coefficient"], found["low"], found["high"]) == (1.0, None, None)
    assert "nan to nan" not in (tmp_path / "report" / "report.html").read_text()


def test_what_a_spreadsheet_makes_of_ids_is_understood(tmp_path):
    made = sheets.comparison_sheets({"ours": answers("x"), "theirs": answers("y")}, ["Ann"], seed=1)
    assert {row["id"] for row in made.by_rater["Ann"]} == {f"row{place:04d}" for place in range(1, 13)}
    for written, back in (("row{:04d}", "row{:04d}"), ("{:04d}", "{}"), ("{:04d}", " {:04d} ")):
        key = [{**row, "sheet_id": written.format(place)} for place, row in enumerate(made.key, start=1)]
        write_jsonl(tmp_path / "key.jsonl", key)
        rows = [{"id": back.format(place), "rater": "Ann", "rating": place % 7 + 1} for place in range(1, 13)]
        (tmp_path / "Ann.csv").write_text(sheets.as_csv(rows), encoding="utf-8-sig")
        found = read_pair_ratings(tmp_path / "Ann.csv", read_key(tmp_path / "key.jsonl"))
        assert [rating.id for rating in found] == [row["id"] for row in made.key]


def test_tables_are_read_as_spreadsheets_of_any_country_save_them(tmp_path):
    table = tmp_path / "r.csv"
    columns = ("id", "rater", "rating", "model_a", "model_b", "prompt")
    for delimiter in ",;\t":
        for encoding in ("utf-8-sig", "utf-8"):
            with open(table, "w", encoding=encoding, newline="") as file:
                rows = csv.writer(file, delimiter=delimiter)
                rows.writerows([columns, ("1", "Zoë", "4.0", "x", "y", "a, b; c\nd"), ("",) * len(columns)])
                file.write(delimiter * 7 + "\r\n")  # below the table more columns may be touched
            assert read_pair_ratings(table) == [PairRating("1", "Zoë", "x", "y", 0)], (delimiter, encoding)
    table.write_bytes(table.read_bytes().decode().encode("cp1252"))
    with pytest.raises(ValueError, match=r'not UTF-8 \(byte \d+\); expected what a spreadsheet saves as "CSV UTF-8"'):
        read_pair_ratings(table)


def test_wrong_files_are_told_with_line_and_field(tmp_path):
    path = tmp_path / "r.jsonl"

    def error(row, read=read_pair_ratings):
        write_jsonl(path, [row])
        with pytest.raises(ValueError) as caught:
            read(path)
        return str(caught.value)

    good = {"id": "1", "rater": "Ann", "rating": 2, "model_a": "x", "model_b": "y"}
    write_jsonl(path, [good])
    assert read_pair_ratings(path)[0].rating == 2
    assert error({**good, "rating": 8}) == f"{path}:1: rating: expected 1 to 7, got 8"
    assert error({**good, "rating": True}) == f"{path}:1: rating: expected 1 to 7, got True"
    assert error({**good, "rating": 2.5}).endswith("rating: expected 1 to 7, got 2.5")
    assert "model_b: expected another model than model_a" in error({**good, "model_b": "x"})
    assert "turns: expected a whole number" in error({**good, "turns": "many"})
    wrong = {"raters" if name == "rater" else name: value for name, value in good.items()}
    assert f"{path}:1: rater: missing (is 'raters' meant?); found id, raters" in error(wrong)
    assert "model: missing" in error(good, read_safety_ratings)
    write_jsonl(path, [good, good])
    with pytest.raises(ValueError, match="rater 'Ann' rated '1' of x and y twice"):
        read_pair_ratings(path)
    table = tmp_path / "r.csv"
    table.write_text("id,rater,rating,model_a,model_b\n1,Ann,4,x,y\n2,Ann,9,x,y\n")
    with pytest.raises(ValueError, match=r"r\.csv:3: rating: expected 1 to 7, got '9'"):
        read_pair_ratings(table)
    table.write_text("ID,rating, rater,model-a,model_b\n1,4,Ann,x,y\n")
    with pytest.raises(ValueError, match=r"r\.csv:2: id, model_a: missing \(is 'model-a' meant\?\); found ID, rating, rater"):
        read_pair_ratings(table)
    table.write_text(" id,rater ,rating,model_a,model_b\n1,Ann,4,x,y\n")
    assert read_pair_ratings(table) == [PairRating("1", "Ann", "x", "y", 0)]
    table.write_text("id,rater,rating,model_a,model_b, rating,,\n1,Ann,4,x,y,7,,\n")
    with pytest.raises(ValueError, match=r"r\.csv:1: rating: expected each column once"):
        read_pair_ratings(table)
    table.write_text("id,rater,rating,model_a,model_b\n1,Ann,4\n")
    with pytest.raises(ValueError, match=r"r\.csv:2: expected 5 columns"):
        read_pair_ratings(table)


def test_a_long_answer_comes_back_from_its_sheet(tmp_path):
    row = {"id": "1", "rater": "Ann", "rating": 4, "model_a": "x", "model_b": "y"}
    rows = [{**row, "answer_a": "word " * 40_000, "answer_b": "one two"}]
    (tmp_path / "Ann.csv").write_text(sheets.as_csv(rows), encoding="utf-8-sig")
    limit = csv.field_size_limit()
    assert read_pair_ratings(tmp_path / "Ann.csv")[0].answer_words == 40_002 and csv.field_size_limit() == limit


def test_files_of_ratings_are_read_once_and_say_the_same_of_a_pair(tmp_path):
    row = {"id": "7", "rater": "Ann", "rating": 3, "model_a": "ours", "model_b": "theirs", "turns": 2}
    ann, bo = str(tmp_path / "ann.jsonl"), str(tmp_path / "bo.jsonl")
    write_jsonl(ann, [row])
    for again in (ann, str(tmp_path / "link.jsonl"), str(tmp_path / "copy.jsonl")):
        if again.endswith("link.jsonl"):
            (tmp_path / "link.jsonl").symlink_to(ann)
        elif again.endswith("copy.jsonl"):
            write_jsonl(again, [row])
        with pytest.raises(ValueError, match="got it twice|rated '7' in .*ann.jsonl already"):
            report(tmp_path / "report", comparisons=[ann, again])
    differ = "turns: expected the same for all raters, got 3 for rater 'Bo', 2 for 'Ann'"
    for other, words in (({"turns": 3}, differ), ({"category": "facts"}, "")):
        write_jsonl(bo, [{**row, "rater": "Bo", "model_a": "theirs", "model_b": "ours", **other}])
        if words:
            with pytest.raises(ValueError, match=f"^{bo}: id '7': {words}$"):
                report(tmp_path / "report", comparisons=[ann, bo])
        else:  # one file says more than the other
            (pair,) = report(tmp_path / "report", comparisons=[ann, bo])["comparisons"]
            assert pair["category"]["facts"]["n"] == 1 and pair["turn_count"].keys() == {"2"}


def test_the_command_reports_both_protocols_and_refuses_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ("facts", "writing")
    write_jsonl(tmp_path / "pairs.jsonl", [
        {"id": str(i), "rater": rater, "rating": int(rng.integers(1, 8)), "model_a": "ours", "model_b": "theirs",
         "turns": i % 3, "category": kinds[i % 2], "words": i + 1}
        for i in range(30) for rater in "abc"
    ])  # fmt: skip
    write_jsonl(tmp_path / "safe.jsonl", [
        {"id": str(i), "rater": rater, "rating": int(rng.integers(1, 6)), "model": model, "risk": "hateful", "turns": 1 + i % 2}
        for model in ("ours", "theirs") for i in range(10) for rater in "abc"
    ])  # fmt: skip
    command = [sys.executable, "-m", "llama_jax.human_evaluation", f"--output={tmp_path}/report"]
    done = subprocess.run(
        [*command, f"--comparisons={tmp_path}/pairs.jsonl", f"--safety={tmp_path}/safe.jsonl"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    html = (tmp_path / "report" / "report.html").read_text()
    for cells in (("L2-Chat 70B against ChatGPT", "35.9", "31.5", "32.5", "36", "31", "33", "36", "32", "32"),
                  ("writing", "30", "31", "39"), ("Vicuna-33b", "38", "3.4", "32", "50")):  # Figs. 1 and 12; 30; 3, 17, 18
        assert "".join(f"<td>{cell}</td>" for cell in cells) in re.sub(r"<td[^>]*>", "<td>", html), cells
    assert "AC2 is 0.37 to 0.55" in html and "mean AC2 of 0.92" in html and "read off" in html
    assert {row["model"] for row in values["safety"]} == {"ours", "theirs"}
    assert {"outcomes", "outcomes_1_length", "violations", "safety_ratings", "violations_turns"} <= values["figures"].keys()
    assert all(figure["alt"] for figure in values["figures"].values())
    twice = subprocess.run(
        [*command[:3], f"--output={tmp_path}/sheets", "--answers=SFT=a.jsonl,SFT=b.jsonl", "--raters=Ann"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert twice.returncode == 1 and "error: --answers: two are named 'SFT', a.jsonl and b.jsonl" in twice.stderr
    again = subprocess.run([*command, f"--comparisons={tmp_path}/pairs.jsonl"], capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.strip().endswith("expected a new or an empty directory")
    assert "Traceback" not in again.stderr
