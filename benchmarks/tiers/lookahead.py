"""Count the rows each policy moves on real logs, relative to the least possible: R5 and R6, and how deep to look.

The bound comes from `bound.py`, which shares no code with the library. Capacity is a share of the distinct rows and
holds between batches; rows of batches in flight are beside it. Exits with 1 if look-ahead (depth 200) moves more than
1.05 times the bound on any log.

    python benchmarks/tiers/lookahead.py --out benchmarks/results/lookahead.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from bound import bounds
from traces import FOLDER, TRACES

from vitalfew.core.files import write_document
from vitalfew.meter import machine
from vitalfew.tiers import LFU, LRU, Belady, LookAhead, Policy, Static, simulate

POLICIES: dict[str, Policy] = {
    "lru": LRU(), "lfu": LFU(), "look 1": LookAhead(1), "look 8": LookAhead(8), "look 50": LookAhead(50),
    "look 200": LookAhead(200), "belady": Belady(),
}  # fmt: skip
MOST = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", default="amazon-book,gowalla,video-games,retail,kosarak,frappe,criteo-like")
    parser.add_argument("--shares", default="0.05,0.1")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results, worst = [], 0.0
    print("log            share   miss ratio of the optimum | rows moved / bound:", *POLICIES, "static", sep="  ")
    for name in args.logs.split(","):
        if name != "criteo-like" and not FOLDER.exists():
            print(f"{name}: left out, {FOLDER} is not there")
            continue
        trace = TRACES[name]()
        ids, offsets = trace.ids, trace.batch_offsets
        counts = np.bincount(ids)
        for share in map(float, args.shares.split(",")):
            capacity = int(share * trace.distinct)
            least = bounds(ids, offsets, [capacity])[0]
            line: dict[str, float] = {}
            start, accesses = time.perf_counter(), 0
            hot = np.argsort(-counts, kind="stable")[:capacity]
            for label, policy in (*POLICIES.items(), ("static", Static.of(hot))):
                found = simulate(ids, offsets, policy, capacity)
                line[label] = found.misses / least
                accesses += found.accesses
            speed = accesses / (time.perf_counter() - start) / 1e6
            ratio = least / found.unique
            cells = " ".join(f"{x:7.3f}" for x in line.values())
            print(f"{name:14} {share:5.0%} {ratio:8.3f} | {cells}  {speed:.0f} M ids/s")
            results.append({"log": name, "share": share, "capacity": capacity, "bound": int(least), "miss ratio": ratio,
                            "moved / bound": line, "million ids/s": speed})  # fmt: skip
            if name != "criteo-like":
                worst = max(worst, line["look 200"])
    if not worst:
        sys.exit("no real log was there: nothing is shown")
    print(f"look-ahead of 200 batches moves at most {worst:.3f} times the bound on the real logs (asked: {MOST})")
    if args.out:
        about = {"command": "python " + " ".join(sys.argv), "machine": machine()}
        write_document(args.out, "benchmark", 1, {**about, "results": results})
    sys.exit(worst > MOST)


if __name__ == "__main__":
    main()
