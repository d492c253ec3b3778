"""Random-access sources of records, as they are found: tar shards, ArrayRecord, Parquet, JSONL.

A source has a length, and `source[i]` is a `Record`, or an error where it is damaged. Sources can
be pickled, so that worker processes have copies of them.
"""

from starflow2_jax.data.sources.array_record import ArrayRecordSource
from starflow2_jax.data.sources.conversations import ConversationSource
from starflow2_jax.data.sources.folder import FolderSource
from starflow2_jax.data.sources.parquet import ParquetSource
from starflow2_jax.data.sources.record import Record, RecordError, Source
from starflow2_jax.data.sources.webdataset import WebDatasetSource

__all__ = [
    "ArrayRecordSource",
    "ConversationSource",
    "FolderSource",
    "ParquetSource",
    "Record",
    "RecordError",
    "Source",
    "WebDatasetSource",
]
