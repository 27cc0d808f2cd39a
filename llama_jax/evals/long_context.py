"""The long inputs of Table 16, from SCROLLS (Shaham et al. 2022), as task settings for the harness.

A row is SCROLLS' own: `id`, `input` (the question, an empty line, the document) and `output`; rows of one id are several
references to one question. What is longer than the model's context is cut from the left and counted, as in every task.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.evals import downloads, spans
from llama_jax.evals.local_rows import texts_of

Settings = dict[str, Any]
Document = dict[str, Any]
PARTS = ("narrative_qa", "qasper", "quality", "qmsum", "contract_nli")
COLUMNS = ("id", "input", "output")
_ZIP = "zip://{part}/{split}.jsonl::https://huggingface.co/datasets/tau/scrolls/resolve/main/{part}.zip"
_PROMPT = "{{text}}\n\nQuestion: {{question}}\nAnswer:"
_HYPOTHESIS = "{{text}}\n\nHypothesis: {{question}}\nConclusion:"
_ROUGE = ("rouge1", "rouge2", "rougeL")


def settings(part: str) -> Settings:
    """The harness's settings of a task; prompts are those of its own SCROLLS tasks."""
    own = {
        "narrative_qa": lambda: _generated({"f1": spans.f1}),
        "qasper": lambda: _generated({"f1": lambda text, references: spans.f1(text or "Unanswerable", references)}),
        "quality": _quality,
        "qmsum": lambda: _generated({name: rouge(name) for name in _ROUGE}, tokens=256),
        # The paper's scores are below chance, so its answers were generated, not chosen.
        "contract_nli": lambda: _generated({"exact_match": spans.exact}, prompt=_HYPOTHESIS),
    }  # fmt: skip
    return {
        "dataset_path": "tau/scrolls", "dataset_name": part, "custom_dataset": functools.partial(download, part),
        "test_split": "validation", "process_docs": functools.partial(prepare, part), **own[part](),
    }  # fmt: skip


def download(part: str, **_: Any) -> Mapping[str, Any]:
    """The published validation rows. ConnectionError where the hub is not reached and nothing is in the cache."""
    return {"validation": downloads.json_rows(_ZIP.format(part=part, split="validation"))}


def prepare(part: str, rows: Any) -> Any:
    """Rows as documents, one a question, with all references. # datasets.Dataset -> datasets.Dataset"""
    from datasets import Dataset  # an extra

    return Dataset.from_list(documents(part, rows))


def documents(part: str, rows: Any) -> list[Document]:
    """The documents of rows in order; ValueError for one that cannot be read."""
    found: dict[str, Document] = {}
    for row in rows:
        if row["id"] in found:
            found[row["id"]]["outputs"].append(row["output"])
        else:
            found[row["id"]] = {**document(part, row["input"]), "id": row["id"], "outputs": [row["output"]]}
    if part == "quality":
        for doc in found.values():
            answer = " ".join(doc["outputs"][0].split())
            if answer not in doc["choices"]:
                raise ValueError(f"id {doc['id']}: output: expected one of {doc['choices']}, got {answer!r}")
            doc["gold"] = doc["choices"].index(answer)
    return list(found.values())


def document(part: str, text: str) -> Document:
    """Question and document of an `input`; of QuALITY the four choices too. ValueError where they are not found."""
    question, empty_line, rest = text.partition("\n\n")
    if not empty_line:
        raise ValueError(f"input: expected a question, an empty line and a document, got {text[:80]!r}")
    if part != "quality":
        return {"question": question, "text": rest}
    end = rest.find("\n\n", rest.find("(D)")) if "(D)" in rest else -1
    names = [" ".join(choice.split()) for choice in re.split(r" *\([A-D]\) *", rest[:end])[1:]]
    if end < 0 or len(names) != 4:
        raise ValueError(f"input: expected choices (A) to (D) behind the question, got {rest[:80]!r}")
    return {"question": question, "text": rest[end:].strip(), "choices": names}


def checked(part: str) -> Callable[[Mapping[str, Any]], Document]:
    """A row as it is, if it can be read as one of this task; ValueError otherwise."""

    def check(row: Mapping[str, Any]) -> Document:
        found = texts_of(*COLUMNS)(row)
        document(part, found["input"])
        return found

    return check


def rouge(name: str) -> Callable[[str, list[str]], float]:
    """The largest F1 of a kind of ROUGE over the references, with stemming as in SCROLLS."""

    def score(text: str, references: list[str]) -> float:
        return max(_scorer().score(reference, text)[name].fmeasure for reference in references)

    return score


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE), use_stemmer=True)


def _generated(
    judges: Mapping[str, Callable[[str, list[str]], float]], *, prompt: str = _PROMPT, tokens: int = 64
) -> Settings:  # fmt: skip
    def judge(doc: Document, results: list[str]) -> dict[str, float]:
        return {name: score(results[0].strip(), doc["outputs"]) for name, score in judges.items()}

    return {
        "output_type": "generate_until", "doc_to_text": prompt, "doc_to_target": "{{outputs[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": tokens, "do_sample": False},
        "process_results": judge, "metric_list": _metrics(*judges),
    }  # fmt: skip


def _quality() -> Settings:
    return {
        "output_type": "multiple_choice", "doc_to_text": _PROMPT, "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": _metrics("acc"),
    }  # fmt: skip


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
