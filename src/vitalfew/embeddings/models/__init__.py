"""Models on top of embedding bags."""

from vitalfew.embeddings.models._base import ClickModel
from vitalfew.embeddings.models.adrec import AdRec
from vitalfew.embeddings.models.dcn import DCNv2
from vitalfew.embeddings.models.deepfm import DeepFM
from vitalfew.embeddings.models.dlrm import DLRM
from vitalfew.embeddings.models.tbsm import TBSM
from vitalfew.embeddings.models.wide_deep import WideDeep

__all__ = ["DLRM", "MODELS", "TBSM", "AdRec", "ClickModel", "DCNv2", "DeepFM", "WideDeep"]

MODELS: dict[str, type[ClickModel]] = {
    "dlrm": DLRM,
    "dcn": DCNv2,
    "deepfm": DeepFM,
    "wide-deep": WideDeep,
    "adrec": AdRec,
}
"""Models of one sample at a time, by the name that `Settings.model` has for them."""
