"""Runs whose files lie in a bucket, against a server of Google Cloud Storage's API on this machine (`bucket_server`).

Real clients throughout: gcsfs for our own files, TensorStore and Orbax for checkpoints, ArrayRecord for blocks.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("gcsfs") is None:  # not imported: it reads the environment that the fixture sets
    pytest.skip("needs gcsfs (extra [gcs])", allow_module_level=True)

from bucket_server import BucketServer  # noqa: E402 - needs what gcsfs brings
from test_corpus_restart import config_in, files, killed  # noqa: E402

from llama_jax import corpus  # noqa: E402
from llama_jax.config import ConfigError  # noqa: E402
from llama_jax.corpus_build import stages  # noqa: E402
from llama_jax.corpus_build.manifest import (  # noqa: E402
    FIELDS,
    CorpusError,
    check_manifest,
    file_sha256,
    read_manifest,
    write_manifest,
)
from llama_jax.corpus_build.stages import Stages, unfinished  # noqa: E402
from llama_jax.data.blocks import block_ids, block_record  # noqa: E402
from llama_jax.data.loader import BlockSource  # noqa: E402
from llama_jax.data.sources import read_jsonl, read_prompts, write_jsonl  # noqa: E402
from llama_jax.data.tokenizer import Tokenizer  # noqa: E402
from llama_jax.files import atomic_write, write_json  # noqa: E402
from llama_jax.interop.tokenizer_files import keep  # noqa: E402
from llama_jax.parallel.output import worked_in  # noqa: E402
from llama_jax.paths import Mirror, absolute, append, move, place, relative, sizes, store  # noqa: E402
from llama_jax.training import lease as lease_module  # noqa: E402
from llama_jax.training.lease import Lease  # noqa: E402
from llama_jax.training.metrics import MetricWriter, read_metrics  # noqa: E402
from llama_jax.training.saved import written_steps  # noqa: E402
from llama_jax.training.workdir import claim, go_back, own  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server():
    with BucketServer("bucket", forbidden=("closed",)) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(server):
    """The only bucket, empty."""
    server.buckets["bucket"].clear()
    return server.buckets["bucket"]


def names(bucket):
    return sorted(bucket)


# ---- files ----


def test_a_path_is_local_or_an_address():
    assert type(place("a/b")) is type(Path("a/b")) and place("gs://bucket/c//d/../e").as_posix() == "gs://bucket/c/e"
    assert str(place("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run" and absolute("run") == Path.cwd() / "run"
    assert relative("gs://bucket/x/base", "gs://bucket/x/run") == "../base" and relative("x/base", "x/run") == "../base"
    assert relative("gs://bucket/base", "gs://c/run") == "gs://bucket/base"
    assert relative("/disk/base", "gs://bucket/run") == "/disk/base"
    assert str(place(place("gs://bucket/x/run") / "../base")) == "gs://bucket/x/base"


def test_tensorstore_is_told_where_a_directory_lies():
    assert store("/a/b") == {"driver": "file", "path": "/a/b/"}
    assert store("gs://bucket/run/0/params/") == {"driver": "gcs", "bucket": "bucket", "path": "run/0/params/"}


def test_files_appear_whole_in_a_bucket(bucket):
    with pytest.raises(RuntimeError), atomic_write("gs://bucket/dir/file") as file:
        file.write(b"half of it")
        raise RuntimeError
    assert not bucket
    with atomic_write("gs://bucket/dir/file") as file:
        file.write(b"x" * (9 << 20))
    assert len(bucket["dir/file"][0]) == 9 << 20
    write_json("gs://bucket/dir/value.json", {"a": 1})
    assert json.loads(bucket["dir/value.json"][0]) == {"a": 1}
    for line in ("one\n", "two\n"):
        append(place("gs://bucket/dir/lines"), line)
    assert bucket["dir/lines"][0] == b"one\ntwo\n"
    assert sizes(place("gs://bucket/dir")) == {"file": 9 << 20, "value.json": len(bucket["dir/value.json"][0]), "lines": 8}
    move(place("gs://bucket/dir"), place("gs://bucket/aside/7"))
    assert names(bucket) == ["aside/7/file", "aside/7/lines", "aside/7/value.json"]


def test_a_mirror_uploads_what_has_changed_and_fetches_what_is_appended_to(bucket, server):
    mirror = Mirror("gs://bucket/logs")
    (mirror.local / "sub").mkdir()
    (mirror.local / "sub" / "x").write_text("1")
    mirror.send()
    generation = bucket["logs/sub/x"][1]
    mirror.send()
    assert bucket["logs/sub/x"] == (b"1", generation), "uploaded again, although nothing has changed"
    (mirror.local / "sub" / "x").write_text("12")
    mirror.close()
    assert bucket["logs/sub/x"][0] == b"12" and not mirror.local.exists()
    again = Mirror("gs://bucket/logs")
    assert again.fetch("sub/../missing").exists() is False
    (again.local / "sub").mkdir()
    assert again.fetch("sub/x").read_text() == "12"
    again.close()


def test_a_command_works_on_this_machine_and_goes_on_from_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.parallel.output.seconds_between_writes", lambda path: 0.05)
    with pytest.raises(KeyboardInterrupt), worked_in("gs://bucket/evaluation") as here:
        (here / "tasks").mkdir()
        (here / "tasks" / "piqa.json").write_text("1")
        (here / "requests.db").write_text("half")
        while "evaluation/tasks/piqa.json" not in bucket:
            time.sleep(0.02)
        assert "evaluation/requests.db" not in bucket  # while it is written to
        raise KeyboardInterrupt
    assert not here.exists() and bucket["evaluation/requests.db"][0] == b"half"
    with worked_in("gs://bucket/evaluation") as here:
        assert (here / "tasks" / "piqa.json").read_text() == "1" and (here / "requests.db").read_text() == "half"
        generation = bucket["evaluation/tasks/piqa.json"][1]
        (here / "report.md").write_text("# Evaluation")
    assert bucket["evaluation/report.md"][0] == b"# Evaluation" and bucket["evaluation/tasks/piqa.json"][1] == generation
    with pytest.raises(ValueError, match="--output=s3://bucket/x: expected a directory, or gs://bucket/directory"):
        worked_in("s3://bucket/x").__enter__()
    with worked_in(tmp_path / "local") as here:
        assert here == tmp_path / "local"
    with pytest.raises(FileNotFoundError, match="the bucket 'nowhere' does not exist"), worked_in("gs://nowhere/x"):
        pass


def test_metrics_survive_in_a_bucket_up_to_the_last_sync(bucket):
    with MetricWriter("gs://bucket/run", resume_step=0) as writer:
        for step in range(4):
            writer.write(step, {"loss": float(step)})
        writer.sync()
        kept = dict(bucket)
        writer.write(4, {"loss": 4.0})
    bucket.clear()
    bucket |= kept  # what a kill after the sync leaves
    with MetricWriter("gs://bucket/run", resume_step=3) as writer:
        writer.write(3, {"loss": 30.0})
    np.testing.assert_array_equal(read_metrics("gs://bucket/run")["loss"], [0, 1, 2, 30])
    assert any(name.startswith("run/tensorboard/events") for name in bucket)


# ---- data ----


def test_rows_and_blocks_are_read_from_a_bucket(bucket, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    prompts = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(3)]
    for name in ("prompts.jsonl", "prompts.jsonl.gz"):
        write_jsonl(f"gs://bucket/data/{name}", prompts)
        assert [row["messages"] for row in read_prompts(f"gs://bucket/data/{name}")] == [row["messages"] for row in prompts]
        assert next(iter(read_jsonl(f"gs://bucket/data/{name}")))[0] == f"gs://bucket/data/{name}:1"
    with pytest.raises(FileNotFoundError, match="gs://bucket/data/none.jsonl: expected a JSONL file, found nothing"):
        read_prompts("gs://bucket/data/none.jsonl")
    writer = ArrayRecordWriter(str(tmp_path / "web"), "group_size:1")
    for i in range(8):
        writer.write(block_record([i] * 5, 4, 96))
    writer.close()
    bucket["corpus/web"] = ((tmp_path / "web").read_bytes(), 1)
    source = BlockSource({"web": ["gs://bucket/corpus/web"]}, {"web": 1.0}, batch_size=4, seed=0)
    local = BlockSource({"web": [tmp_path / "web"]}, {"web": 1.0}, batch_size=4, seed=0)
    for step in range(3):
        np.testing.assert_array_equal(source.batch(step).tokens, local.batch(step).tokens)
    assert block_ids(source._records["web"][3]).tolist() == [3] * 5
    with pytest.raises(ValueError, match="source web: cannot read .*No such object"):
        BlockSource({"web": ["gs://bucket/corpus/none"]}, {"web": 1.0}, batch_size=4, seed=0)


def test_a_tokenizer_in_a_bucket_is_kept_beside_checkpoints(bucket, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    declared = {"chat_template": "{{ messages[0]['content'] }}", "bos_token": "<s>", "eos_token": "</s>"}
    laid = {"tokenizer.json": words.to_str(), "tokenizer_config.json": json.dumps(declared)}
    for name, text in laid.items():
        bucket[f"words/{name}"] = (text.encode(), 1)
    original = Tokenizer("gs://bucket/words")
    for workdir in (tmp_path, place("gs://bucket/run")):
        (workdir / "tokenizer.model").write_bytes(b"another")
        keep(original, workdir)
        kept = Tokenizer(workdir)
        assert (kept.fingerprint, kept.chat_template) == (original.fingerprint, declared["chat_template"])
        assert {name: (workdir / name).read_text() for name in laid} == laid and not (workdir / "tokenizer.model").exists()
    before = bucket["run/tokenizer.json"]
    keep(original, place("gs://bucket/run"))
    assert bucket["run/tokenizer.json"] == before, "uploaded again, although nothing has changed"


def test_a_corpus_in_a_bucket_is_compared_with_its_manifest(bucket, tmp_path):
    class Known:
        fingerprint, path = "f" * 64, "tokenizer"

    (tmp_path / "web").write_bytes(b"shard")
    values = {"tokenizer": Known.fingerprint, "block_length": 4, "sources": {}}
    write_manifest(tmp_path, {**dict.fromkeys(FIELDS, 0), **values})
    for path in tmp_path.iterdir():
        bucket[f"corpus/{path.name}"] = (path.read_bytes(), 1)
    assert check_manifest("gs://bucket/corpus", Known)["block_length"] == 4
    assert file_sha256("gs://bucket/corpus/web") == file_sha256(tmp_path / "web")
    bucket["corpus/web"] = (b"shard and more", 2)
    with pytest.raises(CorpusError, match="gs://bucket/corpus/web: damaged, expected 5 bytes, got 14"):
        check_manifest("gs://bucket/corpus", Known)
    del bucket["corpus/web"]
    with pytest.raises(CorpusError, match="gs://bucket/corpus/web: expected a shard of the corpus, found nothing"):
        check_manifest("gs://bucket/corpus", Known)


# ---- corpora that are built in a bucket ----


def in_bucket(bucket):
    return {name.removeprefix("corpus/"): content for name, (content, _) in bucket.items()}


def test_a_corpus_built_in_a_bucket_has_the_bytes_of_a_local_one(bucket, tmp_path):
    config = config_in(tmp_path)
    manifest = corpus.run(config, "gs://bucket/corpus")
    assert corpus.run(config, tmp_path / "local") == manifest
    assert in_bucket(bucket) == files(tmp_path / "local"), "something else stayed in the bucket, or bytes differ"
    bucket[".corpus.unfinished/work/cleaned/web.pickle"] = (b"x", 1)  # of a build that was killed at its very end
    assert corpus.run(config, "gs://bucket/corpus") == manifest, "expected to be checked, not built again"
    assert in_bucket(bucket) == files(tmp_path / "local")
    with pytest.raises(ConfigError, match="gs://bucket/corpus: was built with another config: seed"):
        corpus.run(dataclasses.replace(config, seed=1), "gs://bucket/corpus")
    with pytest.raises(FileExistsError, match="gs://bucket/corpus: exists"), unfinished("gs://bucket/corpus", None):
        raise AssertionError("entered")


def test_a_build_killed_in_a_bucket_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(bucket, tmp_path):
    killed(tmp_path, ["after:refined", "write:web-00000-of-00002.array_record", "publish:"], output="gs://bucket/corpus")
    assert {name for name in bucket if name.startswith("corpus/")} == {
        "corpus/tokenizer.model", "corpus/blocks/docs-00000-of-00002.array_record",
    }  # fmt: skip
    with pytest.raises(CorpusError, match="expected a corpus .*, found nothing"):
        read_manifest("gs://bucket/corpus")
    config, kept = config_in(tmp_path), dict(bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "once", lambda self, name, make, real=Stages.once: real(self, name, must_not_run))
        corpus.run(config, "gs://bucket/corpus")
    corpus.run(config, tmp_path / "local")
    assert in_bucket(bucket) == files(tmp_path / "local")
    bucket.clear()
    bucket |= kept
    with unfinished("gs://bucket/corpus", {"of": "other inputs"}) as (directory, _):
        assert names(bucket) == [".corpus.lock", ".corpus.unfinished/fingerprint.json"], "the half that had its name stays"
        write_json(directory / "manifest.json", {})
    assert names(bucket) == ["corpus/manifest.json"]


def must_not_run():
    raise AssertionError("a whole product was made again")


def test_two_builds_of_one_corpus_in_a_bucket_do_not_meet(bucket, monkeypatch):
    monkeypatch.setattr(lease_module, "_is_dead", lambda owner: False)  # both are this process
    monkeypatch.setattr(stages, "Lease", functools.partial(Lease, period=0.2, patience=3))
    with unfinished("gs://bucket/corpus", {"of": "this"}) as (directory, products):
        products.once("part", lambda: 7)
        (directory / "manifest.json").write_text("{}")
        for of in ({"of": "this"}, {"of": "that"}, None):
            with pytest.raises(ValueError, match="^gs://bucket/corpus: another build is writing here [(]pid "), \
                    unfinished("gs://bucket/corpus", of):  # fmt: skip
                raise AssertionError("entered")
        assert (directory / "manifest.json").exists() and products.once("part", must_not_run) == 7
    assert in_bucket(bucket) == {"manifest.json": b"{}"}


def test_errors_and_interruptions_leave_in_a_bucket_what_is_done_and_nothing_else(bucket):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), unfinished("gs://bucket/corpus", {"of": "this"}):
            raise error  # before anything was made
        assert not names(bucket)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), unfinished("gs://bucket/corpus", {"of": "this"}) as (_, products):
            products.once("part", lambda: 7)
            raise error
        assert ".corpus.unfinished/work/part.pickle" in bucket and ".corpus.lock" not in bucket
    with unfinished("gs://bucket/corpus", {"of": "this"}) as (directory, products):
        assert products.once("part", must_not_run) == 7
        with atomic_write(directory / "manifest.json") as file:
            file.write(b"{}")
    assert names(bucket) == ["corpus/manifest.json"]


def test_what_others_keep_in_a_bucket_is_no_place_for_a_corpus(bucket):
    bucket["corpus/mine"] = (b"x", 1)
    bucket[".corpus.unfinished/corpus/mine"] = (b"another size", 1)
    kept = dict(bucket)
    for output, error, problem in (
        ("gs://bucket/corpus", FileExistsError, "gs://bucket/corpus: exists"),
        ("gs://bucket", ValueError, "gs://bucket: expected a directory in the bucket"),
    ):
        with pytest.raises(error, match=problem), unfinished(output, None):
            raise AssertionError("entered")
    assert bucket == kept


@pytest.mark.slow
def test_beam_workers_build_a_corpus_in_a_bucket_after_kills(bucket, tmp_path):
    pytest.importorskip("apache_beam", reason="needs apache-beam: pip install 'llama_jax[data]'")
    config = config_in(tmp_path)
    points = ["after:documents", "after:files/web-00000-of-00002.array_record"]
    killed(tmp_path, points, beam=True, output="gs://bucket/corpus")
    assert any(name.startswith(".corpus.unfinished/documents/web/") for name in bucket)
    corpus.run(config, "gs://bucket/corpus", beam=[])
    corpus.run(config, tmp_path / "local")
    assert in_bucket(bucket) == files(tmp_path / "local")
    bucket.clear()  # and by processes that share nothing but the bucket
    corpus.run(config, "gs://bucket/corpus", beam=["--direct_num_workers=2", "--direct_running_mode=multi_processing"])
    assert in_bucket(bucket) == files(tmp_path / "local")


# ---- the workdir ----


def test_two_runs_in_one_bucket_directory_are_told_of_each_other(bucket, monkeypatch):
    monkeypatch.setattr(lease_module, "_is_dead", lambda owner: False)  # both are this process
    lock = place("gs://bucket/run/.lock")
    first, second = Lease(lock, period=0.2, patience=3), Lease(lock, period=0.2, patience=3)
    assert first.take() == ""
    assert second.take() == f"pid {os.getpid()} on {socket.gethostname()}"
    first.release()
    assert not bucket
    assert second.take() == ""
    second.release()
    assert not bucket


def left_behind(**changes):
    owner = {"host": socket.gethostname(), "pid": 2**22 + 1, "owner": "pid 7 on there", "name": "x", "beat": 3}
    return json.dumps(owner | changes).encode(), 1


def test_the_lock_of_a_dead_run_is_taken_over(bucket):
    bucket["run/.lock"] = left_behind()
    lease, begun = Lease(place("gs://bucket/run/.lock"), period=0.2, patience=60), time.monotonic()
    assert lease.take() == "" and time.monotonic() - begun < 30, "a process of this machine that has ended is not waited for"
    lease.release()
    bucket["run/.lock"] = left_behind(host="another")
    lease = Lease(place("gs://bucket/run/.lock"), period=0.2, patience=1)
    assert lease.take() == "" and lease.name in bucket["run/.lock"][0].decode()
    lease.release()


def test_a_run_whose_workdir_was_taken_over_ends(bucket):
    code = "from llama_jax.paths import place; from llama_jax.training.lease import Lease; import time\n"
    code += "Lease(place('gs://bucket/run/.lock'), period=0.2).take(); print('has it', flush=True); time.sleep(60)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "has it\n"
    bucket["run/.lock"] = left_behind(host="another")
    assert process.wait(timeout=30) == 1
    assert "another run has taken this workdir over" in process.stderr.read()


def test_a_bucket_that_is_missing_or_closed_is_one_sentence(bucket):
    with pytest.raises(ConfigError, match=r"^gs://none/run: the bucket 'none' does not exist$"), own(place("gs://none/run")):
        pass
    with pytest.raises(ConfigError, match="^gs://closed/run: no permission to use the bucket 'closed'"), \
            own(place("gs://closed/run")):  # fmt: skip
        pass


def test_another_config_is_refused_in_a_bucket_too(bucket):
    with own(place("gs://bucket/run")):
        claim(place("gs://bucket/run"), {"lr": 1.0})
        claim(place("gs://bucket/run"), {"lr": 2.0})  # nothing was begun
        bucket["run/checkpoints/2/commit_success.txt"] = (b"", 1)
        with pytest.raises(ConfigError, match="gs://bucket/run was begun with another config"):
            claim(place("gs://bucket/run"), {"lr": 1.0})
    assert "run/.lock" not in bucket


def test_going_back_in_a_bucket_moves_what_came_later_aside(bucket):
    write_json("gs://bucket/run/config.json", {"lr": 1.0})
    for step in (2, 4, 6):
        bucket[f"run/checkpoints/{step}/params/d/x"] = (b"x", 1)
        if step < 6:  # a save that was killed is no checkpoint
            bucket[f"run/checkpoints/{step}/commit_success.txt"] = (b"", 1)
    assert written_steps("gs://bucket/run") == [2, 4]
    for _ in range(2):  # the second time does nothing
        go_back(place("gs://bucket/run"), 2, {"lr": 2.0})
    assert json.loads(bucket["run/config.json"][0]) == {"lr": 2.0}
    aside = {name.removeprefix("run/replaced/1/") for name in bucket if name.startswith("run/replaced/")}
    assert aside == {"config.json", "4/commit_success.txt", "4/params/d/x"}
    assert written_steps("gs://bucket/run") == [2]
    with pytest.raises(ConfigError, match="gs://bucket/run/checkpoints has no such checkpoint"):
        go_back(place("gs://bucket/run"), 4, {"lr": 2.0})


# ---- runs ----


def start(workdir, *more, script="tests/toy_run.py", count=1):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    # Programs that compile in less than a second are kept too: how fast this machine is does not matter.
    kept = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": path, **kept}
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    return [
        subprocess.Popen([sys.executable, script, f"--workdir={workdir}", *more], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                         env=environment | cluster | ({"JAX_PROCESS_ID": str(host)} if cluster else {}))
        for host in range(count)
    ]  # fmt: skip


def ends(processes):
    """Codes and the last words on stderr."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said


def fingerprints(text):
    return json.loads(text)["fingerprints"]


def command(module, *flags):
    done = subprocess.run([sys.executable, "-m", f"llama_jax.{module}", *flags], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_resumes_and_ends_as_on_a_disk(bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # of the tests: a run's own lies in its workdir
    assert ends(start(tmp_path / "local"))[0] == [0]
    whole = fingerprints((tmp_path / "local" / "checkpoints" / "8" / "meta" / "metadata").read_text())
    (process,) = start("gs://bucket/run", "--pause=0.5")
    while "run/checkpoints/3/commit_success.txt" not in bucket:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.wait()
    # What a kill in the middle of a save leaves: files of a step, but not the one that says that it is finished.
    bucket["run/checkpoints/6/meta/metadata"] = (b"{}", 1)
    bucket.pop("run/checkpoints/6/commit_success.txt", None)
    codes, said = ends(start("gs://bucket/run"))
    assert codes == [0], said
    assert fingerprints(bucket["run/checkpoints/8/meta/metadata"][0]) == whole
    log = read_metrics("gs://bucket/run")
    np.testing.assert_array_equal(log["step"], np.arange(8))
    np.testing.assert_array_equal(log["loss"], read_metrics(tmp_path / "local")["loss"])
    attempts = [json.loads(line) for line in bucket["run/attempts.jsonl"][0].splitlines()]
    assert [attempt["from"] for attempt in attempts if "from" in attempt] == [0, 3]
    assert "run/.lock" not in bucket and "run/done.json" in bucket and "run/logs/host-0.log" in bucket
    assert any(name.startswith("run/compiled/") for name in bucket) and not Path("gs:").exists()

    code, out, _ = command("verify", "--workdir=gs://bucket/run")
    assert code == 0 and out.splitlines() == ["checkpoint 6: whole", "checkpoint 8: whole"]
    # A damaged checkpoint is named, kept aside, and made again.
    for name in [name for name in bucket if name.startswith("run/checkpoints/8/params/") and "/d/" in name]:
        content = bytearray(bucket[name][0])
        content[len(content) // 2] ^= 1
        bucket[name] = (bytes(content), 2)
    bucket.pop("run/done.json")
    code, out, said = command("verify", "--workdir=gs://bucket/run")
    # Not always the last line: asyncio may complain of a reader that a damaged file left open.
    assert code == 1 and "checkpoint 8: damaged" in out and "the newest whole one is 6" in said
    codes, said = ends(start("gs://bucket/run"))
    assert codes == [0], said
    assert "checkpoint 8 of gs://bucket/run/checkpoints is damaged" in said[0]
    assert fingerprints(bucket["run/checkpoints/8/meta/metadata"][0]) == whole
    assert any(name.startswith("run/damaged/8/params/") for name in bucket)
    assert b"is damaged" in bucket["run/logs/host-0.log"][0]


@pytest.mark.slow
def test_two_hosts_save_into_one_bucket_and_a_preemption_saves_on_both(bucket, tmp_path):
    assert ends(start(tmp_path / "local", count=2))[0] == [0, 0]
    whole = fingerprints((tmp_path / "local" / "checkpoints" / "8" / "meta" / "metadata").read_text())
    processes = start("gs://bucket/run", "--pause=2", count=2)
    while "run/checkpoints/3/commit_success.txt" not in bucket:
        assert processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes)[0] == [75, 75]
    codes, said = ends(start("gs://bucket/run", count=2))
    assert codes == [0, 0], said
    assert fingerprints(bucket["run/checkpoints/8/meta/metadata"][0]) == whole
    assert {"run/logs/host-0.log", "run/logs/host-1.log"} <= set(bucket)


@pytest.mark.slow
def test_a_bucket_that_cannot_be_used_is_one_line(bucket):
    config = "--config=configs/sft.py:tiny"
    for flag, words in (("gs://none/run", "error: gs://none/run: the bucket 'none' does not exist"),
                        ("gs://closed/run", "error: gs://closed/run: no permission to use the bucket 'closed'")):  # fmt: skip
        code, _, said = command("train", config, f"--workdir={flag}", "--config.tokenizer=none")
        assert code == 1 and said.splitlines()[-1].startswith(words), said
    data = ["--workdir=gs://bucket/run", "--config.tokenizer=gs://closed/tokenizer.model"]
    code, _, said = command("train", config, *data)
    last = said.splitlines()[-1]
    assert code == 1 and last.startswith("error: ") and "no permission to use the bucket closed" in last, said
    assert not bucket, "something was written before the data was looked at"
