"""Several hosts, as several processes on this machine: they compare notes before they compute, and stop together."""

import dataclasses
import importlib
import os
import socket
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest

from llama_jax.data.rows import rows_fact, write_jsonl
from llama_jax.parallel.hosts import code_version, compare, file_fact, machine_facts
from llama_jax.train import ROWS, STAGES, rows_read, shared_facts

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


def test_rows_of_a_directory_or_pattern_have_one_fingerprint_of_all_their_files(tmp_path):
    rows = tmp_path / "rows"
    for name in ("0", "1", "0[1]"):
        write_jsonl(rows / f"{name}.jsonl", [{"prompt": name}])
    names = [str(rows / name) for name in ("[01].jsonl", "*.jsonl", "0.jsonl", "0[1].jsonl")]
    before = [rows_fact(name) for name in names]
    assert len({*before, "missing"}) == 5 and before[2:] == [file_fact(name) for name in names[2:]]
    write_jsonl(rows / "1.jsonl", [{"prompt": "2"}])
    assert [rows_fact(name) == fact for name, fact in zip(names, before)] == [False, False, True, True]
    assert rows_fact(rows) == "missing"  # several splits, which no stage reads
    (rows / "0[1].jsonl").unlink()
    assert rows_fact(tmp_path) == rows_fact(rows) == rows_fact(f"{rows}/*") == rows_fact(names[0])
    assert rows_fact(rows / "none*") == "missing"
    (rows / "manifest.json").write_text("{}")
    assert rows_fact(rows) == file_fact(rows / "manifest.json")


def test_a_saved_data_set_has_the_fingerprint_of_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name, prompt in (("one", "a"), ("same", "a"), ("other", "b")):
        datasets.Dataset.from_list([{"prompt": prompt}]).save_to_disk(str(tmp_path / name))
    one, same, other = (rows_fact(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other and "missing" not in (one, other)


@dataclasses.dataclass(frozen=True)
class Config:
    tokenizer: str
    start: str
    policy: str
    pools: tuple[str, ...]
    data: dict[str, str]
    chat: str = "llama2"
    system: str = "Answer. " * 100


def test_every_file_and_stage_that_a_config_names_is_compared(tmp_path):
    files = {
        "tokenizer": tmp_path / "words.model", "start": tmp_path / "sft/checkpoints/6/meta/metadata",
        "policy": tmp_path / "sft/checkpoints/3/meta/metadata", "pools.1": tmp_path / "pool.jsonl",
        "data.corpus": tmp_path / "corpus/manifest.json",
    }  # fmt: skip
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    config = Config(
        tokenizer=str(files["tokenizer"]), start=str(tmp_path / "sft"), policy=f"{tmp_path / 'sft'}@3",
        pools=(str(tmp_path / "not made yet"), str(files["pools.1"])), data={"corpus": str(tmp_path / "corpus")},
    )  # fmt: skip
    before = shared_facts(config)
    assert {name.split()[0] for name in before if not name.startswith("config.")} == set(files)
    for field, path in files.items():
        path.write_text("{ }")
        (line,) = compare([before, shared_facts(config)])
        assert line.startswith(f"{field} {tmp_path}") and ": host 1 has " in line
        path.write_text("{}")
    (line,) = compare([before, shared_facts(dataclasses.replace(config, chat="template"))])
    assert line == f'config.chat: host 1 has "template", host 0 has "{config.chat}"'


def test_only_fields_of_rows_may_be_directories_or_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("llama2", "rows"):
        write_jsonl(tmp_path / name / "0.jsonl", [{"prompt": name}])
    config = Config(
        tokenizer="*/0.jsonl", start="rows", policy="", pools=("llama2",), system="What is it?",
        data={"train": "rows", "held_out": "*/0.jsonl", "chat": "llama2", "validation": "llama2", "others": "llama2"},
    )  # fmt: skip
    before = shared_facts(config)
    measured = {"data.held_out */0.jsonl", "data.validation llama2", "data.others llama2"}
    assert {name for name in before if not name.startswith("config.")} == {"data.train rows", *measured}
    write_jsonl(tmp_path / "rows" / "0.jsonl", [{"prompt": "others"}])
    lines = compare([before, shared_facts(config)])  # the config's own fields are alike
    assert [line.partition(":")[0] for line in lines] == ["data.held_out */0.jsonl", "data.train rows"]
    assert set(rows_read(before)) == {"data.train rows"}  # what is only measured may change in a run's life


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_a_stage_that_names_data_is_one_of_rows(stage):
    module, name = STAGES[stage]
    data = typing.get_type_hints(getattr(importlib.import_module(module), name))["data"]
    named = {field for field, kind in typing.get_type_hints(data).items() if str in (kind, *typing.get_args(kind))}
    assert named - {"corpus", "weights"} <= ROWS and (named & ROWS or stage == "pretrain")


def test_compilers_and_what_they_are_told_are_compared(monkeypatch):
    before = machine_facts()
    assert {"code", "jax", "jaxlib", "compiler", "local devices"} < set(before)
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, f" --b=1   --a=2 {os.environ.get(name, '')}")
        (line,) = compare([before, machine_facts()])
        assert line.startswith(f"{name}: host 1 has --a=2 --b=1"), line
        monkeypatch.undo()


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
