"""QuAC (Choi et al. 2018) as it was published: dialogs on a passage; a document is a question with all that was said before."""

from collections.abc import Mapping
from typing import Any

from llama_jax.evals import downloads
from llama_jax.evals.local_rows import fields, objects, text

Document = dict[str, Any]
ADDRESS = "https://s3.amazonaws.com/my89public/quac/{split}_v0.2.json"


def download(*, shots: int) -> dict[str, Any]:
    """{"validation": documents}, and "train" with a dialog for each example that is shown; ConnectionError."""
    from datasets import Dataset  # an extra

    def documents(split: str) -> list[Document]:
        return [doc for row in downloads.json_rows(ADDRESS.format(split=split), field="data") for doc in article(row)]

    found = {"validation": Dataset.from_list(documents("val"))}
    if shots:
        whole = {doc["context"]: doc for doc in documents("train")}  # the last question of each
        found["train"] = Dataset.from_list(list(whole.values()))
    return found


def article(row: Mapping[str, Any]) -> list[Document]:
    """The documents of a row of the publication: of its passages, each with one dialog."""
    passages = objects(row["paragraphs"], "paragraphs", "context", "qas")
    return [doc for passage in passages for doc in turns({**passage, "title": row["title"]})]


def turns(row: Mapping[str, Any]) -> list[Document]:
    """The questions of one dialog, each with those before it and their answers."""
    said, out = [], []
    about = {name: text(row[name], name) for name in ("title", "context")}
    for qa in objects(row["qas"], "qas", "question", "answers", "orig_answer"):
        answers = [text(answer["text"], "qas: answers: text") for answer in objects(qa["answers"], "qas: answers", "text")]
        if not answers:
            raise ValueError("qas: answers: expected at least one, found none")
        said.append(f"Q: {text(qa['question'], 'qas: question')}\n\nA:")
        out.append({**about, "dialog": "\n\n".join(said), "answers": answers})
        original = fields(qa["orig_answer"], "qas: orig_answer", "text")
        said[-1] += f" {text(original['text'], 'qas: orig_answer: text')}"
    return out
