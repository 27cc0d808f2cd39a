"""Every test runs on 8 virtual CPU devices; tests that shard make their mesh themselves, the others use one device."""

import dataclasses
import os
import time

import jax
import pytest

from llama_jax.model.config import SIZES, ModelConfig

# Tests compile a lot and compute little: without LLVM's optimisation a step compiles 3 to 10 times as fast.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
jax.config.update("jax_num_cpu_devices", 8)  # before anything touches a device


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="how often a test kills a stage of alignment (20)")
    parser.addoption("--until", type=float, metavar="TIME", help="skip tests that did not begin by then (date +%%s)")


def pytest_runtest_setup(item):
    until = item.config.getoption("--until")
    if until and time.time() > until:
        pytest.skip("left out: no time is left for it")


@pytest.fixture
def kills(pytestconfig) -> int:
    return pytestconfig.getoption("--kills")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """One cache of compiled programs for all workers of the session and the commands that they start.

    Many tests compile the same small stages, and to compile is most of what they do.
    """
    here = tmp_path_factory.getbasetemp()
    shared = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")
    settings = {"jax_compilation_cache_dir": str(shared / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def compiled():
    """How many programs XLA has compiled so far in this test, whatever asked for them."""
    counted = []

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(counted)
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tokenizer of tests/small_models.py."""
    from small_models import trained_tokenizer  # after the settings above

    return trained_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def model(tokenizer):
    """A chat model of tests/small_models.py."""
    from small_models import made

    return made(tokenizer, "lm_head")


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """Two layers with grouped queries, much smaller than the preset: compiles in a second."""
    return dataclasses.replace(
        SIZES["tiny"], vocab_size=96, layers=2, width=32, heads=4, kv_heads=2, head_size=8, ffn=64, max_length=32
    )
