"""Attention and votes equal a naive implementation, one logit at a time in float64."""

from __future__ import annotations

import math
from threading import Thread

import numba
import numpy as np
import pytest
import torch

from vitalfew.core.errors import InputError
from vitalfew.generate import _calling, _kernels_reference, _kernels_threads
from vitalfew.generate._blocks import _add_noisy_votes
from vitalfew.generate.noise import Noise, gumbel
from vitalfew.generate.packed import Packed, attend_held, pack
from vitalfew.generate.quant import Int8
from vitalfew.generate.scores import (
    Logits,
    Votes,
    attend_masked,
    attend_prompt,
    attend_slots,
    later_votes,
    vote_and_mark,
)
from vitalfew.generate.select import next_slot

FORMS = {
    "plain": Logits(0.3),
    "softcap": Logits(0.3, softcap=2.0),
    "alibi": Logits(0.3, slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "sinks": Logits(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": Logits(0.3, 2.0, torch.tensor([0.5, 0.25, 0.125, 0.0625]), torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def naive(query, keys, values, form, key_pos, query_pos, votes=None):
    """Attention and votes with loops over rows, heads and queries."""
    query, keys, values = (t.double().numpy() for t in (query, keys, values))
    rows, all_heads, n, _ = query.shape
    heads, m = keys.shape[1:3]
    group = all_heads // heads
    out, cast = np.zeros((rows, n, all_heads, values.shape[-1])), np.zeros((rows, heads, m))
    for b in range(rows):
        real = [p for p in query_pos[b].tolist() if p >= 0]
        for h in range(all_heads):
            at = key_pos[b, h // group].numpy()
            for i, p in enumerate(query_pos[b].tolist()):
                seen = (at >= 0) & (at <= p)
                if p < 0 or not seen.any():
                    continue
                x = keys[b, h // group, seen] @ query[b, h, i] * form.scale
                if form.softcap is not None:
                    x = form.softcap * np.tanh(x / form.softcap)
                if form.slopes is not None:
                    x = x + float(form.slopes[h]) * (at[seen] - p)
                e = np.exp(x - x.max())
                extra = 0.0 if form.sinks is None else math.exp(float(form.sinks[h]) - x.max())
                out[b, i, h] = (e / (e.sum() + extra)) @ values[b, h // group, seen]
                if votes is None or (votes.voters is not None and p not in real[max(0, len(real) - votes.voters) :]):
                    continue
                y = x
                if votes.noise is not None:
                    here = torch.from_numpy(at).expand(1, heads, -1)
                    z = gumbel(votes.noise, all_heads, torch.tensor([[p]]), here)
                    y = x + z[0, h, 0].double().numpy()[seen]
                y = np.exp(y / votes.tau - (y / votes.tau).max())
                cast[b, h // group, seen] += y / y.sum() / group
    return torch.from_numpy(out), torch.from_numpy(cast)


def tensors(n, m, *, rows=2, heads=2, group=2, d=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, heads * group, n, d, generator=g).to(dtype) * 2,
        torch.randn(rows, heads, m, d, generator=g).to(dtype),
        torch.randn(rows, heads, m, d, generator=g).to(dtype),
    )


def whole(n, rows=2, heads=2):
    pos = torch.arange(n).expand(rows, -1)
    return pos[:, None].expand(-1, heads, -1).to(torch.int32), pos


BALLOTS = [
    None, Votes(0), Votes(None), Votes(3), Votes(1), Votes(10_000), Votes(None, 1.7), Votes(None, 1.0, Noise(5, 2)),
    Votes(9, 0.6, Noise(5, 2)),
]  # fmt: skip


@pytest.mark.parametrize("votes", BALLOTS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("n", [1, 37])
def test_a_whole_prompt(n, form, votes):
    q, k, v = tensors(n, n)
    key_pos, query_pos = whole(n)
    out, cast = attend_prompt(q, k, v, form, key_pos, query_pos, votes, causal=True)
    want, votes_wanted = naive(q, k, v, form, key_pos, query_pos, votes)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    if votes is None:
        assert cast is None
        return
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast.double(), votes_wanted, rtol=1e-5, atol=1e-5)
    voters = n if votes.voters is None else min(votes.voters, n)
    torch.testing.assert_close(cast.sum(-1), torch.full((2, 2), float(voters)))


@pytest.mark.parametrize("votes", [Votes(None), Votes(40), Votes(None, 1.3, Noise(1, 1))], ids=str)
@pytest.mark.parametrize("n", [255, 256, 300, 515])
def test_lengths_around_a_block(n, votes):
    q, k, v = tensors(n, n, rows=1)
    key_pos, query_pos = whole(n, rows=1)
    out, cast = attend_prompt(q, k, v, FORMS["plain"], key_pos, query_pos, votes, causal=True)
    want, votes_wanted = naive(q, k, v, FORMS["plain"], key_pos, query_pos, votes)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cast.double(), votes_wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("votes", BALLOTS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, votes):
    n, pad = 33, 7
    q, k, v = tensors(n, n, seed=3)
    key_pos, query_pos = whole(n)
    query_pos, key_pos = query_pos.clone(), key_pos.clone()
    real = slice(pad, n) if side == "left" else slice(0, n - pad)
    query_pos[1], key_pos[1] = -1, -1
    query_pos[1, real] = torch.arange(n - pad)
    key_pos[1, :, real] = torch.arange(n - pad, dtype=torch.int32)
    out, cast = attend_prompt(q, k, v, FORMS["all"], key_pos, query_pos, votes, causal=False)
    for row, part in ((0, slice(0, n)), (1, real)):
        one = slice(row, row + 1)
        alone, alone_cast = attend_prompt(
            q[one, :, part], k[one, :, part], v[one, :, part], FORMS["all"], *whole(part.stop - part.start, 1), votes,
            causal=True,
        )  # fmt: skip
        torch.testing.assert_close(out[one, part], alone, rtol=1e-5, atol=1e-5)
        if cast is not None:
            torch.testing.assert_close(cast[one, :, part], alone_cast, rtol=1e-5, atol=1e-5)
    padding = query_pos[1] < 0
    assert bool((out[1, padding] == 0).all())
    assert cast is None or bool((cast[1, :, padding] == 0).all())


@pytest.mark.parametrize("votes", BALLOTS, ids=str)
def test_a_later_turn_sees_the_slots_and_itself(votes):
    q, k, v = tensors(5, 25)
    kept = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(s))[:18] for s in range(4)])
    old = torch.cat([kept, torch.full((4, 2), -1)], 1).view(2, 2, 20)
    query_pos = torch.arange(40, 45).expand(2, -1)
    key_pos = torch.cat([old, query_pos[:, None].expand(-1, 2, -1)], -1).to(torch.int32)
    out, cast = attend_prompt(q, k, v, FORMS["all"], key_pos, query_pos, votes, causal=False)
    want, votes_wanted = naive(q, k, v, FORMS["all"], key_pos, query_pos, votes)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    if cast is not None:
        torch.testing.assert_close(cast.double(), votes_wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_votes_are_float32(dtype):
    q, k, v = tensors(40, 40, dtype=dtype)
    key_pos, query_pos = whole(40)
    for form in (FORMS["plain"], FORMS["all"]):
        out, cast = attend_prompt(q, k, v, form, key_pos, query_pos, Votes(None), causal=True)
        want, votes_wanted = naive(q, k, v, form, key_pos, query_pos, Votes(None))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(cast.double(), votes_wanted, rtol=1e-5, atol=1e-5)


def test_weights_that_want_gradients():
    """Who calls a model without `torch.no_grad` gets the same figures."""
    q, k, v = tensors(40, 40)
    key_pos, query_pos = whole(40)
    wanting = [t.clone().requires_grad_() for t in (q, k, v)]
    for votes in (None, Votes(None, 1.0, Noise(0, 0)), Votes(2)):
        want = attend_prompt(q, k, v, FORMS["plain"], key_pos, query_pos, votes, causal=True)
        got = attend_prompt(*wanting, FORMS["plain"], key_pos, query_pos, votes, causal=True)
        assert all(a is b or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got = attend_slots(wanting[0][:, :, :1], *wanting[1:], FORMS["plain"], key_pos, query_pos[:, -1])
    want = attend_slots(q[:, :, :1], k, v, FORMS["plain"], key_pos, query_pos[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_chunks_vote_as_the_whole():
    """Noise too: it is addressed, so where a chunk ends does not matter."""
    q, k, v = tensors(50, 50)
    key_pos, query_pos = whole(50)
    votes = Votes(None, 1.2, Noise(9, 0))
    out, cast = attend_prompt(q, k, v, FORMS["plain"], key_pos, query_pos, votes, causal=True)
    outs, total = [], torch.zeros_like(cast)
    for lo, hi in ((0, 13), (13, 14), (14, 50)):
        part, some = attend_prompt(
            q[:, :, lo:hi], k[:, :, :hi], v[:, :, :hi], FORMS["plain"], key_pos[:, :, :hi], query_pos[:, lo:hi], votes,
            causal=lo == 0,
        )  # fmt: skip
        outs.append(part)
        total[:, :, :hi] += some
    torch.testing.assert_close(torch.cat(outs, 1), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, cast, rtol=1e-5, atol=1e-5)


def test_no_square_tensor():
    """A prompt of 3,000 tokens: the largest tensor stays far below n x n."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(result):
                if isinstance(each, torch.Tensor):
                    self.numel = max(self.numel, each.untyped_storage().nbytes() // each.element_size())
            return result

    n = 3000
    q, k, v = tensors(n, n, rows=1, heads=1)
    key_pos, query_pos = whole(n, 1, 1)
    form = Logits(0.3)
    for causal in (True, False):
        for votes in (None, Votes(None), Votes(None, 1.0, Noise(0, 0))):
            with Largest() as largest:
                attend_prompt(q, k, v, form, key_pos, query_pos, votes, causal=causal)
            assert largest.numel < n * n / 4


def slots(seed=0, rows=3, heads=2, group=2, capacity=21, d=8, dtype=torch.float32):
    q, k, v = tensors(1, capacity, rows=rows, heads=heads, group=group, d=d, seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed + 1)
    length = capacity + 20
    pos = torch.stack([torch.randperm(length, generator=g)[:capacity] for _ in range(rows * heads)])
    pos = pos.view(rows, heads, capacity).to(torch.int32)
    pos[:, :, 3] = length
    pos[1, :, 5:9] = -1
    return q, k, v, pos, torch.full((rows,), length)


@pytest.mark.parametrize("d", [8, 64, 80])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_token_over_slots(form, d):
    q, k, v, pos, query_pos = slots(d=d)
    out, logits = attend_slots(q, k, v, form, pos, query_pos)
    want, _ = naive(q, k, v, form, pos, query_pos[:, None])
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert logits.dtype == torch.float32
    assert bool((logits.isneginf() == (pos < 0)[:, :, None]).all())
    weights = logits.double().softmax(-1)
    _, votes = naive(q, k, v, form, pos, query_pos[:, None], Votes(None))
    torch.testing.assert_close(weights.mean(2), votes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slots_of_half_precision(dtype):
    q, k, v, pos, query_pos = slots(dtype=dtype, d=64)
    out, logits = attend_slots(q, k, v, FORMS["all"], pos, query_pos)
    want, _ = naive(q, k, v, FORMS["all"], pos, query_pos[:, None])
    assert (out.dtype, logits.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_kernel_equals_its_twin(form):
    for seed, capacity in ((0, 1), (1, 4), (2, 31), (3, 200)):
        q, k, v = tensors(1, capacity, rows=3, d=64, seed=seed)
        pos = torch.arange(capacity, dtype=torch.int32).expand(3, 2, -1).clone()
        pos[1, 0, capacity // 2 + 1 :] = -1
        k[1, 0, capacity // 2 + 1 :] = v[1, 0, capacity // 2 + 1 :] = torch.nan  # memory that nobody wrote
        query_pos = torch.full((3,), capacity)
        out, logits = attend_slots(q, k, v, form, pos, query_pos)
        want, want_logits = _kernels_reference.attend(
            q.view(3, 2, 2, 64), k, v, pos, query_pos, form.scale, form.softcap, form.slopes, form.sinks
        )
        torch.testing.assert_close(out.view(3, 2, 2, 64), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, want_logits, rtol=1e-5, atol=1e-5)


def test_slots_in_a_larger_memory():
    """Slots in use are a view of what was allocated, and queries one of a model's tensor."""
    q, k, v, pos, query_pos = slots(d=64)
    wide = [torch.nn.functional.pad(t, (0, 0, 0, 11), value=float("nan")) for t in (k, v)]
    views = [t[:, :, : pos.shape[2]] for t in wide]
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    form = FORMS["plain"]
    wide_pos = torch.nn.functional.pad(pos, (0, 11), value=-1)[:, :, : pos.shape[2]]
    want = attend_slots(q, k, v, form, pos, query_pos)
    for a, b in zip(attend_slots(turned, *views, form, wide_pos, query_pos), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("noise", [None, Noise(3, 7)])
@pytest.mark.parametrize("tau", [1.0, 1.6])
def test_votes_of_a_later_token(tau, noise):
    q, k, v, pos, query_pos = slots()
    _, logits = attend_slots(q, k, v, FORMS["plain"], pos, query_pos)
    _, want = naive(q, k, v, FORMS["plain"], pos, query_pos[:, None], Votes(None, tau, noise))
    votes = later_votes(logits, tau, noise, pos, query_pos)
    torch.testing.assert_close(votes.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("noise", [None, Noise(3, 7)])
@pytest.mark.parametrize("tau", [1.0, 1.6])
@pytest.mark.parametrize("recent", [0, 7, "rows"])
def test_the_fused_step_is_the_two_in_turn(recent, tau, noise):
    window = torch.tensor([0, 5, 9]) if recent == "rows" else recent
    for seed in range(20):
        q, k, v, pos, query_pos = slots(seed)
        _, logits = attend_slots(q, k, v, FORMS["plain"], pos, query_pos)
        wide = torch.rand(3, 2, 30, generator=torch.Generator().manual_seed(seed))
        score = wide[:, :, :21]  # a view, as slots are
        score[:, :, 12] = torch.inf
        score[1, :, 6] = torch.nan  # nobody lives there
        want = score + later_votes(logits, tau, noise, pos, query_pos)
        rest = wide[:, :, 21:].clone()
        slot = vote_and_mark(score, logits, tau, noise, pos, query_pos, window)
        live = pos >= 0
        torch.testing.assert_close(score[live], want[live], rtol=1e-6, atol=1e-7)
        assert torch.equal(slot, next_slot(score, pos, window))
        assert torch.equal(wide[:, :, 21:], rest)


@pytest.mark.parametrize("form", [FORMS["plain"], FORMS["softcap"], FORMS["sinks"]])
def test_under_a_mask(form):
    q, k, v = tensors(9, 12)
    at, query_pos = torch.arange(12), torch.arange(3, 12)
    mask = ((at <= query_pos[:, None]) & (at > query_pos[:, None] - 4))[None, None].expand(2, -1, -1, -1)
    out = attend_masked(q, k, v, form, mask)
    for i, p in enumerate(query_pos.tolist()):
        near = slice(p - 3, p + 1)
        want, _ = naive(
            q[:, :, i : i + 1], k[:, :, near], v[:, :, near], form, at[near].expand(2, 2, -1), torch.full((2, 1), p)
        )
        torch.testing.assert_close(out[:, i : i + 1].double(), want, rtol=1e-5, atol=1e-5)
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend_masked(q, k, v, form, added), out)


def test_a_mask_has_no_positions():
    q, k, v = tensors(2, 2)
    with pytest.raises(InputError, match="ALiBi"):
        attend_masked(q, k, v, FORMS["alibi"], torch.ones(2, 1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("noise", [None, Noise(5, 1)], ids=["plain", "noisy"])
def test_any_number_of_threads_gives_the_same(noise, threads, monkeypatch):
    monkeypatch.setattr(_calling, "_LEAST", 1)
    shared = []
    for name in ("attend", "attend_coded", "noisy_votes", "vote_and_mark"):
        kernel = getattr(_kernels_threads, name)
        seen = lambda *given, name=name, kernel=kernel: (shared.append(name), kernel(*given))[1]  # noqa: E731
        monkeypatch.setattr(_kernels_threads, name, seen)
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 4, 1, 8), torch.randn(3, 2, 70, 8), torch.randn(3, 2, 70, 8)
    held, last = torch.arange(70).expand(3, 2, 70), torch.full((3,), 70)
    coded = [Packed(pack(x, Int8()), Int8(), 8) for x in (k, v)]
    weights, start, begun = torch.rand(50, 70), torch.arange(50) * 11, torch.rand(3, 2, 70)

    def run():
        out, logits = attend_slots(q, k, v, FORMS["all"], held, last)
        score, cast = begun.clone(), torch.zeros(70)
        marked = vote_and_mark(score, logits, 1.5, noise, held, last, 9)
        if noise:
            _add_noisy_votes(weights.clone(), noise.seed, start, held[0, 0], 1.3, torch.ones(50), cast, True)
        return out, logits, score, marked, cast, *attend_held(q, *coded, FORMS["softcap"], held, last)

    one = run()
    assert not shared
    for count in (2, 3):
        threads(count)
        for a, b in zip(one, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        names = ["noisy_votes"] if noise else []
        assert {*shared} == {"attend", "attend_coded", "vote_and_mark", *names} or numba.config.NUMBA_NUM_THREADS == 1


def test_without_openmp_only_the_main_thread_shares_its_work(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(_calling, "_openmp", lambda: False)
    found = []
    other = Thread(target=lambda: found.append(_calling.threads_for(8, 1 << 30)))
    other.start()
    other.join()
    assert found == [1]
    assert _calling.threads_for(8, 1 << 30) == min(2, numba.config.NUMBA_NUM_THREADS)
    assert _calling.threads_for(8, 100) < 2
