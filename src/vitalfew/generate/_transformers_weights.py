"""Models and tokenizers from folders, through transformers."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from vitalfew.core.errors import InputError

__all__ = ["convert", "load", "quiet"]


def convert(weights: Path, out: Path) -> None:
    """Write a Llama in GGUF form as float32 safetensors, with its tokenizer."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # one bar of theirs heeds no setting
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        packed = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
        # The loaded object calls itself quantized although its tensors are float32 and refuses to be saved.
        config = copy.deepcopy(packed.config)
        del config.quantization_config
        model = LlamaForCausalLM(config)
        model.load_state_dict(packed.state_dict())
        model.generation_config = packed.generation_config
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def load(folder: str | Path) -> tuple[Any, Any]:
    """Return the causal language model of a folder, in eval mode, and its tokenizer; nothing is downloaded.

    Raises
    ------
    InputError
        If there is no such folder, or it holds no model and tokenizer that transformers can load.
    """
    if not Path(folder).is_dir():
        raise InputError(f"no such folder: {folder}", hint="name a folder with a model, or smollm2 for the sample")
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json", hint="name a folder that `save_pretrained` wrote")
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"{folder} cannot be loaded ({reason})", hint="is it a causal language model?") from error
    if torch.cuda.is_available():
        model.to("cuda")
    return model.eval(), tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and remarks off a terminal that is not theirs."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
