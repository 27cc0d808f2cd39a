"""Table 16: SCROLLS' rows become questions with all their references, and answers are judged as there."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs the extra [eval]")
pytest.importorskip("rouge_score", reason="needs the extra [eval]")

from lm_eval.api.model import LM  # noqa: E402

from llama_jax.evals import benchmarks, long_context, tasks  # noqa: E402
from llama_jax.evals.tasks import TaskChoice  # noqa: E402

CHOICES = " (A) A  cat\n (B) A dog\n (C) A\tbird\n (D) None of these"
ROWS = {
    "narrative_qa": [
        {"id": "1", "input": "Who came?\n\nThe story.\n\nIt goes on.", "output": "The tall man"},
        {"id": "2", "input": "Why?\n\nThe story.", "output": "hunger"},
        {"id": "1", "input": "Who came?\n\nThe story.\n\nIt goes on.", "output": "a stranger"},
    ],
    "qasper": [{"id": "1", "input": "Which data?\n\nA paper.", "output": "Unanswerable"}],
    "quality": [{"id": "1", "input": f"What is it?\n\n{CHOICES}\n\n\nOnce upon a time.\n\nEnd.", "output": "A bird"}],
    "qmsum": [{"id": "1", "input": "What was decided?\n\nA: hm.\nB: yes.", "output": "they decided to run tests"}],
    "contract_nli": [{"id": "1", "input": "It is secret.\n\nThe contract.", "output": "Not mentioned"}],
}


class Answers(LM):
    """Says what it is told, and finds the shortest choice the most likely."""

    def __init__(self, texts):
        super().__init__()
        self.texts, self.prompts = list(texts), []

    def loglikelihood(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [self.texts.pop(0) for _ in requests]


def run(directory, part, metric, answers=()):
    path = directory / f"scrolls_{part}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[part]))
    choice, model = TaskChoice(0, metric), Answers(answers)
    return benchmarks.run_task(model, part, tasks.build(part, choice, data_dir=str(directory)), choice, limit=None), model


def test_rows_of_one_question_are_its_references(tmp_path):
    record, model = run(tmp_path, "narrative_qa", "f1", [" A stranger", " the hunger of all"])
    assert record["n"] == 2 and record["scores"] == pytest.approx([1.0, 2 * 1 / (1 + 3)])
    assert model.prompts[0] == "The story.\n\nIt goes on.\n\nQuestion: Who came?\nAnswer:"


def test_no_answer_to_a_paper_is_unanswerable(tmp_path):
    assert run(tmp_path, "qasper", "f1", [""])[0]["value"] == 1.0
    assert run(tmp_path, "qasper", "f1", [" three corpora"])[0]["value"] == 0.0


def test_choices_are_taken_out_of_the_input(tmp_path):
    record, model = run(tmp_path, "quality", "acc")
    found = long_context.document("quality", ROWS["quality"][0]["input"])
    assert found["choices"] == ["A cat", "A dog", "A bird", "None of these"]
    assert record["value"] == 0.0  # the shortest choice is a cat
    assert set(model.prompts) == {"Once upon a time.\n\nEnd.\n\nQuestion: What is it?\nAnswer:"}


def test_summaries_have_three_kinds_of_rouge(tmp_path):
    record, _ = run(tmp_path, "qmsum", "rouge1", [" they run tests"])
    assert record["value"] == pytest.approx(2 * 3 / (3 + 5)) and record["rougeL"] == pytest.approx(2 * 3 / (3 + 5))
    assert record["rouge2"] == pytest.approx(2 * 1 / (2 + 4))  # run tests


def test_a_conclusion_is_generated_and_must_match(tmp_path):
    record, model = run(tmp_path, "contract_nli", "exact_match", [" not mentioned."])
    assert record["value"] == 1.0 and model.prompts == ["The contract.\n\nHypothesis: It is secret.\nConclusion:"]


@pytest.mark.parametrize(("part", "text", "message"), [
    ("qasper", "no document", r"scrolls_qasper.jsonl:1: .*expected a question, an empty line and a document"),
    ("quality", "What?\n\n (A) one (B) two\n\ntext", r"scrolls_quality.jsonl:1: .*expected choices \(A\) to \(D\)"),
])  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(tmp_path, monkeypatch, part, text, message):
    monkeypatch.setitem(ROWS, part, [{"id": "1", "input": text, "output": "x"}])
    with pytest.raises(ValueError, match=message):
        run(tmp_path, part, "f1")


def test_an_answer_that_is_no_choice_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "quality", [{**ROWS["quality"][0], "output": "A cow"}])
    with pytest.raises(ValueError, match="id 1: output: expected one of .*'A bird'.* got 'A cow'"):
        run(tmp_path, "quality", "acc")
