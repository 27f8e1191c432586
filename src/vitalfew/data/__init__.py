"""Logs of clicks: read them, choose what each column is for, encode them, and draw batches.

Importing this package loads neither Arrow nor numba; the first use of a name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitalfew._lazy import lazily

if TYPE_CHECKING:
    from vitalfew.data.batches import Batches
    from vitalfew.data.encode import Encoder
    from vitalfew.data.encoded import Encoded
    from vitalfew.data.histories import Histories
    from vitalfew.data.implicit import Bags, LibFM, Pairs, read_adjacency, read_bags, read_libfm, read_pairs
    from vitalfew.data.infer import infer_schema
    from vitalfew.data.log import EncodedLog, write_log
    from vitalfew.data.negatives import Samples, negatives
    from vitalfew.data.readers import LogReader, open_log
    from vitalfew.data.schema import Column, Schema
    from vitalfew.data.split import is_test, time_cutoff, time_slices
    from vitalfew.data.vocabulary import Direct, Hashed, Vocabulary, VocabularyBuilder

__all__ = [
    "Bags",
    "Batches",
    "Column",
    "Direct",
    "Encoded",
    "EncodedLog",
    "Encoder",
    "Hashed",
    "Histories",
    "LibFM",
    "LogReader",
    "Pairs",
    "Samples",
    "Schema",
    "Vocabulary",
    "VocabularyBuilder",
    "infer_schema",
    "is_test",
    "negatives",
    "open_log",
    "read_adjacency",
    "read_bags",
    "read_libfm",
    "read_pairs",
    "time_cutoff",
    "time_slices",
    "write_log",
]

_NAMES_IN = {
    "infer": ("infer_schema",),
    "batches": ("Batches",),
    "encode": ("Encoder",),
    "encoded": ("Encoded",),
    "histories": ("Histories",),
    "log": ("EncodedLog", "write_log"),
    "readers": ("LogReader", "open_log"),
    "schema": ("Column", "Schema"),
    "implicit": ("Bags", "LibFM", "Pairs", "read_adjacency", "read_bags", "read_libfm", "read_pairs"),
    "negatives": ("Samples", "negatives"),
    "split": ("is_test", "time_cutoff", "time_slices"),
    "vocabulary": ("Direct", "Hashed", "Vocabulary", "VocabularyBuilder"),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__getattr__ = lazily(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted(__all__)
