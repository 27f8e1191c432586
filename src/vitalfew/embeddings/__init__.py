"""Train recommenders: embedding bags that update only the rows a batch touches, and the models on top."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitalfew.embeddings.ahead import Prefetch
    from vitalfew.embeddings.baseline import TorchBags
    from vitalfew.embeddings.metrics import BinaryMetrics, binary_metrics
    from vitalfew.embeddings.models import DLRM
    from vitalfew.embeddings.optim import SGD, Adagrad, LazyAdam, Optimizer, RowwiseAdagrad, optimizer_from_dict
    from vitalfew.embeddings.parallel import ShardedEmbeddings, sum_gradients, sync_classes
    from vitalfew.embeddings.parallel_ahead import ShardedPrefetch
    from vitalfew.embeddings.rows import Counts, Rows
    from vitalfew.embeddings.saving import load_rows, save_rows
    from vitalfew.embeddings.tables import EmbeddingBags, Table, clip_grad_norm
    from vitalfew.embeddings.tiered import TieredEmbeddings
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
    "TieredEmbeddings": "tiered",
    "Wrapped": "wrapping",
    "wrap": "wrapping",
}

__all__ = [
    "DLRM",
    "SGD",
    "Adagrad",
    "BinaryMetrics",
    "Counts",
    "EmbeddingBags",
    "LazyAdam",
    "Optimizer",
    "Prefetch",
    "Rows",
    "RowwiseAdagrad",
    "ShardedEmbeddings",
    "ShardedPrefetch",
    "Table",
    "TieredEmbeddings",
    "TorchBags",
    "Wrapped",
    "binary_metrics",
    "clip_grad_norm",
    "load_rows",
    "optimizer_from_dict",
    "save_rows",
    "sum_gradients",
    "sync_classes",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used: torch is not loaded before."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitalfew.core import need

    need("torch")
    need("numba")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
