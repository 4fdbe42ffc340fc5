"""Evaluate: measure a model on text and questions that it was not trained on, beside compressors, a baseline and a reward model.

With documents: its loss on the held-out ones, what compressors need for them, and samples of the model's own text. With questions: how
many of the held-out ones it answers correctly, the same for a baseline, and how a reward model scores both.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.artifacts import Documents, Model, Prompts, Report
from pipelines.stage import Models, Source, StageConfig, StageContext, StageFailure, require_role, require_same_tokenizer

MODELS = Models(needs={"model": "policy", "baseline": "policy", "reward_model": "reward"})
DOCUMENTS_PER_BATCH = 256


class EvaluateConfig(StageConfig):
    stride: int | None = Field(default=None, ge=1)
    """Tokens that a window scores; the rest of it is context. None: half of the model's seq_len."""
    compressors: bool = True
    """Also report what xz -9e needs for the held-out text by itself, and PPMd after the training text."""
    prompts: tuple[str, ...] = ("", "", "")
    """What the model continues, for the report; an empty one begins a document. `[]`: no samples."""
    sample_tokens: int = Field(default=120, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    """Temperature of these samples. Questions are answered at temperature 0, and again at 1."""

    questions_file: str | None = None
    """Your own questions, which replace the held-out prompts: JSON lines of {"question": "...", "answer": "..."}, relative to the
    pipeline's `data`."""
    refusal: str | None = None
    """The one answer that declines to answer. Questions with this reference are counted separately."""
    number_marker: str | None = Field(default=None, min_length=1)
    """"####": also count the answers whose number after it equals the reference's, like the verifier of an rl stage."""
    answer_tokens: int = Field(default=64, ge=1)
    """Most tokens of an answer. A longer one is cut off, and then it is never right."""
    best_of: int | None = Field(default=None, ge=2)
    """Also draw this many answers to each question, and count the one that the reward model scores highest."""
    missing_end_score: float = -1.0
    """Score of an answer that was cut off, whatever it says."""
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
    """Write a report with figures and samples. The action record has the figures too."""
    for name, given, role in (("model", model, "policy"), ("baseline", baseline, "policy"), ("reward_model", reward_model, "reward")):
        if given:
            require_role(given, role, f"the input {name} of evaluate takes a {role} model")
            require_same_tokenizer(model, given)
    if config.best_of and not reward_model:
        raise StageFailure(
            "best_of needs a reward model to choose the best answer: add reward_model = 'reward_model' to the inputs, or remove best_of"
        )
    asked = list(_questions_of_file(stage) if config.questions_file else _held_out_questions(questions or []))
    if not documents and not asked:
        raise StageFailure("evaluate has nothing to measure: add documents or questions to its inputs, or set questions_file")
    report: dict[str, Any] = {"figures": {}, "samples": []}
    if documents:
        _evaluate_text(config, model, documents, stage, report)
    if asked:
        _evaluate_answers(config, model, baseline, reward_model, asked, stage, report)
    for name, value in report["figures"].items():
        stage.figure(name, value)
    (stage.output / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return stage.publish(Report, model=model.digest, **{name: value for name, value in report.items() if isinstance(value, int)})


def _evaluate_text(config: EvaluateConfig, model: Model, documents: list[Documents], stage: StageContext, report: dict[str, Any]) -> None:
    """Score every held-out token once. Bits per byte divide by the documents' own bytes."""
    import numpy as np

    from gpt.evaluation import bits_per_byte, held_out_nats, ppmd_bits_per_byte, xz_bits_per_byte
    from gpt.model import load_model
    from gpt.random_streams import stream_seed
    from gpt.sampling import sample
    from gpt.tokenizer import Tokenizer

    if not any(text for each in documents for text in each.texts("held_out")):
        raise StageFailure(
            f"there is no held-out text in {' and '.join(f'documents {each.digest[:12]}' for each in documents)}; "
            'set hold_out in the ingest stage, e.g. hold_out = { share = 0.02, by = "record" }'
        )
    encoder = Tokenizer.load(model.path / "tokenizer.json")
    end = encoder.special["document"]
    network = load_model(model.path).to(stage.device)
    with tempfile.TemporaryDirectory(dir=stage.output) as folder:
        path = Path(folder, "held_out.bin")
        n_documents, n_bytes = _write_tokens(encoder, documents, path, stage)
        tokens = np.memmap(path, np.dtype("<u4"), mode="r")
        nats, count = held_out_nats(network, tokens, stride=config.stride, on_progress=partial(_show, stage, "tokens scored"))
        del tokens
    figures = {"eval/loss": nats / count, "eval/bits_per_byte": bits_per_byte(nats, n_bytes)}
    if config.compressors:
        train, held_out = (partial(_bytes_of, documents, split, stage) for split in ("train", "held_out"))
        figures["eval/xz_bits_per_byte"] = xz_bits_per_byte(held_out())
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
    report |= {"tokens": count, "bytes": n_bytes, "documents": n_documents}


def _write_tokens(encoder: Any, documents: list[Documents], path: Path, stage: StageContext) -> tuple[int, int]:
    """Write <|document|> and the held-out documents' ids, each followed by <|document|>. Return the numbers of documents and bytes."""
    import numpy as np

    end = encoder.special["document"]
    n_documents = n_bytes = 0
    with open(path, "wb") as file:
        np.array([end], "<u4").tofile(file)
        for each in documents:
            for text, token_ids in encoder.encode_stream(each.texts("held_out"), DOCUMENTS_PER_BATCH):
                np.array([*token_ids, end], "<u4").tofile(file)
                n_documents += 1
                n_bytes += len(text.encode())
                stage.progress(n_documents, _count(documents, "held_out"), "documents encoded")
    return n_documents, n_bytes


def _bytes_of(documents: list[Documents], split: str, stage: StageContext) -> Iterator[bytes]:
    done = 0
    for each in documents:
        for text in each.texts(split):
            yield text.encode()
            done += 1
            stage.progress(done, _count(documents, split), f"{split.replace('_', '-')} documents compressed")


def _count(documents: list[Documents], split: str) -> int:
    return sum(each.metadata[split]["documents"] for each in documents)


def _show(stage: StageContext, unit: str, done: int, total: int) -> None:
    stage.progress(done, total, unit)


def _held_out_questions(questions: list[Prompts]) -> Iterator[dict[str, Any]]:
    """Yield `{"prompt": [messages], "reference": "..."}` for each question that training has not seen."""
    for each in questions:
        held_out = list(each.records("held_out"))
        if not held_out:
            raise StageFailure(
                f"there are no held-out questions in prompts {each.digest[:12]}, so training has seen all of them; set "
                'hold_out = { share = 0.1, by = "prompt" } in the stage that makes them, and in those that teach the same questions'
            )
        yield from held_out


def _questions_of_file(stage: StageContext) -> Iterator[dict[str, Any]]:
    """Yield the same for each line of the user's own file."""
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
                        f'{source.name}, line {number}: expected {{"question": "...", "answer": "..."}}, found {line.strip()[:60]!r} '
                        f"({type(error).__name__}: {error})"
                    ) from None
                yield {"prompt": [{"role": "user", "content": question}], "reference": None if answer is None else str(answer)}


def _evaluate_answers(
    config: EvaluateConfig,
    model: Model,
    baseline: Model | None,
    reward_model: Model | None,
    asked: list[dict[str, Any]],
    stage: StageContext,
    report: dict[str, Any],
) -> None:
    """Answer each question twice: with the likeliest tokens, and with a draw at temperature 1."""
    import torch

    from gpt.answers import Examiner, questions_with_room
    from gpt.model import load_config, load_model
    from gpt.numbers import reference_number
    from gpt.reward_scorer import RewardScorer
    from gpt.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model.path / "tokenizer.json")
    seq_len = min(load_config(each.path).seq_len for each in (model, baseline, reward_model) if each)
    questions = questions_with_room(asked, tokenizer, seq_len=seq_len, answer_tokens=config.answer_tokens)
    marker = config.number_marker
    if marker is not None and all(reference_number(each.get("reference"), marker) is None for each in questions):
        raise StageFailure(
            f"number_marker = {marker!r} needs references with a number, and none of {len(questions)} questions has one: expected a "
            "number, or a text with one after the marker. Add such questions, or remove number_marker"
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
        on_progress=partial(_show, stage, "answers"),
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
