"""Evaluate: what a model does with text and questions that it was not trained on, beside what others do with the same.

With documents: its loss on the held-out ones, beside what compressors need for them, and some of its own text. With questions: how
many of the held-out ones it answers right, beside a baseline's answers, and what a reward model says of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.artifacts import Documents, Model, Prompts, Report
from pipelines.stage import Models, Source, StageConfig, StageContext, StageFailure, require_role

MODELS = Models(needs={"model": "policy", "baseline": "policy", "reward_model": "reward"})


class EvaluateConfig(StageConfig):
    stride: int | None = Field(default=None, ge=1)
    """Tokens that a window scores; the rest of it is context. None: half of the model's seq_len."""
    compressors: bool = True
    """Also say what xz -9e needs for the held-out text alone, and PPMd after it has read the training text."""
    prompts: tuple[str, ...] = ("", "", "")
    """What the model continues, for the report; an empty one begins a document. `[]`: no samples."""
    sample_tokens: int = Field(default=120, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    """Of these samples; questions are answered at temperature 0, and again at 1."""

    questions_file: str | None = None
    """Questions of your own, which take the place of the held-out prompts: JSON lines of {"question": "...", "answer": "..."}, relative to
    the pipeline's `data`."""
    refusal: str | None = None
    """The one answer that declines: questions whose right answer it is are counted apart."""
    number_marker: str | None = Field(default=None, min_length=1)
    """"####": also count the answers whose number behind it is the reference's, as the verifier of an rl stage does."""
    answer_tokens: int = Field(default=64, ge=1)
    """Most tokens of an answer; a longer one is cut off, and then not right."""
    best_of: int | None = Field(default=None, ge=2)
    """Also draw so many answers to each question, and take the one that the reward model likes best."""
    missing_end_score: float = -1.0
    """What an answer that was cut off is scored, whatever it says."""
    samples: int = Field(default=12, ge=0)
    """Questions that the report shows with their answers."""

    def sources(self, data: Path) -> list[Source]:
        return [Source(self.questions_file, data / self.questions_file)] if self.questions_file else []


def evaluate(
    config: EvaluateConfig,
    model: Model,
    documents: list[Documents] | None,
    questions: list[Prompts] | None,
    reward_model: Model | None,
    baseline: Model | None,
    stage: StageContext,
) -> Report:
    """The report has figures and samples; the figures stand in the action record too."""
    for each, role in ((model, "policy"), (baseline, "policy"), (reward_model, "reward")):
        if each:
            require_role(each, role, f"here evaluate wants a {role} model")
        if each and each.metadata["tokenizer"] != model.metadata["tokenizer"]:
            raise StageFailure(
                f"model {each.digest[:12]} has tokenizer {each.metadata['tokenizer'][:12]}, model {model.digest[:12]} has "
                f"{model.metadata['tokenizer'][:12]}; they can be compared only with one and the same"
            )
    if config.best_of and not reward_model:
        raise StageFailure("best_of needs a reward model to say which is best: inputs = { ..., reward_model = ['reward_model'] }")
    asked = list(_of_file(stage) if config.questions_file else _held_out(questions or []))
    if not documents and not asked:
        raise StageFailure("evaluate has nothing to ask: give it documents, questions or a questions_file")
    report: dict[str, Any] = {"figures": {}, "samples": []}
    if documents:
        _of_documents(config, model, documents, stage, report)
    if asked:
        _of_answers(config, model, baseline, reward_model, asked, stage, report)
    for name, value in report["figures"].items():
        stage.figure(name, value)
    (stage.output / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return stage.publish(Report, model=model.digest, **{name: value for name, value in report.items() if isinstance(value, int)})


def _of_documents(config: EvaluateConfig, model: Model, documents: list[Documents], stage: StageContext, report: dict[str, Any]) -> None:
    """Every held-out token is scored once; bits per byte divide by the raw bytes of the documents."""
    import numpy as np

    from gpt.evaluation import bits_per_byte, held_out_nats, ppmd_bits_per_byte, xz_bits_per_byte
    from gpt.model import load_model
    from gpt.random_streams import stream_seed
    from gpt.sampling import sample
    from gpt.tokenizer import Tokenizer

    texts = [text for each in documents for text in each.texts("held_out")]
    held_out = "".join(texts).encode()
    if not held_out:
        named = " and ".join(f"documents {each.digest[:12]}" for each in documents)
        raise StageFailure(
            f"{named} hold no held-out text, so there is nothing to evaluate on; "
            'set hold_out in the ingest stage, e.g. hold_out = { share = 0.02, by = "record" }'
        )
    encoder = Tokenizer.load(model.path / "tokenizer.json")
    end = encoder.special["document"]
    token_ids = np.array([token for ids in encoder.encode_batch(texts) for token in (*ids, end)], dtype=np.int64)
    network = load_model(model.path).to(stage.device)
    nats, count = held_out_nats(network, token_ids, document_id=end, stride=config.stride)
    figures = {
        "eval/loss": nats / count,
        "eval/bits_per_byte": bits_per_byte(nats, len(held_out)),
    }
    if config.compressors:
        train = "".join(text for each in documents for text in each.texts("train")).encode()
        figures["eval/xz_bits_per_byte"] = xz_bits_per_byte(held_out)
        figures["eval/ppmd_bits_per_byte"] = ppmd_bits_per_byte(train, held_out)
    responses = sample(
        network,
        [[end, *encoder.encode(prompt)] for prompt in config.prompts],
        streams=[stream_seed(stage.seed, "evaluate", index) for index in range(len(config.prompts))],
        max_tokens=config.sample_tokens,
        temperature=config.temperature,
        stop_ids=(end,),
    )
    report["samples"] += [
        {"prompt": prompt, "text": encoder.stream().feed(*(token for token in response.token_ids if token != end))}
        for prompt, response in zip(config.prompts, responses, strict=True)
    ]
    report["figures"] |= figures
    report |= {"tokens": count, "bytes": len(held_out), "documents": len(texts)}


def _held_out(questions: list[Prompts]) -> Iterator[dict[str, Any]]:
    """`{"prompt": [messages], "reference": "..."}` of each question that training has not seen."""
    for each in questions:
        held_out = list(each.records("held_out"))
        if not held_out:
            raise StageFailure(
                f"prompts {each.digest[:12]} hold nothing out, so there is no question in them that training has not seen; set "
                'hold_out = { share = 0.1, by = "prompt" } in the stage that makes them, and in those that teach the same questions'
            )
        yield from held_out


def _of_file(stage: StageContext) -> Iterator[dict[str, Any]]:
    """The same of each line of the user's own file."""
    for source in stage.sources:
        with stage.open(source) as file:
            for number, line in enumerate(file.read().decode("utf-8-sig").split("\n"), start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    question, answer = str(record["question"]), record["answer"]
                except (ValueError, TypeError, KeyError) as error:
                    raise StageFailure(
                        f'{source.name}, line {number}: {type(error).__name__}: {error}; wanted {{"question": "...", "answer": "..."}}'
                    ) from None
                yield {"prompt": [{"role": "user", "content": question}], "reference": None if answer is None else str(answer)}


def _of_answers(
    config: EvaluateConfig,
    model: Model,
    baseline: Model | None,
    reward_model: Model | None,
    asked: list[dict[str, Any]],
    stage: StageContext,
    report: dict[str, Any],
) -> None:
    """Each question is answered twice, by the likeliest tokens and by a draw at temperature 1."""
    import torch

    from gpt.answers import Examiner, questions_with_room
    from gpt.model import load_config, load_model
    from gpt.reward import RewardScorer
    from gpt.scorers import reference_number
    from gpt.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model.path / "tokenizer.json")
    seq_len = min(load_config(each.path).seq_len for each in (model, baseline, reward_model) if each)
    questions = questions_with_room(asked, tokenizer, seq_len=seq_len, answer_tokens=config.answer_tokens)
    marker = config.number_marker
    if marker is not None and all(reference_number(each.get("reference"), marker) is None for each in questions):
        raise StageFailure(
            f"number_marker = {marker!r}, but none of {len(questions)} questions has a number for its right answer; wanted references "
            "that are a number, or a text with one behind the marker. Give such questions, or remove number_marker"
        )
    device = torch.device(stage.device)
    scorer = None
    if reward_model:
        scorer = RewardScorer(reward_model.path, reward_model.metadata["score_mean"], reward_model.metadata["score_std"], device)
    examiner = Examiner(
        tokenizer,
        questions,
        stage.seed,
        config.answer_tokens,
        refusal=config.refusal,
        number_marker=marker,
        scorer=scorer,
        missing_end_score=config.missing_end_score,
    )
    answered = examiner.answers_of(load_model(model.path).to(device))
    figures = examiner.figures(answered)
    if config.best_of:
        figures |= examiner.best_of(config.best_of, answered)
    before = examiner.answers_of(load_model(baseline.path).to(device)) if baseline else None
    if before:
        figures |= examiner.compare(answered, before)
    report["figures"] |= {f"eval/{name}": value for name, value in figures.items()}
    report["samples"] += examiner.samples(config.samples, answered, before)
    report |= {"questions": len(questions), "too_long": len(asked) - len(questions)}
    if report["too_long"]:
        report["figures"]["eval/too_long_share"] = report["too_long"] / len(asked)
