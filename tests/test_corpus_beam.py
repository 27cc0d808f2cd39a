"""Apache Beam carries the same functions: the corpus is that of one process, byte for byte (needs the extra [data])."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest

from configs.corpus import get_config
from llama_jax import corpus
from llama_jax.config import ConfigError, parse
from llama_jax.corpus_build.beam_functions import read_array
from llama_jax.corpus_build.beam_refine import Refinement
from llama_jax.corpus_build.components import ROUNDS, firsts_in_one_process, firsts_over_workers
from llama_jax.corpus_build.evaluation import Evaluation
from llama_jax.corpus_build.stages import SettingsError, Stages
from llama_jax.data.sources import write_jsonl

pytest.importorskip("apache_beam", reason="needs apache-beam: pip install 'llama_jax[data]'")
WORDS = ["".join(parts) for parts in zip("bcdfghklmnpr" * 20, "aeiou" * 48, "bcdfghklmnprst" * 18, "aeiou" * 48)]


def text(draw: random.Random, paragraphs: int) -> str:
    return "\n\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(paragraphs)) + "\n"


@pytest.fixture
def config(tmp_path) -> corpus.CorpusConfig:
    """Two sources with copies, near copies, repeated paragraphs and lines, modules, evaluation samples and a torn row."""
    draw = random.Random(0)
    texts = [text(draw, 4) for _ in range(80)]
    again = [t + "\n" + t.split("\n\n")[0] + "\n" for t in texts]  # the first paragraph at the end too, held out as well
    # Ids repeat, as in files that count from 0 each.
    docs = [
        {"id": str(i % 9), "text": t, "url": f"http://site{i % 3}.org/", "metadata": {"module": f"m{i % 30}"}}
        for i, t in enumerate(again)
    ]
    web = [{"id": str(i % 4), "text": again[i] + f"and three more {word}"} for i in range(15) for word in ("words", "of it")]
    web += [{"text": again[20] + "  \n"}, {"text": " "}, {"id": "0", "text": again[21], "url": "a.org"}]
    web += [{"id": "0", "text": texts[70] + f"{word}\n", "url": word} for word in ("short", "brief", "brief")]
    web += [{"text": "Accept all the cookies\n\n" + text(draw, 2) + "\n" + texts[i].split("\n\n")[2]} for i in range(30, 70)]
    write_jsonl(tmp_path / "docs.jsonl", docs)
    code = [{"text": text(draw, 3) + "\n" + texts[i % 9].split("\n\n")[0]} for i in range(40)]
    code += [{"text": text(draw, 12) + "\n" + texts[i].split("\n\n")[1]} for i in range(2)]  # samples: 8 % of a program
    write_jsonl(tmp_path / "code.jsonl", code)
    for part in range(3):
        write_jsonl(tmp_path / f"web-{part}.jsonl.gz", web[part::3])
    with open(tmp_path / "web-3.jsonl", "w") as file:
        file.write('{"text": "torn')
    write_jsonl(tmp_path / "samples.jsonl", [{"text": texts[i].split("\n\n")[1]} for i in range(4)])
    values = get_config("jsonl").to_dict()
    values["deduplication"] |= {
        "evaluation": (str(tmp_path / "samples.jsonl"),), "boilerplate": {"documents": 5, "share": 0.001, "shortest": 3},
    }  # fmt: skip
    source = {"byte_budget": None, "steps": ("normalise",)}
    values |= {
        "sources": {
            "docs": {"reader": str(tmp_path / "docs.jsonl"), "weight": 1.0, **source},
            "code": {"reader": str(tmp_path / "code.jsonl"), "weight": 1.0, "whole": True, **source},
            "web": {"reader": str(tmp_path / "web-*"), "weight": 2.0, **source},
        },
        "order": ("docs", "code", "web"), "vocab_size": 360, "block_length": 32, "total_tokens": 10_000,
        "held_out_fraction": 0.1, "held_out_minimum": 3000, "held_out_maximum": 8000, "held_out_group": "module",
        "shards": 2, "max_bad_rows": 1,
        "analyses": ("demographics",),
    }  # fmt: skip
    return parse(corpus.CorpusConfig, values)


def files(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


TWO_WORKERS = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], TWO_WORKERS], ids=["one worker", "two workers"])
def test_beam_builds_the_corpus_of_one_process(config, tmp_path, options):
    manifest = corpus.run(config, tmp_path / "one")
    counts = manifest["sources"]
    # Every kind of removal happens, or equality would say little.
    assert counts["web"]["near_duplicates"] and counts["web"]["duplicates"] and counts["web"]["boilerplate_lines"] >= 40
    assert counts["web"]["repeats_paragraphs"] + counts["web"]["leaks_paragraphs"] > 10
    assert counts["docs"]["withheld_documents"] and counts["docs"]["evaluation_paragraphs"] and counts["code"]["leaks"]
    assert counts["docs"]["repeats_paragraphs"] > counts["docs"]["documents"]  # of held-out documents too
    assert counts["code"]["evaluation"] == 2 and counts["web"]["trimmed_by"]["normalise"]["bytes"] == 2
    assert counts["web"]["bad_rows"] == 1 and counts["web"]["filtered_by"] == {"read: blank": 1}
    assert corpus.run(config, tmp_path / "beam", beam=options) == manifest
    assert files(tmp_path / "beam") == files(tmp_path / "one")
    report = (tmp_path / "one" / "report.html").read_text()
    for what in ("stands for it", "cut from 40 documents", "Paragraphs shared with evaluation", "Repeated paragraphs <span>"):
        assert what in report


@pytest.mark.slow
def test_evaluation_samples_are_not_in_the_job(config, tmp_path):
    """Dataflow takes jobs of 10 MB; a million words of samples would fill one."""
    import apache_beam as beam

    def job(words):
        pipeline, evaluation = beam.Pipeline(), Evaluation((" ".join(map(str, range(words))),))
        work = tmp_path / str(words)
        refinement = Refinement(beam, list(config.order), config.settings(), evaluation, work, Stages(None))
        refinement.expand(pipeline, {name: [str(tmp_path / "docs.jsonl")] for name in config.order})
        assert len(read_array(str(work / "evaluation.npy"))) == words - config.deduplication.leak_ngram + 1
        return pipeline.to_runner_api().ByteSize()

    small, large = job(100), job(20_000)
    assert abs(large - small) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1, ROUNDS])
def test_beam_finds_the_components_of_one_process(rounds):
    import apache_beam as beam
    from apache_beam.testing.util import assert_that, equal_to

    draw = random.Random(0)
    nodes = [(draw.randrange(3), -i, f"d{i % 7}", bytes([i])) for i in range(100)]
    links = [tuple(draw.sample(nodes, 2)) for _ in range(60)] + [(nodes[i], nodes[i + 1]) for i in range(70, 99)]
    expected = list(firsts_in_one_process(links).items())
    with beam.Pipeline() as pipeline:
        assert_that(firsts_over_workers(beam, pipeline | beam.Create(links), rounds=rounds), equal_to(expected))


@pytest.mark.slow
def test_the_tokenizer_of_many_shards_is_that_of_one_process(config, tmp_path):
    config = dataclasses.replace(config, shards=8, tokenizer_bytes=30_000)
    corpus.run(config, tmp_path / "one")
    corpus.run(config, tmp_path / "beam", beam=[])
    assert files(tmp_path / "beam") == files(tmp_path / "one")


@pytest.mark.slow
def test_beam_refuses_what_one_process_refuses(config, tmp_path):
    """A column that is not there, however many files may be bad, and a source of which nothing is left."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"content": ["text"]}), tmp_path / "web-4.parquet")
    for changes, problem in (
        ({"max_bad_files": 9}, r"web-4.parquet:0: no column 'text' .*source 'web'; this is no damage"),
        ({"held_out_maximum": 1, "held_out_minimum": 1}, "source 'docs': 80 documents leave .* and 0 held out; .* withheld"),
    ):
        said = []
        for beam in (None, []):
            with pytest.raises(SettingsError, match=problem) as error:
                corpus.run(dataclasses.replace(config, **changes), tmp_path / "x", beam=beam)
            said.append(str(error.value))
            shutil.rmtree(tmp_path / ".x.unfinished")
        assert said[0] == said[1]
        (tmp_path / "web-4.parquet").unlink(missing_ok=True)


@pytest.mark.slow  # a moment, but Beam is there for the slow tests alone (.ci/run)
def test_what_beam_cannot_do_is_said_before(tmp_path):
    small = parse(corpus.CorpusConfig, get_config("tiny"))
    with pytest.raises(ConfigError, match="sources.reference: Beam reads files; 'installation' is read in one process"):
        corpus.run(small, tmp_path / "x", beam=[])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--runner=Foo"], "got --runner=Foo: Unexpected pipeline runner: Foo. Valid values are "),
        (["--runner=foo.bar.Runner"], "No module named 'foo'"),
        (["--runner=DataflowRunner"], "Missing required option: project. "),
        (["--direct_num_workers=many"], "got --direct_num_workers=many: argument --direct_num_workers: invalid int"),
    ],
)
def test_options_that_make_no_pipeline_are_one_sentence(config, tmp_path, options, problem):
    with pytest.raises(ConfigError, match=f"^--beam: expected options of Apache Beam .*{problem}"):
        corpus.run(config, tmp_path / "x", beam=options)
    assert not (tmp_path / "x").exists() and not (tmp_path / ".x.unfinished").exists()
