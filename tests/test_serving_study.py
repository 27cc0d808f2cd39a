"""The study of serving: equal sizes, batches, memory that is too small, kept results, and the figure."""

import dataclasses
import json

import jax
import pytest

from configs import serving_study as configs
from llama_jax import serving_study
from llama_jax.config import ConfigError, parse
from llama_jax.evals import serving_figure
from llama_jax.model import params
from llama_jax.model.config import SIZES
from llama_jax.parallel.mesh import MeshConfig, make_mesh
from llama_jax.serving_study import ServingConfig, batches, run, variants


def parameters(model):
    return params.count(params.table(model, head="lm_head"))


def settings(**changes):
    config = configs.get_config("smoke")
    config.update({"prompts": (6,), "new_tokens": 3, "largest": 2, **changes})
    return parse(ServingConfig, config)


@pytest.mark.parametrize("name", ["7b", "llama1-33b", "tiny", "nano"])
def test_variants_have_as_many_parameters(name):
    found = variants(SIZES[name], longest=4096)
    heads = SIZES[name].heads
    assert [one.kv_heads for one in found.values()] == [heads, {4: 2, 32: 8, 52: 4}[heads], 1]
    sizes = [parameters(one) for one in found.values()]
    # What rounding to 64 columns leaves: less than half a column block in each layer.
    assert all(abs(one - sizes[0]) <= 3 * SIZES[name].width * 32 * SIZES[name].layers for one in sizes)
    assert found["MQA"].ffn >= found["GQA"].ffn >= found["MHA"].ffn == SIZES[name].ffn


def test_batches_double_from_what_the_mesh_divides():
    assert list(batches(9, least=1)) == [1, 2, 4, 8]
    assert list(batches(8, least=4)) == [4, 8]


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), devices=jax.devices()[:1])


def test_a_batch_is_measured_or_does_not_fit(mesh):
    config, model = settings(), variants(SIZES["nano"], longest=16)["GQA"]
    with jax.set_mesh(mesh):
        weights = serving_study.weights_of(model, config.compute)
        point = serving_study.measure(model, weights, config, prompt=6, batch=2, memory=10**9)
        # Less than the weights alone.
        assert serving_study.measure(model, weights, config, prompt=6, batch=2, memory=2 * parameters(model)) is None
    assert point.batch == 2 and 0 < point.seconds < 60


def test_a_study_is_kept_and_bound_to_its_config(tmp_path, monkeypatch, mesh):
    asked = []

    def measure(model, weights, config, *, prompt, batch, memory):
        asked.append((model.kv_heads, batch))
        return serving_study.Point(batch, 0.5 * batch) if batch * model.kv_heads <= memory else None

    monkeypatch.setattr(serving_study, "measure", measure)
    monkeypatch.setattr(serving_study, "weights_of", lambda model, compute: None)
    found = run(settings(largest=4), tmp_path, mesh, memory=8)
    assert asked == [(4, 1), (4, 2), (4, 4), (2, 1), (2, 2), (2, 4), (1, 1), (1, 2), (1, 4)]
    lines = {name: one["prompts"]["6"] for name, one in found["variants"].items()}
    assert [point["batch"] for point in lines["MHA"]["points"]] == [1, 2] and lines["MHA"]["stopped"] == "memory"
    assert [point["batch"] for point in lines["MQA"]["points"]] == [1, 2, 4] and lines["MQA"]["stopped"] == "largest"
    assert "MHA: the next batch does not fit" in serving_figure.report(found)
    assert json.loads((tmp_path / "serving.json").read_text()) == json.loads(json.dumps(found))
    # One variant is missing, as after a kill: it alone is measured again.
    del found["variants"]["MQA"]
    (tmp_path / "serving.json").write_text(json.dumps(found))
    again = run(settings(largest=4), tmp_path, mesh, memory=8)
    assert asked[9:] == [(1, 1), (1, 2), (1, 4)]
    assert again["variants"]["MHA"] == json.loads(json.dumps(found["variants"]["MHA"]))
    with pytest.raises(ConfigError, match=r"holds another study: config.new_tokens"):
        run(settings(largest=4, new_tokens=4), tmp_path, mesh)
    nothing = run(settings(), tmp_path / "none", mesh, memory=0)
    assert all(one["prompts"]["6"] == {"points": [], "stopped": "memory"} for one in nothing["variants"].values())
    assert serving_figure.curves(nothing).png()


def test_latency_and_throughput_by_hand():
    point = {"batch": 512, "seconds": 11.4}  # the paper's last MHA batch at 256 tokens: about 89 ms, 45 queries/s
    assert serving_figure.latency(point, 128) == pytest.approx(89.06, abs=0.01)
    assert serving_figure.throughput(point) == pytest.approx(44.9, abs=0.05)
    found = {
        "config": {"size": "tiny", "prompts": [256], "new_tokens": 128}, "device": "cpu", "devices": 1,
        "variants": {
            name: {"kv_heads": heads, "ffn": 704, "parameters": 7e6,
                   "prompts": {"256": {"points": [{"batch": 1, "seconds": 1.28}, point][:count], "stopped": "memory"}}}
            for name, heads, count in (("MHA", 4, 1), ("MQA", 1, 2))
        },
    }  # fmt: skip
    text = serving_figure.report(found)
    assert "| 1 | 10 | 0.781 | 10 | 0.781 |" in text and "| 512 |  |  | 89.1 | 44.9 |" in text
    assert "MHA 89 ms/token, 45 queries/s" in text
    assert "MQA 44.9 queries/s at most" in serving_figure.curves(found).alt


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"prompts": ()}, "prompts: expected lengths, got none"), ({"largest": 0}, "largest: expected at least 1, got 0"),
     ({"size": "8b"}, "model '8b' is unknown")],
)  # fmt: skip
def test_configs_that_cannot_run(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)
    assert dataclasses.is_dataclass(settings())
