"""The assistants' recipes, scaled down, from books to an assistant: conversations, judgements and rewards from published data."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BOOKS = 'stages.documents.files=["pretrain_en_books/derived/mary*.jsonl", "pretrain_en_books/derived/arthur*.jsonl"]'
SMALL = {
    "pretrain": ("preset=gpt2-nano", "steps=10", "warmup_steps=2", "eval_every=5"),
    "sft": ("steps=8", "warmup_steps=2", "eval_every=4", "global_batch_size=4", "micro_batch_size=2"),
    "reward_model": ("steps=6", "warmup_steps=2", "eval_every=3", "global_batch_size=4"),
    "rl": ("steps=3", "prompts_per_step=4", "global_batch_size=4", "micro_batch_size=2", "max_response_tokens=12", "value_warmup_steps=1"),
    "evaluate": ("answer_tokens=12",),
}


@dataclass(frozen=True)
class Recipe:
    small: tuple[str, ...]
    asked: str
    """The stage whose held-out records the evaluation asks."""
    taught: tuple[str, ...]
    """The stages whose records teach the answers to such questions."""
    policy: str
    judged: tuple[str, str]
    """A stage, and a figure of it between 0 and 1."""
    reported: set[str]
    changed: str
    """A setting to change; `runs_again` has the stages that run again for it."""
    runs_again: set[str]
    sources: tuple[str, ...]


RECIPES = {
    "coffee": Recipe(
        small=(
            BOOKS,
            "stages.documents.hold_out.share=0.3",
            *(f"stages.{stage}.hold_out.share=0.3" for stage in ("dialogues", "ratings", "prompts")),
            "stages.tokenizer.vocab_size=800",
        ),
        asked="prompts",
        taught=("dialogues", "ratings"),
        policy="rl",
        judged=("reward_model", "eval/rating_auc"),
        reported={"eval/exactly_right", "eval/baseline_exactly_right", "eval/kl_nats_per_response", "eval/score_mean"},
        changed="stages.rl.kl_coef=0.2",
        runs_again={"rl", "evaluate", "export"},
        sources=("pretrain_en_books/derived/", "rlhf_taskmaster_coffee/data/", "rlhf_taskmaster_coffee/reward/"),
    ),
    "instruct-zh-en": Recipe(
        small=(
            *(f"stages.{stage}.hold_out.share=0.3" for stage in ("instructions", "identity", "identity_questions", "pairs")),
            "stages.tokenizer.vocab_size=1200",
            "stages.evaluate.compressors=false",
            "stages.evaluate.best_of=2",
        ),
        asked="identity_questions",
        taught=("identity",),
        policy="sft",
        judged=("reward_model", "eval/pair_accuracy"),
        reported={"eval/exactly_right", "eval/best_of_score_mean", "eval/bits_per_byte"},
        changed="stages.reward_model.lr=1e-5",
        runs_again={"reward_model", "evaluate"},
        sources=("translation_en_zh/", "pretrain_zh_poetry/", "instruct_zh_en_demo/", "preference_dpo_demo/"),
    ),
    "arithmetic": Recipe(
        small=tuple(f"stages.{stage}.hold_out.share=0.3" for stage in ("documents", "problems", "prompts")),
        asked="prompts",
        taught=("problems",),
        policy="rl",
        judged=("rl", "reward/score_mean"),
        reported={"eval/exactly_right", "eval/number_right", "eval/baseline_number_right", "eval/kl_nats_per_response"},
        changed='stages.rl.number_marker="="',
        runs_again={"rl", "evaluate", "export"},
        sources=("verifiable_gsm8k/train.jsonl", "verifiable_svamp/SVAMP.json"),
    ),
}


@dataclass
class Line:
    recipe: Recipe
    program: Any
    words: tuple[str, ...]
    printed: str
    run: str

    def artifact(self, stage: str) -> Any:
        return self.program.store.artifact(self.program.outputs(self.run)[stage])

    def figures(self, stage: str) -> dict[str, float]:
        return self.program.action(stage, self.run).figures


@pytest.fixture(scope="module", params=RECIPES)
def line(request, new_program, configs, data) -> Line:
    recipe = RECIPES[request.param]
    program = new_program()
    path = configs / f"{request.param}.toml"
    stages = tomllib.loads(path.read_text(encoding="utf-8"))["stages"]
    small = [f"stages.{stage}.{each}" for stage in SMALL if stage in stages for each in SMALL[stage]]
    settings = [*small, *recipe.small, f'data="{data}"']
    words = (str(path), *(word for setting in settings for word in ("--set", setting)))
    output = program.run("run", *words, "--inline")
    return Line(recipe, program, words, output, program.last_run())


def first_words(artifact: Any, split: str) -> set[str]:
    """The text of the first user message of each record."""
    messages = (record.get("messages") or record["prompt"] for record in artifact.records(split))
    return {next(message["content"] for message in each if message["role"] == "user") for each in messages}


def test_every_stage_is_built(line):
    status = line.program.status(line.run)
    assert set(status.values()) == {"done"}
    assert {"pretrain", "sft", line.recipe.asked, line.recipe.policy, "evaluate", "export"} <= set(status)
    assert line.printed.splitlines()[-1].startswith(f"{len(status)} made in ")


def test_no_question_of_the_evaluation_was_trained_on(line):
    asked = first_words(line.artifact(line.recipe.asked), "held_out")
    assert asked
    for stage in (line.recipe.asked, *line.recipe.taught):
        taught = first_words(line.artifact(stage), "train")
        assert taught
        assert not asked & taught


def test_the_judge_is_evaluated_too(line):
    stage, figure = line.recipe.judged
    assert 0 <= line.figures(stage)[figure] <= 1


def test_the_report_has_the_figures_and_the_questions_with_their_answers(line, read_json):
    report = read_json(line.artifact("evaluate").path / "report.json")
    assert line.recipe.reported <= set(report["figures"])
    assert report["questions"] == line.artifact(line.recipe.asked).metadata["held_out"]["prompts"]
    assert {"prompt", "reference", "answer"} <= set(report["samples"][-1])


def test_transformers_opens_the_export_with_equal_logits_and_its_template_gives_equal_ids(line, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from gpt.chat import encode_prompt
    from gpt.model import load_model
    from gpt.tokenizer import Tokenizer

    model, export = line.artifact(line.recipe.policy).path, line.artifact("export").path
    ours, tokenizer = load_model(model).eval(), Tokenizer.load(model / "tokenizer.json")
    prompt = next(line.artifact(line.recipe.asked).records("held_out"))["prompt"]
    token_ids = encode_prompt(tokenizer, prompt)
    assert AutoTokenizer.from_pretrained(export).apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] == token_ids
    theirs = GPT2LMHeadModel.from_pretrained(export).eval()
    read = torch.tensor([token_ids])
    with torch.no_grad():
        torch.testing.assert_close(theirs(read).logits, ours(read), rtol=1e-5, atol=1e-5)


def test_a_plan_reuses_every_stage_and_a_changed_setting_reruns_what_depends_on_it(line):
    stages = line.program.status(line.run)
    assert {stage: decision for stage, (decision, _) in line.program.plan(*line.words).items()} == dict.fromkeys(stages, "reuse")
    plan = line.program.plan(*line.words, "--set", line.recipe.changed)
    assert {stage for stage, (decision, _) in plan.items() if decision == "run"} == line.recipe.runs_again


def test_lineage_leads_from_the_report_to_every_data_set(line):
    output = line.program.run("lineage", f"run:{line.run}/evaluate")
    for source in line.recipe.sources:
        assert source in output, output
