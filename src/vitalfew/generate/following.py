"""Follow a text token by token with one cache, and say how well the model foretold it, how fast, and in how many bytes.

The text itself is fed, not what the model would have said (teacher forcing): every cache answers the same questions.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Followed", "Run", "follow", "measure"]


@dataclass(frozen=True, slots=True)
class Followed:
    """What one pass over a text gave.

    Attributes
    ----------
    log_probs
        ``(continued, vocabulary)`` float32: before each token of the continuation, what the model held likely.
    nbytes
        Of the cache at the end.
    prefill, step
        Seconds for the prompt, and the median over the tokens after it.
    mass
        By layer: the share of the prompt's votes that the kept tokens had; None where nothing was chosen by votes.
    """

    log_probs: torch.Tensor
    nbytes: int
    prefill: float
    step: float
    mass: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one text with one cache.

    Attributes
    ----------
    nll
        Mean negative log-likelihood of the continuation, nats per token.
    kl
        Mean divergence of the full cache's distribution from this one's, nats per token.
    agreement
        Share of the tokens where both hold the same token the likeliest.
    nbytes, prefill, step, mass
        As in `Followed`.
    """

    nll: float
    kl: float
    agreement: float
    nbytes: int
    prefill: float
    step: float
    mass: tuple[float | None, ...] = ()


def follow(
    model: Any, tokens: Sequence[int], prompt: int, cache: Any = None, *, on_token: Callable[[], None] = lambda: None
) -> Followed:
    """Read the first `prompt` tokens at once and the others one by one.

    Parameters
    ----------
    model
        A causal language model of transformers.
    tokens
        The text; what is foretold are the tokens after the prompt.
    cache
        An empty cache; by default the model's own, which keeps everything.
    on_token
        Called after every call of the model.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits, seconds = [], []
    ends = [prompt, *range(prompt + 1, len(tokens))]
    with torch.inference_mode():
        for start, end in zip([0, *ends], ends, strict=False):
            _wait(device)
            began = time.perf_counter()
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **last_only)
            _wait(device)
            seconds.append(time.perf_counter() - began)
            cache = out.past_key_values
            logits.append(out.logits[0, -1].float())
            on_token()
        log_probs = torch.stack(logits).log_softmax(-1)
    step = statistics.median(seconds[1:]) if len(seconds) > 1 else seconds[0]
    return Followed(log_probs, _nbytes(cache), seconds[0], step, _mass(cache))


def measure(ours: Followed, full: Followed, continuation: Sequence[int]) -> Run:
    """Compare what a cache foretold with what the full cache did, and both with the text.

    Examples
    --------
    >>> sure = Followed(torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), 100, 1.0, 0.1)
    >>> run = measure(sure, sure, [0, 1])
    >>> round(run.nll, 3), run.kl, run.agreement
    (0.164, 0.0, 1.0)
    """
    p, q = full.log_probs, ours.log_probs
    truth = torch.tensor(continuation, device=q.device)[:, None]
    return Run(
        nll=-float(q.gather(1, truth).double().mean()),
        # Rounding may leave it a little below zero.
        kl=max(0.0, float((p.exp() * (p - q)).sum(-1).double().mean())),
        agreement=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        nbytes=ours.nbytes,
        prefill=ours.prefill,
        step=ours.step,
        mass=ours.mass,
    )


def _wait(device: torch.device) -> None:
    """Let a GPU finish: it works on while its caller does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nbytes(cache: Any) -> int:
    counted = getattr(cache, "nbytes", None)
    if counted is not None:
        return int(counted)
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def _mass(cache: Any) -> tuple[float | None, ...]:
    found = (layer.evicting.mass for layer in getattr(cache, "slot_layers", ()))
    return tuple(None if mass is None else float(mass.mean()) for mass in found)
