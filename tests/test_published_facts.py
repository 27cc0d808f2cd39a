"""The paper's numbers that stand beside ours, held against the fact sheet cell by cell, and against each other."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from llama_jax.corpus_build import demographics
from llama_jax.corpus_build.report import PAPER_LANGUAGES, PAPER_TOXIC
from llama_jax.evals import comparison_report, ghost_figures, loss_by_tokens, report_sections, safety_scaling, serving_figure
from llama_jax.evals import published as papers
from llama_jax.evals import published_alignment as alignment
from llama_jax.markdown import Table
from llama_jax.reward import published as reward
from llama_jax.reward.ranking import MARGINS

ROOT = Path(__file__).parents[1]
# Beside the checkout, or beside the directory of several.
SHEETS = [root / "shared" / "llama2-recipe.md" for root in ROOT.parents[:2]]


@pytest.fixture(scope="module")
def sheet():
    found = next((path for path in SHEETS if path.exists()), None)
    if found is None:
        pytest.skip("needs ../shared/llama2-recipe.md")
    return found.read_text()


def rows_below(sheet, head):
    """The cells of each row of the table whose first line begins with `head`."""
    lines = iter(sheet[sheet.index(f"\n{head}") + 1 :].splitlines()[2:])
    rows = []
    while (line := next(lines)).startswith("|"):
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def said(sheet, begin, end="\n"):
    """What stands between two texts."""
    start = sheet.index(begin) + len(begin)
    return sheet[start : sheet.index(end, start)]


def numbers(text):
    """All numbers of a text, in order; none that is a part of a word (13b, GPT-4)."""
    found = re.findall(r"(?<!\w)(?<!\d\.)(?<![A-Z]-)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\.?\d)(?!\w)", text)
    return [float(number.replace(",", "")) for number in found]


def cells(table):
    """The numbers of a `Table` by row, without the titles of rows."""
    return [[number for cell in row[1:] for number in numbers(cell)] for row in table.rows]


def column(table, name):
    return [numbers(row[table.columns.index(name)])[0] for row in table.rows]


def test_numbers_of_a_text():
    text = "Vicuna-13b 25, 3.70; 28..33.5% of 1,418,091; -15 -> 0.45 (3.5k, 7B, GPT-4)."
    assert numbers(text) == [25, 3.7, 28, 33.5, 1418091, -15, 0.45]


def test_a_table_is_read_whole():
    table = Table.read("""
a   | b c
1,0 | -
""")
    assert table == Table(["a", "b c"], [["1,0", "-"]]) and table.markdown().endswith("\n| 1,0 | - |")
    with pytest.raises(ValueError, match=r"expected rows of 2 cells, got \['1'\]"):
        Table.read("a | b\n1")


# ---- against the fact sheet ----


@pytest.mark.parametrize(("rows", "head"), [
    (papers.TABLE_3, "| model | Code |"), (papers.TABLES_19_20_25, "| model | BoolQ"), (papers.TABLE_18, "| Table 18 |"),
    (papers.TABLES_21_22_23, "| model | HE |"), (papers.TABLE_24, "| model | Avg |"), (papers.TABLES_46_50, "| model | race |"),
    (papers.TABLES_44_45, "| model | T+I"),
], ids=["3", "19, 20, 25", "18", "21 to 23", "24", "46 to 50", "44, 45"])  # fmt: skip
def test_tables_of_benchmarks(sheet, rows, head):
    found = {name: numbers(" ".join(cells).replace("/", " ")) for name, *cells in rows_below(sheet, head)}
    if head == "| Table 18 |":
        means = {name: values.pop() for name, values in found.items()}
        assert means == {name: pytest.approx(np.mean(values), abs=0.01) for name, values in found.items()}
    if "T+I" in head:  # of the chat models a sentence tells
        groups = [name.removeprefix("toxigen:") for name in rows["ChatGPT"]][4:]
        text = said(sheet, "L2-Chat (T+I/T/I, Tox): ")
        for part in text.split(". Table 45")[0].split("; "):
            size, values = part.split(" ", 1)
            found[f"L2-Chat {size}"] = [*numbers(values.replace("/", " ")), *[0.0] * 13]
        toxic = re.findall(r"(\d+B) ([a-z ]+) (0\.\d+)", text.split("except")[1])
        assert len(toxic) == 3
        for size, group, value in toxic:
            found[f"L2-Chat {size}"][4 + groups.index(group.replace(" ", "_"))] = float(value)
    assert {name: list(row.values()) for name, row in rows.items()} == found


def test_tables_of_ablations_closed_models_and_word_problems(sheet):
    both = zip(rows_below(sheet, "| Table 16 |"), rows_below(sheet, "| Table 17 |"))
    found = {f"{one[0]} context": numbers(" ".join([*one[1:], *two[1:]]).replace("/", " ")) for one, two in both}
    assert {name: list(row.values()) for name, row in papers.TABLES_16_17.items()} == found
    (tasks,) = rows_below(sheet, "| MMLU 5 |")
    by_model = zip(papers.TABLE_4.values(), zip(*(cell.split(", ") for cell in tasks)), strict=True)
    for row, printed in by_model:
        assert list(row.values()) == [float(cell) for cell in printed if cell != "-"]
    text = said(sheet, "(ASDiv, SVAMP, MAWPS): ", " (size and prompt")
    found = {name: numbers(values) for name, values in re.findall(r"(Llama 2-Chat|[\w+-]+) ((?:[\d.]+, ){2}[\d.]+)", text)}
    assert {name: list(row.values()) for name, row in papers.TABLE_15.items()} == found


@pytest.mark.parametrize(("table", "head"), [
    (reward.TABLE_6, "| set | comparisons |"), (reward.TABLE_7, "| Table 7 |"), (reward.TABLE_8, "| Table 8 |"),
    (reward.TABLE_28, "| Table 28 "),
], ids=["6", "7", "8", "28"])  # fmt: skip
def test_tables_of_rewards(sheet, table, head):
    printed = rows_below(sheet, head)
    assert cells(table) == [[number for cell in row[1:] for number in numbers(cell)] for row in printed]
    assert len(table.columns) == len(printed[0])
    if table is reward.TABLE_8:
        named = [(model, of.replace("Help.", "helpfulness").replace("Safety", "safety")) for model, of, *_ in printed]
        assert [(model, of) for of, model, *_ in table.rows] == named
    else:
        assert [row[0] for row in table.rows] == [name.split(" (")[0] for name, *_ in printed]


def test_batches_bins_and_shares_of_preferences(sheet):
    weeks = said(sheet, "tokens/response:\n", ". Sum").split("; ")
    assert [numbers(" ".join(row)) for row in reward.TABLE_26.rows] == [numbers(week.replace(":", " ")) for week in weeks]
    assert cells(reward.SAFETY_BINS)[0] == numbers(said(sheet, "(3) both unsafe; ", " of the safety set"))
    shares = numbers(said(sheet, "over batches 1 -> 14: ", " [F]"))
    first, last = cells(reward.FIGURE_25)
    assert shares == [first[0], last[0], first[1], last[1], *first[2:4], first[4], last[4]] and first[2:4] == last[2:4]
    assert column(reward.FIGURE_25, reward.FIGURE_25.columns[0]) == [1, 14]
    text = said(sheet, "median RM score of ", " [F]")
    (most, first_max, first_median), (as_many, last_max, last_median) = cells(reward.FIGURE_26)
    batches = column(reward.FIGURE_26, reward.FIGURE_26.columns[0])
    assert numbers(text) == [most, *batches, first_max, last_max, first_median, last_median] and as_many == most
    assert [list(MARGINS[name].values()) for name in ("small", "large")] == [
        [float(Fraction(cell)) for cell in row[1:]] for row in rows_below(sheet, "| Table 27 |")
    ]


def test_figures_of_rewards_and_the_safety_loss(sheet):
    without, with_loss = cells(reward.TABLE_29)
    text = said(sheet, "Table 29 (Meta Safety test): ", ". Recall")
    assert numbers(text.replace("**", "")) == [*without, *with_loss]
    everything, strongest = (column(reward.FIGURE_6, name) for name in ("all", "significantly"))
    text = said(sheet, "Peaks all pairs: ", " [F]")
    assert numbers(text) == [round(value / 100, 3) for value in (*everything, *strongest)]
    means = numbers(said(sheet, "three annotators, monotone: ", ", band"))
    assert [value for row in cells(alignment.FIGURE_29) for value in row] == means


def test_figures_of_samples_and_red_teaming(sheet):
    (first, median), (last, flat) = cells(alignment.FIGURE_7)
    assert numbers(said(sheet, "max rises ", " (axis")) == [first, last, median] and median == flat
    low, hot, _, spread = cells(alignment.FIGURE_8)
    temperatures = numbers(said(sheet, "N = 1..100 for T in {", "}").replace("...,", ""))
    assert spread[:2] == [min(temperatures), max(temperatures)]
    text = said(sheet, "Re-tune T every round. N = 100 spread about ", " [F]")
    assert numbers(text) == [*spread[2:], 1, *hot, *low[1:], low[0]]
    assert numbers(said(sheet, "samples is 1.2", ". Re-tune")) == [1.3] and alignment.FIGURE_8.rows[2][1] == "1.2 to 1.3"
    factual, creative = (column(alignment.FIGURE_21, kind)[::-1] for kind in ("factual", "creative"))
    assert numbers(said(sheet, "(V3, V2, V1, SFT): ", " [F]").split("; axis")[0]) == [*factual, *creative]
    assert numbers(said(sheet, "7B went ", ". Of")) == cells(alignment.GAMMA)[0]
    assert numbers(said(sheet, "found in one round, ", " on average")) == cells(alignment.REJECTED)[0]


def test_contamination(sheet):
    found = []
    for name, *subsets in rows_below(sheet, "| dataset, L, model |"):
        dataset, length, model = name.split(", ")
        for kind, cell in zip(("clean", "not clean", "not dirty", "dirty"), subsets, strict=True):
            found.append([f"{dataset.replace('Humanities', 'MMLU-Humanities')}, {model}", int(length), kind, *numbers(cell)])
    assert [[row[0], int(row[1]), row[2], *map(float, (cell.replace(",", "") for cell in row[3:]))]
            for row in alignment.TABLE_51.rows] == found  # fmt: skip


def of_people(rows, size, opponent):
    """The row of two models in FIGURES_1_12 by the sheet's short names."""
    (key,) = [name for name in rows if name.startswith(f"L2-Chat {size} against {opponent}")]
    return list(rows[key].values())


def test_people(sheet):
    rows = papers.FIGURES_1_12
    overall = re.findall(r"(\d+B) vs ([\w-]+) ([\d./]+)", said(sheet, "Fig. 1 win/tie/loss: ", ". The text"))
    turns = re.findall(r"(\d+B)-(\w+) ([\d/]+, [\d/]+)", said(sheet, "Fig. 12 single then multi-turn [F]: "))
    assert len(overall) == len(turns) == len(rows) == 6
    for size, opponent, values in overall:
        assert of_people(rows, size, opponent)[:3] == numbers(values.replace("/", " "))
    for size, opponent, values in turns:
        assert of_people(rows, size, opponent)[3:] == numbers(values.replace("/", " "))
    text = said(sheet, "per category win/tie/loss [F]: ", ". Fig. 31")
    found = {name: numbers(values.replace("/", " ")) for name, values in re.findall(r"([a-z ]+) ([\d./]+)", text)}
    assert {name: list(row.values()) for name, row in papers.FIGURE_30.items()} == {k.strip(): v for k, v in found.items()}


def test_violations(sheet):
    rows = papers.FIGURES_3_17_18
    both = said(sheet, "17b mean rating [F]: ").replace(" [P]", "").rstrip(".").split("; ")
    turns = said(sheet, "single/multi-turn % [F]: ", ". Fig. 19").split(", ")
    assert len(both) == len(turns) == len(rows) == 10
    for number, texts in enumerate((both, turns)):
        for text in texts:
            name, values = text.split(" ", 1)
            of_model = f"L2-Chat {name}" if name[0].isdigit() else name
            (row,) = [row for model, row in rows.items() if model.startswith(of_model)]
            assert list(row.values())[2 * number : 2 * number + 2] == numbers(values.replace("/", " ")), text


def test_judges_ghost_attention_and_safety(sheet):
    by_reward, by_gpt_4 = said(sheet, "RM judge: ").split(" GPT-4 judge: ")
    pairs = [[tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", text)] for text in (by_reward, by_gpt_4)]
    assert [list(points) for points in zip(*comparison_report.FIG_11.values())] == pairs
    rates = numbers(said(sheet, "(helpfulness, safety) win rate about ", "% [F]"))
    assert [rate for pair in comparison_report.FIG_2.values() for rate in pair] == rates
    recall = [numbers(part.replace("/", " ")) for part in said(sheet, "at turn 2/4/6/20: ", ". Dialogues").split(", ")]
    assert [list(of.values()) for of in ghost_figures.PAPER.values()] == recall
    assert [list(of) for of in ghost_figures.PAPER.values()] == [[2, 4, 6, 20]] * 2
    shares = safety_scaling.PAPER.values()
    safety = numbers(said(sheet, "Safety mean ", "; helpfulness"))
    assert [row[0] for row in shares] == safety
    flat = numbers(said(sheet, "; helpfulness flat ", "; left tail"))
    assert [row[1] for row in shares if row[1] is not None] == flat
    assert [row[2] for row in shares] == numbers(said(sheet, "by share 0.", "% [F]").replace("006,", "0.006,", 1))
    assert [row[3] for row in shares] == numbers(said(sheet, "Borderline: ", "% [F;"))
    assert list(report_sections._FIG_16A.values()) == numbers(
        re.sub("base|generic pre-prompt|answer template", "", said(sheet, "Fig. 16a medians of Safety RM: ", " [F]"))
    )


def test_pretraining_and_its_data(sheet):
    assert list(loss_by_tokens.FIG_5.values()) == numbers(said(sheet, "Readings at 2T: ", "; 70B"))
    languages = re.findall(r"(\w+) ([\d.]+\d)", said(sheet, "above 0.005% of documents: "))
    assert {name: float(share) for name, share in languages} == PAPER_LANGUAGES
    assert PAPER_TOXIC == numbers(said(sheet, "(English part); about ", " of documents"))[0]
    pronouns = numbers(said(sheet, "share of English documents: ", "\n"))
    names = ("any gendered", "any person", "she", "he", "unspecified", "1st person", "2nd person", "3rd person")
    assert [demographics.PAPER[name] for name in names] == pronouns
    axes = numbers(said(sheet, "| Gender/sex ", "\n").replace("%", " "))
    assert [demographics.PAPER[name] for name in demographics.IDENTITIES] == axes
    found = {}
    for row in rows_below(sheet, "| Gender/sex "):
        found |= {name: float(share) for name, share in (cell.rsplit(" ", 1) for cell in row)}
    assert found == {name: demographics.PAPER[name] for of_axis in demographics.IDENTITIES.values() for name in of_axis}
    text = said(sheet, "Last points: ", " [F]").replace("256-context", "").replace("2k-context", "")
    short, long = (serving_figure.PAPER[prompt] for prompt in (256, 2048))
    assert numbers(text) == [*short["MHA"], *short["GQA"], *long["MHA"], *long["MQA"], *long["GQA"]]
    assert short["MQA"] == short["GQA"]


# ---- against each other ----


def test_outcomes_add_up_to_all():
    for row in papers.FIGURES_1_12.values():
        overall, *by_turns = (sum(list(row.values())[i : i + 3]) for i in (0, 3, 6))
        assert overall == pytest.approx(100, abs=0.11) and by_turns == pytest.approx([100, 100], abs=1)
    assert all(sum(row.values()) == pytest.approx(100, abs=1) for row in papers.FIGURE_30.values())
    again = {f"L2-Chat {ours} against {other}": rates for (ours, other), rates in comparison_report.FIG_1.items()}
    assert again == {name: tuple(row.values())[:3] for name, row in papers.FIGURES_1_12.items()}
    # All prompts lie between single and multiple turns, as far as a plot can be read.
    for row in papers.FIGURES_3_17_18.values():
        assert row["single_turn_%"] - 1 <= row["violations_%"] <= row["multi_turn_%"] + 1
    assert cells(reward.SAFETY_BINS)[0] == [18, 47, 35]
    for significantly, better, low, high, negligibly in cells(reward.FIGURE_25):
        assert low <= 100 - significantly - better - negligibly <= high


# The tasks of each of Table 3's groups (fact sheet 2.1), and the size of what is weighted by it.
GROUPS = {
    "code": ("humaneval", "mbpp"), "world_knowledge": ("nq_open", "triviaqa"), "reading": ("squad", "quac", "boolq"),
    "commonsense": ("piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "commonsense_qa"),
    "math": ("gsm8k", "math"),
}  # fmt: skip
MMLU = {"mmlu_humanities": 4705, "mmlu_stem": 3153, "mmlu_social_sciences": 3077, "mmlu_other": 3107}
AGIEVAL = (254, 651, 230, 510, 269, 206, 206, 220)


@pytest.mark.parametrize("model", papers.TABLE_3)
def test_averages_are_those_of_their_parts(model):
    parts = papers.TABLES_19_20_25[model] | papers.TABLES_21_22_23[model]
    for group, tasks in GROUPS.items():
        mean = np.mean([parts[task] for task in tasks])
        if group == "math" and model in ("L2 7B", "L2 13B"):
            mean = parts["gsm8k"]  # see MATH_NOTE
        assert papers.TABLE_3[model][group] == pytest.approx(mean, abs=0.08), group
    average = sum(parts[name] * n for name, n in MMLU.items()) / sum(MMLU.values())
    assert papers.TABLE_3[model]["mmlu"] == parts["mmlu"]
    assert parts["mmlu"] == pytest.approx(average, abs=0.21 if model.startswith("L1") else 0.08)
    overall, *tasks = papers.TABLE_24[model].values()
    assert papers.TABLE_3[model]["agieval"] == overall
    if model != "Falcon 40B":  # whose two equal cells look like a misprint
        assert overall == pytest.approx(np.average(tasks, weights=AGIEVAL), abs=0.11)


def test_shares_are_those_of_their_questions():
    for model, row in papers.TABLES_44_45.items():
        for name in ("truthfulqa", "truthfulqa_true", "truthfulqa_informative"):
            right = 8.17 * row[name]  # of 817 questions
            assert right == pytest.approx(round(right), abs=0.06), (model, name)
        toxic = [value for name, value in row.items() if name.startswith("toxigen:")]
        assert len(toxic) == 13 and row["toxigen"] == pytest.approx(np.mean(toxic), abs=0.0051), model
    beside, own = papers.TABLE_4["L2 70B"], papers.published("L2 70B")  # whose tables go before Table 4
    assert {name: own[name] for name in beside} == beside


def test_comparisons_add_up():
    *sets, total = cells(reward.TABLE_6)
    counts = [row[0] for row in sets]
    assert sum(counts) - total[0] == 1577  # the printed total is wrong by so many
    weeks = cells(reward.TABLE_26)
    assert sum(week[0] for week in weeks) == counts[-1] == 1_418_091
    means = np.average([week[1:] for week in weeks], axis=0, weights=[week[0] for week in weeks])
    np.testing.assert_allclose(means, sets[-1][1:], rtol=0.012)
    for name, row in zip(reward.TABLE_6.rows, sets):
        _, turns, example, prompt, response = row
        assert turns > 1 or example == pytest.approx(prompt + response, abs=0.11), name


def test_reward_models_are_the_same_in_all_tables():
    by_set = {row[0]: values for row, values in zip(reward.TABLE_7.rows, cells(reward.TABLE_7))}
    for (of, model, *_), values in zip(reward.TABLE_8.rows, cells(reward.TABLE_8)):
        assert values[-1] == by_set[model][of == "Meta safety"]
        assert values[:-1] == sorted(values[:-1], reverse=True)
    for values in cells(reward.TABLE_28):
        assert values[:-1] == sorted(values[:-1], reverse=True) and min(values[:-1]) < values[-1] < max(values[:-1])
    without, with_loss = cells(reward.TABLE_29)
    assert with_loss[:2] == [by_set["Safety RM"][1], cells(reward.TABLE_8)[0][0]]
    for row in (without, with_loss):  # the average weighs bins by their shares
        assert row[0] == pytest.approx(np.average(row[1:4], weights=cells(reward.SAFETY_BINS)[0]), abs=0.25)
    lines = {row[0]: values for row, values in zip(reward.FIGURE_6.rows, cells(reward.FIGURE_6))}
    for name in ("GPT-4", "Open Assistant"):
        assert lines[name][1] == by_set[name][0]
    assert lines["70B"][1] == pytest.approx(by_set["Helpfulness RM"][0], abs=0.3)
    assert lines["7B"] < lines["13B"] < lines["70B"]


def test_subsets_of_table_51_add_up():
    rows = [[row[2], *(float(cell.replace(",", "")) for cell in row[4:])] for row in alignment.TABLE_51.rows]
    for first in range(0, len(rows), 4):
        clean, not_clean, not_dirty, dirty = rows[first : first + 4]
        total = clean[1] + not_clean[1]
        # 4,705 questions of the humanities, of MMLU 14,042, of HellaSwag 10,042.
        assert total == not_dirty[1] + dirty[1] and total in (10_042, 4_705, 14_042)
        for one, other in ((clean, not_clean), (not_dirty, dirty)):
            assert (one[1] * one[2] + other[1] * other[2]) / total == pytest.approx(one[3], abs=0.15)
        for name, n, mean, expected, z in (clean, not_clean, not_dirty, dirty):
            p = expected / 100
            assert z == pytest.approx((mean - expected) / 100 / np.sqrt(p * (1 - p) / n), abs=0.3), (first, name)
