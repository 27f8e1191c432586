"""The small pieces of the server: text as it comes, draws, sizes and figures."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.generate.policies import H2O
from vitalfew.generate.request import Plan
from vitalfew.generate.server.jobs import Piece, Token
from vitalfew.generate.server.metrics import Metrics
from vitalfew.generate.server.pool import Pool, Shape, most_slots, width
from vitalfew.generate.server.requests import ApiError, parse, read_json
from vitalfew.generate.server.responses import Answer
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


def test_the_first_space_of_an_answer_is_kept() -> None:
    """Tokenizers of the SentencePiece kind drop a text's first space, which an answer that goes on must not lose."""
    from tokenizers import Tokenizer, decoders, models

    inner = Tokenizer(models.WordLevel({"\u2581Once": 0, "\u2581upon": 1, "\u2581a": 2, "<unk>": 3}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    assert inner.decode([1, 2]) == "upon a"
    alone, after = (TextStream(inner.decode, before=before) for before in ([], [0]))
    assert [alone.push(k) for k in (1, 2)] == ["upon", " a"]
    assert [after.push(k) for k in (1, 2)] == [" upon", " a"]


@given(st.binary(max_size=12), st.text(min_size=1, max_size=12))
def test_what_stood_before_is_no_part_of_a_text(before: bytes, text: str) -> None:
    stream = TextStream(of_bytes, before=list(before.decode(errors="ignore").encode()))
    assert "".join([stream.push(token) for token in text.encode()]) + stream.flush() == text


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


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_draws_from_many_tokens_are_those_of_the_whole_order(share: float) -> None:
    """Rows so flat that the few likeliest have too little, and rows so steep that two suffice."""
    flat = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    logits = torch.cat([flat, 30 * flat])
    points = [0.0, 0.37, 0.99] * 2
    chances, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    for row, token in enumerate(draw(logits, [1.0] * 6, [share] * 6, points)):
        inside = int((chances[row].cumsum(0) - chances[row] < share).sum())
        upto = chances[row, :inside].cumsum(0) / chances[row, :inside].sum()
        place = int((order[row] == token).nonzero())
        assert place < inside
        low = 0.0 if not place else float(upto[place - 1])
        assert low - 1e-5 <= points[row] <= float(upto[place]) + 1e-5


def test_draws_at_the_very_end_have_a_chance() -> None:
    logits = torch.tensor([[3.0, 2.9, -50.0, -math.inf]])
    assert draw(logits, [1.0], [0.9], [1 - 2**-53])[0] in (0, 1)
    assert draw(logits, [1.0], [1.0], [1 - 2**-53])[0] in (0, 1, 2)


@pytest.mark.parametrize("heat", [1e-5, 1e-6, 1e-40, 1e-300])
def test_a_temperature_of_almost_nothing_takes_the_likeliest(heat: float) -> None:
    assert draw(torch.tensor([[0.0, 50.0, 49.0]] * 2), [heat] * 2, [1.0, 0.5], [0.1, 0.999]) == [1, 1]


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model", "messages", "prompt", "stream", "stream_options", "temperature", "top_p", "n", "seed", "stop", "logprobs",
    "max_tokens", "max_completion_tokens", "top_logprobs", "kv_budget", "best_of", "echo", "tools", "response_format",
]  # fmt: skip


@settings(max_examples=300)
@given(st.booleans(), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_json_is_understood_or_refused(chat: bool, change: dict[str, Any]) -> None:
    ask = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    error = None
    try:
        parse({"model": "m", **ask, **change}, chat=chat)
    except ApiError as found:
        error = found
    assert error is None or (error.status == 400 and error.param and len(error.message) < 250)


@pytest.mark.parametrize("inner", ['{"logit_bias": %s}', '{"stop": %s}', '{"messages": %s}', '{"tools": %s}'])
def test_json_of_any_depth_is_refused(inner: str) -> None:
    for depth in (*range(10, 1100, 7), 5000, 100_000):
        raw = (inner % ("[" * depth + "]" * depth)).replace("{", '{"model": "m", ', 1).encode()
        with pytest.raises(ApiError) as error:
            parse(read_json(raw), chat=True)
        assert error.value.status == 400


@pytest.mark.parametrize("chat", [True, False])
def test_every_setting_of_the_official_client_is_served_or_refused_by_name(chat: bool) -> None:
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as chats

    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    names = set((chats if chat else text).CompletionCreateParamsBase.__annotations__)
    assert len(names) > 15
    for name in names - {"user", "metadata", "safety_identifier", "prompt_cache_key"}:  # which change no answer
        with pytest.raises(ApiError) as error:
            parse({"model": "m", **ask, name: {"no such": "value"}}, chat=chat)
        assert str(error.value.param).startswith(name)
        assert name in error.value.message


def test_names_of_log_probabilities() -> None:
    """Offsets go on from piece to piece, parts of characters share a name, and their bytes are unknown."""
    half, rest = Token(5, -0.5, [(5, -0.5), (6, -1.0)]), Token(7, -0.1, [])
    pieces = [Piece(0, "", (half,), None), Piece(0, "\u00e9x", (rest,), "stop")]
    names = {5: "\ufffd", 6: "\ufffd", 7: "x"}
    ask = parse({"model": "m", "prompt": "a", "logprobs": 2}, chat=False)
    whole, stream = (Answer(ask, names.__getitem__) for _ in range(2))
    for piece in pieces:
        whole.add(piece)
    found = whole.whole()["choices"][0]["logprobs"]
    parts = [stream.chunk(piece)["choices"][0]["logprobs"] for piece in pieces]
    assert found == {key: [one for part in parts for one in part[key]] for key in found}
    assert found["text_offset"] == [0, 1]
    assert found["top_logprobs"] == [{"\ufffd": -0.5}, {}]
    chat = parse(
        {"model": "m", "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}, chat=True
    )
    shown = Answer(chat, names.__getitem__).chunk(pieces[0])["choices"][0]["logprobs"]["content"]
    assert [(token["token"], token["bytes"], len(token["top_logprobs"])) for token in shown] == [("\ufffd", None, 2)]


def test_importing_the_server_loads_neither_transformers_nor_fastapi() -> None:
    code = "import sys, vitalfew.generate.server.scheduler, vitalfew.generate.server.responses; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "fastapi", "uvicorn"} & set(loaded)
