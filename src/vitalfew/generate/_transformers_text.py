"""Text in, text out: prompts as tokens, and what a model writes as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from vitalfew.core.errors import InputError
from vitalfew.generate._transformers_weights import quiet

__all__ = ["tokens_of", "write"]


def tokens_of(tokenizer: Any, text: str, question: str = "", *, chat: bool = False) -> tuple[list[int], int]:
    """Return a prompt as tokens, and how many of the last of them belong to the question, 0 without one.

    Parameters
    ----------
    text, question
        The prompt; the question stands after the text.
    chat
        Put both into the tokenizer's chat template, as what the user says.
    """
    whole = "\n\n".join(part for part in (text, question) if part)
    if not whole.strip():
        raise InputError("the prompt is empty", hint="pass --prompt or --prompt-file")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("this model has no chat template", hint="leave out --chat")
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": whole}], tokenize=False, add_generation_prompt=True
        )

    def tokens(piece: str) -> list[int]:
        # A template writes the special tokens itself. Long texts are the point: no warning about their length.
        return list(tokenizer(piece, add_special_tokens=not chat, verbose=False)["input_ids"])

    found = tokens(whole)
    if not question:
        return found, 0
    before = whole[: whole.rindex(question.strip())]
    return found, max(1, len(found) - len(tokens(before)))


def write(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    emit: Callable[[str], None] = lambda piece: None,
) -> str:
    """Let a model go on after a prompt and return what it wrote.

    Parameters
    ----------
    temperature
        0 for the likeliest token each time; above, tokens are drawn.
    seed
        Of the drawing; the program's own random numbers are left alone.
    emit
        Gets the text piece by piece, whole words as soon as they are sure.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and len(tokens) + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {len(tokens):,} tokens; with {max_new_tokens:,} more it goes past the {limit:,} that the "
            "model can tell apart",
            hint="shorten the prompt or use a smaller --max-new-tokens",
        )
    device = next(model.parameters()).device
    prompt = torch.tensor([list(tokens)], device=device)
    draw = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), quiet():
        torch.manual_seed(seed)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=_Stream(tokenizer, emit),
            **draw,
        )
    return str(tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True))


class _Stream(TextStreamer):
    """Hands on finished words instead of printing them."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._emit(text)
