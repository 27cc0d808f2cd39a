"""Faults inside one process: disks, damaged files, spikes, going back; what is kept, and what is told."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src import distributed
from test_training import (
    SPECS,
    Batches,
    Rollouts,
    assert_equal,
    damage,
    data_files,
    final,
    loop,
    mesh_of,
    stage,
)

from llama_jax import paths
from llama_jax.config import ConfigError
from llama_jax.data.loader import IndexedBatches
from llama_jax.parallel.hosts import clocks
from llama_jax.parallel.peers import Peers, Word, lost, places
from llama_jax.training import goodput, preemption, saved, watchdog
from llama_jax.training.fingerprint import CheckpointError, damages, fingerprints, sealed
from llama_jax.training.goodput import Goodput
from llama_jax.training.lease import Lease
from llama_jax.training.loop import Diverged, Preempted, train
from llama_jax.training.metrics import read_metrics
from llama_jax.training.options import RunOptions, parse_steps
from llama_jax.training.profile import Profile
from llama_jax.training.saved import named, read_meta, restore_params, written_steps
from llama_jax.training.spikes import SpikeConfig, Spikes
from llama_jax.training.stage import Supervised
from llama_jax.training.watchdog import Watchdog
from llama_jax.training.workdir import claim, finished, go_back, own
from llama_jax.verify import verify

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mesh():
    return mesh_of()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mesh):
    """A finished run with checkpoints 3, 6 and 8."""
    workdir = tmp_path_factory.mktemp("faults") / "whole"
    train(stage(mesh), loop(keep=5), mesh=mesh, workdir=workdir)
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


# ---- verify ----


def test_verify_names_the_damaged_leaf_and_changes_nothing(copy, caplog):
    assert verify(copy) == {3: [], 6: [], 8: []}
    assert not caplog.records  # Orbax has nothing to say beside
    for path in data_files(copy / "checkpoints" / "6" / "params"):
        damage(path, "flipped")
    damage(copy / "checkpoints" / "3" / "meta" / "metadata", "truncated")
    before = sorted(copy.rglob("*"))
    found = verify(copy)
    assert found[8] == [] and "meta/metadata: cannot be read" in found[3][0]
    assert found[6] and all(re.match(r"\['params'\]\['(trunk|reward_head)'\]|params: ", line) for line in found[6]), found
    assert sorted(copy.rglob("*")) == before
    with pytest.raises(CheckpointError, match="has no checkpoint 7; it holds 3, 6, 8"):
        verify(copy, 7)


def test_a_wrong_checksum_is_told_with_its_leaf(copy):
    path = copy / "checkpoints" / "8" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    name = next(name for name in meta["fingerprints"] if ".mu" in name and "matrix" in name)  # a moment of AdamW
    meta["fingerprints"][name] ^= 1
    path.write_text(json.dumps(sealed(meta)))
    (line,) = damages(copy, 8)
    assert line.startswith(f"{name}: has checksum 0x")


@pytest.mark.parametrize("key", ["fingerprints", "spikes", "logged", "seconds"])
def test_one_flipped_bit_of_the_meta_is_damage_and_the_older_checkpoint_is_used(copy, mesh, whole, key):
    (copy / "done.json").unlink()
    path = copy / "checkpoints" / "8" / "meta" / "metadata"
    name = f'"{key}"'.encode()
    path.write_bytes(path.read_bytes().replace(name, name[:-2] + bytes([name[-2] ^ 1]) + b'"'))
    found = verify(copy)
    assert found[6] == [] and re.match("meta/metadata: (has another digest|cannot be read)", *found[8]), found
    train(stage(mesh), loop(keep=5), mesh=mesh, workdir=copy)
    assert (copy / "damaged" / "8").exists() and verify(copy)[8] == []
    assert_equal(final(copy, mesh), final(whole, mesh))


# ---- what is kept ----


def test_the_newest_every_mth_and_the_best_checkpoint_stay(tmp_path, mesh):
    losses = {0: 0.5, 2: 5.0, 4: 1.0, 6: 3.0, 8: math.nan, 10: 4.0, 12: 4.5}  # of the start there is no checkpoint
    asked = []

    def evaluate(params):
        del params
        asked.append(0)
        return {"loss": losses[2 * len(asked) - 2]}

    config = loop(steps=12, checkpoint_every=2, keep=1, keep_every=6, keep_best="loss")
    train(stage(mesh, evaluate=evaluate), config, mesh=mesh, workdir=tmp_path)
    assert written_steps(tmp_path) == [4, 6, 12]  # the best, a multiple of 6, and the newest
    log = read_metrics(tmp_path)
    assert log["step"][~np.isnan(log["held_out/loss"])].tolist() == [-1, 1, 3, 5, 9, 11] and len(asked) == 7


def test_a_misspelt_metric_is_told_before_the_first_step(tmp_path, mesh):
    with pytest.raises(ConfigError, match="keep_best=error: no such held-out metric; there are loss"):
        made = stage(mesh, source=Rollouts(), evaluate=lambda params: {"loss": 1.0})
        train(made, loop(keep_best="error"), mesh=mesh, workdir=tmp_path)
    assert not written_steps(tmp_path) and not (tmp_path / "reached.json").exists()


def test_a_start_that_was_measured_twice_stands_once_in_the_log(tmp_path, mesh):
    config = loop(keep_best="loss", checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(stage(mesh, source=Rollouts(interrupt=interrupted, at=2), evaluate=held_out), config, mesh=mesh, workdir=tmp_path)
    train(stage(mesh, source=Rollouts(), evaluate=held_out), config, mesh=mesh, workdir=tmp_path)
    log = read_metrics(tmp_path)
    assert log["step"][~np.isnan(log["held_out/loss"])].tolist() == [-1, 3, 7]


def held_out(params):
    del params
    return {"loss": 1.0}


def interrupted():
    raise KeyboardInterrupt


# ---- statistics ----


class Refused(Exception):
    """As a bucket's client says it: no OSError."""


def refused(*_, **__):
    raise Refused("503, try again")


def test_statistics_that_cannot_be_written_cost_no_checkpoint_and_no_code(tmp_path, mesh, monkeypatch, caplog):
    for owner, name in ((paths.Mirror, "send"), (paths.Mirror, "send_if_due"), (goodput, "append"), (goodput, "write_json")):
        monkeypatch.setattr(owner, name, refused)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with pytest.raises(Preempted):
        train(stage(mesh, source=Rollouts(interrupt=terminate, at=1)), loop(), mesh=mesh, workdir=tmp_path)
    assert written_steps(tmp_path) == [2]
    for place in (tmp_path, tmp_path / "reached.json", tmp_path / "attempts.jsonl"):
        assert f"{place}: could not be written to just now: 503, try again" in caplog.text


def test_a_mirror_that_could_not_be_sent_waits_until_it_is_due_again(tmp_path):
    mirror = paths.Mirror(tmp_path / "there")
    mirror.remote, mirror.local, mirror.due = True, tmp_path / "here", 0.0
    mirror.local.mkdir()
    (mirror.local / "metrics.jsonl").write_text("{}")
    (tmp_path / "there").touch()
    with pytest.raises(NotADirectoryError):
        mirror.send_if_due()
    assert mirror.due > time.monotonic()


def test_a_lease_that_cannot_be_given_back_hides_no_other_error():
    lease = Lease(types.SimpleNamespace(read_text=refused, unlink=refused))
    lease.thread = threading.Thread(target=lambda: None)
    lease.thread.start()
    lease.release()


# ---- disks ----


def train_until(directory, do, *, keep=5):
    """A run of twelve steps in a process of its own, to which a statement happens when its tenth batch is made."""
    script = f"""
        import os, resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, "tests")
        from test_training import Batches, Supervised, loop, mesh_of, stage
        from llama_jax import command
        from llama_jax.training.loop import train
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        mesh = mesh_of()
        source = Supervised(Batches(interrupt=lambda: {do}, at=10))
        command.launch(lambda: train(stage(mesh, source=source), loop(steps=12, keep={keep}, log_every=100), mesh=mesh,
                                     workdir=Path({str(directory)!r}) / "run"))
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.mark.parametrize("keep", [5, 1])
def test_a_disk_that_fills_up_ends_the_run_in_one_sentence_and_costs_no_checkpoint(tmp_path, keep):
    # A limit of the file size makes real writes fail, in the threads that write, after two good checkpoints.
    done = train_until(tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))", keep=keep)
    assert done.returncode == 1, done.stderr
    # Which write fails first depends on timing: that of the checkpoint or that of the log. Orbax tells its own story besides.
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    told = re.search(r"checkpoint (\d+) could not be written; the newest whole one is ([69])|File too large", errors[0])
    assert len(errors) == 1 and told, done.stderr
    assert told[1] is None or int(told[1]) == int(told[2]) + 3  # the one after it, however late that shows
    kept = written_steps(tmp_path / "run")
    assert kept[-1] in (6, 9) and (keep == 1 or {3, 6} <= set(kept)) and not any(verify(tmp_path / "run").values())


def test_ctrl_c_ends_a_run_in_one_word(tmp_path):
    done = train_until(tmp_path, "os.kill(os.getpid(), signal.SIGINT)")
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "interrupted", done.stderr
    assert "Traceback" not in done.stderr and not any(verify(tmp_path / "run").values())


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_a_workdir_that_may_not_be_written_is_refused_in_one_line(tmp_path):
    tmp_path.chmod(0o555)
    locked = f"""
import os
from pathlib import Path
from llama_jax.training.workdir import own
from llama_jax import command
def main():
    os.setuid(65534)  # not before the imports: somebody else may not read these packages
    with own(Path({str(tmp_path)!r}) / "run"): pass
command.launch(main)
"""
    for parent in tmp_path.parents[:-2]:
        parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", locked], cwd=ROOT, capture_output=True, text=True, timeout=200)
    tmp_path.chmod(0o755)
    assert done.returncode == 1 and done.stderr.strip().endswith(f"error: {tmp_path}/run: cannot be written: Permission denied")


def test_parameters_and_fingerprints_are_of_one_checkpoint_though_another_one_lands_meanwhile(copy, mesh, monkeypatch):
    whole = fingerprints(restore_params(f"{copy}@6", SPECS, mesh))
    asked = iter(["6", "8"])
    monkeypatch.setattr(saved, "newest_step", lambda workdir: copy / "checkpoints" / next(asked))
    assert fingerprints(restore_params(copy, SPECS, mesh)) == whole


def test_a_half_written_checkpoint_is_not_taken_for_one(copy, mesh, whole):
    # What a kill in the middle of a save leaves behind.
    (copy / "done.json").unlink()
    shutil.move(copy / "checkpoints" / "8", copy / "checkpoints" / "8.orbax-checkpoint-tmp-1")
    train(stage(mesh), loop(keep=5), mesh=mesh, workdir=copy)
    assert_equal(final(copy, mesh), final(whole, mesh))


def test_a_damaged_checkpoint_is_moved_not_deleted(copy, mesh, whole):
    for path in data_files(copy / "checkpoints" / "8" / "params"):
        damage(path, "truncated")
    train(stage(mesh), loop(keep=5), mesh=mesh, workdir=copy)
    assert (copy / "damaged" / "8" / "params").exists()
    assert_equal(final(copy, mesh), final(whole, mesh))
    done = json.loads((copy / "done.json").read_text())
    assert done["restarts"] == 1


def test_another_checkpoint_than_the_newest_can_be_named(copy, mesh):
    older = restore_params(f"{copy}@6", SPECS, mesh)
    for path in data_files(copy / "checkpoints" / "8" / "params"):
        damage(path, "flipped")
    (copy / "checkpoints" / "6" / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=f"checkpoints/8.*; checkpoint 3 is whole: {copy}@3 means it$"):
        restore_params(copy, SPECS, mesh)
    with pytest.raises(CheckpointError, match=rf"checkpoints/6: meta/metadata: cannot be read.*{copy}@3 means it$"):
        read_meta(f"{copy}@6")
    with pytest.raises(CheckpointError, match="run: has no checkpoint 7; it holds 3, 6, 8"):
        restore_params(f"{copy}@7", SPECS, mesh)
    assert read_meta(f"{copy}@3")["step"] == 3 and fingerprints(older) != fingerprints(restore_params(f"{copy}@3", SPECS, mesh))
    shutil.copytree(copy, f"{copy}@3")  # a name that has an @ in it
    assert named(f"{copy}@3") == (Path(f"{copy}@3"), None) and named(f"{copy}@3@6") == (Path(f"{copy}@3"), 6)


# ---- one run in one workdir, and going back ----


def test_two_runs_in_one_workdir_are_told_of_each_other(tmp_path):
    with own(tmp_path / "run"), pytest.raises(ConfigError, match=rf"another run is writing here \(pid {os.getpid()} on"):
        with own(tmp_path / "run"):
            pass
    with own(tmp_path / "run"):
        pass
    claim(tmp_path / "run", {"a": 1})
    claim(tmp_path / "run", {"a": 2})  # the lock alone does not mean that anything has begun


def test_restart_from_a_step_goes_back_once_and_takes_another_config(copy, mesh, caplog):
    (copy / "config.json").write_text(json.dumps({"lr": 1}))
    whole_log = (copy / "metrics.jsonl").read_text()
    for again in range(2):  # the second time, as after a preemption, changes nothing but says so
        go_back(copy, 3, {"lr": 2})
        assert bool(re.search("--restart_from=3 was done before, as .*restarted.json says", caplog.text)) == again
        assert written_steps(copy) == [3] and written_steps_aside(copy) == ["1/6", "1/8"]
        assert json.loads((copy / "config.json").read_text()) == {"lr": 2} and not (copy / "done.json").exists()
    assert "lr: 1 -> 2" in caplog.text
    train(stage(mesh), loop(keep=5), mesh=mesh, workdir=copy)
    assert (copy / "replaced" / "1" / "metrics.jsonl").read_text() == whole_log
    log = read_metrics(copy)
    np.testing.assert_array_equal(log["step"][~np.isnan(log["loss"])], np.arange(8))
    with pytest.raises(ConfigError, match=r"--restart_from=4: .* has no such checkpoint; it holds \[3, 6, 8\]"):
        go_back(copy, 4, {"lr": 2})
    go_back(copy, 0, {"lr": 2})
    assert written_steps(copy) == [] and written_steps_aside(copy) == ["1/6", "1/8", "2/3", "2/6", "2/8"]


@pytest.mark.parametrize(("name", "read"), [
    ("config.json", lambda workdir: claim(workdir, {"lr": 1})),
    ("done.json", finished),
    ("restarted.json", lambda workdir: go_back(workdir, 3, {"lr": 1})),
])  # fmt: skip
def test_a_damaged_file_of_the_workdir_is_named_and_can_be_removed(copy, name, read):
    for content in (b'{"lr: 1}', b'{"lr": \xff}', b""):
        (copy / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"^{copy / name}: expected JSON: .*; the file is damaged: remove it"):
            read(copy)
    (copy / name).unlink()
    read(copy)
    assert written_steps(copy)


def test_a_damaged_log_does_not_keep_a_run_with_whole_checkpoints_from_going_on(copy, mesh, whole, caplog):
    (copy / "done.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "8")
    log = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    log[2] = log[2].replace(b"loss", b"lo\xffs")
    (copy / "metrics.jsonl").write_bytes(b"".join(log))
    train(stage(mesh), loop(keep=5), mesh=mesh, workdir=copy)
    assert_equal(final(copy, mesh), final(whole, mesh))
    assert "metrics.jsonl:3: expected one JSON object" in caplog.text and "without 1 damaged lines" in caplog.text
    assert read_metrics(copy)["step"].tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert (copy / "damaged" / "metrics.jsonl").read_bytes() == b"".join(log)


def written_steps_aside(workdir):
    return sorted(str(path.relative_to(workdir / "replaced")) for path in workdir.glob("replaced/*/[0-9]*"))


# ---- spikes, and steps that are not finite ----


class Bad(Batches):
    """One batch has targets far off."""

    def __init__(self, bad, **more):
        super().__init__(**more)
        self.bad, self.seen = bad, []

    def batch(self, step):
        self.seen.append(step)
        batch = super().batch(step)
        return batch.replace(y=batch.y + 100) if step == self.bad else batch

    def rows(self, step):
        return [f"row {step}"]


SPIKE = SpikeConfig(sigma=6.0, window=4, rewind=True)


def test_the_window_of_losses_by_hand():
    spikes = Spikes(SpikeConfig(sigma=2.0, window=4))
    for step, loss in enumerate([1.0, 3.0, math.nan, 1.0, 3.0]):
        assert spikes.see(step, loss) is None
    assert spikes.losses == [1.0, 3.0, 1.0, 3.0]  # mean 2, deviation 1: a spike is above 4
    assert spikes.see(5, 4.0) is None
    spikes.losses = [1.0, 3.0, 1.0, 3.0]
    assert "step 6, batch 6: loss 50 is a spike; the 4 losses before are 2 +- 1" in spikes.see(6, 50.0)
    assert spikes.losses == [3.0, 1.0, 3.0, 4.0]  # it enters as the threshold
    assert spikes.leave_out(6, 3) == [6] and [spikes.index(step) for step in (5, 6, 7)] == [5, 7, 8]
    spikes.config = SpikeConfig(skip=3)
    # Batches 5, 7 and 8 are those of a spike in step 7: a checkpoint of 5 steps has seen none of them, one of 6 has.
    assert [spikes.go_back_to(7, steps) for steps in ([3, 5, 6], [6, 7], [])] == [5, 6, 0]
    assert spikes.leave_out(6, 6) == [7] and spikes.skipped == [6, 7]  # batches before the checkpoint have been used
    assert spikes.index(6) == 8


def test_after_a_spike_the_run_goes_back_and_leaves_the_batch_out(tmp_path, mesh, caplog):
    source = Supervised(Bad(7))
    train(stage(mesh, source=source), loop(steps=9, spike=SPIKE), mesh=mesh, workdir=tmp_path / "run")
    assert "step 7, batch 7: loss" in caplog.text and "['row 7']" in caplog.text
    assert "back to step 6, without batches [7]" in caplog.text
    log = read_metrics(tmp_path / "run")
    rows = ~np.isnan(log["loss"])
    np.testing.assert_array_equal(log["step"][rows], np.arange(9))
    assert log["loss"][rows].max() < 100 and log["lost_steps"][rows][-1] > 0 == log["restarts"][rows][-1]

    class Without(Batches):  # the same data without the batch
        def batch(self, step):
            return super().batch(step + (step >= 7))

    train(stage(mesh, source=Supervised(Without())), loop(steps=9), mesh=mesh, workdir=tmp_path / "without")
    assert_equal(final(tmp_path / "run", mesh)[0], final(tmp_path / "without", mesh)[0])


def test_it_goes_back_behind_all_batches_that_are_left_out(tmp_path, mesh, caplog):
    for skip, keep, says in (
        (3, 3, "back to step 3, without batches [5, 6, 7]"),
        (6, 1, "back to step 6, without batches [6, 7]; no checkpoint is old enough to leave out 6"),
    ):
        workdir, source = tmp_path / f"{skip}", Supervised(Bad(7))
        spike = dataclasses.replace(SPIKE, skip=skip)
        train(stage(mesh, source=source), loop(steps=9, spike=spike, keep=keep), mesh=mesh, workdir=workdir)
        assert says in caplog.text
    assert sorted(path.name for path in (tmp_path / "3" / "before_spike").iterdir()) == ["6"]

    class Without(Batches):
        def batch(self, step):
            return super().batch(step + 3 * (step >= 5))

    train(stage(mesh, source=Supervised(Without())), loop(steps=9), mesh=mesh, workdir=tmp_path / "without")
    assert_equal(final(tmp_path / "3", mesh)[0], final(tmp_path / "without", mesh)[0])


def test_killed_after_a_rewind_it_resumes_to_the_same_parameters(tmp_path, mesh):
    class Kill(Exception):
        pass

    def kill():
        raise Kill

    for at in (8, 10):  # before and after the checkpoint that knows of the batch that was left out
        workdir = tmp_path / f"{at}"
        with pytest.raises(Kill):
            source = Supervised(Bad(7, interrupt=kill, at=at))
            if at == 8:
                source.batches.at = None
                source.batches.batch = kill_after_rewind(source.batches, kill)
            train(stage(mesh, source=source), loop(steps=12, spike=SPIKE), mesh=mesh, workdir=workdir)
        train(stage(mesh, source=Supervised(Bad(7))), loop(steps=12, spike=SPIKE), mesh=mesh, workdir=workdir)
    train(stage(mesh, source=Supervised(Bad(7))), loop(steps=12, spike=SPIKE), mesh=mesh, workdir=tmp_path / "whole")
    for at in ("8", "10"):
        assert_equal(final(tmp_path / at, mesh)[0], final(tmp_path / "whole", mesh)[0])


def kill_after_rewind(batches, kill):
    original = type(batches).batch

    def batch(step):
        if batches.seen.count(6) == 2:  # the run has gone back from 7
            kill()
        return original(batches, step)

    return batch


def test_spikes_without_end_stop_the_run_and_rl_can_only_report(tmp_path, mesh):
    class Worse(Batches):
        def batch(self, step):
            batch = super().batch(step)
            return batch.replace(y=batch.y + 100.0 * (step >= 7))

    with pytest.raises(Diverged, match="limit=2 rewinds are used up"):
        train(
            stage(mesh, source=Supervised(Worse())), loop(steps=20, spike=SpikeConfig(sigma=6, window=4, rewind=True, limit=2)),
            mesh=mesh, workdir=tmp_path / "worse",
        )  # fmt: skip
    with pytest.raises(ConfigError, match="loop.spike.rewind"):
        train(stage(mesh, source=Rollouts()), loop(spike=SPIKE), mesh=mesh, workdir=tmp_path / "rl")


def test_the_rows_of_steps_that_are_not_finite_are_listed(tmp_path, mesh):
    source = Supervised(Bad(-1, poisoned=(4, 5)))
    with pytest.raises(Diverged, match=rf"the last at step 5; .*{tmp_path}/diverged.json"):
        train(stage(mesh, source=source), loop(max_skipped_in_a_row=2), mesh=mesh, workdir=tmp_path)
    found = json.loads((tmp_path / "diverged.json").read_text())["steps"]
    assert found == {"4": {"batch": 4, "rows": ["row 4"]}, "5": {"batch": 5, "rows": ["row 5"]}}


def test_batches_tell_their_rows():
    batches = IndexedBatches(list("abcdefgh"), list, 4, seed=3)
    for step in (0, 1, 5):
        assert [batches.examples[i] for i in batches.rows(step)] == batches.batch(step)


# ---- goodput, profile, options ----


def test_goodput_by_hand(tmp_path):
    now = [100.0]
    clock = lambda: now[0]  # noqa: E731
    run = Goodput(tmp_path, enabled=True, clock=clock)
    run.steps_from(0, 0.0)
    for done in range(1, 11):
        now[0] += 2
        run.step(done, 2.0)
    saved = run.productive  # say after 5 steps it was 8: the first compiles
    assert saved == 18 and run.metrics() == {"goodput": 0.9, "restarts": 0, "lost_steps": 0}
    now[0] += 60  # killed; it goes on from step 5
    run = Goodput(tmp_path, enabled=True, clock=clock)
    run.steps_from(5, 8.0)
    assert run.metrics() == {"goodput": 0.1, "restarts": 1, "lost_steps": 5}
    run.note(9)
    run.steps_from(7, 12.0)  # a spike: back within the same start
    assert run.metrics() == {"goodput": 0.15, "restarts": 1, "lost_steps": 7}
    (tmp_path / "reached.json").write_text("{torn")
    (tmp_path / "attempts.jsonl").write_bytes((tmp_path / "attempts.jsonl").read_bytes() + b'{"from": \xff}\n')
    run = Goodput(tmp_path, enabled=True, clock=clock)
    run.steps_from(5, 8.0)
    assert run.metrics() == {"goodput": 0.1, "restarts": 2, "lost_steps": 7}


def test_a_profile_of_the_steps_asked_for_lies_in_the_workdir(tmp_path, mesh):
    options = RunOptions(profile_steps=parse_steps("2:4"))
    train(stage(mesh), loop(), mesh=mesh, workdir=tmp_path, options=options)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_of_steps_that_the_run_does_not_have_is_an_error(tmp_path, mesh):
    options = RunOptions(profile_steps=(loop().steps, 1000))
    with pytest.raises(ConfigError, match=r"--profile_steps=\d+:1000: expected some of the steps 0 to \d+ \(loop.steps="):
        train(stage(mesh), loop(), mesh=mesh, workdir=tmp_path, options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("done", "traced"), [(0, [3, 4, 5]), (3, [3, 4, 5]), (5, [5]), (6, []), (8, [])])
def test_a_run_that_goes_on_within_the_steps_of_a_profile_traces_the_rest(monkeypatch, tmp_path, caplog, done, traced):
    running, found = [False], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: running.__setitem__(0, True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: running.__setitem__(0, False))
    profile = Profile(tmp_path, (3, 6), done=done)
    for step in range(done, 10):
        if profile.due(step):
            profile.turn()
        found += [step] * running[0]
    assert found == traced and not running[0]
    assert ("--profile_steps=3:6: nothing to trace, the run goes on from step" in caplog.text) == (not traced)


def test_options_that_cannot_be():
    assert parse_steps("") is None and parse_steps("10:13") == (10, 13)
    for text in ("3", "4:4", "a:b", "-1:3"):
        with pytest.raises(ValueError, match="--profile_steps: expected FIRST:END"):
            parse_steps(text)
    with pytest.raises(ValueError, match="--peer_seconds: expected a positive number"):
        RunOptions(peer_seconds=0)
    with pytest.raises(ValueError, match="loop.spike"):
        SpikeConfig(window=1)


def test_a_stop_that_was_agreed_on_is_not_forgotten_when_a_spike_takes_the_run_back(monkeypatch):
    """JAX says it once, at one point of the run."""
    answers = iter([False, True, False])
    monkeypatch.setattr(preemption, "stop_agreed", lambda: next(answers))
    terminate = preemption.Terminate()
    terminate.alone = False
    assert [terminate.here() for _ in range(4)] == [False, True, True, True]


# ---- who is to blame ----


def word(silent=0.0, host=1, **status):
    return Word({"count": 3, "name": f"machine-{host}", "pid": 7, "at": "update of step 12", **status}, silent)


def test_a_host_that_never_spoke_is_lost_and_one_that_took_leave_is_not(monkeypatch):
    said = {}
    client = types.SimpleNamespace(
        key_value_set=lambda key, value, allow_overwrite: said.update({key: value}), key_value_dir_get=lambda _: said.items()
    )
    monkeypatch.setattr(distributed.global_state, "client", client)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    hosts = []
    for index in (0, 1, 3):  # host 2 dies before its first word
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        hosts.append(Peers())
    for host in hosts:
        host.begun -= 40.0
    hosts[1].tell(at="the start")
    hosts[2].tell(at="the start")
    hosts[2].leave()
    hosts[0].ask()
    words = hosts[0].words()
    assert list(words) == [1, 2] and words[1].silent < 30 < words[2].silent
    text = lost(words, service_silent=0, me=0, limit=30)
    assert text == "host 2 has been silent for 40 s, and was never heard of after all had met"


@pytest.fixture
def watchdogs(monkeypatch):
    """Those of two hosts, around one service and without threads; and what ended: (host, message, code)."""
    said, ends = {}, []
    client = types.SimpleNamespace(
        key_value_set=lambda key, value, allow_overwrite: said.update({key: value}), key_value_dir_get=lambda _: said.items()
    )
    monkeypatch.setattr(distributed.global_state, "client", client)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(watchdog, "_GRACE", 0.0)
    quiet = types.SimpleNamespace(dump_traceback_later=lambda *_, **__: None)
    monkeypatch.setattr(watchdog, "faulthandler", quiet)
    monkeypatch.setattr(watchdog.threading, "Timer", lambda seconds, end, args: types.SimpleNamespace(
        start=lambda: ends.append(("in 15 s", *args)) if (seconds, end) == (15, os._exit) else None
    ))  # fmt: skip
    made = []
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        made.append(dog := Watchdog(step_seconds=1.0, start_seconds=100.0, peer_seconds=30.0))
        dog._end = lambda message, code, dog=dog: (ends.append((dog.host, message, code)), dog.done.set())
    return *made, ends


@pytest.mark.parametrize(("error", "code"), [(Diverged("3 updates were not finite"), 65), (ConfigError("lr: too much"), 69)])
def test_a_host_that_ends_because_another_one_diverged_has_its_code(watchdogs, error, code):
    other, failed, ends = watchdogs
    failed._report_failure(error)
    own = getattr(error, "exit_code", 1)
    assert ends == [("in 15 s", own)] and failed.code == own
    other.peers.ask()
    other._watch()
    (message,) = [message for host, message, *_ in ends[1:]]
    assert f"failed in the start: {error}" in message and ends[1] == (0, message, code)


def test_an_abort_says_only_what_is_known(watchdogs, monkeypatch):
    first, second, ends = watchdogs
    aborted, codes = [], []
    monkeypatch.setattr(watchdog, "on_abort", lambda end: aborted.append(end) or (lambda: None))
    for dog in (first, second):
        dog._on_abort()
    for end in aborted:
        end()
    above = "in the start, was aborted: see the message above"
    lost = "; if it names nothing, host 0, the coordinator, died or cannot be reached"
    assert ends == [(0, f"host 0, {above}", 69), (1, f"host 1, {above}{lost}", 69)]
    monkeypatch.setattr(os, "_exit", codes.append)
    second._report_failure(Diverged("3 updates were not finite"))
    aborted[1]()
    assert codes == [65]  # it has told the others
    first.peers.ask()
    aborted[0]()
    assert ends[-1][2] == 65 and "host 1 (" in ends[-1][1]


def test_the_host_to_blame_is_named():
    well = {0: word(host=0), 2: word(host=2)}
    assert lost(well, service_silent=1, me=1, limit=30) is None
    text = lost({**well, 3: word(31, host=3)}, service_silent=1, me=1, limit=30)
    assert text == "host 3 (machine-3, pid 7) has been silent for 31 s, last heard of in update of step 12"
    text = lost({**well, 3: word(host=3, failed="no disk")}, service_silent=1, me=1, limit=30)
    assert text == "host 3 (machine-3, pid 7) failed in update of step 12: no disk"
    text = lost(well, service_silent=31, me=1, limit=30)
    assert text == "host 0 (machine-0, pid 7), the coordinator, has not answered for 31 s"
    failed = {1: word(2, failed="no disk")}  # perhaps this host is about to say the same
    assert lost(failed, service_silent=1, me=0, limit=30, grace=3) is None and lost(failed, service_silent=1, me=0, limit=30)
    assert places({2: word(host=2, at="batch of step 12")}) == "host 2 (machine-2, pid 7) is in batch of step 12"
    assert clocks([5.0, 6.0, 7.0]) == [] and clocks([5.0, 3605.0, 6.0]) == ["clock: host 1 is +3599 s off"]
