"""Train recommenders: embedding bags that update only the rows a batch touches, and the models on top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitalfew._lazy import lazily

if TYPE_CHECKING:
    from vitalfew.embeddings.ahead import Prefetch
    from vitalfew.embeddings.baseline import TorchBags
    from vitalfew.embeddings.choosing import HotSet, estimate_hot_rows, hot_inputs, hot_rows
    from vitalfew.embeddings.exporting import export_model
    from vitalfew.embeddings.hot import HotRows
    from vitalfew.embeddings.metrics import BinaryMetrics, binary_metrics
    from vitalfew.embeddings.models import DLRM, MODELS, TBSM, AdRec, ClickModel, DCNv2, DeepFM, WideDeep
    from vitalfew.embeddings.optim import SGD, Adagrad, LazyAdam, Optimizer, RowwiseAdagrad, optimizer_from_dict
    from vitalfew.embeddings.parallel import ShardedEmbeddings, sum_gradients, sync_classes
    from vitalfew.embeddings.parallel_ahead import ShardedPrefetch
    from vitalfew.embeddings.phases import Phase, next_rate
    from vitalfew.embeddings.rows import Counts, Rows
    from vitalfew.embeddings.saving import load_rows, save_rows
    from vitalfew.embeddings.slices import SliceQuality, auc_by_slice, models_by_slice
    from vitalfew.embeddings.split import Part, SplitBatches
    from vitalfew.embeddings.splitting import SplitPayoff, split_batch, split_pays
    from vitalfew.embeddings.stale import SkipStale
    from vitalfew.embeddings.staleness import RowHistory, skippable_inputs, stale_rows
    from vitalfew.embeddings.tables import EmbeddingBags, Table, clip_grad_norm
    from vitalfew.embeddings.tiered import TieredEmbeddings
    from vitalfew.embeddings.way import Way, way_named
    from vitalfew.embeddings.wrapping import Wrapped, wrap

_HOME = {
    "BinaryMetrics": "metrics",
    "binary_metrics": "metrics",
    "TorchBags": "baseline",
    "DLRM": "models",
    "SGD": "optim",
    "Adagrad": "optim",
    "LazyAdam": "optim",
    "Optimizer": "optim",
    "RowwiseAdagrad": "optim",
    "optimizer_from_dict": "optim",
    "ShardedEmbeddings": "parallel",
    "sum_gradients": "parallel",
    "sync_classes": "parallel",
    "ShardedPrefetch": "parallel_ahead",
    "load_rows": "saving",
    "save_rows": "saving",
    "Counts": "rows",
    "Rows": "rows",
    "EmbeddingBags": "tables",
    "Table": "tables",
    "clip_grad_norm": "tables",
    "Prefetch": "ahead",
    "way_named": "way",
    "Way": "way",
    "models_by_slice": "slices",
    "auc_by_slice": "slices",
    "SliceQuality": "slices",
    "export_model": "exporting",
    "WideDeep": "models",
    "TBSM": "models",
    "MODELS": "models",
    "DeepFM": "models",
    "DCNv2": "models",
    "ClickModel": "models",
    "AdRec": "models",
    "stale_rows": "staleness",
    "skippable_inputs": "staleness",
    "RowHistory": "staleness",
    "SkipStale": "stale",
    "SplitPayoff": "splitting",
    "split_pays": "splitting",
    "split_batch": "splitting",
    "SplitBatches": "split",
    "Part": "split",
    "HotRows": "hot",
    "next_rate": "phases",
    "Phase": "phases",
    "hot_rows": "choosing",
    "hot_inputs": "choosing",
    "estimate_hot_rows": "choosing",
    "HotSet": "choosing",
    "TieredEmbeddings": "tiered",
    "Wrapped": "wrapping",
    "wrap": "wrapping",
}

__all__ = [
    "DLRM",
    "MODELS",
    "SGD",
    "TBSM",
    "AdRec",
    "Adagrad",
    "BinaryMetrics",
    "ClickModel",
    "Counts",
    "DCNv2",
    "DeepFM",
    "EmbeddingBags",
    "HotRows",
    "HotSet",
    "LazyAdam",
    "Optimizer",
    "Part",
    "Phase",
    "Prefetch",
    "RowHistory",
    "Rows",
    "RowwiseAdagrad",
    "ShardedEmbeddings",
    "ShardedPrefetch",
    "SkipStale",
    "SliceQuality",
    "SplitBatches",
    "SplitPayoff",
    "Table",
    "TieredEmbeddings",
    "TorchBags",
    "Way",
    "WideDeep",
    "Wrapped",
    "auc_by_slice",
    "binary_metrics",
    "clip_grad_norm",
    "estimate_hot_rows",
    "export_model",
    "hot_inputs",
    "hot_rows",
    "load_rows",
    "models_by_slice",
    "next_rate",
    "optimizer_from_dict",
    "save_rows",
    "skippable_inputs",
    "split_batch",
    "split_pays",
    "stale_rows",
    "sum_gradients",
    "sync_classes",
    "way_named",
    "wrap",
]

__getattr__ = lazily(__name__, _HOME, "torch", "numba")


def __dir__() -> list[str]:
    return __all__
