"""The log survives kills without doubled or torn lines; the progress bar keeps quiet where it should."""

import io
import json

import numpy as np
import pytest

from llama_jax.training.metrics import METRICS_FILE, MetricWriter, Progress, format_seconds, read_metrics
from llama_jax.training.preparation import in_parts


def write_steps(workdir, steps, *, value=1.0, **options):
    with MetricWriter(workdir, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": value})


def test_one_flat_json_object_a_line(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": np.float32(2.5), "count": np.array([4])})
    row = json.loads((tmp_path / METRICS_FILE).read_text())
    assert (row["step"], row["loss"], row["count"]) == (3, 2.5, 4.0) and row["time"] > 1.6e9
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_scorers_name_is_one_that_tensorboard_can_show(tmp_path, caplog):
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"score/my.rules:length": 1.0})
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert b"score/my.rules.length" in events.read_bytes() and not caplog.records
    assert read_metrics(tmp_path)["score/my.rules:length"].tolist() == [1.0]


def test_lines_are_readable_before_close(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(0, {"loss": 1.0})
    assert read_metrics(tmp_path)["loss"].tolist() == [1.0]
    writer.close()


def test_resume_drops_what_will_be_written_again(tmp_path):
    write_steps(tmp_path, range(5), value=1.0)
    write_steps(tmp_path, range(3, 6), value=2.0, resume_step=3)
    metrics = read_metrics(tmp_path)
    assert metrics["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert metrics["loss"].tolist() == [1, 1, 1, 2, 2, 2]


def test_resume_at_zero_starts_afresh_and_without_resume_appends(tmp_path):
    write_steps(tmp_path, range(3))
    write_steps(tmp_path, [3])
    assert len(read_metrics(tmp_path)["step"]) == 4
    MetricWriter(tmp_path, resume_step=0)
    assert len(read_metrics(tmp_path)["step"]) == 0


@pytest.mark.parametrize("resume_step", [None, 2])
def test_a_line_torn_by_a_kill_disappears(tmp_path, resume_step):
    write_steps(tmp_path, range(2))
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(tmp_path)["step"].tolist() == [0, 1]
    write_steps(tmp_path, [2], resume_step=resume_step)
    assert read_metrics(tmp_path)["step"].tolist() == [0, 1, 2]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 0, "time": 1}\nnonsense\n{"step": 1, "time": 1}\n')
    with pytest.raises(ValueError, match=rf"{METRICS_FILE}:2: expected one JSON object, got 'nonsense'"):
        read_metrics(path)
    path.write_text('{"time": 1}\n')
    with pytest.raises(ValueError, match=rf"{METRICS_FILE}:1: field 'step'"):
        read_metrics(path)


def test_absent_and_non_finite_values(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"loss": float("inf")})
        writer.write(1, {"accuracy": 0.5})
        writer.write(2, {"loss": float("nan")})
    assert "Infinity" not in (tmp_path / METRICS_FILE).read_text()
    metrics = read_metrics(tmp_path)
    np.testing.assert_array_equal(metrics["loss"], [np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(metrics["accuracy"], [np.nan, 0.5, np.nan])


def test_other_hosts_write_nothing(tmp_path):
    write_steps(tmp_path / "run", range(3), enabled=False, resume_step=0)
    assert not (tmp_path / "run").exists()


def test_bad_metrics_are_refused(tmp_path):
    writer = MetricWriter(tmp_path)
    with pytest.raises(ValueError, match="metric 'time': this name is taken"):
        writer.write(0, {"time": 1.0})
    with pytest.raises(ValueError, match=r"metric 'loss': expected one number, got an array of shape \(2,\)"):
        writer.write(0, {"loss": np.zeros(2)})
    assert not (tmp_path / METRICS_FILE).exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_are_rare_and_tell_rate_eta_and_value():
    now, stream = [0.0], io.StringIO()
    with Progress(100, "sft", done=20, stream=stream, clock=lambda: now[0]) as progress:
        for step in range(80):
            now[0] += 1.0
            progress.update(1, loss=step)
    assert stream.getvalue().splitlines() == [
        "sft: 50/100 steps, 1 steps/s, ETA 50 s, loss 29",
        "sft: 80/100 steps, 1 steps/s, ETA 20 s, loss 59",
        "sft: 100/100 steps, 1 steps/s, took 1 min 20 s, loss 79",
    ]


def test_a_total_that_nobody_knows_yet_gives_a_count_and_a_rate():
    now, stream = [0.0], io.StringIO()
    with Progress(None, "encode a.jsonl", "comparison", stream=stream, clock=lambda: now[0]) as progress:
        for _ in range(40):
            now[0] += 1.0
            progress.update(4096)
    assert stream.getvalue().splitlines() == [
        "encode a.jsonl: 122880 comparisons, 4.1e+03 comparisons/s",
        "encode a.jsonl: 163840 comparisons, 4.1e+03 comparisons/s, took 40 s",
    ]


def test_rows_in_parts_are_all_there_and_only_many_are_told_of(capsys, monkeypatch):
    passed = []
    monkeypatch.setattr("llama_jax.training.preparation.waypoint", lambda: passed.append(1))
    assert list(in_parts(iter(range(7)), label="encode", unit="row", size=3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert "encode: 7 rows" in capsys.readouterr().err and len(passed) == 2
    for few in (range(0), range(3)):
        assert list(in_parts(few, label="encode", unit="row", size=3)) == [[*few]] * bool(few)
    assert capsys.readouterr().err == ""


def test_quiet_prints_nothing_and_a_terminal_gets_a_bar():
    quiet, terminal = Terminal(), Terminal()
    with Progress(2, "ppo", quiet=True, stream=quiet) as progress:
        progress.update(2)
    with Progress(2, "ppo", "iteration", stream=terminal) as progress:
        progress.update(1, reward=0.25)
        progress.update(1, reward=0.5)
    assert quiet.getvalue() == ""
    assert "ppo: 100%" in terminal.getvalue() and "reward=0.5" in terminal.getvalue()


def test_format_seconds():
    assert [format_seconds(s) for s in (42.4, 59.6, 192, 7500)] == ["42 s", "1 min 0 s", "3 min 12 s", "2 h 5 min"]
