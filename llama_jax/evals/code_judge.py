"""Judges the programs of HumanEval and MBPP by running them (Table 21), each once, and keeps which of them passed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from llama_jax.evals import request_file
from llama_jax.evals.request_file import RequestFile
from llama_jax.evals.sandbox import Limits, Outcome, pass_at_k, run_all
from llama_jax.parallel.hosts import from_host_0
from llama_jax.training.metrics import Progress

_AT_ONCE = 256  # programs


@dataclasses.dataclass
class CodeJudge:
    """pass@k of the answers to a problem, by running them; `programs` makes whole programs of a problem and its answers.

    `passed`: what is known of programs that were run; `run` adds those of many problems, as many at once as there are
    processors, on the first host. `kept`: the file where that is put as it comes, and looked for first, so that a kill costs a
    second's programs.
    """

    programs: Callable[[Any, list[str]], list[str]]
    k: tuple[int, ...]
    name: str = ""
    allowed: bool = False
    passed: dict[str, bool] = dataclasses.field(default_factory=dict)
    kept: RequestFile | None = None

    def run(self, problems: Sequence[tuple[Any, Any]]) -> None:
        """Runs the programs of (problem, answers) that were not run yet. ValueError where nothing may be run."""
        if not self.allowed:
            raise ValueError(f"{self.name} runs code that the model writes, in a sandbox: --run_code allows it")
        wanted = [program for doc, answers in problems for program in self.programs(doc, _listed(answers))]
        new = [program for program in dict.fromkeys(wanted) if program not in self.passed]
        if not new:
            return
        # A program of one host is not run on the others too: a model's answers are the same everywhere. They hear of some
        # hundreds at a time, for nobody waits for ever.
        with Progress(len(new), f"{self.name}: programs run", "program", quiet=jax.process_index() > 0) as progress:
            for start in range(0, len(new), _AT_ONCE):
                some = new[start : start + _AT_ONCE]
                outcomes = from_host_0(lambda some=some: self._outcomes(some, progress))
                self.passed |= dict(zip(some, outcomes, strict=True))

    def _outcomes(self, programs: Sequence[str], progress: Progress) -> list[bool]:
        """Which of some programs pass; those that `kept` does not know are run."""
        limits = Limits()
        keys = {program: request_file.key("program", (program,), dataclasses.asdict(limits)) for program in programs}
        held = self.kept.known(list(keys.values())) if self.kept is not None else {}
        passed = {program: held[key] for program, key in keys.items() if key in held}
        progress.update(len(passed))

        def done(program: str, outcome: Outcome) -> None:
            passed[program] = outcome.passed
            if self.kept is not None:
                self.kept.put(keys[program], outcome.passed)
            progress.update()

        try:
            run_all([program for program in programs if program not in passed], limits, done=done)
        finally:
            if self.kept is not None:
                self.kept.commit()
        return [passed[program] for program in programs]

    def __call__(self, doc: Any, results: list[Any]) -> dict[str, float]:
        """What the harness asks for each problem."""
        answers = _listed(results[0])
        self.run([(doc, answers)])
        right = sum(self.passed[program] for program in self.programs(doc, answers))
        return {f"pass@{k}": pass_at_k(len(answers), right, k) for k in self.k}


def _listed(answers: Any) -> list[str]:
    return answers if isinstance(answers, list) else [answers]
