"""From what people ask for to a plan by which each layer chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vitalfew.core.budget import Budget
from vitalfew.core.errors import InputError
from vitalfew.generate.budgets import slot_bytes
from vitalfew.generate.keeping import keeper
from vitalfew.generate.policies import Policy, policy_named
from vitalfew.generate.policy import check_count
from vitalfew.generate.quant import Codec, codec_named
from vitalfew.generate.request import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["make_plan"]


def make_plan(
    model: PreTrainedModel, budget: Budget, *, policy: str | Policy, recent: float | int | None = None,
    of: str = "prompt", layers: str | Sequence[float] = "uniform", protect: Sequence[slice] = (),
    question: int | slice | None = None, min_length: int = 256, seed: int = 0, evict: str = "end",
    codec: str | Codec | None = None,
) -> Plan:  # fmt: skip
    """Return the plan of a model and settings, which are those of `KeyTokens`.

    Raises
    ------
    InputError
        If a setting makes no sense, or the model cannot be served, with the reason.
    """
    from vitalfew.generate import _transformers_families as families

    chosen = policy_named(policy) if isinstance(policy, str) else policy
    if not isinstance(chosen, Policy):
        raise InputError(f"a policy is a name or a Policy, got {chosen!r}", hint='such as "snapkv", or SnapKV(32)')
    if recent is not None:
        chosen = replace(chosen, recent=recent)
    if of not in ("prompt", "total"):
        raise InputError(f"of must be 'prompt' or 'total', got {of!r}", hint="a share is of the prompt by default")
    if evict not in ("end", "chunk"):
        raise InputError(f"evict must be 'end' or 'chunk', got {evict!r}", hint="'end' is the default")
    check_count("min_length", min_length)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InputError(f"a seed is a whole number of 64 bits, got {seed!r}", hint="pass an int")
    families.check_model(model)
    config, coded = model.config.get_text_config(decoder=True), codec_named(codec)
    which, (heads, key, value) = families.slot_layers(config), families.head_shape(config)
    one = [heads * slot_bytes(key, value, model.dtype.itemsize, coded)] * len(which)
    # Besides its slots a row takes the marks of those that go next, and the windows of other layers.
    fixed = heads * (8 * len(which) + families.window_tokens(config) * (key + value) * model.dtype.itemsize)
    keep = keeper(budget, which, one, least=chosen.least(), fixed=fixed, of=of, layers=layers)
    if isinstance(protect, slice):
        raise InputError(f"protect is a list of slices, got {protect}", hint=f"pass [{protect}]")
    spans = tuple(_span(span) for span in protect)
    mass = _mass(budget, chosen)
    return Plan(chosen, keep, _voters(question), spans, min_length, seed, evict == "chunk", mass, coded)


def _mass(budget: Budget, policy: Policy) -> float | None:
    """Return the share of the votes to keep, where the budget is one."""
    if budget.kind != "coverage" or budget.value == 1.0:
        return None
    if policy.voters == 0:
        raise InputError(
            f"{type(policy).__name__} has no votes of which to keep {budget.value:g}",
            hint="choose a policy whose prompt votes, such as keyformer, h2o or snapkv",
        )
    return float(budget.value)


def _voters(question: int | slice | None) -> int | None:
    if question is None or (isinstance(question, int) and not isinstance(question, bool)):
        count = question
    elif not isinstance(question, slice):
        raise InputError(f"a question is a number of tokens, got {question!r}", hint="pass slice(-32, None), or 32")
    elif question.stop is None and question.step is None and isinstance(question.start, int) and question.start < 0:
        count = -question.start
    else:
        raise InputError(f"the question must end the prompt, got {question}", hint="pass slice(-32, None), or 32")
    if count is not None and count < 1:
        raise InputError(f"a question has at least one token, got {count}", hint="pass None for none")
    return count


def _span(span: slice) -> slice:
    whole = isinstance(span, slice) and all(end is None or isinstance(end, int) for end in (span.start, span.stop))
    if not whole or span.step not in (None, 1):
        raise InputError(f"a protected span is a slice of tokens, got {span!r}", hint="pass slice(0, 40)")
    return span
