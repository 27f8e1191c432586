"""Models on top of embedding bags."""

from vitalfew.embeddings.models.dlrm import DLRM

__all__ = ["DLRM"]
