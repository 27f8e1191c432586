"""The small pieces of the server: text as it comes, draws, sizes and figures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.generate.policies import H2O
from vitalfew.generate.request import Plan
from vitalfew.generate.server.metrics import Metrics
from vitalfew.generate.server.pool import Pool, Shape, most_slots, width
from vitalfew.generate.server.requests import parse
from vitalfew.generate.server.sampling import best, draw
from vitalfew.generate.server.text import TextStream


def of_bytes(ids: object) -> str:
    return bytes(ids).decode(errors="replace")  # type: ignore[call-overload, no-any-return]


def run(data: bytes, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(of_bytes, stops)
    pieces = []
    for token in data:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()], stream.stopped


@given(st.text(max_size=40))
def test_text_comes_whole_and_in_whole_characters(text: str) -> None:
    pieces, _ = run(text.encode())
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_come_as_their_decoding(data: bytes) -> None:
    got, whole = "".join(run(data)[0]), data.decode(errors="replace")
    assert whole.startswith(got)
    assert set(whole[len(got) :]) <= {"\ufffd"}
    assert len(whole) - len(got) <= 3


@given(
    st.text("ab\u00e9 ", max_size=30), st.lists(st.text("ab\u00e9 ", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_stops_cut_at_the_first_place_and_never_show(text: str, stops: list[str]) -> None:
    pieces, stopped = run(text.encode(), tuple(stops))
    # The stop that is complete first ends the text, as it does for a reader who watches it being written.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (pieces and "".join(pieces), stopped) == (text, False)
    else:
        seen = text[: min(ends)]
        assert stopped
        assert "".join(pieces) == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_a_space_that_comes_with_the_next_word_is_kept() -> None:
    # As tokenizers of the SentencePiece kind write: a text's first space is dropped.
    words = ["\u2581Hello", "\u2581big", "ger", "\u2581world"]
    stream = TextStream(lambda ids: "".join(words[k] for k in ids).replace("\u2581", " ").removeprefix(" "))
    assert [stream.push(k) for k in range(4)] == ["Hello", " big", "ger", " world"]


@given(st.integers(1, 200_000))
def test_widths_hold_what_is_asked_for_and_little_more(slots: int) -> None:
    assert width(slots) >= slots
    assert width(width(slots)) == width(slots)
    assert width(slots) <= max(64 * -(-slots // 64), 1.25 * slots)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 80), st.integers(1, 10))
def test_most_slots_is_what_a_row_sees(prompt: int, new: int, least: int, tenths: int) -> None:
    plan = Plan(H2O(), lambda layer, tokens, planned, rows: max(1, tokens * tenths // 10), min_length=least)
    cap, held = None, []
    for count in range(prompt, prompt + new):
        if cap is None and count >= least:
            cap = max(1, count * tenths // 10)
            held += [count] if count > prompt else []  # the slot of the last token was taken before the choice
        held.append(count if cap is None else cap)
    assert most_slots(plan, 0, prompt, new) >= max(held)
    if prompt >= least:
        assert most_slots(plan, 0, prompt, new) == max(held)


def test_pool_counts() -> None:
    pool = Pool(10)
    assert pool.take(10)
    assert not pool.take(1)
    pool.give(4)
    assert pool.take(4)
    assert pool.held == 10
    with pytest.raises(InputError, match="positive"):
        Pool(0)


def test_need_is_prompt_or_answers_whichever_is_more() -> None:
    plan = Plan(H2O(), lambda layer, tokens, planned, rows: tokens // 2)
    need = Shape([128], [144], [16]).need(plan, 256, 100, 3)
    assert (need.prefill, need.row, need.widths) == (256 * 144 + 16, 128 * 144 + 16, (128,))
    assert need.most == 3 * need.row


def test_draws_follow_the_probabilities_of_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    points = [(k + 0.5) / 2000 for k in range(2000)]
    for heat, share, want in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.6, [0.625, 0.375, 0, 0]),
        (1.0, 0.5, [1, 0, 0, 0]),
        (0.5, 1.0, [0.6849, 0.2466, 0.0616, 0.0068]),
        (1.0, 0.0, [1, 0, 0, 0]),
        (0.0, 1.0, [1, 0, 0, 0]),
    ):
        tokens = draw(logits.expand(2000, -1), [heat] * 2000, [share] * 2000, points)
        got = torch.bincount(torch.tensor(tokens), minlength=4) / 2000
        assert got.tolist() == pytest.approx(want, abs=2e-3), (heat, share)


@given(st.integers(0, 2**32), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
@settings(max_examples=50)
def test_a_draw_does_not_depend_on_its_neighbours(seed: int, point: float, share: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    alone = draw(logits[1:2], [0.7], [share], [point])
    assert draw(logits, [0.0, 0.7, 1.9], [1.0, share, 0.3], [0.2, point, 0.9])[1:2] == alone


def test_draws_at_the_very_end_stay_among_the_likeliest() -> None:
    logits = torch.tensor([[3.0, 2.9, -50.0, -60.0]])
    assert draw(logits, [1.0], [0.9], [1 - 2**-53])[0] in (0, 1)


def test_best_is_log_softmax() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    chosen, top = best(logits, 7, 5)
    assert chosen == pytest.approx(float(logits.log_softmax(0)[7]))
    assert [token for token, _ in top] == logits.topk(5).indices.tolist()
    assert best(logits, 0, 0)[1] == []


def test_metrics_are_text() -> None:
    metrics = Metrics()
    metrics.step.add(0.02)
    metrics.step.add(100)
    metrics.gauges["queue"] = 3
    lines = metrics.text().splitlines()
    assert "vitalfew_queue 3" in lines
    assert 'vitalfew_step_seconds_bucket{le="0.03"} 1' in lines
    assert 'vitalfew_step_seconds_bucket{le="+Inf"} 2' in lines
    assert "vitalfew_step_seconds_count 2" in lines


def test_defaults_are_those_of_the_api() -> None:
    chat = parse({"model": "m", "messages": [{"role": "user", "content": "x"}], "stop": None, "user": "me"}, chat=True)
    assert (chat.sampling.most, chat.sampling.temperature, chat.sampling.top_p, chat.sampling.n) == (None, 1, 1, 1)
    assert parse({"model": "m", "prompt": "x"}, chat=False).sampling.most == 16
    assert parse({"model": "m", "prompt": "x", "stop": "a", "frequency_penalty": 0}, chat=False).sampling.stop == ("a",)


def test_importing_the_server_loads_neither_transformers_nor_fastapi() -> None:
    code = "import sys, vitalfew.generate.server.scheduler, vitalfew.generate.server.responses; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "fastapi", "uvicorn"} & set(loaded)
