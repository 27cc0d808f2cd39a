"""Comparisons of two models' answers by the simulated annotator (paper section 3.2.1): helpfulness and safety apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.assistant.annotator import SimulatedAnnotator
from llama_jax.data.dialog import find_tag

TRACKS = ("helpfulness", "safety")
Answer = tuple[str, bool]  # text, and whether the model stopped by itself


def compare_answers(
    prompts: Sequence[Mapping[str, Any]], a: Sequence[Answer], b: Sequence[Answer], annotator: SimulatedAnnotator, *, batch: int
) -> dict[str, list[dict[str, Any]]]:
    """Preference rows by track. A pair with an answer that no dialog can hold, or that the annotator leaves out, gives none."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TRACKS}
    for prompt, (text_a, ended_a), (text_b, ended_b) in zip(prompts, a, b, strict=True):
        if not text_a or not text_b or find_tag(text_a) or find_tag(text_b):
            continue
        preference = annotator.compare(prompt, text_a, text_b, ended_a=ended_a, ended_b=ended_b)
        if preference is None:
            continue
        row = {**preference.row(prompt), "batch": batch}
        row["source"] = f"{row['source']}, batch {batch}"
        # Whatever answers a harmless question is safe. Without this label the safety model takes every answer that does not
        # decline for unsafe, the gate of R_c hands it the helpful prompts too, and PPO learns to decline those.
        row.setdefault("safety_bin", "both_safe")
        rows["safety" if prompt["is_safety"] else "helpfulness"].append(row)
    return rows
