"""What a model wrote for HumanEval and MBPP, kept in a file: it is judged in a second step, which needs no model."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.evals import benchmarks
from llama_jax.evals.request_file import RequestFile


@contextlib.contextmanager
def kept_outcomes(task: Any, path: Path) -> Iterator[None]:
    """Which programs passed goes into a file as it comes, on host 0, and comes from there after a kill: pass@100 of HumanEval
    has 32,800 programs."""
    if jax.process_index() > 0:
        yield
        return
    task.config.process_results.kept = file = RequestFile(path)
    try:
        yield
    finally:
        task.config.process_results.kept = None
        file.close()


class KeptAnswers:
    """A model of the harness whose answers are written to a file, and come from there without the model afterwards.

    It is not derived from the harness's class, as `harness.HarnessModel` is not. `cut` and `less_room` count as the model does,
    also where the answers come from the file.
    """

    rank, world_size, device = 0, 1, None

    def __init__(self, model: Any, path: Path):
        from lm_eval.api.model import LM, CacheHook

        LM.register(type(self))
        self.cache_hook = CacheHook(None)
        self._model, self._path = model, path
        self.cut: dict[str, int] = {}
        self.less_room: dict[str, int] = {}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """The harness's own cache is told nothing: what is kept is here."""

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers. ValueError for a file with answers to other prompts."""
        prompts = [request.args[0] for request in requests]

        def draw() -> dict[str, Any]:
            before = benchmarks.lost(self._model)
            answers = self._model.generate_until(requests)
            after = benchmarks.lost(self._model)
            return {"prompts": prompts, "answers": answers, **{how: after[how] - before[how] for how in after}}

        found = benchmarks.kept(self._path, draw)
        if found["prompts"] != prompts:
            raise ValueError(f"{self._path}: holds answers to other prompts; remove it to draw them again")
        self.cut, self.less_room = {"generate_until": found["cut"]}, {"generate_until": found["less_room"]}
        return found["answers"]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The model's own."""
        return self._model.loglikelihood(requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The model's own."""
        return self._model.loglikelihood_rolling(requests)


def draw(lm: KeptAnswers, task: Any, *, limit: int | None) -> None:
    """Asks for a task's answers, in the order in which the harness does; nothing of them is run."""
    benchmarks.quiet_harness()
    task.build_all_requests(limit=limit)
    lm.generate_until([request for request in task.instances for _ in range(request.repeats)])
