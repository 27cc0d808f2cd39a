"""`python -m llama_jax.corpus` (paper section 2.1): what it builds, once, and what it refuses before a document is read."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import configs.corpus
from configs.corpus import get_config
from llama_jax import corpus
from llama_jax.config import ConfigError, parse, parse_flags
from llama_jax.corpus_build import estimate
from llama_jax.corpus_build.boilerplate import Boilerplate
from llama_jax.corpus_build.manifest import CorpusError, check_manifest, read_manifest
from llama_jax.corpus_build.near_duplicates import NearDuplicates
from llama_jax.corpus_build.refine import Deduplication
from llama_jax.corpus_build.stages import SettingsError
from llama_jax.corpus_build.steps import CleanConfig
from llama_jax.data.sources import read_jsonl, write_jsonl
from llama_jax.data.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[1]


WORDS = "the model reads every naïve loop of a line and counts 42 tokens in it or returns no key when two lists meet".split()


def text(i: int) -> str:
    return f"number {i}: " + " ".join(random.Random(i).choices(WORDS, k=30 + i % 20)) + "\n"


def config_of(path: Path, **changes) -> corpus.CorpusConfig:
    config = get_config("jsonl")
    config.sources.web.reader = str(path)
    config.update({"vocab_size": 360, "block_length": 32, "held_out_fraction": 0.1, "total_tokens": 10_000, **changes})
    return parse(corpus.CorpusConfig, config)


@pytest.fixture
def web(tmp_path) -> Path:
    path = tmp_path / "web.jsonl.gz"
    write_jsonl(path, ({"id": i, "text": text(i), "url": f"u{i}"} if i % 2 else {"text": text(i)} for i in range(90)))
    return path


def test_the_command_builds_a_corpus_of_a_jsonl_file(web, tmp_path):
    command = [
        sys.executable, "-m", "llama_jax.corpus", "--config=configs/corpus.py:jsonl", f"--config.sources.web.reader={web}",
        "--config.vocab_size=360", "--config.block_length=32", "--config.held_out_fraction=0.1", "--config.total_tokens=10000",
        f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    first = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines() if line] == ["source", "web", "source", "web"]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["sources"]["web"]["documents_read"] == 90 and manifest["sources"]["web"]["planned_tokens"] == 10_000
    # What is there is checked, not built again; another config or a damaged shard ends in one line.
    assert corpus.run(config_of(web), tmp_path / "out") == manifest
    second = subprocess.run(
        [*command, "--config.held_out_fraction=0.2"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert second.returncode == 1 and not second.stdout
    changed = "held_out_fraction: 0.1 -> 0.2; undo, or use another --output"
    expected = f"error: {tmp_path / 'out'}: was built with another config: {changed}"
    assert second.stderr.strip().splitlines()[-1] == expected and "Traceback" not in second.stderr
    (tmp_path / "out" / "blocks" / "web.array_record").write_bytes(b"")
    with pytest.raises(CorpusError, match="web.array_record: damaged"):
        corpus.run(config_of(web), tmp_path / "out")


def test_documents_of_a_file_keep_their_fields_up_to_the_budget(web):
    source = corpus.SourceConfig(reader=str(web), weight=1.0, byte_budget=10**9)
    documents = list(corpus.documents("web", source, seed=0))
    assert [d.text for d in documents] == [text(i) for i in range(90)]
    assert (documents[1].id, documents[1].url, documents[1].source) == ("1", "u1", "web")
    assert documents[0].id == f"{web}:1"
    budget = sum(len(text(i).encode()) for i in range(5))
    for bytes_, count in ((budget, 5), (budget - 1, 4)):
        assert len(list(corpus.documents("web", dataclasses.replace(source, byte_budget=bytes_), seed=0))) == count


def test_beam_takes_no_budget_that_it_cannot_keep(web, tmp_path):
    """Text and the file that it is packed in have different sizes: one process counts the text, Beam would have to guess."""
    plain = tmp_path / "plain.jsonl"
    write_jsonl(plain, ({"text": text(i)} for i in range(90)))
    size = plain.stat().st_size

    def files(reader: str, budget: int | None) -> list[str]:
        return corpus.beam_files("web", corpus.SourceConfig(reader=reader, weight=1.0, byte_budget=budget))

    packed = (str(web), f"tfds://c4:3.1.0?dir={tmp_path}", str(tmp_path))
    assert [len(files(reader, None)) for reader in (str(plain), *packed)] == [1, 1, 1, 2]
    assert files(str(plain), size) == [str(plain)]
    with pytest.raises(ConfigError, match=f"web.byte_budget: Beam reads whole files; expected at least {size:,}, got 9"):
        files(str(plain), 9)
    for reader in packed:
        with pytest.raises(ConfigError, match=r"in (tfds://c4:3.1.0|.*/web.jsonl.gz).* only reading tells; expected none"):
            files(reader, 10**15)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "malformed JSON"),
        ('{"txt": "a"}', "text: expected a string, got None"),
        ('{"text": ["a"]}', "text: expected a string, got list"),
        ('{"text": "a\\ud800"}', "text: an escape"),
        ('{"text": "a", "url": "\\ud800"}', "id, url or metadata: .* surrogates not allowed"),
    ],
)
def test_a_bad_row_of_a_corpus_is_named_by_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "web.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        corpus.run(config_of(path), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["web.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ("web", "wiki")}, r"order: expected each of \['web'\] once, got \['web', 'wiki'\]"),
        ({"sources": {}, "order": ()}, "sources: expected at least one"),
        ({"sources": {"web": {"weight": 0.0}}}, "sources.web.weight: expected a positive share, got 0.0"),
        ({"sources": {"web": {"weight": "1"}}}, "sources.web.weight: expected a float, got '1'"),
        ({"sources": {"web": {"byte_budget": 0}}}, "sources.web.byte_budget: expected bytes above 0, got 0"),
        ({"sources": {"web": {"reader": "none.jsonl"}}}, "reader: expected 'installation' or files; none.jsonl: expected"),
        ({"sources": {"web": {"reader": "installation"}}}, "sources.web: an installation has the sources reference"),
        (
            {"sources": {"reference": {"reader": "installation", "weight": 1.0}}, "order": ("reference",)},
            "sources.reference.byte_budget: of an installation expected a number of bytes, got None",
        ),
        ({"sources": {"web": {"readers": "x"}}}, "readers: unknown field of SourceConfig; did you mean 'reader'?"),
        ({"vocabulary": 400}, "vocabulary: unknown field of CorpusConfig; did you mean 'vocab_size'?"),
        ({"deduplication": {"leak_ngram": -1}}, "config.deduplication: leak_ngram: expected at least 0, got -1"),
        ({"deduplication": {"boilerplate": {"documents": -1}}}, "deduplication.boilerplate: documents: expected at least 0"),
        ({"clean": {"page_characters": 0}}, "config.clean: page_characters: expected at least 1, got 0"),
        ({"identities": "x"}, "identities: 'x' is for the analysis demographics, which is not among the analyses"),
        ({"toxicity_checkpoint": "x"}, "toxicity_checkpoint: 'x' is for the analysis toxicity, which is not among"),
        ({"identities": "/none", "analyses": ("demographics",)}, "identities: expected a file of axes and descriptors"),
        ({"toxicity_checkpoint": "./x", "analyses": ("toxicity",)}, "expected a checkpoint of transformers, found no config"),
        ({"deduplication": {"near": {"threshold": 2.0}}}, "deduplication.near: threshold: expected a number between 0 and 1"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: expected a number between 0 and 1, got 1.0"),
        ({"block_length": "long"}, "block_length: expected a int, got 'long'"),
        ({"clean": {"mask": True}}, "clean.mask: True is for the step privacy, which no source has; expected it among the"),
        ({"clean": {"languages": ("de",)}}, r"clean.languages: \('de',\) is for the step language, which no source has"),
        ({"clean": {"c4": {"sentences": 1}}}, "clean.c4: other limits is for the step c4, which no source has"),
        ({"clean": {"gopher": {"stop_words": 0}}}, "is for the step gopher or repetition, which no source has"),
        ({"clean": {"block_list": __file__}}, r"test_corpus.py:1: expected a domain, a tab and a reason, got '\"\"\"`python"),
        ({"sources": {"web": {"reader": ""}}}, "sources.web.reader: .* expected a path, a pattern or a directory of .* got ''"),
        ({"sources": {"web": {"reader": __file__}}}, "sources.web.reader: .*expected files to read .*found .*/test_corpus.py"),
        ({"sources": {"web": {"reader": "none://bucket/x.jsonl"}}}, "web.reader: .*storage could not be asked .ValueError"),
    ],
)
def test_a_wrong_corpus_config_is_refused(web, changes, message):
    values = get_config("jsonl").to_dict()
    values["sources"]["web"]["reader"] = str(web)
    if "web" in changes.get("sources", {}):
        values["sources"]["web"].update(changes["sources"]["web"])
        changes = {k: v for k, v in changes.items() if k != "sources"}
    with pytest.raises(ConfigError, match=message):
        parse(corpus.CorpusConfig, {**values, **changes})


def test_a_classifier_that_was_replaced_is_noticed(tmp_path):
    none = types.SimpleNamespace(evaluation=(), block_list=None)
    config = types.SimpleNamespace(
        sources={}, tokenizer=None, identities=None, clean=none, deduplication=none, toxicity_checkpoint=f"{tmp_path}/c#toxic"
    )  # fmt: skip
    (tmp_path / "c").mkdir()
    (tmp_path / "c/weights").write_bytes(b"old")
    before = corpus.inputs(config)
    (tmp_path / "c/weights").write_bytes(b"newer")
    assert corpus.changed_files(before, corpus.inputs(config)) == [f"{tmp_path}/c/weights: 3 bytes -> 5 bytes"]
    config.toxicity_checkpoint = "unitary/toxic-bert"
    assert corpus.inputs(config)["settings"] == []


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "web.jsonl").touch()
    with pytest.raises(ConfigError, match="sources.web.reader: expected text in the files, .*/web.jsonl: empty"):
        config_of(tmp_path / "web.jsonl")
    (tmp_path / "web.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="source 'web': 0 documents leave 0 to train on and 0 held out"):
        corpus.run(config_of(tmp_path / "web.jsonl"), tmp_path / "out")
    with pytest.raises(ValueError, match="corpus 'big' is unknown; expected tiny, default, jsonl or web"):
        get_config("big")


def test_a_dry_run_prints_the_mixture_and_writes_nothing(web, tmp_path):
    config = config_of(web, max_epochs=2.0, total_tokens=5000)
    printed = corpus.dry_run(config)
    size = sum(len(text(i).encode()) for i in range(90)) * 0.9  # what is held out does not count
    row = next(line for line in printed.splitlines() if line.startswith("web "))
    _, count, megabytes, tokens, share, planned, epochs = row.split()
    assert (count, share, planned) == ("81", "100.0%", "5,000")
    ratio = estimate.assumed_bytes_a_token(config.vocab_size)
    assert int(tokens.replace(",", "")) == pytest.approx(size / ratio, rel=0.01)
    assert float(epochs) == pytest.approx(5000 / (size / ratio), rel=0.02) and float(megabytes) == 0.0
    assert "90 documents" in printed and "100.0% pass the filters" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["web.jsonl.gz"]
    printed = corpus.dry_run(config_of(web, max_epochs=2.0, total_tokens=1_000_000))
    assert "2.00*" in printed and "of the 1,000,000 tokens of training asked for" in printed


@pytest.mark.parametrize("pieces, ratio", [(32_000, 4.0), (16_000, 3.7), (64_000, 4.3), (4096, 3.11), (1, 1.0)])
def test_fewer_pieces_are_shorter(pieces, ratio):
    assert estimate.assumed_bytes_a_token(pieces) == pytest.approx(ratio, abs=0.005)


def estimated(printed: str) -> tuple[int, int]:
    """Documents and tokens of the one source."""
    row = next(line for line in printed.splitlines() if line.startswith("web ")).split()
    return int(row[1].replace(",", "")), int(row[3].replace(",", ""))


def test_a_dry_run_looks_at_small_and_large_files_of_each_kind(tmp_path):
    """Where one kind or the smallest file stood for all, these came out as thousands of documents, and as a third of them."""
    long = [f"{text(i)}\n\n{text(i + 200)}" for i in range(102)]
    for i, content in enumerate([*long, "Hi"]):
        (tmp_path / "texts" / f"{i}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(content)
    count, _ = estimated(corpus.dry_run(config_of(tmp_path / "texts")))
    assert count == round(103 * 0.9)  # without the held-out tenth
    for i in range(12):  # more than are sampled, and as much text packed as plain
        rows = [{"text": text(k)} for k in range(40 * i, 40 * i + 40)]
        write_jsonl(tmp_path / "mixed" / f"{i}.jsonl{'.gz' * (i % 2)}", rows)
    config = config_of(tmp_path / "mixed")
    count, tokens = estimated(corpus.dry_run(config))
    size = sum(len(text(k).encode()) for k in range(480)) * 0.9
    assert count == pytest.approx(432, rel=0.02)
    assert tokens == pytest.approx(size / estimate.assumed_bytes_a_token(config.vocab_size), rel=0.02)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_dry_run_of_the_beginning_of_a_file_knows_how_much_of_it_that_is(tmp_path, monkeypatch, suffix):
    draw = random.Random(0)
    rows = [{"text": f"{draw.getrandbits(800):x}", "more": f"{draw.getrandbits(2400):x}"} for _ in range(3000)]
    write_jsonl(tmp_path / f"web.jsonl{suffix}", rows)  # a text of 200 bytes in a row of 800
    monkeypatch.setattr(estimate, "SAMPLED_BYTES", 200_000)
    count, _ = estimated(corpus.dry_run(config_of(tmp_path / f"web.jsonl{suffix}")))
    assert count == pytest.approx(2700, rel=0.15)


def test_a_dry_run_says_what_it_cannot_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "web.jsonl", ({"content": text(i)} for i in range(30)))
    with pytest.raises(SettingsError, match=r"web.jsonl:\d+: text: .* got None \(there are 'content'; .*as bad"):
        corpus.dry_run(config_of(tmp_path / "web.jsonl"))
    write_jsonl(tmp_path / "web.jsonl", ({"text" if i % 2 else "content": text(i)} for i in range(30)))
    printed = corpus.dry_run(config_of(tmp_path / "web.jsonl"))
    assert "web: 15 bad row(s) in the sample, the first" in printed and "the build will end, max_bad_rows is 0" in printed
    assert "the build will end" not in corpus.dry_run(config_of(tmp_path / "web.jsonl", max_bad_rows=15))
    for part in range(4):  # the smallest has another column
        rows = {"text" if part else "content": [text(i) for i in range(2 + 30 * part)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{part}.parquet")
    with pytest.raises(SettingsError, match="0.parquet:0: no column 'text' among 'content'"):
        corpus.dry_run(config_of(f"{tmp_path}/*.parquet", max_bad_files=9))


def test_a_source_that_names_what_is_not_there_is_no_damage(tmp_path, monkeypatch):
    """A wrong column and a wrong data set end the build, however many files may be damaged."""
    import pyarrow
    import pyarrow.parquet
    import tensorflow_datasets

    pyarrow.parquet.write_table(pyarrow.table({"content": [text(i) for i in range(30)]}), tmp_path / "a.parquet")
    with pytest.raises(SettingsError, match="a.parquet:0: no column 'text' .* this is no damage that max_bad_files could skip"):
        corpus.run(config_of(f"{tmp_path}/a.parquet", max_bad_files=9), tmp_path / "out")

    def unknown(*args, **how):
        raise LookupError("Dataset nothing not found.\nAvailable datasets:\n" + "\t- many\n" * 1000)

    monkeypatch.setattr(tensorflow_datasets, "data_source", unknown)
    said = r"nothing:0: TFDS gives no split 'train' of this data set \(LookupError: Dataset nothing not found.\) \(source 'web'"
    with pytest.raises(SettingsError, match=said):
        corpus.run(config_of("tfds://nothing", max_bad_files=9), tmp_path / "out")


def test_a_corpus_of_nothing_says_what_became_of_all(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "too short"}] * 20 + [{"content": "x"}] * 3)
    config = get_config("jsonl")
    config.sources.web.update({"reader": f"{tmp_path}/a.jsonl", "steps": ("gopher",)})
    config.max_bad_rows = 5
    said = r"source 'web': 20 documents leave 0 to train on and 0 held out; expected at least one each; 20 filtered "
    said += r"\(gopher: words 20\); 3 bad rows skipped, the first .*/a.jsonl:21: text: expected a string"
    with pytest.raises(SettingsError, match=said):
        corpus.run(parse(corpus.CorpusConfig, config), tmp_path / "out")
    config.sources.web.steps = ("normalise",)
    with pytest.raises(SettingsError, match="20 documents leave .*; 19 exact copies; 3 bad rows skipped"):
        corpus.run(parse(corpus.CorpusConfig, config), tmp_path / "out")


def test_documents_are_grouped_by_the_field_that_the_config_names_and_by_no_other(tmp_path):
    """A course whose pages have modules, a few for all, is not withheld for it."""
    rows = [{"text": text(i), "metadata": {"module": i % 12, "course": i // 3}} for i in range(90)]
    write_jsonl(tmp_path / "web.jsonl", rows)
    withheld = {}
    for group in (None, "module", "course"):
        config = config_of(tmp_path / "web.jsonl", held_out_group=group, held_out_minimum=1, deduplication={})
        counts = corpus.run(config, tmp_path / str(group))["sources"]["web"]
        held = {row["metadata"].get(group) for _, row in read_jsonl(tmp_path / str(group) / "held_out" / "web.jsonl")}
        withheld[group] = counts["withheld_documents"]
        assert withheld[group] == (0 if group is None else sum(row["metadata"][group] in held for row in rows)
                                   - counts["held_out_documents"])  # fmt: skip
    assert 0 < withheld["course"] < withheld["module"]


def test_a_dry_run_of_a_tfds_data_set_has_numbers(tmp_path, monkeypatch):
    from array_record.python.array_record_module import ArrayRecordWriter

    from tests.test_corpus_readers import example, tfds_folder

    folder = tfds_folder(tmp_path, 90)
    writer = ArrayRecordWriter(str(folder / "tiny_text-train.array_record-00000-of-00001"), "group_size:1")
    for i in range(90):
        writer.write(example({"id": str(i), "text": text(i), "url": ""}))
    writer.close()
    config = config_of(f"tfds://tiny_text:1.0.0?split=train&dir={tmp_path}")
    for sampled in (10**9, 3000):  # all of it, and the beginning
        monkeypatch.setattr(estimate, "SAMPLED_BYTES", sampled)
        row = next(line for line in corpus.dry_run(config).splitlines() if line.startswith("web "))
        assert int(row.split()[1]) == pytest.approx(81, abs=1)  # without the held-out tenth
        size = sum(len(text(i).encode()) for i in range(90)) * 0.9
        assert int(row.split()[3].replace(",", "")) == pytest.approx(
            size / estimate.assumed_bytes_a_token(config.vocab_size), rel=0.1
        )


def test_a_dry_run_of_parquet_counts_rows_and_not_compressed_bytes(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    for part in range(3):
        rows = {"id": [f"{part}/{i}" for i in range(30)], "text": [text(30 * part + i) for i in range(30)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{part}.parquet", compression="zstd")
    for sampled in (10**9, 1000):
        monkeypatch.setattr(estimate, "SAMPLED_BYTES", sampled)
        table = corpus.dry_run(config_of(f"{tmp_path}/*.parquet"))
        row = next(line for line in table.splitlines() if line.startswith("web "))
        assert int(row.split()[1]) == pytest.approx(81, abs=1)  # without the held-out tenth


def parsed(*arguments: str) -> ConfigDict:
    """The config as the command's flags make it, without the seconds that a process of its own takes."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", values)
    argv = ["corpus", f"--config={REPOSITORY}/configs/corpus.py:jsonl", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "FLAGS", values)
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for the fields
        parse_flags(argv)
    return values.config


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("sources.books.reader=x", "config.sources.books: unknown field, there are web"),
        ("clean.gophers.words=(1,2)", "config.clean.gophers: unknown field .did you mean 'gopher'.*, there are .*, gopher, "),
        ("deduplication.near.treshold=0.5", "config.deduplication.near.treshold: unknown .* 'threshold'.*, there are bands, "),
        ("vocab=3", r"config.vocab: unknown field \(did you mean 'vocab_size'\?\), there are .*, shards"),
    ],
)
def test_a_flag_that_names_no_field_is_told_those_that_there_are(flag, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        parsed(f"--config.{flag}")


def test_every_rule_has_a_flag_and_a_switch(web):
    off = ["boilerplate.documents=0", "near.threshold=0", "leak_ngram=0", "repeated_paragraph=0"]
    values = parsed(
        f"--config.sources.web.reader={web}", "--config.sources.web.steps=('repetition','c4')",
        "--config.clean.gopher.words=(5,100)", "--config.clean.c4.sentences=1",
        "--config.max_bad_files=3", *(f"--config.deduplication.{rule}" for rule in off),
    )  # fmt: skip
    config = parse(corpus.CorpusConfig, values)
    assert (config.clean.gopher.words, config.clean.c4.sentences, config.settings().max_bad_files) == ((5, 100), 1, 3)
    rules = config.deduplication
    assert not (rules.boilerplate or rules.near or rules.leak_ngram or rules.repeated_paragraph)
    assert Deduplication() == Deduplication(boilerplate=Boilerplate(documents=0), near=NearDuplicates(threshold=0.0))
    # The numbers of the config are the published ones that the library has.
    config = parse(corpus.CorpusConfig, {**get_config("jsonl").to_dict(), "sources": values.sources.to_dict()})
    assert config.clean == CleanConfig() and config.deduplication.near == NearDuplicates()
    assert dataclasses.replace(config.deduplication.boilerplate, documents=10) == Boilerplate()


def test_the_config_of_ones_own_that_the_docstring_shows(tmp_path, monkeypatch):
    source = configs.corpus.__doc__.split("such as\n")[1].split("\nin the directory")[0]
    write_jsonl(tmp_path / "crawl" / "a.jsonl", [{"text": text(1)}])
    write_jsonl(tmp_path / "wiki" / "b.jsonl", [{"content": text(2)}])
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(textwrap.dedent(source).replace("parquet", "jsonl").replace("warc.gz", "jsonl"), namespace)
    config = parse(corpus.CorpusConfig, namespace["get_config"]())
    assert config.order == ("wiki", "web") and config.sources["web"].steps[0] == "extract"
    found = [next(corpus.documents(name, config.sources[name], seed=0)).text for name in config.order]
    assert found == [text(2), text(1)]


def test_bad_rows_are_counted_named_and_fatal_beyond_the_limit(tmp_path):
    path = tmp_path / "web.jsonl"
    rows = [f'{{"text": {json.dumps(text(i))}}}' for i in range(90)]
    path.write_text("\n".join([*rows[:40], "{", *rows[40:], "[]"]) + "\n")
    counts = corpus.run(config_of(path, max_bad_rows=2), tmp_path / "out")["sources"]["web"]
    assert counts["bad_rows"] == 2 and counts["documents_read"] == 90
    assert [row.split(": ")[0] for row in counts["bad_rows_named"]] == [f"{path}:41", f"{path}:92"]
    with pytest.raises(ValueError, match=rf"^{path}:92: expected a JSON object.*bad row 2 of source 'web'; max_bad_rows is 1"):
        corpus.run(config_of(path, max_bad_rows=1), tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_two_sources_in_their_order_built_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ({"text": text(i)} for i in range(40)))
    write_jsonl(tmp_path / "b.jsonl.gz", ({"text": text(i)} for i in range(30, 70)))
    values = get_config("jsonl").to_dict() | {
        "sources": {
            "a": {"reader": str(tmp_path / "a.jsonl"), "weight": 3.0, "byte_budget": 10**6},
            "b": {"reader": str(tmp_path / "b.jsonl.gz"), "weight": 1.0, "byte_budget": 10**6},
        },
        "order": ("b", "a"), "vocab_size": 330, "block_length": 16, "total_tokens": 5000, "held_out_fraction": 0.1,
    }  # fmt: skip
    manifest = corpus.run(parse(corpus.CorpusConfig, values), tmp_path / "c")
    assert list(manifest["sources"]) == ["b", "a"] and manifest["sources"]["a"]["planned_tokens"] == 3750
    assert [s["duplicates"] for s in manifest["sources"].values()] == [0, 10]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    assert corpus.run(parse(corpus.CorpusConfig, values), tmp_path / "c") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before
    with pytest.raises(ConfigError, match="built with another config: block_length: 16 -> 8"):
        corpus.run(parse(corpus.CorpusConfig, {**values, "block_length": 8}), tmp_path / "c")


def test_a_corpus_of_files_that_changed_is_not_taken_for_theirs(tmp_path):
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", ({"text": text(i)} for i in range(30)))
    (tmp_path / "sites").write_text("bad.org\t spam\n")
    values = get_config("jsonl").to_dict()
    values["sources"]["web"]["steps"] = ("privacy",)
    values["sources"]["web"]["reader"] = str(tmp_path / "*.jsonl")
    values["clean"]["block_list"] = str(tmp_path / "sites")
    values |= {"vocab_size": 330, "block_length": 16, "total_tokens": 1000, "held_out_fraction": 0.1}
    manifest = corpus.run(parse(corpus.CorpusConfig, values), tmp_path / "out")
    size = (tmp_path / "a.jsonl").stat().st_size
    assert [facts[:2] for facts in manifest["inputs"]["sources"]["web"]][0] == [str(tmp_path / "a.jsonl"), size]
    assert len(manifest["code"]) == 64
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").rename(tmp_path / "d.jsonl")
    os.utime(tmp_path / "c.jsonl", ns=(1, 1))
    os.utime(tmp_path / "sites", ns=(1, 1))
    expected = [
        f"{tmp_path}/a.jsonl: {size:,} bytes -> 16 bytes", f"{tmp_path}/b.jsonl: is gone",
        f"{tmp_path}/c.jsonl: {size:,} bytes, written again", f"{tmp_path}/d.jsonl: was not there",
        f"{tmp_path}/sites: 14 bytes, written again",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as error:
        corpus.run(parse(corpus.CorpusConfig, values), tmp_path / "out")
    assert str(error.value) == f"{tmp_path}/out: was built of other files; use another --output: {'; '.join(expected)}"


def test_the_command_on_this_installation(tmp_path):
    small = {"vocab_size": 400, "tokenizer_bytes": 100_000, "held_out_minimum": 5000, "held_out_maximum": 10_000}
    names = ("reference", "stdlib_docs", "package_docs", "source_code")
    budgets = {f"sources.{name}.byte_budget": 100_000 for name in names}
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.corpus", "--config=configs/corpus.py:tiny", f"--output={tmp_path / 'c'}"]
        + [f"--config.{name}={value}" for name, value in {**small, **budgets}.items()],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = check_manifest(tmp_path / "c", Tokenizer(tmp_path / "c" / "tokenizer.model"))
    assert done.stdout.strip() == manifest["table"]
    assert tuple(manifest["sources"]) == names
    assert manifest["config"]["vocab_size"] == 400 and manifest["config"]["deduplication"]["leak_ngram"] == 8
    for name, counts in manifest["sources"].items():
        rows = [row for _, row in read_jsonl(tmp_path / "c" / "held_out" / f"{name}.jsonl")]
        assert len(rows) == counts["held_out_documents"] and {row["source"] for row in rows} == {name}
        assert sum(len(row["text"].encode()) for row in rows) == counts["held_out_bytes"] <= 10_000
