"""Generate text with a fraction of the KV cache: few tokens do most of the work of attention."""

from vitalfew.generate.key_tokens import Generation, KeyTokens
from vitalfew.generate.policies import (
    H2O,
    POLICIES,
    TOVA,
    Keyformer,
    Policy,
    Random,
    Recent,
    SnapKV,
    Streaming,
    policy_named,
    then,
)
from vitalfew.generate.scores import Logits, Votes

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "Generation",
    "KeyTokens",
    "Keyformer",
    "Logits",
    "Policy",
    "Random",
    "Recent",
    "SnapKV",
    "Streaming",
    "Votes",
    "policy_named",
    "then",
]
