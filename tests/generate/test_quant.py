"""Codecs of slots: bounded errors, exact zeros, bytes as counted, and one slot that is rewritten leaves the rest."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.generate.tiny import smollm2_folder
from vitalfew.core import InputError
from vitalfew.generate.quant import CODECS, Codec, Fp8, Int4, Int8, codec_named, hadamard

DATA = Path(os.environ.get("VITALFEW_DATA", Path(__file__).parents[3] / "shared" / "data")) / "generate"
each = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
seeds, sizes = st.integers(0, 10**6), st.sampled_from([8, 24, 32, 64, 80, 96, 128, 256])


def vectors(seed: int, *shape: int, spread: float = 3.0) -> torch.Tensor:
    """Channels of very different sizes, as keys have them."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice) * torch.exp(spread * torch.randn(shape[-1], generator=dice))


def worst(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """Return the bound on the error's norm: per channel a part of what the largest of its group is, in turned axes."""
    size = x.shape[-1]
    turned = hadamard(x) if size & (size - 1) == 0 else x
    groups = turned.reshape(*x.shape[:-1], -1, codec.group(size))
    top = groups.abs().amax(-1, keepdim=True)
    if isinstance(codec, Fp8):  # three bits of mantissa, and the smallest step of the type
        error = groups.abs() / 16 + top / 448 * 2**-10
    else:  # half a step; with four bits a channel as large as the largest and of the other sign loses a whole one
        error = (top * (0.5 / 127 if isinstance(codec, Int8) else 1 / 8)).expand_as(groups)
    # The scale itself is rounded: to 11 bits, or to the smallest numbers of float16.
    error = error + top * 2**-11 + 448 * 2.0**-25
    return error.square().sum((-1, -2)).sqrt() * 1.001


@each
@given(seed=seeds, size=sizes, power=st.floats(-6, 4))
def test_the_error_is_bounded(codec: Codec, seed: int, size: int, power: float) -> None:
    x = vectors(seed, 2, 3, 5, size, spread=1.0) * 10**power
    back = codec.decode(codec.encode(x), torch.float32)
    assert back.shape == x.shape
    assert ((back - x).norm(dim=-1) <= worst(codec, x) + 1e-6 * x.norm(dim=-1)).all()


@each
def test_zeros_are_exact_and_so_is_padding_beside_others(codec: Codec) -> None:
    x = vectors(0, 2, 4, 64)
    x[0, 1] = 0
    back = codec.decode(codec.encode(x), torch.float32)
    assert (back[0, 1] == 0).all()
    assert (codec.decode(codec.encode(torch.zeros(3, 80)), torch.bfloat16) == 0).all()


@each
@given(seed=seeds, slot=st.integers(0, 8), size=sizes)
def test_one_slot_rewritten_leaves_all_others_bit_identical(codec: Codec, seed: int, slot: int, size: int) -> None:
    x, new = vectors(seed, 2, 3, 9, size), vectors(seed + 1, 2, 3, size)
    parts = codec.encode(x)
    before = codec.decode(parts, torch.float32).clone()
    for part, one in zip(parts, codec.encode(new), strict=True):
        part[:, :, slot] = one
    after = codec.decode(parts, torch.float32)
    others = torch.arange(9) != slot
    assert torch.equal(after[:, :, others], before[:, :, others])
    # And what was written is what the slot would hold had it been there from the start.
    x[:, :, slot] = new
    assert all(torch.equal(a, b) for a, b in zip(parts, codec.encode(x), strict=True))


@each
@pytest.mark.parametrize("size", [8, 64, 80, 128])
def test_bytes_are_as_counted(codec: Codec, size: int) -> None:
    parts = codec.encode(vectors(0, 2, 3, 7, size))
    assert sum(part.numel() * part.element_size() for part in parts) == 2 * 3 * 7 * codec.nbytes(size)
    assert all(part.shape[:3] == (2, 3, 7) for part in parts)


def test_bytes_of_64_channels() -> None:
    assert [codec.nbytes(64) for codec in (Int8(), Int4(), Fp8())] == [66, 36, 66]


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_in_and_out(codec: Codec, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = codec.decode(codec.encode(x), dtype)
    assert back.dtype == dtype
    assert (back - x).abs().max() < (0.9 if codec.name == "int4" else 0.25)


@each
def test_turned_vectors_give_the_same_products(codec: Codec) -> None:
    query, keys = vectors(1, 4, 64, spread=0.5), vectors(2, 9, 64)
    parts = codec.encode(keys)
    plain = query @ codec.decode(parts, torch.float32).T
    turned = hadamard(query) @ codec.decode(parts, torch.float32, turned=True).T
    torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-3)
    odd = codec.encode(keys[:, :24])
    assert torch.equal(codec.decode(odd, torch.float32, turned=True), codec.decode(odd, torch.float32))


@given(seed=seeds, power=st.integers(0, 8))
def test_hadamard_is_its_own_inverse_and_keeps_products(seed: int, power: int) -> None:
    x = torch.randn(3, 2**power, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close(hadamard(x) @ hadamard(x).T, x @ x.T)


def test_hadamard_equals_the_matrix() -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    torch.testing.assert_close(hadamard(torch.eye(16)), matrix / math.sqrt(16))


@each
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_what_cannot_be_held_is_refused(codec: Codec, value: float) -> None:
    x = torch.ones(2, 64)
    x[1, 3] = value
    with pytest.raises(InputError, match=codec.name) as caught:
        codec.encode(x)
    assert caught.value.hint


def test_bad_sizes_and_names() -> None:
    with pytest.raises(InputError, match="got 12"):
        Int4().encode(torch.ones(2, 12))
    with pytest.raises(InputError, match="got 24"):
        hadamard(torch.ones(24))
    with pytest.raises(InputError, match="'int3'"):
        codec_named("int3")
    assert codec_named(None) is None
    assert codec_named("int8") == Int8() == codec_named(Int8())


def test_turning_lowers_the_error_where_a_channel_is_large() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] += 40
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    plain = (x / scale).round() * scale
    ours = Int8().decode(Int8().encode(x), torch.float32)
    assert (ours - x).norm() < 0.5 * (plain - x).norm()


@pytest.mark.slow
@pytest.mark.data
def test_turning_pays_on_the_keys_of_a_real_model() -> None:
    """512 tokens of an essay through SmolLM2: what attention loses by coded keys, beside the same codec unturned."""
    transformers = pytest.importorskip("transformers")
    folder = smollm2_folder()
    essay = DATA / "essays" / "addiction.txt.gz"
    if not essay.is_file():
        pytest.skip(f"no essays: set VITALFEW_DATA ({essay})")
    text = gzip.decompress(essay.read_bytes()).decode()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :512]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    lost = dict.fromkeys(("int8", "int4", "fp8", "int8 unturned", "int4 unturned"), 0.0)
    for layer in cache.layers:
        keys = layer.keys[0]
        # A key is a query of its own kind: same sizes, same rotation; its attention is sharp like a query's.
        query = keys[:, 256::16]
        exact = (query @ keys.mT / 8).log_softmax(-1)
        coded = {name: CODECS[name].decode(CODECS[name].encode(keys), torch.float32) for name in CODECS}
        for name, size, top in (("int8", 64, 127.0), ("int4", 32, 7.0)):
            groups = keys.unflatten(-1, (-1, size))
            scale = (groups.abs().amax(-1, keepdim=True) / top).half().float()
            coded[f"{name} unturned"] = ((groups / scale).round() * scale).flatten(-2)
        for name, found in coded.items():
            other = (query @ found.mT / 8).log_softmax(-1)
            lost[name] += float((exact.exp() * (exact - other)).sum(-1).mean()) / len(cache.layers)
    assert lost["int8"] < 0.5 * lost["int8 unturned"]
    assert lost["int4"] < 0.6 * lost["int4 unturned"]
    assert lost["int8"] < lost["fp8"] < lost["int4"]
