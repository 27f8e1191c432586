"""Decoding on a GPU: kernels against their twins, and a step with evicted slots beside SDPA on a static full cache.

    kernels   every kernel over a grid of head sizes, groups, types and forms, against plain float32 torch
    step      one layer's attention of a token: slots against SDPA over all tokens, both in CUDA graphs, with the bytes
              that each reads per second beside those of a measured copy
    model     a whole step of a model of a given shape with random weights, both in CUDA graphs, beside the ceiling; the
              full cache is static, and attended to without a mask, which SDPA's fast kernels would not take
    prompt    the share of a prompt's time that scoring takes
    memory    the largest batch that fits a given memory, beside what the bytes of a slot foretell

Rounds of the sides are interleaved, but for whole models, whose caches a device holds one at a time; a figure is the
median. Weights, keys and values are made on the device.

    python benchmarks/generate/gpu.py --out benchmarks/results/generate_gpu.json
    python benchmarks/generate/gpu.py --dry     # tiny shapes on the CPU, in Triton's interpreter: shows that it runs
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from vitalfew.core.files import write_document
from vitalfew.generate import _kernels_reference as twin
from vitalfew.generate import scores, slots
from vitalfew.generate._blocks import voting
from vitalfew.generate.ceiling import KVShape, decode_ceiling, weight_bytes
from vitalfew.generate.key_tokens import KeyTokens
from vitalfew.generate.noise import Noise
from vitalfew.generate.scores import Logits, Votes
from vitalfew.meter import machine

OF_COPY, OF_CEILING, OF_PROMPT, OF_MEMORY = 0.70, 0.88, 0.15, 0.05
"""Asked for: the least share of the copy's bandwidth and of the ceiling, the most of a prompt, the largest error."""
LOOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Row = dict[str, Any]


# -- the clock


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return a replay of a step; without a GPU the step itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles kernels and makes tables
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_: Callable[[], Any] = step) -> None:  # which holds what the graph has the addresses of
        graph.replay()

    return replay


def medians(sides: dict[str, Callable[[], Any]], args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the median seconds of a call of each side, measured in turns."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            wait(device)
            start = time.perf_counter()
            for _ in range(args.repeats):
                sides[name]()
            wait(device)
            took[name].append((time.perf_counter() - start) / args.repeats)
    return {name: sorted(values[1:])[len(values[1:]) // 2] for name, values in took.items()}


def copy_bandwidth(args: argparse.Namespace, device: torch.device) -> float:
    """Return bytes read and written per second by a copy that no cache holds."""
    source = torch.empty(args.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = medians({"copy": captured(lambda: target.copy_(source), device)}, args, device)["copy"]
    return 2 * args.copy_bytes / seconds


# -- kernels


def held(rows: int, heads: int, group: int, capacity: int, d: int, dtype: torch.dtype, device: torch.device) -> Row:
    """Return slots at random positions, full of random numbers, and a query; made on the device."""
    length = 2 * capacity
    pos = torch.rand(rows, heads, length, device=device).argsort(-1)[..., :capacity].to(torch.int32)
    pos[..., 0] = length
    return {
        "query": torch.randn(rows, heads, group, d, device=device, dtype=dtype),
        "keys": torch.randn(rows, heads, capacity, d, device=device, dtype=dtype),
        "values": torch.randn(rows, heads, capacity, d, device=device, dtype=dtype),
        "pos": pos,
        "query_pos": torch.full((rows,), length, device=device),
    }


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference, relative to the larger of the two and one."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    off = (got.float() - want).abs() / want.abs().clamp(min=1.0)
    return float(off[finite].max()) if bool(finite.any()) else 0.0


def kernels(args: argparse.Namespace, device: torch.device) -> list[Row]:
    from vitalfew.generate import _kernels_triton as one
    from vitalfew.generate import _kernels_triton_prompt as many
    from vitalfew.generate import _kernels_triton_votes as ballots

    found = []
    for dtype in args.types:
        for d in args.dims:
            for group in args.groups:
                for form in forms(2 * group, device):
                    x = held(3, 2, group, args.capacity, d, dtype, device)
                    x["pos"][1, :, args.capacity // 2 : args.capacity - 3] = -1  # rows that hold fewer
                    rest = (form.scale, form.softcap, form.slopes, form.sinks)
                    exact = {name: t.float() if t.is_floating_point() else t for name, t in x.items()}
                    want, want_logits = twin.attend(**exact, **dict(zip(FORM, rest, strict=True)))
                    out, logits = one.attend(**x, **dict(zip(FORM, rest, strict=True)))
                    off = {"attend": far(out, want), "logits": far(logits, want_logits)}
                    score = torch.rand(x["pos"].shape, device=device)
                    mine, live = score.clone(), x["pos"] >= 0
                    ballot = (want_logits, 1.5, Noise(1, 2), x["pos"], x["query_pos"], args.capacity // 4)
                    marked, same = ballots.vote_and_mark(mine, *ballot), twin.vote_and_mark(score, *ballot)
                    off["votes"] = far(mine[live], score[live])
                    n = args.capacity // 4 + 3
                    at = torch.arange(n, device=device)
                    prompt = torch.randn(3, 2 * group, n, d, device=device, dtype=dtype)
                    key_pos = at.to(torch.int32).expand(3, 2, -1)
                    given = (prompt, x["keys"][:, :, :n], x["values"][:, :, :n])
                    votes = Votes(None, 1.0, Noise(1, 2))
                    voices = voting(at.expand(3, -1), None) / group
                    out, cast = many.attend_and_vote(*given, form, key_pos, at.expand(3, -1), voices, votes, True)
                    with without_triton():
                        want, want_cast = scores.attend_prompt(
                            *(t.float() for t in given), form, key_pos, at.expand(3, -1), votes, causal=False
                        )
                    off |= {"prompt": far(out, want), "prompt's votes": far(cast, want_cast)}
                    bad = [k for k, v in off.items() if v > (1e-4 if "votes" in k else LOOSE[dtype])]
                    bad += [] if torch.equal(marked, same) else ["next slot"]
                    found.append(
                        {"type": str(dtype), "d": d, "group": group, "form": str(rest[1:]), **off, "missed": bad}
                    )
    worst = {k: max(row[k] for row in found) for k in ("attend", "logits", "votes", "prompt", "prompt's votes")}
    print(f"kernels: {len(found)} cases, {sum(bool(row['missed']) for row in found)} off; largest differences {worst}")
    return found


FORM = ("scale", "softcap", "slopes", "sinks")


def forms(heads: int, device: torch.device) -> list[Logits]:
    slopes, sinks = torch.rand(heads, device=device) / 64, torch.randn(heads, device=device)
    return [Logits(0.1), Logits(0.1, 5.0, slopes, sinks)]


@contextmanager
def without_triton() -> Iterator[None]:
    """Use the engines that every device has."""
    before, scores.on_gpu = scores.on_gpu, lambda tensor: False
    try:
        yield
    finally:
        scores.on_gpu = before


# -- one layer's step


def layer_steps(args: argparse.Namespace, device: torch.device) -> list[Row]:
    found = []
    for rows in args.rows:
        for length in args.tokens:
            for name, (heads, _, d) in args.shapes.items():
                if rows * length * 2 * heads * d * args.dtype.itemsize <= args.most_bytes:
                    found += beside_sdpa(name, rows, length, args, device)
    return found


def beside_sdpa(name: str, rows: int, length: int, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Return a row for each share kept of a shape; what it measured with is gone then."""
    from vitalfew.generate import _kernels_triton as one
    from vitalfew.generate import _kernels_triton_votes as ballots

    heads, group, d = args.shapes[name]
    per_token = 2 * heads * d * args.dtype.itemsize
    full = held(rows, heads, group, length, d, args.dtype, device)
    query = full["query"].flatten(1, 2)[:, :, None]

    def sdpa() -> None:
        functional.scaled_dot_product_attention(query, full["keys"], full["values"], enable_gqa=group > 1)

    sides: dict[str, Callable[[], Any]] = {"sdpa": captured(sdpa, device)}
    for share in args.shares:
        few = held(rows, heads, group, int(length * share), d, args.dtype, device)
        score, noise, window = torch.zeros(few["pos"].shape, device=device), Noise(0, 0), few["pos"].shape[2] // 4

        def attend(few: Row = few) -> torch.Tensor:
            return one.attend(**few, scale=0.1, softcap=None, slopes=None, sinks=None)[1]

        def whole(few: Row = few, score: torch.Tensor = score, noise: Noise = noise, window: int = window) -> None:
            ballots.vote_and_mark(score, attend(few), 1.5, noise, few["pos"], few["query_pos"], window)

        sides[f"attend {share:.0%}"] = captured(attend, device)
        sides[f"step {share:.0%}"] = captured(whole, device)
    took = medians(sides, args, device)
    found = []
    for share in args.shares:
        kept = int(length * share)
        attend_s, step_s = took[f"attend {share:.0%}"], took[f"step {share:.0%}"]
        read = rows * kept * (per_token + heads * 4 * (1 + group))  # with positions, and logits, which are written
        row = {
            "shape": name, "rows": rows, "tokens": length, "share": share, "sdpa us": 1e6 * took["sdpa"],
            "attend us": 1e6 * attend_s, "step us": 1e6 * step_s, "over sdpa": took["sdpa"] / step_s,
            "bytes per second": read / attend_s, "of the copy's": read / attend_s / args.copy,
            "sdpa, of the copy's": rows * length * per_token / took["sdpa"] / args.copy,
        }  # fmt: skip
        # What fits the caches says nothing about the memory.
        row["missed"] = ["bandwidth"] if read > args.copy_bytes / 8 and row["of the copy's"] < OF_COPY else []
        found.append(row)
        show(row)
    return found


# -- a model's step, prompt and memory


SHAPES = {"llama-8b": (8, 14_336, 128_256), "mpt-7b": (32, 11_008, 50_432)}
"""KV heads, inner size and vocabulary; the second has MPT-7B's bytes of weights and of keys and values per token."""


def build(name: str, args: argparse.Namespace, device: torch.device) -> Any:
    """Return a model of a shape with random weights, made on the device."""
    heads, inner, vocabulary = (1 if name == "llama-8b" else 2, 64, 64) if args.dry else SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64 if args.dry else 4096, intermediate_size=inner,
        num_hidden_layers=args.layers, num_attention_heads=2 if args.dry else 32, num_key_value_heads=heads,
        max_position_embeddings=1 << 17,
    )  # fmt: skip
    # A name without a mask function gets no mask, so that all of a static cache is attended to.
    AttentionInterface.register("unmasked", sdpa_attention_forward)
    config._attn_implementation = "unmasked"
    before = torch.get_default_dtype()
    torch.set_default_dtype(args.dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def fill(cache: Any, rows: int, length: int, kept: int, dtype: torch.dtype, device: torch.device, config: Any) -> None:
    """Put a cache where a prompt of so many tokens would have left it, with random keys and values."""
    shape = KVShape.of(config, dtype.itemsize)
    layers = []
    for _ in range(shape.layers):
        pos = torch.rand(rows, shape.heads, length, device=device).argsort(-1)[..., :kept].to(torch.int32)
        pos[..., 0] = length - 1
        keys = torch.randn(rows, shape.heads, kept, shape.head_dim, device=device, dtype=dtype)
        score = torch.rand(rows, shape.heads, kept, device=device)
        layers.append(
            {
                "keys": keys, "values": torch.randn_like(keys), "pos": pos, "score": score,
                "marked": torch.ones(rows, shape.heads, dtype=torch.int64, device=device),
            }
        )  # fmt: skip
    for layer, tensors in zip(cache.slot_layers, layers, strict=True):
        evicting = layer.evicting
        evicting.slots = slots.Slots(tensors["keys"], tensors["values"])
        evicting.slots.replace(tensors["keys"], tensors["values"], tensors["pos"], tensors["score"])
        evicting.slots.marked = tensors["marked"]
        evicting.slots.counts, evicting.slots.caps = [length] * rows, [kept] * rows
        evicting.length = evicting.prompt_end = length
        layer.is_initialized = True


def model_steps(args: argparse.Namespace, device: torch.device) -> list[Row]:
    found = []
    for name, rows, length in args.models:
        model = build(name, args, device)
        shape = KVShape.of(model.config, args.dtype.itemsize)
        tokens = torch.ones(rows, 1, dtype=torch.int64, device=device)
        later = 8 + (args.rounds + 1) * args.repeats
        static = static_cache(model, rows, length, later, args.dtype, device)
        at = torch.full((rows, 1), length, device=device)
        with torch.inference_mode():
            step = captured(
                lambda m=model, t=tokens, c=static, p=at: m(t, past_key_values=c, position_ids=p).logits, device
            )
            full = medians({"static": step}, args, device)["static"]
            del step, static
            for share in args.shares:
                kept = int(length * share)
                with KeyTokens(model, kept, policy="keyformer-dynamic", min_length=0) as few:
                    cache = few.cache(prompt=length, max_new_tokens=later)
                    fill(cache, rows, length, kept, args.dtype, device, model.config)
                    with cache.steady() as clock:
                        step = captured(
                            lambda m=model, t=tokens, c=cache, k=clock: (
                                m(t, past_key_values=c, position_ids=k.pos[:, None]).logits
                            ),
                            device,
                        )
                        seconds = medians({"slots": step}, args, device)["slots"]
                    del step, cache, clock
                ceiling = decode_ceiling(weight_bytes(model), rows, length, kept, shape.bytes_per_token)
                row = {
                    "model": name, "rows": rows, "tokens": length, "share": share, "static ms": 1e3 * full,
                    "slots ms": 1e3 * seconds, "over static": full / seconds, "ceiling": ceiling,
                    "of the ceiling": full / seconds / ceiling,
                }  # fmt: skip
                row["missed"] = ["ceiling"] if row["of the ceiling"] < OF_CEILING else []
                found.append(row)
                show(row)
        del model
    return found


def static_cache(
    model: Any, rows: int, length: int, later: int, dtype: torch.dtype, device: torch.device
) -> StaticCache:
    """Return transformers' static cache of so many tokens, the last of which are still to come."""
    shape = KVShape.of(model.config, dtype.itemsize)
    cache = StaticCache(config=model.config, max_cache_len=length)
    tokens = torch.randn(rows, shape.heads, length - later, shape.head_dim, device=device, dtype=dtype)
    for index in range(shape.layers):
        cache.update(tokens, tokens, index)
    return cache


def prompt_shares(args: argparse.Namespace, device: torch.device) -> list[Row]:
    found = []
    model = build("llama-8b", args, device)
    text = torch.randint(1, model.config.vocab_size, (1, args.prompt), device=device)

    def once(policy: str) -> Callable[[], None]:
        def run() -> None:
            with KeyTokens(model, 0.5, policy=policy, min_length=0) as few:
                cache = few.cache(prompt=args.prompt, max_new_tokens=64)
                model(text, past_key_values=cache, logits_to_keep=1)

        return run

    few_rounds = argparse.Namespace(**{**vars(args), "repeats": 1})
    policies = ("streaming", "snapkv", "keyformer", "keyformer-dynamic")
    with torch.inference_mode():
        took = medians({policy: once(policy) for policy in policies}, few_rounds, device)
    for policy in policies[1:]:
        share = 1 - took["streaming"] / took[policy]
        row = {"policy": policy, "tokens": args.prompt, "prompt ms": 1e3 * took[policy], "scoring's share": share}
        row["missed"] = ["scoring"] if policy == "keyformer" and share > OF_PROMPT else []
        found.append(row)
        show(row)
    return found


def memory(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Return the largest batch whose cache fits, found by making caches, beside the formula's."""
    found = []
    model = build("llama-8b", args, device)
    shape, length = KVShape.of(model.config, args.dtype.itemsize), args.memory_tokens
    slot = shape.heads * shape.layers * (2 * shape.head_dim * args.dtype.itemsize + 8)
    for share in (1.0, *args.shares):
        kept = int(length * share)
        foretold = args.memory_bytes // (kept * slot)
        low, high = 0, 2 * foretold + 2
        while high - low > 1:
            rows = (low + high) // 2
            with KeyTokens(model, kept, policy="keyformer", min_length=0) as few:
                cache = few.cache(prompt=length, max_new_tokens=1)
                before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                fill(cache, rows, length, kept, args.dtype, device, model.config)
                used = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else cache.nbytes
                del cache
            low, high = (rows, high) if used <= args.memory_bytes else (low, rows)
        error = abs(low - foretold) / max(foretold, 1)
        row = {"tokens": length, "share": share, "bytes": args.memory_bytes, "largest batch": low, "foretold": foretold}
        row["missed"] = ["memory"] if error > OF_MEMORY and abs(low - foretold) > 1 else []
        found.append(row)
        show(row)
    return found


# -- the run


def show(row: Row) -> None:
    print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}, flush=True)


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], list[Row]]] = {
    "kernels": kernels, "step": layer_steps, "model": model_steps, "prompt": prompt_shares, "memory": memory,
}  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas between")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, without a GPU")
    parser.add_argument("--out")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    large: dict[str, Any] = {
        "types": [torch.float32, torch.float16, torch.bfloat16], "dims": [64, 80, 96, 128, 256], "groups": [1, 3, 4, 8],
        "capacity": 1000, "rows": [1, 8, 32], "tokens": [4096, 16_384, 65_536], "shares": [0.5, 0.2],
        "shapes": {"llama-8b": (8, 4, 128), "mpt-7b": (32, 1, 128)}, "dtype": torch.bfloat16,
        "most_bytes": 48 << 30, "copy_bytes": 4 << 30, "layers": 32, "prompt": 16_384,
        "models": [("llama-8b", 1, 16_384), ("llama-8b", 8, 8192), ("llama-8b", 32, 8192), ("mpt-7b", 16, 8192)],
        "memory_tokens": 8192, "memory_bytes": 32 << 30,
    }  # fmt: skip
    tiny: dict[str, Any] = {
        "types": [torch.float32, torch.float16], "dims": [80], "groups": [3], "capacity": 90, "rows": [1, 2],
        "tokens": [128], "shares": [0.5], "shapes": {"llama-8b": (1, 2, 32), "mpt-7b": (2, 1, 32)},
        "dtype": torch.float32, "most_bytes": 100_000, "copy_bytes": 1 << 16, "layers": 1, "prompt": 24,
        "models": [("llama-8b", 1, 64), ("mpt-7b", 1, 64)], "memory_tokens": 64, "memory_bytes": 1 << 20,
        "rounds": 1, "repeats": 1,
    }  # fmt: skip
    vars(args).update(tiny if args.dry else large)
    return args


def main() -> int:
    args = options()
    if not args.dry and not torch.cuda.is_available():
        print("there is no GPU here; nothing was measured (--dry tries the script out)")
        return 0
    device = torch.device("cpu" if args.dry else "cuda")
    if args.dry:  # the interpreter stands for the GPU
        scores.on_gpu = slots.on_gpu = lambda tensor: True
    torch.manual_seed(0)
    args.copy = copy_bandwidth(args, device)
    results: dict[str, Any] = {"copy": args.copy}
    print(f"a copy moves {args.copy / 1e9:,.0f} GB/s")
    for name in args.parts.split(","):
        with torch.inference_mode() if name in ("kernels", "step") else nullcontext():
            results[name] = PARTS[name](args, device)
    if args.out:
        about = {"name": "generate_gpu", "command": "python " + " ".join(sys.argv), "machine": machine()}
        write_document(args.out, "benchmark", 1, {**about, "dry": args.dry, "results": results})
    # Tiny shapes in an interpreter show what is right, not what is fast.
    asked = ("kernels", "memory") if args.dry else tuple(PARTS)
    missed = [row for name in asked for row in results.get(name, []) if row["missed"]]
    print(f"{len(missed)} rows miss what is asked for" if missed else "all that is asked for is met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
