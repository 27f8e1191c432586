"""Rows on disk: the same bits whatever they lay in, and what is not whole is refused before anything changes."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitalfew.core import StorageError
from vitalfew.embeddings import (
    SGD,
    Adagrad,
    EmbeddingBags,
    LazyAdam,
    Optimizer,
    Prefetch,
    RowwiseAdagrad,
    Table,
    TieredEmbeddings,
)
from vitalfew.tiers import LFU, LRU, Dram, File

Refuses = Callable[..., AbstractContextManager[None]]
RULES = [SGD(0.1), RowwiseAdagrad(0.1), Adagrad(0.1), LazyAdam(0.1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["memory", "disk", "ring", "slots"]
TABLES = (Table("user", 40, 3), Table("item", 25, 3))


@contextmanager
def made(
    kind: str,
    tables: tuple[Table, ...] = TABLES,
    rule: Optimizer = RULES[3],
    seed: int = 0,
    folder: Path | None = None,
    **settings: object,
) -> Iterator[EmbeddingBags]:
    settings |= {"generator": torch.Generator().manual_seed(seed), "seed": seed}
    if kind == "memory":
        yield EmbeddingBags(tables, rule, **settings)
        return
    with tempfile.TemporaryDirectory() as temporary:
        file = File(folder or Path(temporary) / "rows")
        tiers = {"disk": [Dram(12), file], "ring": [Dram(12), Dram(7), file], "slots": [Dram("8 MiB")]}[kind]
        with TieredEmbeddings(tables, rule, tiers=tiers, policy=LRU(), **settings) as tiered:
            yield tiered


def train(bags: EmbeddingBags, steps: range) -> EmbeddingBags:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        ids = torch.stack([torch.randint(0, t.num_rows, (5,), generator=draw) for t in bags.tables], 1)
        (bags(ids) * torch.randn(bags.dim, generator=draw)).square().sum().backward()
        bags.step()
    return bags


def content(bags: EmbeddingBags) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in bags.columns(0, bags.num_rows).items() if name != "stats"}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8)) for k in one
    )


@contextmanager
def new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "export"


def sizes(dim: int) -> st.SearchStrategy[tuple[Table, ...]]:
    rows = st.lists(st.integers(1, 60), min_size=1, max_size=2)
    return rows.map(lambda ns: tuple(Table(f"t {i}\u00e9", n, dim) for i, n in enumerate(ns)))


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
@given(
    tables=st.integers(1, 9).flatmap(sizes),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    shard_bytes=st.sampled_from([1, 100, 1000, 1 << 30]),
)
@settings(max_examples=12)
def test_bits_do_not_depend_on_where_rows_lie(source, target, tables, rule, dtype, shard_bytes) -> None:
    with (
        new_folder() as folder,
        made(source, tables, rule, seed=1, dtype=dtype) as one,
        made(target, tables, type(rule)(7.0), seed=2, dtype=dtype) as other,
    ):
        train(one, range(4))
        train(other, range(10, 13))
        one.save(folder, shard_bytes=shard_bytes)
        other.load(folder)
        assert same(content(one), content(other))
        assert other.get_extra_state() == one.get_extra_state()
        train(one, range(4, 8))
        train(other, range(4, 8))
        assert same(content(one), content(other))
        for bags in (one, other):
            if isinstance(bags, TieredEmbeddings):
                bags.store.check()


@pytest.mark.parametrize("source", KINDS)
def test_the_files_do_not_depend_on_where_rows_lie(source: str, tmp_path: Path) -> None:
    with made("memory") as plain, made(source) as bags:
        train(plain, range(5)).save(tmp_path / "a", shard_bytes=200)
        train(bags, range(5)).save(tmp_path / "b", shard_bytes=200)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names[:-1]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_those_of_the_safetensors_library(dtype: torch.dtype, tmp_path: Path) -> None:
    tables = (Table('item \u00e9"', 7, 3), Table("user", 10, 3))  # by name, as the library has them
    bags = train(EmbeddingBags(tables, LazyAdam(0.1), dtype=dtype), range(3))
    bags.save(tmp_path / "export")
    for column in ("weight", "wide0", "wide1"):
        parts = bags.columns(0, 7)[column], bags.columns(7, 17)[column]
        named = {f"{t.name}.{column}": part.clone() for t, part in zip(tables, parts, strict=True)}
        save_file(named, tmp_path / "theirs")
        mine = tmp_path / "export" / f"rows-{column}-00001.safetensors"
        assert mine.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_large_table_is_cut_and_the_library_reads_every_part(tmp_path: Path) -> None:
    tables = (Table("small", 4, 4), Table("large", 100, 4), Table("last", 3, 4))
    bags = train(EmbeddingBags(tables, RowwiseAdagrad(0.1)), range(3))
    bags.save(tmp_path / "export", shard_bytes=30 * 16)
    manifest = json.loads((tmp_path / "export" / "rows.json").read_text())
    weights = [file for file in manifest["files"] if file["column"] == "weight"]
    names = [[tensor["name"] for tensor in file["tensors"]] for file in weights]
    assert names == [
        ["small.weight"], ["large.weight.0"], ["large.weight.1"], ["large.weight.2"], ["large.weight.3", "last.weight"],
    ]  # fmt: skip
    for file in manifest["files"]:
        path = tmp_path / "export" / file["file"]
        assert path.stat().st_size == file["bytes"]
        with safe_open(path, "pt") as opened:
            assert sorted(opened.keys()) == sorted(tensor["name"] for tensor in file["tensors"])
            for tensor in file["tensors"]:
                start = bags.span_of(tensor["table"]).start + tensor["first_row"]
                mine = bags.columns(start, start + tensor["num_rows"])[file["column"]]
                assert torch.equal(opened.get_tensor(tensor["name"]), mine)
                assert torch.equal(opened.get_slice(tensor["name"])[1:3], mine[1:3])


def test_progress_rises_to_one(tmp_path: Path) -> None:
    seen: list[float] = []
    with made("disk") as bags:
        bags.save(tmp_path / "export", shard_bytes=100, progress=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == 1
        seen.clear()
        bags.load(tmp_path / "export", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.parametrize("target", KINDS)
def test_weights_alone_begin_anew(target: str, tmp_path: Path) -> None:
    with made("memory", rule=LazyAdam(0.1)) as bags, made(target, rule=Adagrad(0.2), seed=3) as other:
        train(bags, range(3)).save(tmp_path / "export", state=False)
        train(other, range(3)).load(tmp_path / "export")
        found = content(other)
        assert torch.equal(found["weight"], bags.weight)
        assert not found["wide0"].any()
        assert (other.rows.optimizer, other.rows.seed, other.counts.steps) == (Adagrad(0.2), 3, 0)
    assert [path.name for path in sorted((tmp_path / "export").iterdir())] == [
        "rows-weight-00001.safetensors",
        "rows.json",
    ]


# -- filling


@given(
    kind=st.sampled_from(["disk", "ring", "slots"]),
    rule=st.sampled_from(RULES),
    parts=st.lists(st.lists(st.integers(0, 64), min_size=1, max_size=65, unique=True), min_size=1, max_size=6),
)
@settings(max_examples=60)
def test_any_rows_can_be_replaced_between_steps(kind: str, rule: Optimizer, parts: list[list[int]]) -> None:
    with made("memory", rule=rule) as plain, made(kind, rule=rule) as tiered:
        assert isinstance(tiered, TieredEmbeddings)
        for step, ids in enumerate(parts):
            for bags in (plain, tiered):
                train(bags, range(2 * step, 2 * step + 2))
            draw = torch.Generator().manual_seed(step)
            rows = torch.tensor(ids)
            new = {k: torch.rand((len(ids), t.shape[1]), generator=draw) for k, t in plain.columns(0, 1).items()}
            for name, column in plain.columns(0, 65).items():
                column[rows] = new[name]
            tiered.rows.end_turn("")
            tiered.rows.fill(rows.numpy(), new)
            tiered.store.check()
            assert same(content(plain), content(tiered))


def test_a_load_moves_no_row_into_a_slot_and_is_durable_after_commit(tmp_path: Path) -> None:
    with made("memory", seed=1) as bags:
        train(bags, range(3)).save(tmp_path / "export")
        with made("disk", folder=tmp_path / "rows") as other:
            assert isinstance(other, TieredEmbeddings)
            train(other, range(1)).commit()
            before = other.store.busy_slots
            missed = other.moves.missed
            other.load(tmp_path / "export")
            assert (other.store.busy_slots, other.moves.missed) == (before, missed)
            assert other.commit() == before  # those in slots are the only ones that the disk has not yet
        tiers = [Dram(12), File(tmp_path / "rows")]
        with TieredEmbeddings(TABLES, LazyAdam(0.1), tiers=tiers, resume=True) as again:
            assert same(content(again), content(bags))
            assert same(content(train(again, range(3, 6))), content(train(bags, range(3, 6))))


@pytest.mark.parametrize("policy", [LRU(), LFU()])
def test_loading_many_times_leaves_one_copy_of_each_row(policy: object, tmp_path: Path) -> None:
    tables = (Table("a", 20_000, 8),)
    exports = []
    for seed in (1, 2):
        exports.append(EmbeddingBags(tables, Adagrad(0.1), generator=torch.Generator().manual_seed(seed)))
        exports[-1].save(tmp_path / f"{seed - 1}")
    with TieredEmbeddings(tables, Adagrad(0.1), tiers=[Dram(500), File(tmp_path / "rows")], policy=policy) as bags:
        for n in range(6):
            train(bags, range(20 * n, 20 * n + 20))
            bags.load(tmp_path / f"{n % 2}")
            bags.store.check()
            assert same(content(bags), content(exports[n % 2]))
        lower = bags.store.lower
        assert lower._space.rows <= 20_000
        assert lower.holding_pages <= 2 * lower._space.pages_for(20_000) + 16


# -- what is refused


def export(folder: Path) -> Path:
    with made("memory", seed=5) as bags:
        train(bags, range(2)).save(folder / "export", shard_bytes=300)
    return folder / "export"


def remove(folder: Path) -> None:
    (folder / "rows-wide1-00002.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "rows-wide1-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def grow(folder: Path) -> None:
    path = folder / "rows-wide1-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")


def flip(folder: Path) -> None:
    path = folder / "rows-wide1-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def change_the_manifest(folder: Path) -> None:
    path = folder / "rows.json"
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 3'))


def remove_the_manifest(folder: Path) -> None:
    (folder / "rows.json").unlink()


def empty_the_manifest(folder: Path) -> None:
    (folder / "rows.json").write_text("{")


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize(("value", "damage"), [
    ("rows-wide1-00002.safetensors` cannot be read", remove),
    ("rows-wide1-00002.safetensors` is damaged: it has 259 bytes of 260", cut),
    ("rows-wide1-00002.safetensors` is damaged: it has 261 bytes of 260", grow),
    ("rows-wide1-00002.safetensors` is damaged: it is not what was written", flip),
    ("rows.json` is damaged", change_the_manifest),
    ("no such file", remove_the_manifest),
    ("is not a JSON document", empty_the_manifest),
    ("no such file", shutil.rmtree),
])  # fmt: skip
def test_damage_changes_nothing(value: str, damage, target: str, tmp_path: Path, refuses: Refuses) -> None:
    damage(folder := export(tmp_path))
    with made(target) as bags:
        before, extra = content(train(bags, range(2))), bags.get_extra_state()
        with refuses(value):
            bags.load(folder)
        assert same(content(bags), before)
        assert bags.get_extra_state() == extra


@pytest.mark.parametrize(("value", "tables", "settings"), [
    ("['user: 40 x 3', 'item: 25 x 3'], not ['user: 40 x 3', 'item: 26 x 3']", (TABLES[0], Table("item", 26, 3)), {}),
    ("['user: 40 x 3', 'item: 25 x 3'], not ['item: 25 x 3', 'user: 40 x 3']", TABLES[::-1], {}),
    ("not ['user: 40 x 4', 'item: 25 x 4']", (Table("user", 40, 4), Table("item", 25, 4)), {}),
    ("float32, not bfloat16", TABLES, {"dtype": torch.bfloat16}),
    ("trained by lazy_adam, not adagrad", TABLES, {"rule": Adagrad(0.1)}),
])  # fmt: skip
@pytest.mark.parametrize("target", ["memory", "disk"])
def test_what_does_not_fit_changes_nothing(value, tables, settings, target, tmp_path, refuses: Refuses) -> None:
    folder = export(tmp_path)
    with made(target, tables, **settings) as bags:
        before, extra = content(bags), bags.get_extra_state()
        with refuses(value):
            bags.load(folder)
        assert same(content(bags), before)
        assert bags.get_extra_state() == extra


def test_other_files_beside_are_left_alone(tmp_path: Path) -> None:
    folder = export(tmp_path)
    (folder / "README").write_text("mine")
    save_file({"other": torch.zeros(1)}, folder / "rows-weight-00009.safetensors")
    with made("disk") as bags, made("memory", seed=5) as source:
        bags.load(folder)
        assert same(content(bags), content(train(source, range(2))))


def test_bad_settings_and_a_folder_that_exists(tmp_path: Path, refuses: Refuses) -> None:
    with made("disk") as bags:
        with refuses("shard_bytes must be positive, got 0"):
            bags.save(tmp_path / "export", shard_bytes=0)
        with refuses("exists already"):
            bags.save(tmp_path)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_gradients_that_wait_are_not_lost(kind: str, tmp_path: Path, refuses: Refuses) -> None:
    folder = export(tmp_path)
    with made(kind, update="step") as bags:
        bags(torch.tensor([[1, 2]])).sum().backward()
        with refuses("a save would leave them out"):
            bags.save(tmp_path / "other")
        with refuses("a load would come between"):
            bags.load(folder)
        bags.step()
        bags.save(tmp_path / "other")
        bags.load(folder)


def test_a_load_waits_for_the_backward_and_for_the_loop(tmp_path: Path, refuses: Refuses) -> None:
    folder = export(tmp_path)
    with made("disk") as bags:
        assert isinstance(bags, TieredEmbeddings)
        out = bags(torch.tensor([[1, 2]]))
        with refuses("a forward waits"):
            bags.load(folder)
        out.sum().backward()
        bags.load(folder)
        batches = [{"ids": torch.tensor([[n, n]])} for n in range(8)]
        with Prefetch(bags, batches) as loop, closing(iter(loop)) as running:
            batch = next(running)
            bags(batch["ids"]).sum().backward()
            bags.save(tmp_path / "inside")  # while rows move
            with refuses("a loop over Prefetch is running"):
                bags.load(folder)
            inside = content(bags)
        bags.load(tmp_path / "inside")
        assert same(content(bags), inside)


# -- disks


FULL = """
import resource, sys, torch
from pathlib import Path
from vitalfew.core import StorageError
from vitalfew.embeddings import SGD, EmbeddingBags, Table, TieredEmbeddings
from vitalfew.tiers import Dram, File
folder, tiers = Path(sys.argv[1]), sys.argv[2] == "disk"
tables = [Table("a", 50_000, 8)]
bags = TieredEmbeddings(tables, SGD(0.1), tiers=[Dram(100), File(folder.parent / "rows")]) if tiers else \\
    EmbeddingBags(tables, SGD(0.1))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    bags.save(folder)
except StorageError as error:
    print(error, "|", error.hint, "|", sorted(path.name for path in folder.parent.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
bags.save(folder)
bags.load(folder)
print("went on")
"""


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_full_disk_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", FULL, str(tmp_path / "export"), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/export cannot be written: File too large" in done.stdout
    assert done.stdout.splitlines()[0].endswith("[]" if kind == "memory" else "['rows']")
    assert "went on" in done.stdout


def test_a_tier_that_fails_half_way_is_whole_after_the_next_load(tmp_path: Path) -> None:
    tables = (Table("a", 300_000, 8),)
    bags = EmbeddingBags(tables, SGD(0.1))
    bags.save(tmp_path / "export")
    with TieredEmbeddings(tables, SGD(0.1), tiers=[Dram(100), File(tmp_path / "rows")]) as tiered:
        train(tiered, range(3)).commit()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
        try:
            with pytest.raises(StorageError, match="full"):
                tiered.load(tmp_path / "export")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        tiered.store.check()
        content(tiered)  # every row can be read
        tiered.load(tmp_path / "export")
        assert same(content(tiered), content(bags))


@pytest.mark.parametrize("harm", [cut, remove])
def test_a_file_that_changes_after_the_check_is_noticed(harm: Callable[[Path], None], tmp_path: Path) -> None:
    folder = export(tmp_path)
    with made("disk") as bags, pytest.raises(StorageError, match=r"was cut|No such file") as caught:
        bags.load(folder, progress=lambda share: harm(folder) if share == 0.5 else None)
    assert caught.value.hint
    with made("disk") as bags, made("memory", seed=5) as source:
        source_rows = content(train(source, range(2)))
        shutil.rmtree(folder)
        bags.load(export(tmp_path))
        assert same(content(bags), source_rows)


def test_a_damaged_tier_is_not_saved(tmp_path: Path) -> None:
    with made("disk", (Table("a", 500, 8),), folder=tmp_path / "rows") as bags:
        for step in range(30):
            train(bags, range(step, step + 1))
        path = tmp_path / "rows" / "rows.pages"
        data = bytearray(path.read_bytes())
        data[: 1 << 16] = bytes(b ^ 1 for b in data[: 1 << 16])
        path.write_bytes(data)
        with pytest.raises(StorageError, match="is damaged"):
            bags.save(tmp_path / "export")
    assert [each.name for each in tmp_path.iterdir()] == ["rows"]


LARGE = """
import sys, torch
from pathlib import Path
from vitalfew.embeddings import Adagrad, Table, TieredEmbeddings
from vitalfew.meter.memory import PROCESS
from vitalfew.tiers import Dram, File
folder = Path(sys.argv[1])
torch.set_num_threads(1)
with TieredEmbeddings([Table("a", 100, 32)], Adagrad(0.1), tiers=[Dram("8 MiB"), File(folder / "few")]) as warm:
    warm.save(folder / "warm")
    warm.load(folder / "warm")
tables = [Table("a", 1_000_000, 32), Table("b", 600_000, 32)]
with TieredEmbeddings(tables, Adagrad(0.1), tiers=[Dram("32 MiB"), File(folder / "rows")]) as bags:
    for step in range(20):
        ids = torch.randint(0, 600_000, (2000, 2), generator=torch.Generator().manual_seed(step))
        bags(ids).sum().backward()
    for do in (bags.save, bags.load, bags.save):
        watch = PROCESS.open()
        do(folder / ("again" if (folder / "export").exists() and do == bags.save else "export"))
        PROCESS.close(watch)
        assert watch.exact
        print((watch.peak - watch.start) / 2**20)
for path in (folder / "export").glob("*.safetensors"):
    assert path.read_bytes() == (folder / "again" / path.name).read_bytes()
"""


@pytest.mark.slow
def test_memory_stays_small(tmp_path: Path) -> None:
    """410 MB of rows with their state through 32 MiB; the growth is above what the tables take already."""
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert all(float(growth) < 96 for growth in done.stdout.split()), done.stdout


def test_the_manifest_says_what_it_is_about(tmp_path: Path, refuses: Refuses) -> None:
    folder = export(tmp_path)
    manifest = json.loads((folder / "rows.json").read_text())
    assert (manifest["schema"], manifest["version"]) == ("vitalfew/rows-export", 1)
    assert (manifest["dtype"], manifest["steps"], manifest["seed"]) == ("float32", 2, 5)
    assert isinstance(manifest["first"], int)
    assert manifest["optimizer"] == LazyAdam(0.1).to_dict()
    assert manifest["tables"][1] == {"name": "item", "num_rows": 25, "dim": 3}
    assert set(load_file(folder / manifest["files"][0]["file"])) == {"user.weight.0"}
    (folder / "rows.json").write_text(json.dumps(manifest | {"version": 2}))
    with made("memory") as bags, refuses("reads up to 1"):
        bags.load(folder)
