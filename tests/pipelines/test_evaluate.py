"""The evaluate stage on a model of two layers."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pipelines.artifacts import Documents, Model, Prompts, Report
from pipelines.stage import Source, StageFailure
from pipelines.stages.evaluate import EvaluateConfig, evaluate


class Bench:
    """The part of StageContext that evaluate uses."""

    seed = 1
    device = "cpu"

    def __init__(self, output: Path) -> None:
        self.output = output
        self.sources: list[Source] = []
        self.figures: dict[str, float] = {}
        self.shown: dict[str, tuple[int, int]] = {}
        """The last reported progress by unit: done and total."""

    def open(self, source: Source) -> BinaryIO:
        return source.path.open("rb")

    def progress(self, done: int, total: int, unit: str) -> None:
        self.shown[unit] = (done, total)

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = value

    def publish(self, kind: type[Report], **metadata: Any) -> Report:
        return kind(self.output, "0" * 64, metadata)


def documents(folder: Path, held_out: list[str]) -> Documents:
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "to train on"}\n')
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    return Documents(folder, "d" * 64, {"train": {"documents": 1}, "held_out": {"documents": len(held_out)}})


@pytest.mark.parametrize("held_out", [[], [""]])
def test_documents_without_held_out_text_are_refused_before_the_model_is_loaded(tmp_path: Path, held_out: list[str]):
    nowhere = Model(tmp_path / "nowhere", "e" * 64, {"role": "policy", "tokenizer": "t" * 64})
    with pytest.raises(StageFailure, match=r"^there is no held-out text in documents dddddddddddd; set hold_out in the ingest stage"):
        run(EvaluateConfig(), nowhere, Bench(tmp_path), documents=[documents(tmp_path / "documents", held_out)])


def run(config: EvaluateConfig, model: Model, bench: Bench, **inputs: Any) -> Report:
    absent = dict.fromkeys(("documents", "questions", "reward_model", "baseline"))
    return evaluate(config, model, stage=bench, **{**absent, **inputs})  # type: ignore[arg-type]


def saved_model(folder: Path, seed: int, role: str = "policy") -> Model:
    import torch

    from gpt.model import GPT, RewardModel, save_model
    from gpt.settings import PRESETS, GPTConfig
    from gpt.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    shape = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    model = GPT(shape, generator)
    if role == "reward":
        model = RewardModel.from_policy(model, generator)
    save_model(folder, shape, dict(model.named_parameters()), type(model))
    tokenizer.save(folder / "tokenizer.json")
    scale = {"score_mean": 0.5, "score_std": 2.0} if role == "reward" else {}
    return Model(folder, f"{seed}" * 64, {"role": role, "tokenizer": "t" * 64, **scale})


def test_without_prompts_there_are_no_samples(tmp_path: Path):
    bench = Bench(tmp_path)
    config = EvaluateConfig.model_validate({"prompts": [], "compressors": False})
    run(config, saved_model(tmp_path / "model", 1), bench, documents=[documents(tmp_path / "documents", ["a text"])])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["samples"], report["tokens"], report["bytes"], report["documents"]) == ([], 7, 6, 1)


def test_held_out_text_is_read_as_a_stream_that_shows_its_progress_and_leaves_no_file_behind(tmp_path: Path):
    texts = ["ab", "", "cde"]
    bench = Bench(tmp_path)
    config = EvaluateConfig(prompts=())
    run(config, saved_model(tmp_path / "model", 1), bench, documents=[documents(tmp_path / "documents", texts)])
    # Each text is followed by <|document|>: 3 + 1 + 4 = 8 tokens. PPMd reads the training text, then both.
    compressed = {"train documents compressed": (1, 1), "held-out documents compressed": (3, 3)}
    assert bench.shown == {"documents encoded": (3, 3), "tokens scored": (8, 8)} | compressed
    assert {path.name for path in tmp_path.iterdir()} == {"model", "documents", "report.json"}
    assert bench.figures["eval/xz_bits_per_byte"] == 8 * len(lzma.compress(b"abcde", preset=9 | lzma.PRESET_EXTREME)) / 5


def test_questions_from_a_file_are_answered_by_model_and_baseline_and_scored(tmp_path: Path):
    (tmp_path / "questions.jsonl").write_text(
        """{"question": "a?", "answer": "7"}\n\n{"question": "c?", "answer": "No."}\n{"question": "d?", "answer": null}\n"""
    )
    config = EvaluateConfig.model_validate(
        {"questions_file": "questions.jsonl", "refusal": "No.", "number_marker": "n", "answer_tokens": 4, "best_of": 2, "samples": 2}
    )
    bench = Bench(tmp_path)
    bench.sources = config.sources(tmp_path)
    model = saved_model(tmp_path / "model", 1)
    run(config, model, bench, baseline=model, reward_model=saved_model(tmp_path / "reward", 3, "reward"))
    figures = bench.figures
    assert (figures["eval/exactly_right"], figures["eval/declined"], figures["eval/false_refusals"]) == (0.0, 0.0, 0.0)
    assert figures["eval/kl_nats_per_response"] == 0.0  # its own baseline
    assert figures["eval/score_mean"] == figures["eval/baseline_score_mean"]
    assert figures["eval/best_of_score_mean"] >= figures["eval/score_mean"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["questions"], report["too_long"]) == (3, 0)
    assert [(each["prompt"], each["reference"]) for each in report["samples"]] == [("a?", "7"), ("c?", "No.")]
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [name for name in figures if f"`{name.replace('baseline_', '').replace('best_of_', '')}`" not in page] == []
    assert set(report["samples"][0]) == {"prompt", "reference", "answer", "drawn", "score", "baseline", "baseline_drawn"}


def test_a_question_that_leaves_no_room_for_its_answer_is_left_out(tmp_path: Path):
    (tmp_path / "questions.jsonl").write_text(
        """{"question": "short?", "answer": "b"}\n""" + json.dumps({"question": "?" * 30, "answer": ""})
    )
    config = EvaluateConfig(questions_file="questions.jsonl", answer_tokens=8)  # seq_len = 32
    bench = Bench(tmp_path)
    bench.sources = config.sources(tmp_path)
    model = saved_model(tmp_path / "model", 1)
    run(config, model, bench)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["questions"], report["too_long"], bench.figures["eval/too_long_share"]) == (1, 1, 0.5)
    with pytest.raises(ValueError, match="none of 2 questions leaves room for answer_tokens = 30 within the models' seq_len = 32"):
        run(config.model_copy(update={"answer_tokens": 30}), model, bench)


def prompts(folder: Path, *questions: str) -> Prompts:
    """Held-out prompts without references."""
    folder.mkdir()
    lines = (json.dumps({"prompt": [{"role": "user", "content": question}]}) + "\n" for question in questions)
    (folder / "held_out.jsonl").write_text("".join(lines))
    return Prompts(folder, "c" * 64)


def test_the_share_of_right_numbers_is_measured_for_likeliest_and_drawn_answers_and_for_the_baseline(tmp_path: Path, monkeypatch):
    import gpt.answers
    from gpt.sampling import Response

    def answer_four(model, prompts, *, streams, temperature, **how):
        """All of the likeliest answers are right, but of the sampled ones only the first."""
        texts = ["#### 4" if temperature == 0 or place == 0 else "#### 5" for place in range(len(prompts))]
        return [Response([*text.encode(), how["stop_ids"][0]], stopped=True) for text in texts]

    monkeypatch.setattr(gpt.answers, "sample", answer_four)
    (tmp_path / "questions.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n{"question": "1 + 3?", "answer": "1 + 3 = 4 #### 4"}')
    config = EvaluateConfig(questions_file="questions.jsonl", number_marker="####", answer_tokens=8)
    bench = Bench(tmp_path)
    bench.sources = config.sources(tmp_path)
    model = saved_model(tmp_path / "model", 1)
    run(config, model, bench, baseline=model)
    figures = {name: value for name, value in bench.figures.items() if "right" in name}
    assert figures == {
        "eval/exactly_right": 0.0,
        "eval/number_right": 1.0,
        "eval/exactly_right_sampled": 0.0,
        "eval/number_right_sampled": 0.5,
        "eval/baseline_exactly_right": 0.0,
        "eval/baseline_number_right": 1.0,
    }
    (tmp_path / "questions.jsonl").write_text('{"question": "Who?", "answer": "Me."}')
    with pytest.raises(StageFailure, match="number_marker = '####' needs references with a number, and none of 1 questions has one"):
        run(config, model, bench)


def test_truncated_answers_are_counted_also_for_questions_without_references(tmp_path: Path):
    bench = Bench(tmp_path)
    model = saved_model(tmp_path / "model", 1)
    run(EvaluateConfig(answer_tokens=1), model, bench, questions=[prompts(tmp_path / "prompts", "a?", "b?")], baseline=model)
    report = json.loads((tmp_path / "report.json").read_text())
    assert bench.figures == {
        "eval/truncated_share": 1.0,  # this model's likeliest token is not the end
        "eval/response_tokens": 1.0,
        "eval/kl_nats_per_response": 0.0,
    }
    assert [(each["prompt"], each["reference"]) for each in report["samples"]] == [("a?", None), ("b?", None)]


def test_prompts_without_held_out_questions_are_refused_by_name(tmp_path: Path):
    policy = Model(tmp_path, "e" * 64, {"role": "policy", "tokenizer": "t" * 64})
    message = r'^there are no held-out questions in prompts cccccccccccc, .*; set hold_out = { share = 0.1, by = "prompt" } in the stage'
    asked = [prompts(tmp_path / "prompts")]
    for others in ({}, {"documents": [documents(tmp_path / "documents", ["a text"])]}):
        with pytest.raises(StageFailure, match=message):
            run(EvaluateConfig(), policy, Bench(tmp_path), questions=asked, **others)


def test_questions_from_a_file_replace_the_prompts(tmp_path: Path):
    (tmp_path / "questions.jsonl").write_text('{"question": "mine?", "answer": "b"}')
    config = EvaluateConfig(questions_file="questions.jsonl", answer_tokens=1)
    bench = Bench(tmp_path)
    bench.sources = config.sources(tmp_path)
    run(config, saved_model(tmp_path / "model", 1), bench, questions=[prompts(tmp_path / "prompts", "a?", "b?")])
    (sample,) = json.loads((tmp_path / "report.json").read_text())["samples"]
    assert sample["prompt"] == "mine?"


def test_only_a_newline_ends_a_line_of_a_questions_file(tmp_path: Path):
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "a\u2028b\x85?", "answer": "c"}, ensure_ascii=False) + "\r\n\n")
    config = EvaluateConfig(questions_file="questions.jsonl", answer_tokens=8)
    bench = Bench(tmp_path)
    bench.sources = config.sources(tmp_path)
    run(config, saved_model(tmp_path / "model", 1), bench)
    (sample,) = json.loads((tmp_path / "report.json").read_text())["samples"]
    assert sample["prompt"] == "a\u2028b\x85?"


@pytest.mark.parametrize("line", ["{}", "[]", "{", '{"question": "a?"}'])
def test_a_malformed_question_is_refused_with_its_line(tmp_path: Path, line: str):
    (tmp_path / "questions.jsonl").write_text(f"""{{"question": "a?", "answer": "b"}}\n{line}\n""")
    config = EvaluateConfig(questions_file="questions.jsonl")
    bench = Bench(tmp_path)
    bench.sources = config.sources(tmp_path)
    with pytest.raises(StageFailure, match=r'questions.jsonl, line 2: expected {"question": "...", "answer": "..."}, found '):
        run(config, Model(tmp_path, "e" * 64, {"role": "policy", "tokenizer": "t" * 64}), bench)


def test_wrong_roles_other_tokenizers_and_missing_inputs_are_refused_before_a_model_is_loaded(tmp_path: Path):
    policy = Model(tmp_path, "e" * 64, {"role": "policy", "tokenizer": "t" * 64})
    reward = Model(tmp_path, "f" * 64, {"role": "reward", "tokenizer": "u" * 64})
    bench = Bench(tmp_path)
    with pytest.raises(StageFailure, match="model ffffffffffff: expected role policy, found reward; the input model of"):
        run(EvaluateConfig(), reward, bench)
    with pytest.raises(
        StageFailure, match=r"model ffffffffffff: expected tokenizer tttttttttttt, .* model eeeeeeeeeeee, found uuuuuuuuuuuu"
    ):
        run(EvaluateConfig(), policy, bench, reward_model=reward)
    with pytest.raises(StageFailure, match="best_of needs a reward model"):
        run(EvaluateConfig(best_of=4), policy, bench)
    with pytest.raises(StageFailure, match="evaluate has nothing to measure"):
        run(EvaluateConfig(), policy, bench)
