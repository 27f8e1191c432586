"""Every policy on a small cache: kept sets equal those of naive implementations, and the laws hold for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitalfew.core.errors import InputError
from vitalfew.generate.noise import Noise
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
from vitalfew.generate.scores import Logits, Votes, attend_prompt, attend_slots, later_votes, vote_and_mark
from vitalfew.generate.select import next_slot, prompt_tokens

FORM = Logits(0.4)
EVERY = {**POLICIES, "snapkv-then-h2o": lambda: then(SnapKV(8), H2O()), "max-pool": lambda: SnapKV(8, kind="max")}


class Text:
    """Queries and keys of a text of T tokens: H KV heads, G query heads each."""

    def __init__(self, total, heads=2, group=2, d=4, seed=0, rows=1):
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(rows, heads * group, total, d, generator=g) * 2
        self.k = torch.randn(rows, heads, total, d, generator=g) * 2
        self.heads, self.group, self.total, self.rows = heads, group, total, rows


def ours(policy, text, n, kept, *, seed=5, layer=1, fused=False):
    """Run a policy over one row with the engine; yield the kept positions per head after the prompt and every step."""
    noise = Noise(seed, layer) if policy.noise else None
    planned = text.total - n
    pos = torch.arange(n, dtype=torch.int32).expand(1, text.heads, -1)
    votes = Votes(policy.voters, policy.temperature(0, planned), noise)
    _, cast = attend_prompt(
        text.q[:, :, :n], text.k[:, :, :n], text.k[:, :, :n], FORM, pos, torch.arange(n)[None], votes, causal=True
    )
    score = policy.prompt_scores(cast, pos, seed)
    score = score.masked_fill((pos >= 0) & (pos < policy.sinks), torch.inf)
    window = policy.recent_of(kept)
    index = prompt_tokens(score, pos, [kept], [window])
    score, pos = score.gather(2, index), pos.gather(2, index)
    keys = text.k[:, :, :n].gather(2, index[..., None].expand(-1, -1, -1, text.k.shape[-1]))
    score = policy.kept_scores(score, pos, [window])
    marked = next_slot(score, pos, window)
    yield [set(head.tolist()) for head in pos[0]]
    for p in range(n, text.total):
        at = marked[..., None]
        pos.scatter_(2, at, p)
        score.scatter_(2, at, 0.0)
        keys.scatter_(2, at[..., None].expand(-1, -1, -1, keys.shape[-1]), text.k[:, :, p : p + 1])
        query_pos = torch.tensor([p])
        _, logits = attend_slots(text.q[:, :, p : p + 1], keys, keys, FORM, pos, query_pos)
        tau = policy.temperature(p - n + 1, planned)
        yield [set(head.tolist()) for head in pos[0]]
        if fused:
            marked = vote_and_mark(score, logits, tau, noise, pos, query_pos, window)
            continue
        cast = later_votes(logits, tau, noise, pos, query_pos) if policy.votes_later else None
        score = policy.later_scores(score, cast, pos, seed)
        marked = next_slot(score, pos, window)


def weights(text, h, p, kept, tau, noise):
    """What the query at p gives to each kept position: the mean over the query heads of KV head h, in float64."""
    from vitalfew.generate.noise import gumbel

    at = torch.tensor(sorted(kept))
    total = torch.zeros(len(at), dtype=torch.float64)
    heads = text.heads * text.group
    for g in range(h * text.group, (h + 1) * text.group):
        x = (text.k[0, h, at].double() @ text.q[0, g, p].double()) * FORM.scale
        if noise is not None:
            here = at.expand(1, text.heads, -1)
            x = x + gumbel(noise, heads, torch.tensor([[p]]), here)[0, g, 0].double()
        total += (x / tau).softmax(0) / text.group
    return dict(zip(at.tolist(), total.tolist(), strict=True))


def naive(text, n, kept, window, tau_of, noise, *, later=True):
    """Sum votes in dicts, and drop the lowest outside the window: Keyformer and H2O as described."""
    score = [dict.fromkeys(range(n), 0.0) for _ in range(text.heads)]
    for h in range(text.heads):
        for p in range(n):
            for key, weight in weights(text, h, p, range(p + 1), tau_of(0), noise).items():
                score[h][key] += weight
        free = sorted(range(n - window), key=lambda p, s=score[h]: (-s[p], p))[: kept - window]
        score[h] = {p: score[h][p] for p in [*free, *range(n - window, n)]}
    yield [set(s) for s in score]
    for p in range(n, text.total):
        for s in score:
            free = [key for key in s if key < p - window + 1] or list(s)
            del s[min(free, key=lambda key, s=s: (s[key], key))]
            s[p] = 0.0
        yield [set(s) for s in score]
        for h in range(text.heads):
            for key, weight in weights(text, h, p, score[h], tau_of(p - n + 1), noise).items():
                score[h][key] += weight


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("policy", "n", "kept"),
    [
        (Keyformer.dynamic(), 40, 24), (Keyformer.dynamic(recent=0.0), 30, 9), (Keyformer(), 33, 11), (H2O(), 40, 12),
        (Keyformer.dynamic(recent=5, tau_init=0.5, tau_end=4.0), 30, 6), (H2O(recent=1.0), 30, 8),
    ],
    ids=str,
)  # fmt: skip
def test_summed_votes_as_by_hand(policy, n, kept, fused):
    text = Text(n + 64)
    noise = Noise(5, 1) if policy.noise else None
    window = policy.recent_of(kept)
    want = naive(text, n, kept, window, lambda step: policy.temperature(step, 64), noise)
    for step, (a, b) in enumerate(zip(ours(policy, text, n, kept, fused=fused), want, strict=True)):
        assert a == b, f"step {step}"


def test_the_temperature_stops_at_its_end():
    policy = Keyformer()
    assert [policy.temperature(t, 4) for t in (0, 1, 2, 4, 5, 100)] == [1.0, 1.25, 1.5, 2.0, 2.0, 2.0]
    assert policy.temperature(0, 0) == 1.0
    assert policy.temperature(3, 0) == 2.0
    assert Keyformer(tau_init=2.0, tau_end=1.0).temperature(9, 4) == 1.0


@pytest.mark.parametrize(("n", "kept", "window"), [(40, 24, 7), (50, 10, 3), (37, 18, 5)])
def test_frozen_is_the_published_code(n, kept, window):
    """Counts by exact arithmetic; the best of 0 .. n-w-1 stay for good, and the last w including the query's own."""
    policy, text = Keyformer.frozen(), Text(n + 30, group=1)
    assert policy.recent_of(kept) == window
    assert not policy.votes_later
    votes = [dict.fromkeys(range(n), 0.0) for _ in range(text.heads)]
    for h in range(text.heads):
        for p in range(n):
            for key, weight in weights(text, h, p, range(p + 1), 1.0, Noise(5, 1)).items():
                votes[h][key] += weight
    chosen = [set(sorted(range(n - window), key=lambda p, v=v: (-v[p], p))[: kept - window]) for v in votes]
    steps = ours(policy, text, n, kept)
    next(steps)
    for p, sets in enumerate(steps, n):
        assert sets == [keys | set(range(p - window + 1, p + 1)) for keys in chosen]
        assert all(n - window not in each and len(each) == kept for each in sets)


def test_frozen_by_hand():
    """Of 40 tokens 60 % are 24, of which 30 % are 7: 17 key tokens, and position 33 is lost at once."""
    assert Keyformer.frozen().recent_of(40 * 60 // 100) == 7
    steps = list(ours(Keyformer.frozen(), Text(64), 40, 24))
    for sets in steps[1:]:
        assert all(33 not in each and sum(p < 33 for p in each) == 17 for each in sets)
    keys = [[{p for p in each if p < 33} for each in sets] for sets in steps[1:]]
    assert all(each == keys[0] for each in keys)
    with pytest.raises(InputError, match="recent=0"):
        Keyformer.frozen(recent=0)


@pytest.mark.parametrize("name", EVERY)
def test_laws_of_every_policy(name):
    policy, text = EVERY[name](), Text(90)
    n, kept = 40, 20
    window = policy.recent_of(kept)
    runs = [list(ours(policy, text, n, kept)) for _ in range(2)]
    assert runs[0] == runs[1]
    for p, sets in enumerate(runs[0], n - 1):
        for each in sets:
            assert len(each) == kept
            assert each <= set(range(p + 1))
            assert set(range(p - window + 1, p + 1)) <= each
            assert set(range(policy.sinks)) <= each
            assert p < n or p in each


def test_streaming_keeps_its_sinks_and_a_window():
    for p, sets in enumerate(ours(Streaming(4), Text(80), 30, 12), 29):
        assert sets == [{0, 1, 2, 3} | set(range(p - 7, p + 1))] * 2
    for p, sets in enumerate(ours(Recent(), Text(50), 30, 12), 29):
        assert sets == [set(range(p - 11, p + 1))] * 2


def test_tova_chooses_once_for_all_heads():
    text = Text(70)
    kept = set(range(30))
    for p, sets in enumerate(ours(TOVA(), text, 30, 12), 29):
        if p == 29:
            mean = {k: sum(weights(text, h, p, kept, 1.0, None)[k] for h in range(2)) for k in kept}
            kept = set(sorted(kept, key=lambda k: (-mean[k], k))[:12])
        else:
            kept = (kept - {min(kept, key=lambda k: (mean[k], k))}) | {p}
        assert sets == [kept, kept]
        mean = {k: sum(weights(text, h, p, kept, 1.0, None)[k] for h in range(2)) for k in kept}


def test_random_draws_evenly_and_differs_by_head_and_seed():
    text = Text(200, d=1)
    runs = [list(ours(Random(), text, 100, 50, seed=seed))[-1] for seed in range(60)]
    assert all(first != second for first, second in runs)
    assert runs[0] != runs[1]
    early = sum(len([p for p in head if p < 100]) for run in runs for head in run) / (120 * 50)
    assert abs(early - 0.5) < 0.04  # six thousand tokens: five standard errors are 0.032


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_snapkv_smooths_over_neighbours_in_the_text(kind):
    g = torch.Generator().manual_seed(0)
    votes, order = torch.rand(2, 1, 20, generator=g), torch.randperm(20, generator=g)
    pos = torch.arange(20, dtype=torch.int32).expand(2, 1, -1).clone()
    policy = SnapKV(4, pool=5, kind=kind)
    scores = policy.prompt_scores(votes, pos, 0)
    for p in range(20):
        near = votes[:, 0, max(0, p - 2) : p + 3]
        want = near.sum(1) / 5 if kind == "avg" else near.amax(1)
        torch.testing.assert_close(scores[:, 0, p], want)
    shuffled = policy.prompt_scores(votes[..., order], pos[..., order], 0)
    torch.testing.assert_close(shuffled, scores[..., order])
    padded = policy.prompt_scores(
        torch.nn.functional.pad(votes, (3, 0), value=9.0), torch.nn.functional.pad(pos, (3, 0), value=-1), 0
    )
    torch.testing.assert_close(padded[..., 3:], scores)


def test_which_policies_sum_their_votes():
    assert [name for name in EVERY if EVERY[name]().sums_votes] == [
        "keyformer", "keyformer-dynamic", "h2o", "snapkv-then-h2o"
    ]  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_infinity_stays(name):
    policy = EVERY[name]()
    score = torch.tensor([[[1.0, torch.inf, 0.5]]])
    pos = torch.tensor([[[0, 1, 2]]], dtype=torch.int32)
    votes = torch.rand(1, 1, 3) if policy.votes_later else None
    assert policy.later_scores(score, votes, pos, 0)[0, 0, 1] == torch.inf


def test_a_composed_policy_takes_each_part_from_its_own():
    both = then(SnapKV(16), Keyformer())
    assert (both.voters, both.votes_later, both.noise) == (16, True, False)
    assert both.temperature(0, 10) == 1.0
    assert both.temperature(5, 10) == 1.5
    assert both.recent_of(10) == 3
    assert replace(both, recent=4).recent_of(10) == 4
    assert then(Streaming(6), H2O()).sinks == 6
    assert then(SnapKV(4), Keyformer.frozen()).votes_later is False
    assert both.sums_votes
    assert not then(SnapKV(4), TOVA()).sums_votes
    with pytest.raises(InputError, match="noise"):
        then(Keyformer.dynamic(), H2O())


@pytest.mark.parametrize(
    ("share", "kept", "window"), [(0.3, 24, 7), (0.29, 100, 29), (0.1, 30, 3), (1.0, 7, 7), (9, 7, 7)]
)
def test_a_share_is_the_decimal_that_was_written(share, kept, window):
    assert Policy(recent=share).recent_of(kept) == window


def test_names():
    assert policy_named("keyformer") == Keyformer()
    assert policy_named("keyformer-dynamic") == Keyformer(noise=True)
    assert policy_named("keyformer-frozen") == Keyformer.frozen()
    with pytest.raises(InputError, match=r"no policy 'snap'.*snapkv"):
        policy_named("snap")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: H2O(recent=1.5), "1.5"), (lambda: H2O(recent=-1), "-1"), (lambda: H2O(recent=True), "True"),
        (lambda: Streaming(-4), "-4"), (lambda: SnapKV(0), "window"), (lambda: SnapKV(pool=4), "odd, got 4"),
        (lambda: SnapKV(kind="mean"), "mean"), (lambda: Keyformer(tau_end=0.0), "tau_end"),
        (lambda: Keyformer(tau_init=float("nan")), "tau_init"),
    ],
)  # fmt: skip
def test_bad_settings(make, said):
    with pytest.raises(InputError, match=said) as error:
        make()
    assert error.value.hint
