"""lm-evaluation-harness's own command, with our checkpoints in it:

    python -m llama_jax.harness run --model llama_jax --model_args checkpoint=smollm2-135m --tasks hellaswag --limit 100

Every flag is the harness's. `--model_args` takes checkpoint (whatever `llama_jax.load` opens), tokenizer, dtype, mesh_tensor,
chat=True, seed, slots, int8_cache=True (see `configs/evaluate.py`); other names are refused. The harness finds models in a
registry that other packages cannot enter by themselves, so the entry is made here, before it starts. It runs in one process.
"""

import difflib
import inspect
import sys
from typing import Any

from llama_jax.config import ConfigError
from llama_jax.convert import one_process
from llama_jax.parallel.host import device_memory
from llama_jax.pretrained import load

NAME = "llama_jax"
_NOT_OURS = ("batch_size", "max_batch_size", "device")  # what the harness adds to the arguments of any model


def register() -> None:
    """Enters `llama_jax` into the harness's registry of models."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry

    from llama_jax.evals.harness import HarnessModel

    class Checkpoint(HarnessModel, LM):
        """Made from the arguments of the harness's command; its batch size and device are not ours to follow."""

        def __init__(
            self, checkpoint: str = "", tokenizer: str | None = None, dtype: str = "compute", mesh_tensor: int = 0,
            chat: bool = False, seed: int = 0, slots: int = 0, int8_cache: bool = False, **more: Any,
        ):  # fmt: skip
            known = [name for name in inspect.signature(Checkpoint).parameters if name != "more"]
            for name in (name for name in more if name not in _NOT_OURS):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}"
                raise ConfigError(f"model_args: {name!r} is unknown; {hint}")
            if not checkpoint:
                raise ConfigError("model_args: checkpoint is missing")
            super().__init__(
                load(checkpoint, dtype=dtype, tokenizer=tokenizer, mesh_tensor=mesh_tensor), chat=chat, seed=seed, slots=slots,
                int8_cache=int8_cache, memory=device_memory(),
            )  # fmt: skip

    if NAME not in model_registry:
        model_registry.register(NAME)(Checkpoint)


def main() -> None:
    """Registers, and hands over."""
    try:
        one_process("harness")
    except ValueError as error:
        sys.exit(f"error: {error}")
    register()
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
