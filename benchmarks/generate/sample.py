"""What the benchmarks of this folder share: the sample model, and how a results file names the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from corpora import essays
from transformers import AutoModelForCausalLM, AutoTokenizer

from vitalfew.generate.weights import smollm2


def sample_model() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct in float32, and its tokenizer."""
    folder = smollm2(say=lambda line: print(line, file=sys.stderr))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def essay_tokens(tokenizer: Any) -> torch.Tensor:
    """Return all essays as one row of tokens."""
    return torch.cat([tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in essays().values()])


def command() -> str:
    """Return the command line, without paths of a machine."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for k, word in enumerate(words[:-1]):
        if word == "--out":
            words[k + 1] = f"benchmarks/results/{Path(words[k + 1]).name}"
        elif word == "--peer":
            words[k + 1] = "PYTHON"
    return "python benchmarks/generate/" + " ".join(words)
