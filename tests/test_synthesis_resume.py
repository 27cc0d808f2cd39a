"""Ghost Attention and context distillation killed by SIGKILL while they sample, score, fine-tune and save, as the stages of
test_rl_resume.py: the same rows and the same parameters to the bit as without kills.
"""

import pytest
from test_rl_resume import kill_again_and_again

from llama_jax.data.rows import read_jsonl

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage, kept", [("ghost", "ghost.jsonl"), ("distill", "kept.jsonl")])
def test_killed_again_and_again_it_ends_with_the_same_bits(stage, kept, kills, tmp_path):
    kill_again_and_again(kills, stage, tmp_path, {"rollout", "update", "save"} | ({"scoring"} if stage == "distill" else set()))
    assert any(True for _ in read_jsonl(tmp_path / "killed" / kept))  # or only the other dialogs would have been trained
