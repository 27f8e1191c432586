"""What stays and what goes equals a naive choice with sorted lists, and obeys the laws of a choice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.generate.scores import mark
from vitalfew.generate.select import next_slot, prompt_tokens

SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, -1.0, -math.inf])


def naive_prompt(score, pos, keep, recent):
    """One row and head: indices that stay, in order of position."""
    live = [i for i, p in enumerate(pos) if p >= 0]
    last = max(pos)
    held = [i for i in live if score[i] == math.inf or pos[i] > last - recent]
    rest = sorted((i for i in live if i not in held), key=lambda i: (-score[i], pos[i]))
    return sorted(held + rest[: keep - len(held)], key=lambda i: pos[i])


def naive_next(score, pos, recent):
    """One row and head: the slot that goes."""
    live = [i for i, p in enumerate(pos) if p >= 0]
    new = max(pos) + 1
    window = set(range(new - recent + 1, new + 1)) if recent else set()
    free = [i for i in live if score[i] < math.inf]
    outside = [i for i in free if pos[i] not in window]
    if outside:
        return min(outside, key=lambda i: (score[i], pos[i]))
    return min(free or live, key=lambda i: pos[i])


@st.composite
def heads(draw):
    n = draw(st.integers(1, 24))
    pos = draw(st.permutations(range(n)))
    empty = draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    pos = [-1 if i in empty else p for i, p in enumerate(pos)]
    score = draw(st.lists(SCORES, min_size=n, max_size=n))
    return torch.tensor(score)[None, None], torch.tensor(pos, dtype=torch.int32)[None, None]


@settings(deadline=None, max_examples=300)
@given(heads(), st.data())
def test_a_prompt_is_chosen_from_as_by_hand(head, data):
    score, pos = head
    live = int((pos >= 0).sum())
    keep = data.draw(st.integers(1, live))
    recent = data.draw(st.integers(0, keep))
    held = set(naive_prompt([-1.0] * pos.numel(), pos[0, 0].tolist(), recent, recent))
    for i in range(pos.numel()):  # protect as many others as there is room for
        if pos[0, 0, i] >= 0 and len(held | {i}) <= keep and data.draw(st.booleans()):
            latest = int(pos.max()) - recent
            protected = sum(
                1 for j in range(pos.numel())
                if pos[0, 0, j] >= 0 and (score[0, 0, j] == math.inf or pos[0, 0, j] > latest or j == i)
            )  # fmt: skip
            if protected <= keep:
                score[0, 0, i] = math.inf
    index = prompt_tokens(score, pos, [keep], [recent])
    assert index.dtype == torch.int64
    assert index[0, 0].tolist() == naive_prompt(score[0, 0].tolist(), pos[0, 0].tolist(), keep, recent)


@settings(deadline=None, max_examples=300)
@given(heads(), st.integers(0, 30), st.data())
def test_the_next_slot_is_found_as_by_hand(head, recent, data):
    score, pos = head
    for i in range(pos.numel()):
        if data.draw(st.integers(0, 3)) == 0:
            score[0, 0, i] = math.inf
    slot = next_slot(score, pos, recent)
    want = naive_next(score[0, 0].tolist(), pos[0, 0].tolist(), recent)
    assert int(slot) == want
    assert int(next_slot(score, pos, torch.tensor([recent]))) == want
    assert int(mark(score, pos, recent)) == int(mark(score, pos, torch.tensor([recent]))) == want


def test_every_row_and_head_chooses_for_itself():
    g = torch.Generator().manual_seed(0)
    score = torch.rand(3, 2, 30, generator=g)
    pos = torch.arange(30, dtype=torch.int32).expand(3, 2, -1).clone()
    pos[1] = torch.cat([torch.full((9,), -1), torch.arange(21)])
    keep, recent = [12, 7, 1], [3, 0, 1]
    index = prompt_tokens(score, pos, keep, recent)
    assert index.shape == (3, 2, 12)
    slots = next_slot(score, pos, torch.tensor(recent))
    assert torch.equal(slots, mark(score, pos, torch.tensor(recent)))
    assert torch.equal(slots, mark(torch.cat((score, score), 2)[:, :, :30], pos, torch.tensor(recent)))
    for b in range(3):
        for h in range(2):
            alone = naive_prompt(score[b, h].tolist(), pos[b, h].tolist(), keep[b], recent[b])
            assert index[b, h].tolist() == alone + [-1] * (12 - keep[b])
            assert int(slots[b, h]) == naive_next(score[b, h].tolist(), pos[b, h].tolist(), recent[b])


def test_a_larger_budget_keeps_a_superset():
    score = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with ties
    pos = torch.arange(50, dtype=torch.int32).expand(2, 3, -1)
    before = [[set() for _ in range(3)] for _ in range(2)]
    for keep in range(4, 51):
        index = prompt_tokens(score, pos, [keep] * 2, [4] * 2)
        for b in range(2):
            for h in range(3):
                kept = set(index[b, h].tolist())
                assert len(kept) == keep
                assert before[b][h] <= kept
                before[b][h] = kept


def test_what_cannot_be_chosen():
    pos = torch.arange(6, dtype=torch.int32)[None, None]
    score = torch.zeros(1, 1, 6)
    with pytest.raises(InputError, match=r"row 0 is to keep 7 tokens, but has 6"):
        prompt_tokens(score, pos, [7], [0])
    with pytest.raises(InputError, match=r"row 0 keeps 2 tokens, but 4 are protected or recent"):
        prompt_tokens(score.index_fill(2, torch.tensor([0, 1]), math.inf), pos, [2], [2])
    score[0, 0, 2] = math.nan
    with pytest.raises(InputError, match="NaN"):
        prompt_tokens(score, pos, [3], [0])
    pos = pos.clone()
    pos[0, 0, 2] = -1  # nobody lives there
    assert prompt_tokens(score, pos, [5], [0])[0, 0].tolist() == [0, 1, 3, 4, 5]
