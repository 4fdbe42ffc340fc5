"""Evaluate: how well a model predicts the held-out documents, beside what compressors need for them, and some of its text."""

from __future__ import annotations

import json

from pydantic import Field

from pipelines.artifacts import Documents, Model, Report
from pipelines.stage import StageConfig, StageContext, StageFailure


class EvaluateConfig(StageConfig):
    stride: int | None = Field(default=None, ge=1)
    """Tokens that a window scores; the rest of it is context. None: half of the model's seq_len."""
    compressors: bool = True
    """Also say what xz -9e needs for the held-out text alone, and PPMd after it has read the training text."""
    prompts: tuple[str, ...] = ("", "", "")
    """What the model continues, for the report; an empty one begins a document. `[]`: no samples."""
    sample_tokens: int = Field(default=120, ge=1)
    temperature: float = Field(default=0.8, ge=0)


def evaluate(config: EvaluateConfig, model: Model, documents: list[Documents], stage: StageContext) -> Report:
    """Every held-out token is scored once; bits per byte divide by the raw bytes of the documents."""
    import numpy as np

    from gpt.evaluation import bits_per_byte, held_out_nats, ppmd_bits_per_byte, xz_bits_per_byte
    from gpt.model import load_model
    from gpt.random_streams import stream_seed
    from gpt.sampling import sample
    from gpt.tokenizer import Tokenizer

    if model.metadata["role"] != "policy":
        raise StageFailure(f"model {model.digest[:12]} has the role {model.metadata['role']}; evaluate wants a policy")
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
    network = load_model(model.path).to(stage.device).eval()
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
    samples = [
        {"prompt": prompt, "text": encoder.stream().feed(*(token for token in response.token_ids if token != end))}
        for prompt, response in zip(config.prompts, responses, strict=True)
    ]
    for name, value in figures.items():
        stage.figure(name, value)
    report = {"figures": figures, "samples": samples, "tokens": count, "bytes": len(held_out), "documents": len(texts)}
    (stage.output / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return stage.publish(Report, tokens=count, documents=len(texts), model=model.digest)
