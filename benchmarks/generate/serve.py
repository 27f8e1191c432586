"""The server at equal memory for keys and values: the full cache against a share of it, 32 streaming clients at once.

All clients ask at the same moment, with prompts of mixed lengths and as many tokens each; the memory holds eight of the
longest requests in full. Each arm is the same server, the full cache with a budget of 1.0; they take turns. The bytes
held are counted after each call of the model and must never exceed the memory, all requests must be answered, and the
exit status is 1 where that fails. The throughput ratio is reported, whatever it is.

    python benchmarks/generate/serve.py --out benchmarks/results/generate_serve.json
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
from corpora import essays
from sample import command, sample_model

from vitalfew.core.files import write_document
from vitalfew.generate.server._fastapi import Server
from vitalfew.generate.server.serving import Serving, Settings
from vitalfew.meter import machine


def count_steps(served: Serving) -> dict[str, list[float]]:
    """Note rows, seconds and bytes of each step, and the seconds of each chunk."""
    engine, seen = served.scheduler.engine, {"rows": [], "step": [], "chunk": [], "bytes": []}
    step, advance = engine.step, engine.advance

    def counted_step(tokens: Any) -> Any:
        start = time.perf_counter()
        out = step(tokens)
        seen["step"].append(time.perf_counter() - start)
        seen["rows"].append(len(tokens))
        seen["bytes"].append(engine.nbytes)
        return out

    def counted_advance() -> Any:
        start = time.perf_counter()
        out = advance()
        seen["chunk"].append(time.perf_counter() - start)
        seen["bytes"].append(engine.nbytes)
        return out

    engine.step, engine.advance = counted_step, counted_advance
    return seen


async def ask_all(url: str, prompts: list[list[int]], new: int) -> list[tuple[float, float, int]]:
    """Return seconds to the first piece, seconds in all and tokens written, for each client."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=7200) as api:

        async def ask(prompt: list[int]) -> tuple[float, float, int]:
            start = time.perf_counter()
            stream = await api.completions.create(
                model="smollm2", prompt=prompt, max_tokens=new, temperature=0, stream=True,
                stream_options={"include_usage": True}, logprobs=0,
            )  # fmt: skip
            first, written = 0.0, 0
            async for chunk in stream:
                first = first or time.perf_counter() - start
                written = chunk.usage.completion_tokens if chunk.usage else written
            return first, time.perf_counter() - start, written

        return await asyncio.gather(*map(ask, prompts))


def serve_all(
    model: Any, tokenizer: Any, budget: float, policy: str, memory: int, prompts: list[list[int]], new: int
) -> dict[str, Any]:
    settings = Settings("smollm2", budget, policy, min_length=0, kv_memory=memory, timeout=7200)
    served = Serving(model, tokenizer, settings)
    seen = count_steps(served)
    listens, urls = threading.Event(), []
    server = Server(served, port=0, ready=lambda url: (urls.append(url), listens.set())[0])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert listens.wait(60), "the server does not listen"
        start, busy = time.perf_counter(), time.process_time()
        answers = asyncio.run(ask_all(urls[0], prompts, new))
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    finally:
        server.should_exit = True
        thread.join()
    written = sum(tokens for *_, tokens in answers)
    assert written == len(prompts) * new, f"{written} tokens were written, {len(prompts) * new} asked for"
    assert max(seen["bytes"]) <= memory, f"{max(seen['bytes'])} bytes were held, {memory} allowed"
    return {
        "budget": budget, "seconds": seconds, "process seconds": busy, "tokens": written,
        "tokens per second": written / seconds, "tokens per process second": written / busy,
        "seconds to the first token, median": statistics.median(first for first, *_ in answers),
        "rows at once, most": max(seen["rows"]), "rows at once, mean": statistics.mean(seen["rows"]),
        "steps": len(seen["step"]), "seconds in steps": sum(seen["step"]), "seconds in prompts": sum(seen["chunk"]),
        "bytes held, most": max(seen["bytes"]), "memory": memory,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small prompts: shows that it runs")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=512)
    parser.add_argument("--longest", type=int, default=1536)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--policy", default="keyformer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.shortest, args.longest, args.new, args.repeats = 64, 192, 24, 1
    model, tokenizer = sample_model()
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # each answer has all of its tokens
    ids = tokenizer("\n".join(essays().values()), verbose=False)["input_ids"]
    span = max(1, args.longest - args.shortest)
    lengths = [args.shortest + (k * 397) % (span + 1) for k in range(args.clients - 1)] + [args.longest]
    prompts = [ids[2000 * k % (len(ids) - length) :][:length] for k, length in enumerate(lengths)]
    full = Serving(model, tokenizer, Settings("smollm2", 1.0))
    memory = 8 * full.scheduler.engine.shape.need(full.scheduler.engine.plan, args.longest, args.new, 1).most
    full.close()
    runs = []
    for k in range(args.repeats):
        pair = {}
        for budget in (1.0, args.budget) if k % 2 == 0 else (args.budget, 1.0):
            pair[budget] = serve_all(model, tokenizer, budget, args.policy, memory, prompts, args.new)
            print({name: round(value, 2) for name, value in pair[budget].items()}, flush=True)
        runs.append([pair[1.0], pair[args.budget]])
    ratios = {
        name: [after[name] / before[name] for before, after in runs]
        for name in ("tokens per second", "tokens per process second", "rows at once, most", "rows at once, mean")
    }
    print({name: [round(ratio, 3) for ratio in found] for name, found in ratios.items()})
    if args.out:
        setup = {name: getattr(args, name) for name in ("clients", "shortest", "longest", "new", "policy", "quick")}
        about = {"command": command(), "machine": machine(), "setup": setup}
        write_document(args.out, "benchmark", 1, {**about, "results": runs, "ratios": ratios})
    return 0


if __name__ == "__main__":
    sys.exit(main())
