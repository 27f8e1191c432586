"""Generate text with a fraction of the KV cache: few tokens do most of the work of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitalfew._lazy import lazily

if TYPE_CHECKING:
    from vitalfew.generate.budgets import by_mass, pyramid, slot_bytes, slots_for_bytes, uniform, weighted
    from vitalfew.generate.ceiling import Ceiling, KVShape, decode_ceiling, foretell, weight_bytes
    from vitalfew.generate.comparing import Arm, Compared, Course, arms_of, compare_caches, long_enough
    from vitalfew.generate.key_tokens import Generation, KeyTokens
    from vitalfew.generate.mass import (
        LayerMass,
        attention_mass,
        coverage_curve,
        kept_mask,
        layer_mass,
        output_bound,
        slots_for_mass,
    )
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
    from vitalfew.generate.prefix import CompressedPrefix, compress
    from vitalfew.generate.quant import CODECS, Codec, Fp8, Int4, Int8, codec_named
    from vitalfew.generate.scores import Logits
    from vitalfew.generate.states import load_state, save_state
    from vitalfew.generate.texts import read_prompt, read_texts
    from vitalfew.generate.weights import smollm2

_HOME = {
    "by_mass": "budgets",
    "pyramid": "budgets",
    "slot_bytes": "budgets",
    "slots_for_bytes": "budgets",
    "uniform": "budgets",
    "weighted": "budgets",
    "Ceiling": "ceiling",
    "KVShape": "ceiling",
    "decode_ceiling": "ceiling",
    "foretell": "ceiling",
    "weight_bytes": "ceiling",
    "Arm": "comparing",
    "Compared": "comparing",
    "Course": "comparing",
    "arms_of": "comparing",
    "compare_caches": "comparing",
    "long_enough": "comparing",
    "Generation": "key_tokens",
    "KeyTokens": "key_tokens",
    "LayerMass": "mass",
    "attention_mass": "mass",
    "coverage_curve": "mass",
    "kept_mask": "mass",
    "layer_mass": "mass",
    "output_bound": "mass",
    "slots_for_mass": "mass",
    "H2O": "policies",
    "POLICIES": "policies",
    "TOVA": "policies",
    "Keyformer": "policies",
    "Policy": "policies",
    "Random": "policies",
    "Recent": "policies",
    "SnapKV": "policies",
    "Streaming": "policies",
    "policy_named": "policies",
    "then": "policies",
    "CompressedPrefix": "prefix",
    "compress": "prefix",
    "CODECS": "quant",
    "Codec": "quant",
    "Fp8": "quant",
    "Int4": "quant",
    "Int8": "quant",
    "codec_named": "quant",
    "Logits": "scores",
    "load_state": "states",
    "save_state": "states",
    "read_prompt": "texts",
    "read_texts": "texts",
    "smollm2": "weights",
}

__all__ = [
    "CODECS",
    "H2O",
    "POLICIES",
    "TOVA",
    "Arm",
    "Ceiling",
    "Codec",
    "Compared",
    "CompressedPrefix",
    "Course",
    "Fp8",
    "Generation",
    "Int4",
    "Int8",
    "KVShape",
    "KeyTokens",
    "Keyformer",
    "LayerMass",
    "Logits",
    "Policy",
    "Random",
    "Recent",
    "SnapKV",
    "Streaming",
    "arms_of",
    "attention_mass",
    "by_mass",
    "codec_named",
    "compare_caches",
    "compress",
    "coverage_curve",
    "decode_ceiling",
    "foretell",
    "kept_mask",
    "layer_mass",
    "load_state",
    "long_enough",
    "output_bound",
    "policy_named",
    "pyramid",
    "read_prompt",
    "read_texts",
    "save_state",
    "slot_bytes",
    "slots_for_bytes",
    "slots_for_mass",
    "smollm2",
    "then",
    "uniform",
    "weight_bytes",
    "weighted",
]

__getattr__ = lazily(__name__, _HOME, "torch", "numba")


def __dir__() -> list[str]:
    return __all__
