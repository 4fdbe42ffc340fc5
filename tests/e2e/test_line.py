"""The shipped recipes, scaled down, from text to a model that transformers opens. The tests look at everything that a run leaves behind."""

from __future__ import annotations

import html.parser
import json
import re
import tomllib
from dataclasses import dataclass
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMALL = (
    "stages.pretrain.preset=gpt2-nano",
    "stages.pretrain.steps=20",
    "stages.pretrain.warmup_steps=5",
    "stages.pretrain.log_every=5",
    "stages.pretrain.eval_every=10",
    "stages.evaluate.sample_tokens=20",
)
RECIPES = {
    "quickstart": (
        "stages.tokenizer.vocab_size=400",
        "stages.pretrain.seq_len=128",  # room for questions
        *(f"stages.{stage}.steps=6" for stage in ("sft", "sft_longer", "reward_model")),
        *(f"stages.{stage}.eval_every=3" for stage in ("sft", "reward_model")),
        *(f"stages.{stage}.warmup_steps=2" for stage in ("sft", "reward_model")),
        "stages.reward_model.gate.min=0.0",
        *(
            f"stages.rl.{setting}"
            for setting in ("steps=2", "prompts_per_step=8", "global_batch_size=8", "micro_batch_size=4", "value_warmup_steps=1")
        ),
        "stages.rl.max_response_tokens=12",
        *(f"stages.evaluate_{which}.answer_tokens=8" for which in ("sft", "longer", "rl")),
    ),
    "shakespeare": tuple(f"stages.pretrain.{size}" for size in ("n_layer=2", "n_head=2", "n_embd=32", "seq_len=32")),
    "books": (
        'stages.documents.files=["pretrain_en_books/derived/mary*.jsonl", "pretrain_en_books/derived/arthur*.jsonl"]',
        "stages.documents.hold_out.share=0.3",
        "stages.tokenizer.vocab_size=400",
    ),
    "poetry-zh": (  # trained long enough to write characters
        "stages.pretrain.steps=100",
        "stages.pretrain.lr=1e-2",
        "stages.documents.hold_out.share=0.2",
        "stages.tokenizer.vocab_size=1200",
        "stages.evaluate.temperature=0",
    ),
}
ON_RAY = "quickstart"
"""The recipe that runs on Ray, with two ranks under DeepSpeed; the others run in one process, to save time."""


@dataclass
class Line:
    recipe: str
    program: Any
    words: tuple[str, ...]
    printed: str
    run: str

    stages: tuple[str, ...]

    def model(self, stage: str = "pretrain") -> Any:
        return self.program.store.artifact(self.program.outputs(self.run)[stage])


@pytest.fixture(scope="module", params=RECIPES)
def line(request, new_program, configs, data) -> Line:
    recipe = request.param
    program = new_program()
    settings = [*SMALL, *RECIPES[recipe], *([] if recipe == ON_RAY else [f'data="{data}"'])]
    words = (str(configs / f"{recipe}.toml"), *(word for setting in settings for word in ("--set", setting)))
    output = program.run("run", *words, *([] if recipe == ON_RAY else ["--inline"]))
    stages = tuple(tomllib.loads((configs / f"{recipe}.toml").read_text())["stages"])
    return Line(recipe, program, words, output, program.last_run(), stages)


def test_every_stage_is_built_and_a_pipe_gets_plain_lines(line):
    assert line.program.status(line.run) == dict.fromkeys(line.stages, "done")
    assert line.printed.splitlines()[-1].startswith(f"{len(line.stages)} made in ")
    assert line.printed.replace("\n", "").isprintable()
    made = line.program.action("pretrain", line.run).operational
    assert (made["engine"], made["ranks"]) == (("deepspeed", 2) if line.recipe == ON_RAY else ("torch", 1))


def test_the_report_compares_bits_per_byte_with_compressors(line, read_json):
    report = read_json(line.program.store.artifact(line.program.outputs(line.run)["evaluate"]).path / "report.json")
    figures = report["figures"]
    assert 0 < figures["eval/bits_per_byte"] < 10
    assert 0 < figures["eval/ppmd_bits_per_byte"] < figures["eval/xz_bits_per_byte"] < 10
    assert figures["eval/loss"] * report["tokens"] / (0.6931471805599453 * report["bytes"]) == pytest.approx(figures["eval/bits_per_byte"])
    assert len(report["samples"]) == 3
    if line.recipe == "poetry-zh":
        assert "\ufffd" not in json.dumps(report["samples"], ensure_ascii=False)


def test_transformers_opens_the_export_with_equal_logits_and_equal_ids(line, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from gpt.model import load_model
    from gpt.tokenizer import Tokenizer

    export = line.program.store.artifact(line.program.outputs(line.run)["export"]).path
    model = line.model("rl" if "rl" in line.stages else "pretrain")
    ours, tokenizer = load_model(model.path), Tokenizer.load(model.path / "tokenizer.json")
    theirs = GPT2LMHeadModel.from_pretrained(export).eval()
    held_out = next(iter(line.program.store.artifact(line.program.outputs(line.run)["documents"]).texts("held_out")))
    token_ids = tokenizer.encode(held_out)
    assert AutoTokenizer.from_pretrained(export)(held_out)["input_ids"] == token_ids
    window = torch.tensor([token_ids[: ours.config.seq_len]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(window).logits, ours(window), rtol=1e-5, atol=1e-5)


def test_a_second_run_and_a_plan_reuse_every_stage(line):
    assert {stage: decision for stage, (decision, _) in line.program.plan(*line.words).items()} == dict.fromkeys(line.stages, "reuse")
    before = line.program.outputs(line.run)
    output = line.program.run("run", *line.words)  # without --inline; yet nothing has to be started
    assert line.program.status() == dict.fromkeys(line.stages, "reused")
    assert line.program.outputs() == before
    assert "starting Ray" not in output
    assert output.splitlines()[-1].startswith(f"{len(line.stages)} reused in ")


def test_lineage_leads_from_the_model_to_the_source_files(line):
    output = line.program.run("lineage", f"sha256:{line.model().digest[:16]}")
    sources = {
        "quickstart": r"source \d+ files, .*\.py",
        "shakespeare": r"source pretrain_en_tinyshakespeare/tinyshakespeare\.txt",
        "books": r"source pretrain_en_books/derived/mary-shelley_frankenstein\.jsonl",
        "poetry-zh": r"source pretrain_zh_poetry/songci/songci_0000\.json",
    }
    assert output.startswith(f"policy model {line.model().digest[:12]}  pretrain")
    assert re.search(sources[line.recipe], output), output
    assert re.search(r"^[├└]─ (hf_checkpoint|report) ", output, re.MULTILINE)  # and what was built from it
    assert line.program.run("lineage", f"run:{line.run}/pretrain") == output


def test_sample_continues_a_prompt_the_same_way_for_the_same_seed(line):
    prompt = "明月幾時有"
    sample = ("sample", f"run:{line.run}/pretrain", "--prompt", prompt, "--tokens", "40")
    output = line.program.run(*sample, "--temperature", "0")
    assert output.startswith(prompt)
    assert len(output) > len(prompt) + 1
    if line.recipe == "poetry-zh":  # a model that read little Chinese may write invalid UTF-8
        assert not output.removeprefix(prompt).isascii()
        assert "\ufffd" not in output
        assert line.program.run(*sample, "--seed", "5") == line.program.run(*sample, "--seed", "5")


@pytest.mark.parametrize("line", ["quickstart"], indirect=True)  # the only one of these recipes with an assistant
def test_the_assistant_is_the_pipelines_newest_model_and_answers_in_a_pipe(line):
    assert line.program.store.alias(line.recipe, "newest") == line.program.outputs(line.run)["rl"]
    answer = line.program.run("chat", "--tokens", "8", typed="What does len do?\n")
    assert answer.strip()
    traced = line.program.run("lineage", f"run:{line.run}/rl")
    for kind in ("documents", "conversations", "preferences", "prompts", "reward model"):
        assert re.search(rf"^\W*\w+: {kind} ", traced, re.MULTILINE), traced


class _Loaded(html.parser.HTMLParser):
    """Collects what a browser would fetch from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            fetched = name in ("src", "srcset", "data", "poster") or (name in ("href", "xlink:href") and tag in ("link", "image", "use"))
            if fetched and not (value or "").startswith(("data:", "#")):
                self.found.append(f"<{tag} {name}={value}>")


def test_the_page_is_one_file_that_loads_nothing(line):
    page = (line.program.store.root / "runs" / line.run / "page.html").read_text(encoding="utf-8")
    loaded = _Loaded()
    loaded.feed(page)
    assert loaded.found == []
    assert "@import" not in page
    assert not re.search(r"url\((?!['\"]?(data:|#))", page)
    for stage in line.stages:
        assert stage in page
    assert "<svg" in page  # curves


def test_mlflow_has_the_run_and_a_child_per_stage_with_its_inputs_and_outputs(line):
    from mlflow import MlflowClient

    line.program.run("sync")
    client = MlflowClient(f"sqlite:///{line.program.store.root}/mlflow.db")
    experiment = client.get_experiment_by_name(line.recipe)
    runs = client.search_runs([experiment.experiment_id], f"tags.`gptline.run` = '{line.run}'")
    children = {run.data.tags["gptline.stage"]: run for run in runs if "gptline.stage" in run.data.tags}
    (parent,) = [run for run in runs if "gptline.stage" not in run.data.tags]
    assert set(children) == set(line.stages)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}

    outputs = line.program.outputs(line.run)
    for stage, child in children.items():
        assert child.data.tags["gptline.output"] == outputs[stage]
        assert child.data.tags["gptline.key"] == line.program.ended(line.run)[stage].key
        assert child.data.tags["gptline.decision"] == "run"
        assert f"| [{stage}](" in parent.data.tags["mlflow.note.content"]
    pretrain, evaluate = children["pretrain"], children["evaluate"]
    steps = int(pretrain.data.params["steps"])
    for metric, every in (("train/loss", 5), ("val/loss", 10)):
        assert [point.step for point in client.get_metric_history(pretrain.info.run_id, metric)] == list(range(every, steps + 1, every))
    assert pretrain.data.params["lr"] == str(line.program.action("pretrain", line.run).leaves["config.lr"])
    assert evaluate.data.metrics["eval/bits_per_byte"] > 0
    assert parent.data.metrics["eval/bits_per_byte"] == evaluate.data.metrics["eval/bits_per_byte"]

    datasets = {each.dataset.digest for each in client.get_run(pretrain.info.run_id).inputs.dataset_inputs}
    assert outputs["tokenize"][:36] in datasets
    (made,) = client.get_run(pretrain.info.run_id).outputs.model_outputs
    (read,) = client.get_run(evaluate.info.run_id).inputs.model_inputs
    assert made.model_id == read.model_id
    assert client.get_logged_model(made.model_id).tags["gptline.digest"] == outputs["pretrain"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"config.json", "page.html", "lineage.html"}
