"""The real logs, unchanged: they hold what no one would think of writing into a test."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from vitalfew.core.errors import InputError
from vitalfew.data import Encoded, Encoder, infer_schema, open_log, write_log

pytestmark = pytest.mark.data

# Rows and positive labels as stated in the read-me file of the data folder.
CRITEO = [
    ("kaggle_1000.tsv.gz", "criteo", "label", 1000, 205),
    ("kaggle_tiny_train.csv.gz", None, "Label", 1999, 418),
    ("kaggle_200.csv.gz", None, "label", 200, 49),
    ("kaggle_115.csv.gz", None, "label", 115, 26),
]


@pytest.mark.parametrize(("name", "format_", "label", "rows", "positive"), CRITEO)
def test_criteo_samples(real_logs, tmp_path, name, format_, label, rows, positive):
    log = open_log(real_logs / "criteo" / name, format=format_)
    numeric = [f"I{i}" for i in range(1, 14)]
    schema = infer_schema(log, label=label, numeric=numeric, categorical=[f"C{i}" for i in range(1, 27)])
    assert len(schema.features) == 26
    encoder = Encoder.fit(log, schema)
    assert encoder.label_counts == (rows - positive, positive)
    whole = Encoded.concat([encoder.encode(batch) for batch in encoder.batches(log)])
    assert np.isfinite(whole.dense).all()
    for j, table in enumerate(encoder.tables.values()):
        assert (np.bincount(whole.ids[:, j], minlength=table.num_rows) == table.counts).all()
    train, test = write_log(tmp_path / "encoded", log, encoder)
    assert len(train) + len(test) == rows


def test_the_number_of_empty_cells(real_logs):
    log = open_log(real_logs / "criteo" / "kaggle_tiny_train.csv.gz")
    schema = infer_schema(log, label="Label", categorical=[f"C{i}" for i in range(1, 27)], ignore=["Id"])
    encoder = Encoder.fit(log, schema, min_count=1)
    numeric = Encoder.fit(log, infer_schema(log, label="Label", numeric=[f"I{i}" for i in range(1, 14)], ignore=["Id"]))
    empty = sum(int(encoder.counts[f"C{i}"][0]) for i in range(1, 27)) + sum(numeric.num_missing.values())
    assert empty == 11_626


def test_a_train_encoder_reads_the_unlabelled_file(real_logs):
    log = open_log(real_logs / "criteo" / "kaggle_tiny_train.csv.gz")
    encoder = Encoder.fit(log, infer_schema(log, label="Label", ignore=["Id"]))
    other = open_log(real_logs / "criteo" / "kaggle_tiny_test.csv.gz")
    rows = [encoder.encode(batch, labels=False) for batch in encoder.batches(other, labels=False)]
    assert sum(map(len, rows)) == 1999
    assert 0.5 < (rows[0].ids > 0).mean() < 1
    with pytest.raises(InputError, match="`Label` is missing"):
        encoder.batches(other)


def test_labels_of_frappe_as_text(real_logs, tmp_path):
    """The lines end in a carriage return, and the label is -1 or 1."""
    import gzip

    text = gzip.decompress((real_logs / "frappe" / "test.libfm.gz").read_bytes()).decode()
    assert "\r\n" in text
    path = tmp_path / "frappe.csv"
    path.write_bytes(("label user item\r\n" + text).replace(" ", ",").replace(":1,", ",").encode())
    with pytest.raises(InputError, match=r"row 2 of .* has 11 fields, expected 3"):
        list(open_log(path).batches())
    names = ",".join(f"f{i}" for i in range(10))
    path.write_bytes(f"label,{names}\r\n{text}".replace(" ", ",").replace(":1", "").encode())
    log = open_log(path)
    encoder = Encoder.fit(log, infer_schema(log, label="label", categorical=[f"f{i}" for i in range(10)]))
    assert encoder.label_counts == (28_860 - 9_536, 9_536)
    assert sum(encoder.num_rows.values()) - 10 <= 5_382


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """Two million rows of text, 70 MB: the reader holds a few blocks, the vocabularies what they must."""
    program = f"""
import resource, pathlib, numpy as np
import pyarrow.csv, pyarrow.parquet, numba
path = pathlib.Path({str(tmp_path)!r}) / "log.csv"
rng = np.random.default_rng(0)
with path.open("w") as file:
    file.write("click,user,item,price\\n")
    for _ in range(20):
        rows = zip(rng.integers(0, 2, 100_000), rng.integers(0, 50_000, 100_000), rng.integers(0, 9_000, 100_000))
        file.writelines(f"{{c}},{{u}},item-{{i:012d}},{{u / 7:.4f}}\\n" for c, u, i in rows)
from vitalfew.data import Batches, Encoder, infer_schema, open_log, write_log
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
log = open_log(path)
encoder = Encoder.fit(log, infer_schema(log, label="click", categorical=["user"]))
train, test = write_log(path.parent / "encoded", log, encoder)
rows = sum(len(batch) for batch in Batches(train, 4096, blocks_in_memory=4).epoch(0))
print(len(train) + len(test), rows == len(train), peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    num_rows, complete, grown = run.stdout.split()
    assert (num_rows, complete) == ("2000000", "True")
    assert float(grown) < 400


def test_importing_the_package_is_light():
    program = "import vitalfew.data, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"pyarrow", "numba", "numpy", "torch"} & set(run.stdout.split())
