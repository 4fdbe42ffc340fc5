"""Turn conversations into plain text, so that the tokenizer learns the words and scripts that its model will meet in them."""

from __future__ import annotations

import json

from pipelines.artifacts import SPLITS, Conversations, Documents
from pipelines.stage import StageConfig, StageContext


def documents(config: StageConfig, conversations: list[Conversations], stage: StageContext) -> Documents:
    """Write one document per conversation, one message after the other; what is held out there is held out here."""
    counts = {}
    for split in SPLITS:
        texts = [
            "\n".join(message["content"] for message in record["messages"]) for each in conversations for record in each.records(split)
        ]
        with open(stage.output / f"{split}.jsonl", "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        counts[split] = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
    total = {unit: sum(each[unit] for each in counts.values()) for unit in ("documents", "bytes")}
    licenses = sorted({name for each in conversations for name in each.metadata["licenses"]})
    return stage.publish(Documents, **total, **counts, licenses=licenses)
