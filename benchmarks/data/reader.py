"""Read, encode and shuffle a log much larger than the memory allowed: time and peak memory of a fresh process.

python benchmarks/data/reader.py --rows 10000000 --out benchmarks/results/reader.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from vitalfew.core.files import write_document
from vitalfew.data.synthetic import zipf_trace
from vitalfew.meter import machine

LIMIT = 2**30
READ = """
import json, resource, sys, tempfile, time
from vitalfew.data import Batches, Encoder, infer_schema, open_log, time_cutoff, write_log
start = time.perf_counter()
log = open_log(sys.argv[1])
schema = infer_schema(log, label="click", time="ts", categorical=("user", "item", "place"))
cutoff, _ = time_cutoff(log, "ts")
encoder = Encoder.fit(log, schema, until=cutoff)
with tempfile.TemporaryDirectory() as folder:
    train, test = write_log(folder + "/log", log, encoder, cutoff=cutoff)
    written = time.perf_counter() - start
    rows = sum(len(batch) for batch in Batches(train, 4096).epoch(0)) + len(test)
print(json.dumps({
    "rows": rows, "table_rows": sum(encoder.num_rows.values()), "encode_s": written,
    "seconds": time.perf_counter() - start, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""


def write(path: Path, rows: int) -> None:
    """Write a log of three id columns, a number and a time, a million rows at a time."""
    rng = np.random.default_rng(0)
    writer = None
    for first in range(0, rows, 1_000_000):
        n = min(1_000_000, rows - first)
        table = pa.table(
            {
                "ts": np.arange(first, first + n),
                "click": (rng.random(n) < 0.2).astype(np.int8),
                "user": zipf_trace(1_000_000, n, 1.05, seed=first),
                "item": zipf_trace(200_000, n, 1.05, seed=first + 1),
                "place": pa.array([f"place {i}" for i in range(500)]).take(pa.array(rng.integers(0, 500, n))),
                "price": rng.lognormal(2, 1, n).round(2),
            }
        )
        if writer is None:
            kind = pa.csv.CSVWriter if path.suffix == ".csv" else pa.parquet.ParquetWriter
            writer = kind(path, table.schema)
        writer.write_table(table)
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out")
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("log.parquet", "log.csv"):
            path = Path(folder) / name
            write(path, args.rows)
            run = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
            found = figures[name] = json.loads(run.stdout) | {"bytes": path.stat().st_size}
            path.unlink()
            print(
                f"{name}: {found['rows']:,} rows, {found['bytes'] / 2**20:.0f} MiB, "
                f"{found['table_rows']:,} table rows: "
                f"{found['seconds']:.1f} s, peak {found['peak_rss'] / 2**20:.0f} MiB"
            )
    if args.out:
        command = "python " + " ".join(sys.argv)
        write_document(
            args.out, "benchmark", 1, {"name": "reader", "command": command, "machine": machine(), "figures": figures}
        )
    return any(found["peak_rss"] > LIMIT or found["rows"] != args.rows for found in figures.values())


if __name__ == "__main__":
    sys.exit(main())
