"""lm-evaluation-harness's own command, with our checkpoints in it:

    python -m llama_jax.harness run --model llama_jax --model_args checkpoint=smollm2-135m --tasks hellaswag --limit 100

Every flag is the harness's. `--model_args` takes checkpoint (whatever `llama_jax.load` opens), tokenizer, dtype, chat=True. The
harness finds models in a registry that other packages cannot enter by themselves, so the entry is made here, before it starts.
"""

from typing import Any

from llama_jax.pretrained import load

NAME = "llama_jax"


def register() -> None:
    """Enters `llama_jax` into the harness's registry of models."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry

    from llama_jax.evals.harness import HarnessModel

    class Checkpoint(HarnessModel, LM):
        """Made from the arguments of the harness's command; its batch size and device are not ours to follow."""

        def __init__(self, checkpoint: str, tokenizer: str | None = None, dtype: str = "float32", chat: bool = False, **_: Any):
            super().__init__(load(checkpoint, dtype=dtype, tokenizer=tokenizer), chat=chat)

    if NAME not in model_registry:
        model_registry.register(NAME)(Checkpoint)


def main() -> None:
    """Registers, and hands over."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
