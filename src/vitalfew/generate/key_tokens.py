"""Let a model generate with a fraction of its keys and values, and take it all back."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from vitalfew.core.budget import Budget
from vitalfew.core.compare import Comparison
from vitalfew.core.errors import InputError
from vitalfew.core.receipt import Line, Receipt
from vitalfew.generate.planning import make_plan
from vitalfew.generate.policies import Policy
from vitalfew.generate.quant import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vitalfew.generate._transformers import SlotCache

__all__ = ["Generation", "KeyTokens"]


@dataclass(frozen=True)
class Generation:
    """What one call of ``generate`` took.

    Attributes
    ----------
    rows, prompt, new
        Rows of the batch (beams count), tokens of the prompt and tokens that followed, padding included.
    nbytes, full_nbytes
        Bytes that the cache held at the end, and that all tokens' keys and values would have taken.
    to_prompt_end, seconds
        Seconds until the attention of the prompt was done, and in all.
    mass
        Per layer: the voters' attention that kept tokens had, lowest and mean over rows and heads.
    whole
        Rows of which nothing was evicted in some layer: all of their tokens were fewer than `min_length`, or than the
        slots.
    """

    rows: int
    prompt: int
    new: int
    nbytes: int
    full_nbytes: int
    to_prompt_end: float
    seconds: float
    mass: tuple[tuple[float, float] | None, ...]
    whole: int = 0


class _Generate:
    """What an enabled model has in place of its ``generate``; a copy of the model would generate with the model."""

    def __init__(self, original: Callable[..., Any], run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._run = functools.partial(run, inspect.signature(original))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)

    def __reduce__(self) -> Any:
        raise InputError("an enabled model cannot be copied or pickled", hint="undo() first, and enable the copy")


class KeyTokens:
    """Generate with the keys and values of the tokens that matter, in slots that are overwritten.

    While it is enabled, the model's own ``generate`` uses a cache that truly evicts: after the prompt each layer and
    head keeps a fraction of the tokens, and each new token takes the slot of the least wanted one.

    Parameters
    ----------
    model
        A decoder of transformers; its weights and code are not touched.
    budget
        A share (``0.5`` or ``"50%"``) of the prompt, a number of slots per layer and head, a size for the whole cache
        with all its rows (``"256 MiB"``), or a `Budget`. 1.0 never evicts.
    policy
        Which tokens stay: a name (see `POLICIES`) or a `Policy`.
    recent
        Share (float) or number (int) of the kept slots for the latest tokens; None for what the policy says.
    of
        Whether a share is of the prompt, or of prompt and planned tokens (``"total"``).
    layers
        ``"uniform"``, ``"pyramid"`` (early layers more), or one weight per layer with full attention.
    protect
        Slices of the prompt, in tokens of a row without its padding, that never go (a system prompt). Sinks are the
        policy's own.
    question
        How many of the prompt's last tokens are the question: they alone vote. Where nobody votes (`Streaming`,
        `Recent`, `Random`) it changes nothing, and the receipt says so.
    min_length
        Rows shorter than this are left whole, as are those of which the share would be fewer slots than the policy
        needs; they are chosen from when they are long enough. The receipt counts them.
    seed
        Of noise and random choices. The same row gives the same text, whatever stands beside it in a batch.
    codec
        How the kept keys and values are coded: ``"int8"``, ``"int4"``, ``"fp8"`` or a `Codec`; None for the model's
        own type. A prompt is attended to as it is, and coded when it has been chosen from.
    evict
        ``"end"`` to choose once a prompt is complete, ``"chunk"`` after each of its chunks, which bounds the peak.

    Raises
    ------
    InputError
        If the model cannot be served, with the reason; a model never runs at full cache in silence.

    References
    ----------
    Adnan et al., "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
    MLSys 2024, section 3.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> prompt = torch.arange(1, 41)[None]
    >>> with KeyTokens(model, budget=0.5, min_length=0) as few:
    ...     out = model.generate(prompt, max_new_tokens=8, do_sample=False)
    >>> out.shape, few.generations[-1].nbytes < few.generations[-1].full_nbytes
    (torch.Size([1, 48]), True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: Budget | float | int | str = 0.5,
        *,
        policy: str | Policy = "keyformer",
        recent: float | int | None = None,
        of: Literal["prompt", "total"] = "prompt",
        layers: str | Sequence[float] = "uniform",
        protect: Sequence[slice] = (),
        question: int | slice | None = None,
        min_length: int = 256,
        seed: int = 0,
        evict: Literal["end", "chunk"] = "end",
        codec: str | Codec | None = None,
    ) -> None:
        from vitalfew.generate._transformers_enabling import enable

        self.model = model
        self.budget = Budget.of(budget)
        self._plan = make_plan(
            model, self.budget, policy=policy, recent=recent, of=of, layers=layers, protect=protect, question=question,
            min_length=min_length, seed=seed, evict=evict, codec=codec,
        )  # fmt: skip
        self.policy, self.codec = self._plan.policy, self._plan.codec
        self._config = model.config.get_text_config(decoder=True)
        self.generations: list[Generation] = []
        self._undo = enable(model)
        self._generate: Callable[..., Any] | None = model.__dict__.get("generate")
        self._original: Callable[..., Any] = model.generate
        model.__dict__["generate"] = _Generate(self._original, self._run)
        self._enabled = True

    def cache(self, prompt: int | None = None, max_new_tokens: int | None = None) -> SlotCache:
        """Return a fresh cache for ``generate`` or for calls of the model itself.

        Parameters
        ----------
        prompt
            Tokens of the prompt, padding included. None: each call of several tokens is a prompt, or a later turn.
        max_new_tokens
            Planned tokens after it.
        """
        from vitalfew.generate._transformers import SlotCache

        self._check_enabled()
        return SlotCache(self._config, self._plan, prompt=prompt, planned=max_new_tokens or 0)

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise InputError("this KeyTokens was undone", hint="make a new one")

    def _run(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from vitalfew.generate._transformers import SlotCache, settled

        bound = signature.bind(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}

        def setting(name: str) -> Any:
            places = (given, vars(given.get("generation_config") or object), vars(self.model.generation_config))
            return next((place[name] for place in places if place.get(name) is not None), None)

        if setting("use_cache") is False:
            raise InputError("use_cache=False leaves nothing to evict", hint="pass use_cache=True, or undo() first")
        if setting("assistant_early_exit") is not None:
            raise InputError(
                "assistant_early_exit lets the model's first layers draft, with a cache of their own",
                hint="use an assistant_model, or undo() first",
            )
        if setting("is_assistant"):
            raise InputError(
                "an enabled model cannot draft for another: of its prompt too tokens would be taken back",
                hint="undo() the KeyTokens of the assistant_model",
            )
        other = setting("cache_implementation")
        if other not in (None, "hybrid"):  # which is what some models name their own default
            raise InputError(f"cache_implementation={other!r} is another cache", hint="leave it out, or undo() first")
        cache = given.get("past_key_values")
        if cache is None:
            cache = self.cache()
            kwargs = {**kwargs, "past_key_values": cache}
        elif not isinstance(cache, SlotCache):
            raise InputError(
                f"generate() got a {type(cache).__name__}, which evicts nothing", hint="pass few.cache(), or none"
            )
        prompt = _prompt_length(given, cache.length)
        planned = setting("max_new_tokens")
        if planned is None:
            most = setting("max_length")
            planned = most - prompt if most and most > prompt else 20
        if prompt <= cache.length:
            raise InputError(
                f"generate() got {prompt} tokens, of which this cache holds {cache.length} already",
                hint="pass the whole conversation, or its new tokens with an attention_mask over all of it",
            )
        request, before = cache.request, (cache.length, cache.request.prompt, cache.request.planned)
        recording = request.recording
        # One token more is the last of a generation that ended, which goes on as if it had not.
        if not cache.length or prompt > cache.length + 1:
            cache.expect(prompt, int(planned))
        start = time.perf_counter()
        try:
            with settled(cache):
                out = self._original(*args, **kwargs)
        except BaseException:
            if cache.length == before[0]:  # that prompt never came
                request.prompt, request.planned = before[1:]
            raise
        finally:
            request.recording = recording
        request.check_sound()
        self.generations.append(_generation(cache, prompt, start, time.perf_counter()))
        return out

    def undo(self) -> None:
        """Give the model its own attention and ``generate`` back; caches made here cannot be used any more."""
        if not self._enabled:
            return
        if self._generate is None:
            del self.model.__dict__["generate"]
        else:
            self.model.__dict__["generate"] = self._generate
        self._undo.close()
        self._enabled = False

    def __enter__(self) -> KeyTokens:
        self._check_enabled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def receipt(self, comparison: Comparison | None = None) -> Receipt:
        """Return what the cache held, what it would have held, and how much attention the kept tokens had.

        Parameters
        ----------
        comparison
            Of paired runs with and without this; without it the verdict is open.
        """
        runs = self.generations
        if not runs:
            raise InputError("nothing was generated yet", hint="call model.generate() first")
        steps = sum(max(0, run.new - 1) for run in runs)
        full = sum(run.full_nbytes for run in runs)
        later = sum(run.seconds - run.to_prompt_end for run in runs)
        held, texts = sum(run.nbytes for run in runs), sum(run.rows for run in runs)
        first = sum(run.to_prompt_end for run in runs) / len(runs)
        lines = [
            Line("keys and values at the end", "B", full, held, "counted"),
            Line("texts generated", "", None, texts, "counted"),
            Line("time to the end of the prompt", "s", None, first, "measured"),
        ]
        if steps:
            lines.append(Line("time per later step", "s", None, later / steps, "measured"))
        masses = [m for run in runs for m in run.mass if m is not None]
        if masses:
            note = "of the prompt's voting tokens alone; what was evicted is unknown to later ones"
            low, mean = min(m[0] for m in masses), sum(m[1] for m in masses) / len(masses)
            what = "attention that kept tokens had"
            lines.append(Line(what, "share", 1.0, mean, "measured", low=low, high=1.0, note=note))
        title, method = "generation with fewer keys and values", f"{self.policy}, {self.budget}"
        notes = self._notes(texts)
        if comparison is None:
            why = "no paired run was made: bytes alone do not show the quality"
            return Receipt(title, method, tuple(lines), "undecided", why, notes=notes)
        return Receipt(
            title, method, tuple(lines), comparison.verdict, comparison.why, str(comparison.rule),
            quality=(comparison.quality,), pairs=comparison.pairs, pairs_needed=comparison.pairs_needed, notes=notes,
        )  # fmt: skip

    def _notes(self, texts: int) -> tuple[str, ...]:
        """Return which settings had no effect."""
        notes = []
        whole = sum(run.whole for run in self.generations)
        if whole and self._plan.keep is not None:
            why = f"too short for the budget, or for min_length={self._plan.min_length}"
            notes.append(f"{whole} of {texts} texts were kept whole: {why}")
        if self._plan.voters is not None and self.policy.voters == 0:
            notes.append(f"question={self._plan.voters} changed nothing: nobody votes in {self.policy}")
        return tuple(notes)


def _generation(cache: SlotCache, prompt: int, start: float, end: float) -> Generation:
    layers = [layer.evicting for layer in cache.slot_layers]
    slots = [layer.slots for layer in layers if layer.slots is not None]
    rows = len(slots[0].counts) if slots else 0
    full = sum(
        rows * cache.length * heads * sum(s.sizes) * s.dtype.itemsize for s in slots for heads in (s.keys.shape[1],)
    )
    rest = cache.nbytes - sum(layer.nbytes for layer in layers)
    mass = tuple(None if m.mass is None else (float(m.mass.min()), float(m.mass.mean())) for m in layers)
    return Generation(
        rows, prompt, max(0, cache.length + 1 - prompt), cache.nbytes, full + rest,
        max(0.0, cache.request.prompt_done - start), end - start, mass,
        sum(None in caps for caps in zip(*(s.caps for s in slots), strict=True)),
    )  # fmt: skip


def _prompt_length(given: dict[str, Any], held: int) -> int:
    """Return the tokens of a prompt with what came before it, padding included, from generate's arguments."""
    mask, ids = given.get("attention_mask"), given.get("input_ids", given.get("inputs"))
    texts = [t for t in (ids, given.get("inputs_embeds")) if isinstance(t, torch.Tensor) and t.ndim >= 2]
    if not texts:
        return 1
    rows, count = len(texts[0]), max(text.shape[1] for text in texts)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return count
    if len(mask) != rows or mask.shape[1] not in (count, held + count):
        raise InputError(
            f"the attention mask has shape {tuple(mask.shape)} for {rows} rows of {count} tokens",
            hint="pass a mask of 0 and 1 over all tokens so far, padding included",
        )
    return int(mask.shape[1])
