"""The kernels for GPUs give what the CPU's give; without a CUDA device they run in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from vitalfew.generate import _kernels_reference as twin
from vitalfew.generate import scores, slots
from vitalfew.generate._blocks import voting
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.noise import POOL, Noise, gumbel, gumbel_table, gumbels
from vitalfew.generate.scores import Logits, Votes, attend_prompt

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language
CUDA = torch.cuda.is_available()

LOOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NOISE = Noise(5, 2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request, monkeypatch):
    if request.param == "cuda":
        if not CUDA:
            pytest.skip("no CUDA device")
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter was not asked for before triton was imported")
    from triton.runtime import interpreter

    from vitalfew.generate import _kernels_triton

    # Two processors, so that slots are shared out in pieces of several blocks.
    monkeypatch.setattr(_kernels_triton, "_processors", lambda device: 2)
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        # The interpreter holds bfloat16 as bits, and would multiply these.
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return torch.device("cpu")


def forms(heads, seed=0):
    g = torch.Generator().manual_seed(seed)
    slopes, sinks = torch.rand(heads, generator=g), torch.randn(heads, generator=g)
    return {"plain": Logits(0.3), "all": Logits(0.3, 2.0, slopes, sinks), "sinks": Logits(0.3, sinks=sinks)}


def put(form, device):
    slopes, sinks = (None if each is None else each.to(device) for each in (form.slopes, form.sinks))
    return Logits(form.scale, form.softcap, slopes, sinks)


class Held:
    """Slots in a larger memory, some of them empty, with what is no number in those."""

    def __init__(self, capacity, d, group, dtype=torch.float32, *, rows=2, heads=2, out=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.query = (torch.randn(rows, heads, group, d, generator=g) * 2).to(dtype)
        self.keys = torch.randn(rows, heads, capacity + 9, d, generator=g).to(dtype)[:, :, :capacity]
        self.values = torch.randn(rows, heads, capacity + 9, out or d, generator=g).to(dtype)[:, :, :capacity]
        length = 2 * capacity + 9
        pos = torch.stack([torch.randperm(length, generator=g)[: capacity + 9] for _ in range(rows * heads)])
        self.pos = pos.view(rows, heads, -1).to(torch.int32)[:, :, :capacity]
        self.pos[:, :, 3 % capacity] = length
        if capacity > 8:
            self.pos[1, 0, capacity // 4 : capacity - 3] = -1  # whole blocks of it
            self.pos[1, 1, capacity // 2 : capacity // 2 + 2] = -1
        self.keys[self.pos < 0] = self.values[self.pos < 0] = torch.nan
        self.query_pos = torch.full((rows,), length)
        self.score = torch.rand(rows, heads, capacity + 9, generator=g)[:, :, :capacity]
        self.score[:, :, 4 % capacity] = torch.inf

    @property
    def tensors(self):
        return self.query, self.keys, self.values, self.pos, self.query_pos


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize(
    ("d", "group", "dtype"),
    [
        (64, 3, torch.float32), (80, 1, torch.float32), (96, 2, torch.float16), (128, 4, torch.bfloat16),
        (128, 8, torch.float16), (256, 4, torch.float32), (256, 1, torch.bfloat16),
    ],
)  # fmt: skip
def test_one_token_over_slots(device, d, group, dtype, form):
    from vitalfew.generate import _kernels_triton as kernels

    form = forms(2 * group)[form]
    held = Held(140, d, group, dtype)
    want, want_logits = twin.attend(
        *(t.float() for t in held.tensors[:3]), *held.tensors[3:], form.scale, form.softcap, form.slopes, form.sinks
    )
    there = put(form, device)
    out, logits = kernels.attend(
        *(t.to(device) for t in held.tensors), there.scale, there.softcap, there.slopes, there.sinks
    )
    assert (out.dtype, logits.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.cpu().float(), want, rtol=LOOSE[dtype], atol=LOOSE[dtype])
    torch.testing.assert_close(logits.cpu(), want_logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("capacity", [1, 64, 65, 257])
def test_numbers_of_slots(device, capacity):
    from vitalfew.generate import _kernels_triton as kernels

    held = Held(capacity, 64, 2, out=32)
    want, want_logits = twin.attend(*held.tensors, 0.3, None, None, None)
    out, logits = kernels.attend(*(t.to(device) for t in held.tensors), 0.3, None, None, None)
    torch.testing.assert_close(out.cpu(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.cpu(), want_logits, rtol=1e-5, atol=2e-5)


def test_what_is_sliced_out_of_something_larger(device):
    """Positions of one token of several are a column; so may be the rest that a row has one of."""
    from vitalfew.generate import _kernels_triton as kernels
    from vitalfew.generate import _kernels_triton_votes as ballots

    held = Held(40, 16, 3)
    columns = torch.tensor([[7, 90], [8, 101]])
    query_pos, slopes, sinks = columns[:, 1], torch.rand(6, 2)[:, 1], torch.rand(6, 2, dtype=torch.float64)[:, 1]
    tensors = (*held.tensors[:4], query_pos)
    want, want_logits = twin.attend(*tensors, 0.3, None, slopes, sinks)
    there = columns.to(device)[:, 1]
    out, logits = kernels.attend(
        *(t.to(device) for t in held.tensors[:4]), there, 0.3, None, slopes.to(device), sinks.to(device)
    )
    torch.testing.assert_close(out.cpu(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.cpu(), want_logits, rtol=1e-5, atol=2e-5)
    tau, recent = torch.rand(2, 2, dtype=torch.float64)[:, 1] + 1, columns[:, 0]
    score, wide = held.score.clone(), want_logits.repeat(1, 1, 1, 2)[..., :40]
    slot = twin.vote_and_mark(score, want_logits, tau.float(), NOISE, held.pos, query_pos, recent)
    mine = held.score.to(device)
    got = ballots.vote_and_mark(
        mine, wide.to(device), tau.to(device), NOISE, held.pos.to(device), there, columns.to(device)[:, 0]
    )
    torch.testing.assert_close(mine.cpu()[held.pos >= 0], score[held.pos >= 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(got.cpu(), slot)
    marked = torch.arange(8).view(2, 2, 2)
    key, value = torch.rand(2, 2, 16, 2)[..., 1], torch.rand(2, 2, 5, 16)[:, :, 3]
    for name in ("keys", "values", "pos", "score"):
        setattr(held, name, getattr(held, name).nan_to_num(0.0))
    before = [t.clone() for t in (held.keys, held.values, held.pos, held.score)]
    after = [torch.zeros(2, 2, 50, *t.shape[3:], dtype=t.dtype, device=device)[:, :, 5:45] for t in before]
    for mine, its in zip(after, before, strict=True):
        mine.copy_(its)
    kernels.write(*after, marked.to(device)[..., 1], key.to(device), value.to(device), there)
    for row in range(2):
        for head in range(2):
            at = int(marked[row, head, 1])
            before[0][row, head, at], before[1][row, head, at] = key[row, head], value[row, head]
            before[2][row, head, at], before[3][row, head, at] = int(query_pos[row]), 0.0
    assert all(torch.equal(mine.cpu(), its) for mine, its in zip(after, before, strict=True))


def test_a_row_of_empty_slots(device):
    """It gives zeros, and marks a slot that there is."""
    from vitalfew.generate import _kernels_triton as kernels
    from vitalfew.generate import _kernels_triton_votes as ballots

    held = Held(70, 16, 2)
    held.pos[1] = -1
    out, logits = kernels.attend(*(t.to(device) for t in held.tensors), 0.3, None, None, None)
    assert not out[1].any()
    assert (logits[1] == -torch.inf).all()
    score = held.score.to(device)
    marked = ballots.vote_and_mark(score, logits, 1.0, NOISE, held.pos.to(device), held.query_pos.to(device), 3)
    assert torch.equal(score[1].cpu(), held.score[1])
    assert ((marked >= 0) & (marked < 70)).all()


@pytest.mark.slow
def test_memory_beyond_what_32_bits_count(device):
    """Slots of a layout whose heads stand between them, far apart."""
    from vitalfew.generate import _kernels_triton as kernels
    from vitalfew.generate import _kernels_triton_prompt as prompts

    step = (1 << 30) + 64
    far = torch.empty(2 * step + 64, dtype=torch.float16, device=device).as_strided((1, 1, 3, 16), (16, 16, step, 1))
    near = torch.randn(1, 1, 3, 16, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    pos, at = torch.arange(3, dtype=torch.int32).view(1, 1, 3), torch.arange(3)[None]
    want, _ = twin.attend(near[:, :, :1].float(), near.float(), near.float(), pos, at[:, 2], 0.3, None, None, None)
    got, _ = kernels.attend(
        near[:, :, :1].to(device), far, far, pos.to(device), at[:, 2].to(device), 0.3, None, None, None
    )
    torch.testing.assert_close(got.cpu().float(), want, rtol=4e-3, atol=4e-3)
    want, cast = attend_prompt(near.float(), near.float(), near.float(), Logits(0.3), pos, at, Votes(None), causal=True)
    voices = torch.ones(1, 3, device=device)
    got, given = prompts.attend_and_vote(
        far, far, far, Logits(0.3), pos.to(device), at.to(device), voices, Votes(None), True
    )
    torch.testing.assert_close(got.cpu().float(), want, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(given.cpu(), cast, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["", "noise"])
@pytest.mark.parametrize("recent", [0, 1, 40, "rows"])
@pytest.mark.parametrize(("group", "tau"), [(1, 1.0), (3, 1.6), (2, "rows")])
def test_votes_and_the_next_slot(device, group, tau, recent, noise):
    from vitalfew.generate import _kernels_triton_votes as kernels

    tau = torch.tensor([1.0, 1.7]) if tau == "rows" else tau
    recent = torch.tensor([3, 60]) if recent == "rows" else recent
    for seed in range(2):
        held = Held(1100 if seed else 90, 8, group, seed=seed)
        _, logits = twin.attend(*held.tensors, 0.3, None, None, None)
        want = held.score.clone()
        slot = twin.vote_and_mark(want, logits, tau, noise, held.pos, held.query_pos, recent)
        wide = torch.zeros(2, 2, held.score.shape[2] + 5, device=device)
        score = wide[:, :, :-5].copy_(held.score)
        got = kernels.vote_and_mark(
            score, logits.to(device), tau.to(device) if isinstance(tau, torch.Tensor) else tau, noise,
            held.pos.to(device), held.query_pos.to(device),
            recent.to(device) if isinstance(recent, torch.Tensor) else recent,
        )  # fmt: skip
        assert torch.equal(got.cpu(), slot)
        live = held.pos >= 0
        torch.testing.assert_close(score.cpu()[live], want[live], rtol=1e-5, atol=1e-6)
        assert not wide[:, :, -5:].any()


@pytest.mark.parametrize("protected", ["ties", "window", "all", "infinity"])
def test_ties_go_to_the_oldest_and_protection_holds(device, protected):
    from vitalfew.generate import _kernels_triton_votes as kernels

    held = Held(400, 8, 2)
    logits = torch.zeros(2, 2, 2, 400).masked_fill(held.pos[:, :, None] < 0, -torch.inf)
    held.score.zero_()
    recent = 1000 if protected in ("window", "all") else 5
    if protected in ("all", "infinity"):
        held.score.fill_(torch.inf)
    if protected == "all":
        held.score[:, :, 7] = 1.0
    want = twin.vote_and_mark(held.score.clone(), logits, 1.0, None, held.pos, held.query_pos, recent)
    score = held.score.to(device)
    got = kernels.vote_and_mark(
        score, logits.to(device), 1.0, None, held.pos.to(device), held.query_pos.to(device), recent
    )
    assert torch.equal(got.cpu(), want)


def prompt(kind, group, d, dtype, seed=0):
    """Queries, keys, values and both positions of a prompt that stands alone, is padded, or follows slots."""
    n, m = {"alone": (70, 70), "padded": (50, 50), "slots": (40, 100), "strewn": (5, 9)}[kind]
    g = torch.Generator().manual_seed(seed)
    query = (torch.randn(2, 2 * group, n, d, generator=g) * 2).to(dtype)
    keys, values = (torch.randn(2, 2, m, d, generator=g).to(dtype) for _ in range(2))
    query_pos = torch.arange(n).expand(2, -1).clone()
    key_pos = torch.arange(m, dtype=torch.int32).expand(2, 2, -1).clone()
    if kind == "padded":
        query_pos[1] = (torch.arange(n) - 30).clamp(min=-1)
        key_pos[1] = query_pos[1].int()
    elif kind == "slots":
        query_pos += 400
        key_pos[:, :, : m - n] = torch.randperm(400, generator=g)[: m - n].int()
        key_pos[:, :, m - n :] = query_pos[:, None].int()
        key_pos[1, 0, 3:9] = -1
    elif kind == "strewn":
        key_pos[:] = torch.randperm(m, generator=g).int()
        query_pos[:] = torch.randperm(m, generator=g)[:n]
    return query, keys, values, key_pos, query_pos


BALLOTS = [None, Votes(None), Votes(9), Votes(None, 1.5), Votes(None, 1.0, NOISE), Votes(20, 0.7, NOISE)]


@pytest.mark.parametrize("kind", ["alone", "padded", "slots", "strewn"])
@pytest.mark.parametrize(
    ("votes", "form", "group", "d", "dtype"),
    [
        (None, "all", 2, 64, torch.float32), (Votes(None), "plain", 2, 80, torch.float32),
        (Votes(9), "all", 1, 64, torch.float32), (Votes(None, 1.5), "sinks", 3, 64, torch.float16),
        (Votes(None, 1.0, NOISE), "plain", 1, 64, torch.float32), (Votes(20, 0.7, NOISE), "all", 2, 64, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_a_prompt(device, kind, votes, form, group, d, dtype):
    from vitalfew.generate import _kernels_triton_prompt as kernels

    query, keys, values, key_pos, query_pos = prompt(kind, group, d, dtype)
    form = forms(2 * group)[form]
    want, cast = attend_prompt(
        query.float(), keys.float(), values.float(), form, key_pos, query_pos, votes, causal=kind == "alone"
    )
    keys[key_pos < 0] = values[key_pos < 0] = torch.nan
    voices = None if votes is None else (voting(query_pos, votes.voters) / group).to(device)
    tensors = (t.to(device) for t in (query, keys, values))
    out, got = kernels.attend_and_vote(
        *tensors, put(form, device), key_pos.to(device), query_pos.to(device), voices, votes, kind == "alone"
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().float(), want, rtol=LOOSE[dtype], atol=LOOSE[dtype])
    if votes is None:
        assert got is None
    else:
        torch.testing.assert_close(got.cpu(), cast, rtol=1e-4, atol=1e-4)


@triton.jit(do_not_specialize=["key"])
def _draw(z, gumbel, query_pos, key_pos, key, STARTS: tl.constexpr, LAST: tl.constexpr, KEYS: tl.constexpr):
    query, head, j = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, KEYS)
    start = STARTS(key, head, tl.load(query_pos + query))
    at = (start + tl.load(key_pos + j).to(tl.uint32)) & LAST
    tl.store(z + (head * tl.num_programs(0) + query) * KEYS + j, tl.load(gumbel + at.to(tl.int32)))


@pytest.mark.parametrize("noise", [NOISE, Noise(-1, 0), Noise((1 << 64) - 3, 79)], ids=str)
def test_the_same_noise_on_every_device(device, noise):
    """Bit by bit, and wherever in its 32 bits a hash or a sum turns round."""
    from vitalfew.generate._kernels_triton_votes import _starts, signed

    query_pos = torch.tensor([[0, 1, 65_535, 65_536, 1_000_003, 2**31 - 1]])
    key_pos = torch.cat((torch.arange(29), torch.tensor([65_535, 65_536, 2**31 - 1])))[None, None]
    table = gumbel_table(noise.seed, device)
    z = torch.empty(1, 5, 6, 32, device=device)
    _draw[(6, 5)](
        z, table, query_pos.to(device), key_pos.to(device), signed(noise.key), STARTS=_starts, LAST=POOL - 1, KEYS=32,
        enable_fp_fusion=True,
    )  # fmt: skip
    assert table.cpu().numpy().tobytes() == gumbels(noise.seed).tobytes()
    assert torch.equal(z.cpu(), gumbel(noise, 5, query_pos, key_pos))


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def use_kernels(device, monkeypatch):
    """On a CPU, take the interpreter's kernels for the CPU's own."""
    if device.type == "cpu":
        for module in (scores, slots):
            monkeypatch.setattr(module, "on_gpu", lambda tensor: True)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["keyformer-dynamic", "snapkv", "tova"])
def test_generation(device, policy, monkeypatch):
    """A padded batch through prompt and steps, token for token what the CPU's kernels give."""
    model, new = tiny(), 4
    ids = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :7] = mask[1, :7] = 0
    with KeyTokens(model, 0.5, policy=policy, min_length=0):
        want = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    use_kernels(device, monkeypatch)
    model.to(device)
    with KeyTokens(model, 0.5, policy=policy, min_length=0):
        got = model.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=new, do_sample=False
        )  # fmt: skip
    assert torch.equal(got.cpu(), want)


@torch.no_grad()
def test_tokens_one_after_another_and_steady_steps(device, monkeypatch):
    """A call that goes past its prompt, one of several tokens, and steps that could be captured."""
    model = tiny()
    ids = torch.randint(1, 64, (2, 17), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0

    def run(there):
        model.to(there)
        text, seen, got = ids.to(there), mask.to(there), []
        with KeyTokens(model, 0.5, policy="keyformer-dynamic", min_length=0) as few:
            cache = few.cache(prompt=12, max_new_tokens=5)
            for some in (slice(0, 13), slice(13, 15)):
                positions = (seen.cumsum(1) - 1).clamp(min=0)[:, some]
                out = model(
                    text[:, some], attention_mask=seen[:, : some.stop], position_ids=positions, past_key_values=cache
                )
                got.append(out.logits)
            with cache.steady() as clock:
                for at in (15, 16):
                    token = text[:, at : at + 1]
                    got.append(model(token, position_ids=clock.pos[:, None], past_key_values=cache).logits)
            held = [layer.evicting.slots for layer in cache.slot_layers]
        return torch.cat(got, 1)[mask[:, :17].bool()].cpu(), [
            (s.pos.cpu(), s.score.cpu(), s.marked.cpu()) for s in held
        ]

    want, kept = run(torch.device("cpu"))
    use_kernels(device, monkeypatch)
    got, mine = run(device)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for (pos, score, marked), (its_pos, its_score, its_marked) in zip(mine, kept, strict=True):
        assert torch.equal(pos, its_pos)
        assert torch.equal(marked, its_marked)
        torch.testing.assert_close(score, its_score, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_captured_step(device):
    """Replayed, it gives the tokens of ordinary steps."""
    if device.type != "cuda":
        pytest.skip("only a CUDA device can capture")
    model, new = tiny().to(device), 12
    ids = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    with KeyTokens(model, 0.5, policy="keyformer-dynamic", min_length=0) as few:
        want = model.generate(ids, max_new_tokens=new, do_sample=False)[:, ids.shape[1] :]
        cache = few.cache(prompt=ids.shape[1], max_new_tokens=new)
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        got = [token.clone()]
        with cache.steady() as clock:

            def step():
                out = model(token, position_ids=clock.pos[:, None], past_key_values=cache)
                token.copy_(out.logits.argmax(-1))

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
                    got.append(token.clone())
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            while len(got) < new:
                graph.replay()
                got.append(token.clone())
        assert cache.length == ids.shape[1] + new - 1
    assert torch.equal(torch.cat(got, 1), want)
