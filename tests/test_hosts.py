"""Several hosts, as several processes on this machine: they compare notes before they compute, and stop together."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from llama_jax.parallel.hosts import code_version, compare, file_fact

ROOT = Path(__file__).parents[1]


def launch(script, count=2, **environment):
    """Runs a script in `count` processes that form a cluster; [(return code, stdout, stderr)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
                 "JAX_PROCESS_ID": str(index), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment},
        )
        for index in range(count)
    ]  # fmt: skip
    return [(process.wait(timeout=240), *process.communicate()) for process in processes]


def test_compare_names_the_host_that_differs():
    same = {"code": "a", "config": "x"}
    assert compare([same, same]) == []
    assert compare([same, same, {**same, "code": "b"}]) == ["code: host 2 has b, the others have a"]
    assert compare([{"code": "a"}, {"code": "b"}]) == ["code: host 1 has b, host 0 has a"]
    assert compare([same, {"code": "a"}, same]) == ["config: host 1 has (absent), the others have x"]


def test_fingerprints(tmp_path):
    assert file_fact(tmp_path) == "missing"
    (tmp_path / "manifest.json").write_text("{}")
    one = file_fact(tmp_path)
    (tmp_path / "manifest.json").write_text("{ }")
    assert len({one, file_fact(tmp_path), "missing"}) == 3 and file_fact(tmp_path / "manifest.json") == file_fact(tmp_path)
    assert code_version() == code_version()


def test_hosts_that_differ_are_refused_and_a_signal_to_one_stops_all_at_one_step():
    script = """
        import os, signal, time
        from llama_jax.parallel.mesh import start_distributed
        start_distributed()
        import jax
        from llama_jax.parallel.hosts import HostsDiffer, preflight, stop_agreed
        me = jax.process_index()
        assert jax.process_count() == 2
        preflight({"config": "same"})
        try:
            preflight({"config": "same", "data": f"corpus {me}"})
        except HostsDiffer as error:
            print(error)
        for step in range(10_000):
            if stop_agreed():
                break
            if step == 5 and me == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        print("stopped at", step)
    """
    done = launch(script)
    assert [code for code, _, _ in done] == [0, 0], done
    (first, first_step), (second, second_step) = (out.strip().splitlines()[-2:] for _, out, _ in done)
    assert first == second == "the hosts of this run differ; data: host 1 has corpus 1, host 0 has corpus 0"
    assert first_step == second_step and 5 < int(first_step.split()[-1]) < 9_999
