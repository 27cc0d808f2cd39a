"""Whose results lie in a directory: models are known by their weights, wherever these lie."""

import json
import shutil

import jax
import numpy as np
import pytest
from small_models import CONFIG

from llama_jax.config import ConfigError, describe
from llama_jax.evals.origin import claim, identity
from llama_jax.model import params
from llama_jax.training.checkpoint import Checkpoints
from llama_jax.training.state import TrainState


def test_a_checkpoint_that_was_trained_on_is_another_model(tmp_path):
    def train(step, seed, at="run"):
        tree = params.init(params.table(CONFIG, head="lm_head"), jax.random.key(seed))
        shutil.rmtree(tmp_path / at, ignore_errors=True)
        state = TrainState(step=np.int32(step), params=tree, opt_state={}, skipped=np.int32(0), skipped_in_a_row=np.int32(0))
        checkpoints = Checkpoints(tmp_path / at / "checkpoints", keep=1)
        checkpoints.save(step, state, {}, {"stage": "sft", "model": describe(CONFIG), "tokenizer": ""})
        checkpoints.close()

    file = tmp_path / "out/model.json"
    for at in ("run", "moved"):
        train(100, 0, at)
        claim(file, tmp_path / at)  # the same weights wherever they lie
    assert identity(tmp_path / "run") == identity(f"{tmp_path}/moved@100") and identity(tmp_path / "run")["weights"]
    train(100, 1)
    with pytest.raises(ConfigError, match="other settings: weights: "):
        claim(file, tmp_path / "run")  # trained anew to the same step
    train(200, 1)
    with pytest.raises(ConfigError, match="other settings: step: 100 -> 200; weights: "):
        claim(file, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    claim(file, tmp_path / "run")  # its results outlive it


def test_a_model_in_files_is_known_by_what_is_in_them(tmp_path):
    rng, source, file = np.random.default_rng(0), tmp_path / "hf", tmp_path / "out/model.json"
    source.mkdir()
    weights = rng.integers(0, 256, 3_000_000, np.uint8)
    (source / "model.safetensors").write_bytes(weights.tobytes())
    (source / "config.json").write_text('{"rope_theta": 1e4}')
    claim(file, source)
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("a copy")
    claim(file, tmp_path / "copy")
    weights[rng.random(len(weights)) < 0.01] ^= 1  # trained on: of the same size, and every hundredth byte another one
    for name, data in (("model.safetensors", weights.tobytes()), ("config.json", b'{"rope_theta": 1e6}')):
        before = (source / name).read_bytes()
        (source / name).write_bytes(data)
        with pytest.raises(ConfigError, match="of another model, or of other settings: weights: "):
            claim(file, source)
        (source / name).write_bytes(before)
    claim(file, source)
    (tmp_path / "a.gguf").write_bytes(b"GGUF 1")
    claim(tmp_path / "out/gguf.json", tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF 2")
    with pytest.raises(ConfigError, match="weights: "):
        claim(tmp_path / "out/gguf.json", tmp_path / "a.gguf")


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    file, cache = tmp_path / "out/model.json", tmp_path / "models--owner--name"

    def download(commit):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs/main").write_text(commit)

    claim(file, "hf:owner/name")  # the first run will download it
    assert "weights" not in json.loads(file.read_text())
    download("1" * 40)
    claim(file, "hf:owner/name")
    assert identity("hf:owner/name") == {"weights": "1" * 40}
    download("2" * 40)
    with pytest.raises(ConfigError, match="weights: '1111.*' -> '2222"):
        claim(file, "hf:owner/name")
