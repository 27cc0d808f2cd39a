"""The paper's evaluation (sections 2.3, 4.1 and 4.4): `python -m llama_jax.evaluate --config=configs/evaluate.py:academic ...`.

Suites: academic (Table 3), each of its groups by name, closed (Table 4), context (Tables 16 and 17: SCROLLS and what long
contexts may cost), attention (Table 18: what fewer key heads may cost), pass_at_k (Table 21), shots (Tables 22 and 23), safety
(Tables 11 and 14), and smoke for tests. "nq_open@1" is a task with another number of examples than Table 3's.
`--config.models` lists models side by side, each "name=path"; "hf:..." is a Hugging Face model in the harness's own class.
"""

from ml_collections import ConfigDict

_SAFETY = ("truthfulqa", "toxigen", "bold")
# Their tasks stand in evals/groups.py.
_GROUPS = ("code", "commonsense", "world_knowledge", "reading", "math", "mmlu", "bbh", "agieval")
SUITES = (*_GROUPS, "academic", "closed", "context", "attention", "pass_at_k", "shots", "safety", "smoke")


def _tasks() -> dict[str, dict]:
    """Shots and metrics of Table 3 and A.2.2. Choices are scored as for Llama 1: where they are texts, likelihoods are divided
    by length, but for OpenBookQA and BoolQ, where by the likelihood of the choice behind "Answer:" (`acc_mutual_info`)."""
    code = {"samples": 1, "temperature": 0.1, "top_p": 0.95}  # A.2.2: pass@1 at temperature 0.1, top-p 0.95
    return {
        "humaneval": {"shots": 0, "metric": "pass@1", **code},
        "mbpp": {"shots": 3, "metric": "pass@1", **code},
        "piqa": {"shots": 0, "metric": "acc_norm"},
        "siqa": {"shots": 0, "metric": "acc_norm"},
        "hellaswag": {"shots": 0, "metric": "acc_norm"},
        "winogrande": {"shots": 0, "metric": "acc"},
        "arc_easy": {"shots": 0, "metric": "acc_norm"},
        "arc_challenge": {"shots": 0, "metric": "acc_norm"},
        "openbookqa": {"shots": 0, "metric": "acc_mutual_info"},
        "commonsense_qa": {"shots": 7, "metric": "acc"},
        "nq_open": {"shots": 5, "metric": "exact_match", "filter": "remove_whitespace"},
        "triviaqa": {"shots": 5, "metric": "exact_match", "filter": "remove_whitespace"},
        "squad": {"shots": 0, "metric": "exact_match"},
        "quac": {"shots": 0, "metric": "f1"},
        "boolq": {"shots": 0, "metric": "acc_mutual_info"},
        "gsm8k": {"shots": 8, "metric": "exact_match", "filter": "strict-match"},
        "math": {"shots": 4, "metric": "math_verify"},
        "mmlu": {"shots": 5, "metric": "acc"},
        "bbh": {"shots": 3, "metric": "exact_match", "filter": "get-answer"},
        "agieval": {"shots": 5, "metric": "acc_norm"},  # 3 to 5, as many as a task has; its choices are sentences
    }


def _with_shots(tasks: dict[str, dict], name: str, *counts: int) -> dict[str, dict]:
    """A task at several numbers of examples; that of Table 3 keeps its plain name."""
    own = tasks[name]["shots"]
    return {name if shots == own else f"{name}@{shots}": {**tasks[name], "shots": shots} for shots in counts}


def get_config(suite: str = "academic") -> ConfigDict:
    """The tasks of a suite and how they are run."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; expected one of {', '.join(SUITES)}")
    tasks = _tasks()
    if suite == "pass_at_k":  # Table 21: pass@100 and pass@80 at temperature 0.8
        many = {"samples": 200, "temperature": 0.8, "top_p": 0.95}
        tasks = {
            "humaneval": {"shots": 0, "metric": "pass@100", "k": (1, 10, 100), **many},
            "mbpp": {"shots": 3, "metric": "pass@80", "k": (1, 10, 80), **many},
        }
    elif suite == "context":
        tasks = {
            "narrative_qa": {"shots": 0, "metric": "f1"}, "qasper": {"shots": 0, "metric": "f1"},
            "quality": {"shots": 0, "metric": "acc"}, "qmsum": {"shots": 0, "metric": "rouge1"},
            "contract_nli": {"shots": 0, "metric": "exact_match"},
            **{name: tasks[name] for name in ("squad", "hellaswag", "gsm8k", "humaneval")},
            **_with_shots(tasks, "nq_open", 64), **_with_shots(tasks, "triviaqa", 64),
        }
    elif suite == "attention":
        names = ("boolq", "piqa", "siqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
        tasks = {
            **{name: tasks[name] for name in names}, **_with_shots(tasks, "nq_open", 0), **_with_shots(tasks, "triviaqa", 0)
        }
    elif suite == "closed":
        tasks = {
            "mmlu": tasks["mmlu"], **_with_shots(tasks, "triviaqa", 1), **_with_shots(tasks, "nq_open", 1),
            **{name: tasks[name] for name in ("gsm8k", "humaneval", "bbh")},
        }
    elif suite == "shots":
        tasks = {
            **_with_shots(tasks, "nq_open", 0, 1, 5, 64), **_with_shots(tasks, "triviaqa", 0, 1, 5, 64),
            **_with_shots(tasks, "squad", 0, 1, 4, 5), **_with_shots(tasks, "quac", 0, 1),
        }
    elif suite == "smoke":
        tasks = {name: tasks[name] for name in ("hellaswag", "boolq", "mmlu")}
    elif suite == "safety":
        tasks = {}
    return ConfigDict({
        "suite": suite,
        "groups": (suite,) if suite in _GROUPS else (),  # these groups of the tasks; none: all tasks
        "tasks": tasks, "safety": _SAFETY if suite == "safety" else (), "models": (), "data_dir": "", "tokenizer": "",
        "seed": 0, "bootstrap": 10_000,
        # Beside which of the paper's models the tables stand.
        "paper": (
            ("L2 7B", "L2 13B", "L2 70B", "L2-Chat 7B", "L2-Chat 70B", "ChatGPT") if suite == "safety"
            else ("GPT-3.5", "GPT-4", "PaLM 540B", "PaLM-2-L", "L2 70B") if suite == "closed"
            else ("2k context", "4k context") if suite == "context" else ("MHA", "MQA", "GQA") if suite == "attention"
            else ("MPT 7B", "Falcon 7B", "L1 7B", "L2 7B", "L2 13B", "L2 34B", "L2 70B")
        ),
        # Section 4.1 and A.4.7: temperature 0.1 and top-p 0.9 for all safety benchmarks. Judges: "" for none; a directory of a
        # transformers classifier (PATH#LABEL: which of its labels), or ours=PATH for a reward model (of toxicity a safety one:
        # toxic is what it calls unsafe, 1 - sigmoid(score)).
        "decoding": {"temperature": 0.1, "top_p": 0.9, "max_tokens": 64, "chat": False},
        "judges": {"truth": "", "informativeness": "", "toxicity": ""},
        "scoring": {"row": 512, "tokens": 0, "share": 32},
        # Devices that share each matrix (0: as few as hold the model), answers drawn together (0: as many as fit, at most 16 on
        # each shard of the batch), keys and values in 8 bits; and how "hf:" models are run.
        "mesh_tensor": 0, "slots": 0, "int8_cache": False,
        "hf": {"dtype": "auto", "batch_size": 8, "trust_remote_code": False},
    })  # fmt: skip
