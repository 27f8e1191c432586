"""The families of models that are tested with slots; loads nothing."""

from __future__ import annotations

__all__ = ["ADAPTED", "SEEN"]

ADAPTED = {
    "bloom": "_transformers_bloom",
    "codegen": "_transformers_gptj",
    "falcon": "_transformers_falcon",
    "gptj": "_transformers_gptj",
    "mpt": "_transformers_mpt",
}
"""Families that do not take their attention from transformers' registry, and the file that adapts each."""

SEEN = (
    "cohere", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "lfm2", "llama",
    "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip
"""Families that do, and whose slots are compared with the full cache in the tests."""
