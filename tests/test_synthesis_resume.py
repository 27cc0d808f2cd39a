"""Ghost Attention and context distillation killed by SIGKILL while they sample, score, fine-tune and save, as the stages of
test_rl_resume.py: the same rows and the same parameters to the bit as without kills.
"""

import pytest
from test_rl_resume import kill_twenty_times

from llama_jax.data.rows import read_jsonl

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage, kept", [("ghost", "ghost.jsonl"), ("distill", "kept.jsonl")])
def test_killed_twenty_times_it_ends_with_the_same_bits(stage, kept, tmp_path):
    kill_twenty_times(stage, tmp_path, {"rollout", "update", "save"} | ({"scoring"} if stage == "distill" else set()))
    assert any(True for _ in read_jsonl(tmp_path / "killed" / kept))  # or only the other dialogs would have been trained
