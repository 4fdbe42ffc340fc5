"""The public face of ingest: what a stage of your own needs to read files and to write records."""

from pipelines.ingest.dialogue_settings import DialogueConfig, DialogueSettings
from pipelines.ingest.dialogues import to_conversation, to_conversations, to_prompt, to_prompts, to_rating, to_ratings
from pipelines.ingest.documents import WeightedSource, text_of, to_text
from pipelines.ingest.gather import gather
from pipelines.ingest.messages import Message
from pipelines.ingest.pairs import to_pairs
from pipelines.ingest.reader import Reader
from pipelines.ingest.records import Record, to_records
from pipelines.ingest.rows import Place, Reject, Row
from pipelines.ingest.settings import HoldOut, IngestSettings, ReadSettings, SourceSettings, Weighted
from pipelines.ingest.templates import column_of

__all__ = [
    "DialogueConfig",
    "DialogueSettings",
    "HoldOut",
    "IngestSettings",
    "Message",
    "Place",
    "ReadSettings",
    "Reader",
    "Record",
    "Reject",
    "Row",
    "SourceSettings",
    "Weighted",
    "WeightedSource",
    "column_of",
    "gather",
    "text_of",
    "to_conversation",
    "to_conversations",
    "to_pairs",
    "to_prompt",
    "to_prompts",
    "to_rating",
    "to_ratings",
    "to_records",
    "to_text",
]
