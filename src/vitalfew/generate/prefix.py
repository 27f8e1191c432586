"""A long text read once, compressed, saved and forked: each question starts behind it and pays for itself alone."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from vitalfew.core.budget import Budget
from vitalfew.core.errors import InputError
from vitalfew.generate import policies
from vitalfew.generate.planning import make_plan
from vitalfew.generate.policies import Policy
from vitalfew.generate.quant import CODECS, Codec
from vitalfew.generate.request import Plan
from vitalfew.generate.states import (
    VERSION,
    flatten,
    read_tensors,
    tensor_digest,
    text_digest,
    unflatten,
    write_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vitalfew.generate._transformers import SlotCache
    from vitalfew.generate.key_tokens import KeyTokens

__all__ = ["CompressedPrefix", "compress"]

_OWN = ("_name_or_path", "name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype")
"""What a configuration says that has no part in keys and values, or is compared by itself."""


def compress(
    model: PreTrainedModel,
    ids: torch.Tensor | Sequence[int],
    *,
    policy: str | Policy = "keyformer",
    budget: Budget | float | int | str = 0.5,
    recent: float | int | None = None,
    layers: str | Sequence[float] = "uniform",
    protect: Sequence[slice] = (),
    question: int | slice | None = None,
    min_length: int = 0,
    seed: int = 0,
    codec: str | Codec | None = None,
) -> CompressedPrefix:
    """Read a text once, and return the keys and values that are worth their slots.

    Parameters
    ----------
    model
        A decoder of transformers, enabled or not.
    ids
        The tokens of one row, without padding.
    policy, budget, recent, layers, protect, question, min_length, seed, codec
        As of `KeyTokens`. A size is for one row; `min_length` is 0, so that any text is compressed.

    Raises
    ------
    InputError
        If the model or a setting cannot be served, with the reason.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=4, eos_token_id=None)).eval()
    >>> prefix = compress(model, range(1, 61), policy="snapkv", budget=0.5)
    >>> with prefix.serve(model):
    ...     out = model.generate(**prefix.followed_by(torch.tensor([[5, 6, 7], [8, 9, 1]])), max_new_tokens=4,
    ...         do_sample=False)
    >>> out.shape
    torch.Size([2, 67])

    Notes
    -----
    Cost: one pass over the text, and one over the weights for their digest.
    """
    tokens = _tokens(ids)
    limit = Budget.of(budget)
    plan = make_plan(
        model, limit, policy=policy, recent=recent, layers=layers, protect=protect, question=question,
        min_length=min_length, seed=seed, codec=codec,
    )  # fmt: skip
    settings = {
        "policy": _plain(plan.policy), "budget": [limit.kind, limit.value],
        "layers": layers if isinstance(layers, str) else [float(weight) for weight in layers],
        "protect": [[span.start, span.stop] for span in protect], "question": plan.voters, "min_length": min_length,
        "seed": seed, "codec": _name(plan.codec),
    }  # fmt: skip
    plan = _of_one_row(plan, limit)
    from vitalfew.generate._transformers import SlotCache
    from vitalfew.generate._transformers_attention import served
    from vitalfew.generate._transformers_enabling import enable

    cache = SlotCache(model.config.get_text_config(decoder=True), plan, prompt=len(tokens))
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with nullcontext() if model in served else enable(model), torch.no_grad():
        model(torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True, **last)
    return CompressedPrefix(tokens, settings, _about(model), cache.state_dict(), plan, model.config)


@dataclass(frozen=True, eq=False)
class CompressedPrefix:
    """The slots of one text, made by `compress` or read by `load`; it never changes.

    Attributes
    ----------
    tokens
        Of the text.
    settings
        How it was compressed, as plain values.
    about
        Digests of the model's configuration and weights, its class and its type of numbers.
    """

    tokens: tuple[int, ...]
    settings: dict[str, Any]
    about: dict[str, str]
    _state: dict[str, Any] = field(repr=False)
    _plan: Plan = field(repr=False)
    _config: Any = field(repr=False)

    @property
    def key(self) -> str:
        """A SHA-256 that is the same for the same tokens, model, settings and form of file."""
        tokens = hashlib.sha256(repr(self.tokens).encode()).hexdigest()
        return text_digest({"tokens": tokens, "settings": self.settings, "about": self.about, "form": VERSION})

    @property
    def nbytes(self) -> int:
        """Bytes of one copy of the slots."""
        return sum(t.nbytes for name, t in flatten(self._state)[1].items() if not name.endswith(".mass"))

    def fork(self, rows: int = 1, *, few: KeyTokens | None = None) -> SlotCache:
        """Return a cache of so many rows that have all read the text; each goes its own way from here.

        Parameters
        ----------
        rows
            Questions that are asked at once.
        few
            Whose settings hold from here on; None for those of the prefix. A policy and a budget then choose among
            the slots of the prefix and the tokens that follow.

        Raises
        ------
        InputError
            If there are no rows, or another codec is asked for.
        """
        from vitalfew.generate._transformers import SlotCache

        if rows < 1:
            raise InputError(f"a fork has at least one row, got {rows}", hint="pass the number of questions")
        plan = self._plan if few is None else few.cache().request.plan
        cache = SlotCache(self._config.get_text_config(decoder=True), plan)
        cache.load_state_dict(self._state)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def followed_by(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, each: int = 1
    ) -> dict[str, Any]:
        """Return what ``generate`` takes to go on from here with questions.

        Parameters
        ----------
        ids, attention_mask
            ``(questions, tokens)``, padded on the left.
        each
            Rows that ``generate`` makes of each question: its ``num_beams``, or ``num_return_sequences``.

        Raises
        ------
        InputError
            If there is padding, and the model has layers with a window, which would see it.
        """
        if attention_mask is not None and any(self._state["windows"]) and not bool(attention_mask.all()):
            raise InputError(
                "padding between a prefix and a question takes room in the windows of this model",
                hint="ask questions of the same length together",
            )
        if ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != ids.shape):
            mask_said = "none" if attention_mask is None else tuple(attention_mask.shape)
            raise InputError(
                f"questions have the shape {tuple(ids.shape)} and their mask {mask_said}",
                hint="pass (questions, tokens), padded on the left, and a mask of the same shape",
            )
        rows = ids.shape[0]
        text = torch.tensor([self.tokens], device=ids.device, dtype=ids.dtype).expand(rows, -1)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return {
            "input_ids": torch.cat((text, ids), 1),
            "attention_mask": torch.cat((torch.ones_like(text, dtype=mask.dtype), mask), 1),
            "past_key_values": self.fork(rows * each),
        }

    def serve(self, model: PreTrainedModel) -> KeyTokens:
        """Return an enabled `KeyTokens` of the same settings; forks go on in the ``generate`` of its model.

        Raises
        ------
        InputError
            If it is another model, naming what differs.
        """
        from vitalfew.generate.key_tokens import KeyTokens

        _check(self.about, _about(model), "this prefix")
        return KeyTokens(model, **_arguments(self.settings))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, in one step."""
        header, tensors = flatten(self._state)
        header |= {"tokens": list(self.tokens), "settings": self.settings, "about": self.about, "key": self.key}
        write_tensors(path, "prefix", header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> CompressedPrefix:
        """Read a file for the model that it was made with.

        Raises
        ------
        InputError
            If the file is torn or altered, or the model is another one or was changed; the message names the field.
        """
        header, tensors = read_tensors(path, "prefix")
        _check(header["about"], _about(model), str(path))
        state = unflatten(header, {name: tensor.to(model.device) for name, tensor in tensors.items()})
        settings = _arguments(header["settings"])
        plan = _of_one_row(make_plan(model, **settings), settings["budget"])
        return cls(tuple(header["tokens"]), header["settings"], header["about"], state, plan, model.config)


def _tokens(ids: torch.Tensor | Sequence[int]) -> tuple[int, ...]:
    row = torch.as_tensor(ids if isinstance(ids, torch.Tensor) else list(ids))
    if row.ndim == 2 and row.shape[0] == 1:
        row = row[0]
    if row.ndim != 1 or not len(row) or row.is_floating_point():
        raise InputError(
            f"a prefix is one row of token ids, got shape {tuple(row.shape)} of {row.dtype}",
            hint="compress each text by itself, without padding",
        )
    return tuple(row.tolist())


def _of_one_row(plan: Plan, budget: Budget) -> Plan:
    """Let a size be for one row, so that a fork keeps the same slots however many rows it has."""
    keep = plan.keep
    if keep is None or budget.kind != "bytes":
        return plan
    return replace(plan, keep=lambda layer, tokens, planned, rows: keep(layer, tokens, planned, 1))


def _plain(policy: Policy) -> dict[str, Any]:
    """Return a policy as plain values."""
    name = type(policy).__name__
    if getattr(policies, name, None) is not type(policy):
        raise InputError(f"a prefix cannot remember the policy {name}", hint="choose one of vitalfew.generate's own")
    held = {each.name: getattr(policy, each.name) for each in fields(policy)}
    return {"name": name} | {key: _plain(x) if isinstance(x, Policy) else x for key, x in held.items()}


def _policy(plain: dict[str, Any]) -> Policy:
    kind: Any = getattr(policies, str(plain["name"]), None)
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise InputError(f"there is no policy {plain['name']!r}", hint="it was written by another vitalfew")
    held: dict[str, Any] = {key: _policy(x) if isinstance(x, dict) else x for key, x in plain.items() if key != "name"}
    made: Policy = kind(**held)
    return made


def _name(codec: Codec | None) -> str | None:
    if codec is not None and CODECS.get(codec.name) != codec:
        raise InputError(f"a prefix cannot remember the codec {codec!r}", hint=f"choose one of {', '.join(CODECS)}")
    return None if codec is None else codec.name


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `make_plan`, and of `KeyTokens`."""
    kind, value = settings["budget"]
    return settings | {
        "policy": _policy(settings["policy"]), "budget": Budget(kind, value),
        "protect": [slice(start, stop) for start, stop in settings["protect"]],
    }  # fmt: skip


def _about(model: PreTrainedModel) -> dict[str, str]:
    """Return what a prefix depends on in a model."""
    config = model.config.to_dict()
    said = {key: value for key, value in config.items() if key not in _OWN and "attn_implementation" not in key}
    sha = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sha.update(f"{name} {tensor_digest(tensor)} ".encode())
    return {
        "class": type(model).__name__, "config": text_digest({"config": json.loads(json.dumps(said, default=str))}),
        "dtype": str(model.dtype).removeprefix("torch."), "weights": sha.hexdigest(),
    }  # fmt: skip


def _check(made_with: dict[str, str], have: dict[str, str], what: str) -> None:
    for name, value in have.items():
        if made_with.get(name) != value:
            was = str(made_with.get(name))
            raise InputError(
                f"{what} was made with another model: its {name} is {was[:12]}, this model's is {value[:12]}",
                hint="compress the text again with this model",
            )
