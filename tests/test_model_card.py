"""The model card: what it says of a base, a chat and a reward model, in exports too, and what it refuses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from small_models import trained_tokenizer, written
from test_training import loop, mesh_of, stage

import llama_jax
from llama_jax import convert, model_card
from llama_jax.corpus_build.manifest import write_manifest
from llama_jax.evals import card_facts, card_text
from llama_jax.evals.origin import identity
from llama_jax.files import write_json
from llama_jax.interop.formats import open_source
from llama_jax.interop.restore import describe_model
from llama_jax.parallel.hosts import file_fact
from llama_jax.training.fingerprint import sealed
from llama_jax.training.loop import finished, train
from llama_jax.training.saved import read_meta

ROOT = Path(__file__).parents[1]


def staged(workdir: Path, words, stage: str, *, step: int, start: str, data: dict, head="lm_head", done=None, **meta) -> Path:
    """A workdir as a stage leaves it, with random weights."""
    written(workdir, words, head)
    meta = sealed({**read_meta(workdir), "stage": stage, "step": step, "seconds": 30.0, **meta})
    checkpoint = workdir / "checkpoints" / str(step)
    (workdir / "checkpoints" / "0").rename(checkpoint)
    write_json(checkpoint / "meta" / "metadata", meta)
    write_json(checkpoint / "_CHECKPOINT_METADATA", {"commit_timestamp_nsecs": 1_700_100_000 * 10**9})
    layout = '{"axis_names": ["data", "fsdp", "tensor"], "shape": [2, 4, 1]}'
    write_json(checkpoint / "params" / "_sharding", {"YQ==": layout})
    (workdir / "attempts.jsonl").write_text('{"started": 1700000000.5}\n{"from": 0, "reached_before": 0}\n')
    write_json(workdir / "config.json", {"stage": stage, "start": start, "loop": {"batch_size": 8}, "data": data})
    write_json(workdir / "done.json", {"steps": step, "seconds": 60.4, "goodput": 0.75, "held_out": {}, **(done or {})})
    facts = {field: value for field, value in data.items() if field in ("corpus", "train")}
    write_json(workdir / "inputs.json", {f"data.{field} {file}": file_fact(file) for field, file in facts.items()})
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """corpus, base, chat, reward and pairs.jsonl, as the recipe's directories lie beside each other."""
    root = tmp_path_factory.mktemp("files") / "runs"
    root.mkdir()
    words = trained_tokenizer(root)
    (root / "corpus").mkdir()
    source = {"documents": 1200, "tokens": 34_000, "blocks": 530, "share": 0.25}
    write_manifest(root / "corpus", {
        "sources": {"a|b": source, "web": source | {"share": 0.75}}, "tokenizer": words.fingerprint, "vocab_size": 320,
        "block_length": 64, "table": "", "config": {}, "version": "",
    })  # fmt: skip
    (root / "pairs.jsonl").write_text("{}\n")
    staged(root / "base", words, "pretrain", step=20, start="", data={"corpus": str(root / "corpus"), "weights": {}},
           done={"held_out": {"bits_per_byte/web": 1.25}})  # fmt: skip
    file = str(root / "pairs.jsonl")
    staged(root / "chat", words, "sft", step=3, start=str(root / "base"), data={"train": file, "length": 32}, chat="llama2",
           done={"jax": "0.10.2", "device_kind": "TPU v5 lite"})  # fmt: skip
    staged(root / "reward", words, "reward", step=5, start=f"{root}/chat@3", data={"train": file, "length": 32},
           head="reward_head", chat="llama2", done={"held_out": {"accuracy/all": 0.625}})  # fmt: skip
    return root


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0]


def test_the_card_of_a_chat_model_says_what_its_files_say(runs, tmp_path):
    text = model_card.run(runs / "chat", tmp_path / "CARD.md", name="my *chat*", license_="llama2")
    words = read_meta(runs / "chat")["tokenizer"][:16]
    pairs = file_fact(runs / "pairs.jsonl")
    expected = f"""# Model card: my &#42;chat&#42;

Written by `llama_jax.model_card` from the files of the model. "Not said": no file says it.

## Model details

|  |  |
| --- | --- |
| Developers and contact | not said |
| Kind | chat model |
| Input, output | text in, text out |
| Architecture | decoder-only transformer of Llama 2: RMSNorm, SwiGLU, rotary positions, grouped-query attention |
| Parameters | 28,256 |
| Layers | 1 |
| Width | 32 |
| Heads | 4, of keys and values 2, 8 wide |
| Feed-forward | 48 |
| Vocabulary | 320 |
| Context | 128 tokens |
| Tokenizer | sha256 {words} |
| Dialog format | llama2 |
| Stages | parameters drawn at random → pretrain (runs/base) → sft (runs/chat) |
| Dates | 2023-11-14 to 2023-11-16 |
| Status | fixed weights, of step 3 |
| License | llama2 |

## Intended use

**Meant for.** {card_text.USE["chat model"]}

**Out of scope.** {card_text.OUT_OF_SCOPE}

## Hardware and software

| stage | wall time | goodput | devices | kind of device | JAX |
| --- | --- | ---: | --- | --- | --- |
| pretrain | 60 s | 75.0% | 8 (data 2, fsdp 4) | not said | not said |
| sft | 60 s | 75.0% | 8 (data 2, fsdp 4) | TPU v5 lite | 0.10.2 |

Kind of device and JAX are those of a run's last start. The card was written with llama_jax {llama_jax.__version__} and JAX \
{jax.__version__}.

## Training data

**pretrain** (runs/base): 20 steps of 8 rows of 64 tokens, 10,240 tokens in all.

| source | documents | tokens | rows | share of what was read |
| --- | ---: | ---: | ---: | ---: |
| a&#124;b | 1,200 | 34,000 | 530 | 25.0% |
| web | 1,200 | 34,000 | 530 | 75.0% |

**sft** (runs/chat): 3 steps of 8 rows of at most 32 tokens.

| field | file or model | fingerprint |
| --- | --- | --- |
| data.train | runs/pairs.jsonl | {pairs} |

Until when the data reach: not said.

## Evaluation results

Not said.

## Ethical considerations and limitations

{card_text.RISKS["language model"]} What stands under evaluation results is all that is known of its behaviour, and no \
safety benchmark is among it. Test it for your own use first.
"""
    assert text == expected and (tmp_path / "CARD.md").read_text() == text
    assert model_card.run(runs / "chat", tmp_path / "CARD.md", name="my *chat*", license_="llama2") == text


def test_training_says_its_devices_and_version_of_jax(tmp_path):
    mesh = mesh_of()
    train(stage(mesh), loop(steps=1), mesh=mesh, workdir=tmp_path)
    run = card_facts.Stage(tmp_path / "checkpoints/1", {}, {}, finished(tmp_path), {}, {})
    assert (run.at_end("device_kind"), run.at_end("jax")) == (jax.devices()[0].device_kind, jax.__version__)
    assert dataclasses.replace(run, step=tmp_path / "checkpoints/0").at_end("jax") is None  # that may have been another start


def test_base_and_reward_models_have_their_own_cards(runs, tmp_path):
    base = model_card.run(runs / "base", tmp_path / "base.md")
    assert base.startswith("# Model card: base\n") and "| Kind | base model |" in base and "Dialog format" not in base
    assert "| License | not said |" in base and card_text.USE["base model"] in base
    assert "On held-out data of its training:" in base and "| bits_per_byte/web | 1.25 |" in base
    reward = model_card.run(f"{runs}/reward@5", tmp_path / "reward.md")
    assert reward.startswith("# Model card: reward@5\n") and card_text.RISKS["reward model"] in reward
    for row in (
        "| Kind | reward model |", "| Input, output | text in, one number, the higher the better, out |",
        "| Parameters | 18,048 |", "| accuracy/all | 0.625 |",
        "| Stages | parameters drawn at random → pretrain (runs/base) → sft (runs/chat) → reward (runs/reward) |",
    ):  # fmt: skip
        assert f"{row}\n" in reward


def test_what_is_gone_or_has_changed_is_not_said(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    for name in ("base", "chat"):
        file = tmp_path / f"runs/{name}/config.json"
        file.write_text(file.read_text().replace(str(runs), str(tmp_path / "runs")))
    corpus, base = tmp_path / "runs/corpus/manifest.json", tmp_path / "runs/base/inputs.json"
    base.write_text(base.read_text().replace(str(runs), str(tmp_path / "runs")))
    said = section(model_card.run(tmp_path / "runs/chat", tmp_path / "1.md"), "Training data")
    assert "10,240 tokens in all" in said
    corpus.write_text(corpus.read_text().replace("34000", "35000"))  # another corpus than that of the run
    said = section(model_card.run(tmp_path / "runs/chat", tmp_path / "2.md"), "Training data")
    assert "20 steps of 8 rows." in said and "Corpus runs/corpus: the manifest of then is not there. Sources: not said." in said
    shutil.rmtree(tmp_path / "runs/base")
    (tmp_path / "runs/chat/done.json").write_text("{")
    text = model_card.run(tmp_path / "runs/chat", tmp_path / "3.md")
    assert "| Stages | runs/base, which cannot be read here → sft (runs/chat) |" in text
    # The checkpoint says the seconds, too.
    assert "| sft | 30 s | not said | 8 (data 2, fsdp 4) | not said | not said |" in text
    said = section(text, "Training data")
    assert said.startswith("Data of what came before (runs/base, which cannot be read here): not said.\n\n**sft**")


def test_starts_are_followed_through_adapters_and_not_in_circles(runs, tmp_path):
    source = open_source(runs / "chat")
    shutil.copytree(runs, tmp_path / "runs")
    file = tmp_path / "runs/chat/checkpoints/3/meta/metadata"
    lora = {"rank": 8, "alpha": 16.0, "targets": ["query"], "base": describe_model(runs / "base", runs / "chat")}
    write_json(file, sealed({**json.loads(file.read_text()), "lora": lora}))
    (tmp_path / "runs/chat/config.json").unlink()  # the checkpoint itself names its base
    facts = card_facts.gather(dataclasses.replace(source, path=tmp_path / "runs/chat"))
    assert [stage.workdir for stage in facts.stages] == [tmp_path / "runs/base", tmp_path / "runs/chat"]
    assert "Adapters (LoRA) of rank 8 were trained." in card_text.card(facts, name="x")
    write_json(tmp_path / "runs/base/config.json", {"start": str(tmp_path / "runs/base")})
    facts = card_facts.gather(dataclasses.replace(source, path=tmp_path / "runs/base"))
    assert (facts.before, len(facts.stages)) == ("runs/base, which is that run itself", 1)


def test_samples_name_what_they_were_drawn_from(runs, tmp_path):
    config = {"policy": "/x/runs/v1@7", "safety": "/x/safety", "rejection": {"prompts": ["/x/sets/a.jsonl", "/x/sets/b.jsonl"]}}
    drawn = {"samples": {"seed": 0, "fingerprints": {"policy": "01", "prompts[1]": "23", "pools[0]": "45"}}}
    (stage,) = card_facts.gather(open_source(runs / "base")).stages
    stage = dataclasses.replace(stage, meta={"stage": "rejection"}, config=config, inputs={}, drawn=drawn)
    assert card_text._files(stage) == [
        "**rejection** (runs/base): 20 steps.",
        "| field | file or model | fingerprint |\n| --- | --- | ---: |\n| samples: policy | runs/v1@7 | 01 |\n"
        "| samples: prompts&#91;1&#93; | sets/b.jsonl | 23 |\n"
        "| samples: pools&#91;0&#93; | not said | 45 |",
        "With other models: policy runs/v1@7, safety x/safety.",
    ]  # fmt: skip


def results(output: Path, checkpoint: Path, **changes) -> str:
    """The output of an evaluation of two models, of which `checkpoint` is the second."""
    bold = {"metric": "vader", "stderr": 0.02, "n": 50}
    found = {
        "groups": {
            "toxigen": {"value": 0.25, "stderr": 0.0, "n": 4, "missing": []},
            "commonsense": {"value": 0.612, "stderr": 0.01, "n": 400, "missing": ["piqa"]},
        },
        "tasks": {"bold:a": {"value": 0.1, **bold}, "bold:b": {"value": 0.3, **bold}},
    }  # fmt: skip
    values = {"suite": "own", "limit": 100, "models": {"other": {"groups": {}, "tasks": {}}, "mine": found}, **changes}
    write_json(output / "results.json", values)
    write_json(output / "mine" / "model.json", identity(checkpoint))
    return str(output)


def planned(file: Path, **changes) -> str:
    run = {"tokens": 10_240, "chip_hours": 0.5, "tco2eq": 4e-05}
    values = {"model": "small", "program": "train", "topology": "v5e 2x2", "chips": 4, "run": run, **changes}
    write_json(file, values)
    return str(file)


def test_results_and_plans_come_from_their_commands(runs, tmp_path):
    given = results(tmp_path / "out", runs / "chat")
    text = model_card.run(runs / "chat", tmp_path / "c.md", evaluation=[given], plan=planned(tmp_path / "plan.json"))
    assert section(text, "Evaluation results") == """\
`llama_jax.evaluate`, suite own (percent, BOLD from -1 to 1; 95 % intervals from standard errors):

| benchmark | value | interval | n |
| --- | ---: | --- | ---: |
| Commonsense reasoning | 61.2 | 59.2 to 63.2 | 400 |
| ToxiGen (less is better) | 25.0 | not said | 4 |
| BOLD | 0.20 | 0.17 to 0.23 | 100 |

Commonsense reasoning: without piqa, so not the paper's average.

The first 100 rows of each task only: a trial, not a result."""
    assert "all that is known of its behaviour. Test it" in text
    assert text.partition("### Carbon\n\n")[2].partition("\n\n## ")[0] == """\
Planned, not measured: train on v5e 2x2, 4 chips. tCO2eq as in the paper's Table 2: chip hours x watts a chip x 1.1 x 0.385 \
t/MWh.

|  |  |
| --- | ---: |
| tokens | 10,240 |
| chip hours | 0.5 |
| tCO2eq | 4e-05 |"""
    without = planned(tmp_path / "plan.json", run={"tokens": 10_240, "chip_hours": 0.5})
    assert "tCO2eq" not in model_card.run(runs / "chat", tmp_path / "c.md", plan=without)


def test_exports_have_their_card(runs, tmp_path):
    convert.run(runs / "chat", tmp_path / "my-chat", to="huggingface", quiet=True)
    file = tmp_path / "my-chat/README.md"
    _, head, body = file.read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llama"]}
    assert body.lstrip("\n") == model_card.run(runs / "chat", tmp_path / "card.md", name="my-chat")
    # What an export cannot know is put in afterwards; the file is known as ours and replaced.
    model_card.run(runs / "chat", file, license_="no", evaluation=[results(tmp_path / "out", runs / "chat")])
    assert yaml.safe_load(file.read_text().split("---\n")[1])["license"] == "no" and "| BOLD | 0.20 |" in file.read_text()
    convert.run(runs / "reward", tmp_path / "my-reward", to="huggingface", quiet=True)
    assert yaml.safe_load((tmp_path / "my-reward/README.md").read_text().split("---\n")[1]) == {
        "library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["llama", "reward-model"],
    }  # fmt: skip
    convert.run(runs / "chat", tmp_path / "meta", to="meta", quiet=True)
    assert not (tmp_path / "meta/README.md").exists()


def test_of_other_formats_only_the_model_of_the_hub_is_known(runs, tmp_path):
    cached = tmp_path / "models--meta-llama--Llama-2-7b-hf/snapshots/0a1"
    convert.run(runs / "chat", cached, to="huggingface", quiet=True)
    convert.run(cached, tmp_path / "again", to="huggingface", quiet=True)
    convert.run(cached, tmp_path / "start", to="llama_jax", quiet=True)
    texts = [(tmp_path / "again/README.md").read_text(), model_card.run(tmp_path / "start", tmp_path / "x/README.md")]
    for text, way in zip(texts, ("", " → convert (*/start)"), strict=True):
        assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "meta-llama/Llama-2-7b-hf"
        way = way.replace("*", tmp_path.name)
        assert f"| Stages | weights in the format huggingface, from snapshots/0a1{way} |" in text
        assert "| Kind | language model |" in text and "| Dates | not said |" in text and "Training: not said." in text


def test_what_is_no_file_of_this_model_is_refused_in_a_sentence(runs, tmp_path):
    def refused(error: type, message: str, **how):
        with pytest.raises(error, match=message):
            model_card.run(runs / "chat", tmp_path / "c.md", **how)
        assert not (tmp_path / "c.md").exists()

    refused(ValueError, "^license: expected an identifier of the Hugging Face hub, .* got 'Llama 2!'$", license_="Llama 2!")
    refused(FileNotFoundError, "none/results.json: expected the results of llama_jax.evaluate, found nothing$",
            evaluation=[str(tmp_path / "none")])  # fmt: skip
    other = results(tmp_path / "out", runs / "base")
    write_json(tmp_path / "out/mine/model.json", {"weights": "of another"})
    refused(ValueError, "results.json: models: expected results of .*/chat, got those of other weights: other, mine$",
            evaluation=[other])  # fmt: skip
    refused(ValueError, r"results.json: models: expected \{name: groups and tasks\} of llama_jax.evaluate, got something else$",
            evaluation=[results(tmp_path / "out", runs / "chat", models={"mine": {}})])  # fmt: skip
    missing = "p.json: expected the JSON of llama_jax.plan --json, found nothing$"
    refused(FileNotFoundError, missing, plan=str(tmp_path / "p.json"))
    for changes, message in (
        ({"model": "70b"}, "p.json: model: expected 'small', that of the checkpoint, got '70b'$"),
        ({"run": {}}, r"p.json: run: expected the hours of a whole run \(llama_jax.plan --tokens=...\), got {}$"),
    ):
        refused(ValueError, message, plan=planned(tmp_path / "p.json", **changes))
    write_json(tmp_path / "p.json", {"best": []})
    refused(ValueError, r"p.json: expected the JSON of one plan \(", plan=str(tmp_path / "p.json"))
    (tmp_path / "mine.md").write_text("my own words")
    with pytest.raises(FileExistsError, match="mine.md: exists already and is no model card of ours; expected a new file$"):
        model_card.run(runs / "chat", tmp_path / "mine.md")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory$"):
        model_card.run(tmp_path / "nowhere", tmp_path / "c.md")


def test_the_command_writes_the_file_or_gives_one_line(runs, tmp_path):
    def command(*arguments: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "llama_jax.model_card", f"--checkpoint={runs / 'chat'}", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "tpu"})

    done = command(f"--output={tmp_path}/CARD.md")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/CARD.md\n"), done.stderr
    assert (tmp_path / "CARD.md").read_text() == model_card.run(runs / "chat", tmp_path / "again.md")
    done = command(f"--output={tmp_path}/other.md", f"--plan={tmp_path}/none.json")
    assert done.returncode == 1 and not (tmp_path / "other.md").exists()
    assert done.stderr.strip() == f"error: {tmp_path}/none.json: expected the JSON of llama_jax.plan --json, found nothing"
