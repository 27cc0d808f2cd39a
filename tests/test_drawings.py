"""Drawings say what the data say: runs of packed rows, pieces on devices, trained tokens; and what `notebook` shows."""

import io
import re

import jax
import numpy as np
import pytest

from llama_jax import markdown, notebook
from llama_jax.data.dialog import EncodedDialog, encode_dialog
from llama_jax.data.packing import packed_row
from llama_jax.data.tokenizer_sentencepiece import train_tokenizer
from llama_jax.evals import drawings
from llama_jax.evals.drawings import Piece, Run
from llama_jax.evals.ghost import AttentionMap
from llama_jax.evals.plots import LIGHT
from llama_jax.model.params import table
from llama_jax.parallel.axes import DECODE, TRAIN
from llama_jax.parallel.mesh import MeshConfig, make_mesh

Image = pytest.importorskip("PIL.Image", reason="the extra [eval]: it comes with matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def row():
    """A dialog of four tokens, its last two trained, and one of three, its last trained, in a row of ten."""
    dialogs = EncodedDialog([1, 5, 6, 2], [False, False, True, True]), EncodedDialog([1, 7, 2], [False, False, True])
    return packed_row(dialogs, 10)


def test_runs_of_a_packed_row():
    assert drawings.runs(row()) == [
        Run(0, 2, 1, False), Run(2, 2, 1, True), Run(4, 2, 2, False), Run(6, 1, 2, True), Run(7, 3, 0, False),
    ]  # fmt: skip
    assert drawings.packed_rows([row(), row()]).png().startswith(PNG)


def test_pieces_say_who_holds_what(tiny):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    specs = table(tiny, head="lm_head")
    query = specs["trunk"]["layers"]["query"]  # [L, D 32, H 4, E]: width over fsdp, heads over tensor
    shape, found = drawings.pieces(query, mesh, TRAIN)
    assert shape == (32, 4)
    ids = np.vectorize(lambda device: device.id)(mesh.devices).reshape(4, 2)
    expected = [Piece((8 * f, 8 * f + 8), (2 * t, 2 * t + 2), (int(ids[f, t]),)) for f in range(4) for t in range(2)]
    assert found == expected
    shape, found = drawings.pieces(query, mesh, DECODE)  # generation does not split the width
    assert found == [Piece((0, 32), (2 * t, 2 * t + 2), tuple(sorted(ids[:, t].tolist()))) for t in range(2)]
    shape, found = drawings.pieces(specs["trunk"]["final_norm"], mesh, TRAIN)
    assert (shape, found) == ((1, 32), [Piece((0, 1), (0, 32), tuple(range(8)))])


def test_layouts_are_drawn(tiny):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    layers = table(tiny, head="lm_head")["trunk"]["layers"]
    specs = {"query": layers["query"], "norm": layers["attention_norm"]}
    assert drawings.layouts(specs, mesh, {"TRAIN": TRAIN, "DECODE": DECODE}).png().startswith(PNG)


def test_bars_and_maps_are_drawn_alike_each_time(tmp_path):
    bars = {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 0.5}}
    draw = [drawings.stacked_bars(bars, title="t", xlabel="GiB", limit=2.5, limit_label="limit").png() for _ in range(2)]
    assert draw[0] == draw[1] and draw[0].startswith(PNG)
    single = drawings.stacked_bars({"a": {"GiB": 1.0}}, title="t", xlabel="GiB")  # whose legend the axis has said
    assert not single.draw(LIGHT).legends and single.alt == "Bars of GiB. t. a 1.00."
    found = AttentionMap(np.eye(4, dtype=np.float32), 2, (1, 3), np.array([0.5, 0.25]), (0, 4))
    maps = {"SFT": found, "GAtt": found}
    assert drawings.attention_maps(maps).png().startswith(PNG)
    assert drawings.attention_by_turn(maps).png().startswith(PNG)
    drawings.save_maps(tmp_path / "maps.npz", maps)
    again = drawings.load_maps(tmp_path / "maps.npz")
    assert list(again) == ["SFT", "GAtt"] and (again["GAtt"].bin_size, again["GAtt"].instruction) == (2, (1, 3))
    assert again["GAtt"].turns == (0, 4)
    sft, gatt, scale = drawings.attention_maps(maps).draw(LIGHT).axes
    assert scale.get_ylabel() == "largest weight" and [text.get_text() for text in gatt.texts] == ["turn 1", "turn 2"]
    assert [line.get_ydata()[0] for line in sft.get_lines() if line.get_color() == "white"] == [4]
    np.testing.assert_array_equal(again["SFT"].cells, found.cells)
    assert drawings.attention_maps(again).png() == drawings.attention_maps(maps).png()


def test_the_loss_mask_marks_the_answer_alone(tmp_path):
    tokenizer = train_tokenizer(["What is <b>? It is bold & big."] * 4, tmp_path / "tokenizer.model", vocab_size=300)
    dialog = encode_dialog(
        [{"role": "user", "content": "What is <b>?"}, {"role": "assistant", "content": "It is bold & big."}], tokenizer
    )
    page = drawings.loss_mask_html(dialog, tokenizer)
    boxes = re.findall(r'<span title="id (\d+)" style="background:(#\w+)[^>]*>(.*?)</span>', page)
    assert [int(token) for token, _, _ in boxes] == dialog.ids
    assert [colour == "#c8ecdd" for _, colour, _ in boxes] == dialog.supervised
    assert "<b>" not in page and "&amp;" in page


def test_a_table_survives_what_a_model_writes():
    text = markdown.markdown_table(["a|", "n"], [["x | y\nz", 1.5], [notebook.verbatim("<b> `*_ |"), "-2"]])
    assert text.split("\n") == [
        "| a\\| | n |", "| --- | ---: |", "| x \\| y z | 1.5 |", "| &lt;b&gt; &#96;&#42;&#95; &#124; | -2 |",
    ]  # fmt: skip


def test_configs_are_found_and_changed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # from a working directory without configs
    values = notebook.config("sft.py:tiny", {"model": "nano", "loop": {"steps": 3}})
    assert (values.stage, values.model, values.loop.steps, values.loop.batch_size) == ("sft", "nano", 3, 8)
    with pytest.raises(ValueError, match=r"sft.py:tiny.loop.step: unknown field"):
        notebook.config("sft.py:tiny", {"loop": {"step": 3}})


def test_fewer_colours_keep_the_picture():
    png = drawings.packed_rows([row()] * 3).png()
    small = notebook.fewer_colours(png)
    assert len(small) < len(png)
    a, b = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int) for data in (png, small))
    assert a.shape == b.shape and np.abs(a - b).mean() < 2


def test_start_gives_a_new_directory():
    before = jax.config.jax_num_cpu_devices
    first, second = notebook.start(), notebook.start()
    assert first != second and first.is_dir() and not list(first.iterdir())
    assert jax.config.jax_num_cpu_devices == before


def test_fresh_clears_what_the_notebook_made_and_nothing_else(tmp_path):
    workdir = notebook.start()
    (workdir / "sft" / "checkpoints").mkdir(parents=True)
    (workdir / "other").mkdir()
    (workdir / "rows.jsonl").write_text("{}")
    for _ in range(2):  # of nothing, too
        assert notebook.fresh(workdir / "sft") == workdir / "sft" and notebook.fresh(str(workdir / "rows.jsonl"))
        assert [path.name for path in workdir.iterdir()] == ["other"]
    (tmp_path / "mine").mkdir()
    (workdir / "link").symlink_to(tmp_path / "mine")
    for place in (tmp_path / "mine", workdir / "link", workdir, workdir / "..", "."):
        with pytest.raises(ValueError, match=r"inside the directory that notebook.start\(\) returned, got"):
            notebook.fresh(place)
    assert (tmp_path / "mine").is_dir() and (workdir / "other").is_dir()
