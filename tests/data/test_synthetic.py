"""Laws of the synthetic logs, and their skew against Meta's published statistics."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score

from vitalfew.core.errors import InputError
from vitalfew.data._draws import rank_of
from vitalfew.data._popularity import _non_negative_least_squares
from vitalfew.data.synthetic import (
    CRITEO_KAGGLE_ROWS,
    CRITEO_NUM_DENSE,
    META_2021,
    META_2022,
    CriteoLike,
    Popularity,
    UseHistogram,
    fit_popularity,
    popularity_trace,
    scatter,
    write_criteo_like,
    zipf_trace,
)

META = [("2021_t856_bs65536.txt", META_2021), ("2022_t788_bs131072.txt", META_2022)]

popularities = (
    st.lists(st.floats(0, 1e6), min_size=1, max_size=25)
    .filter(lambda rows: sum(rows) > 0)
    .map(lambda rows: Popularity(tuple(rows)))
)
seeds = st.integers(0, 2**64)


def published(folder: Path, name: str) -> UseHistogram:
    """Read the first entry of a file of locality statistics."""
    entry = (folder / "meta-locality" / name).read_text().split("\n\n")[0]
    lookups, distinct = (int(re.findall(rf"# of {what}: (\d+)", entry)[0]) for what in ("indices", "unique cols"))
    shares = [float(share) for share in re.findall(r"^\(.*: ([\d.]+)$", entry, re.MULTILINE)]
    return UseHistogram(lookups, distinct, tuple(shares[:17]), tuple(shares[17:]))


class TestPublishedStatistics:
    @pytest.mark.data
    @pytest.mark.parametrize(("name", "constant"), META)
    def test_constants_are_the_fit(self, real_logs: Path, name: str, constant: Popularity) -> None:
        fitted = fit_popularity(published(real_logs, name))
        np.testing.assert_allclose(constant.rows, fitted.rows, rtol=0.01)
        assert constant.uses == pytest.approx(fitted.uses, rel=1e-3)

    @pytest.mark.data
    @pytest.mark.parametrize(("name", "constant"), META)
    def test_trace_repeats_the_histogram(self, real_logs: Path, name: str, constant: Popularity) -> None:
        target = published(real_logs, name)
        trace = UseHistogram.of(popularity_trace(constant, 1_000_000, round(constant.uses * 1_000_000), seed=1))
        assert trace.distance(target) <= 0.005  # the requirement is .02
        assert trace.lookups / trace.distinct == pytest.approx(target.lookups / target.distinct, rel=0.01)

    @pytest.mark.data
    def test_cardinalities(self, real_logs: Path) -> None:
        lines = (real_logs / "criteo" / "cardinalities_kaggle.txt").read_text().split()
        assert tuple(map(int, lines)) == CRITEO_KAGGLE_ROWS

    def test_sizes(self) -> None:
        assert len(CRITEO_KAGGLE_ROWS) == 26
        assert sum(CRITEO_KAGGLE_ROWS) == 33_762_577
        assert CRITEO_NUM_DENSE == 13


class TestUseHistogram:
    @given(st.lists(st.integers(-5, 40), min_size=1, max_size=300), st.integers(2, 9))
    def test_equals_a_plain_count(self, ids: list[int], num_bins: int) -> None:
        uses = Counter(ids)
        bins = Counter(min((n - 1).bit_length(), num_bins - 1) for n in uses.values())
        ours = UseHistogram.of(ids, num_bins=num_bins)
        assert (ours.lookups, ours.distinct) == (len(ids), len(uses))
        assert ours.rows == pytest.approx([bins[b] / len(uses) for b in range(num_bins)])
        lookups = [
            sum(n for n in uses.values() if min((n - 1).bit_length(), num_bins - 1) == b) for b in range(num_bins)
        ]
        assert ours.accesses == pytest.approx([n / len(ids) for n in lookups])
        assert ours.distance(ours) == 0

    def test_distance_sees_rows_and_lookups(self) -> None:
        a = UseHistogram(10, 5, (0.5, 0.5), (0.3, 0.7))
        assert a.distance(UseHistogram(10, 5, (0.5, 0.5), (0.1, 0.9))) == pytest.approx(0.2)
        assert a.distance(UseHistogram(10, 5, (0.9, 0.1), (0.3, 0.7))) == pytest.approx(0.4)

    def test_bad_input(self) -> None:
        with pytest.raises(InputError, match="1 id and 2 bins"):
            UseHistogram.of([])
        with pytest.raises(InputError, match="1 id and 2 bins"):
            UseHistogram.of([1], num_bins=1)
        with pytest.raises(InputError, match="cannot have 3 distinct rows"):
            UseHistogram(2, 3, (1.0, 0.0), (1.0, 0.0))
        with pytest.raises(InputError, match="2 or more bins"):
            UseHistogram(3, 3, (1.0, 0.0), (1.0,))
        with pytest.raises(InputError, match="sum to 1"):
            UseHistogram(3, 3, (1.0, float("nan")), (1.0, 0.0))
        with pytest.raises(InputError, match="cannot be compared"):
            UseHistogram.of([1]).distance(UseHistogram.of([1], num_bins=3))


class TestPopularity:
    @given(popularities)
    def test_curve_is_a_lorenz_curve(self, law: Popularity) -> None:
        covered = law.coverage(np.linspace(0, 1, 101))
        assert covered[0] == 0
        assert covered[-1] == pytest.approx(1)
        steps = np.diff(covered)
        assert steps.min() >= 0
        assert np.diff(steps).max() <= 1e-9  # the more popular rows come first

    @given(popularities, st.floats(0, 1, exclude_max=True), st.integers(1, 2**48))
    def test_a_draw_is_the_row_where_the_curve_passes(self, law: Popularity, covered: float, num_ids: int) -> None:
        rank = rank_of(covered, num_ids, *law.edges())
        assert 0 <= rank < num_ids
        low, high = law.coverage([rank / num_ids, (rank + 1) / num_ids])
        assert low - 1e-9 <= covered <= high + 1e-9

    @pytest.mark.parametrize("rows", [(), (0.0,), (-1.0, 2.0), (float("inf"),), (float("nan"),)])
    def test_bad_rows(self, rows: tuple[float, ...]) -> None:
        with pytest.raises(InputError, match="rows must be"):
            Popularity(rows)

    def test_bad_numbers(self) -> None:
        with pytest.raises(InputError, match="uses must be"):
            Popularity((1.0,), uses=0.0)
        with pytest.raises(InputError, match="must lie in"):
            META_2021.coverage(1.1)


class TestFit:
    def test_finds_the_number_of_unseen_rows(self) -> None:
        ids = np.random.default_rng(0).integers(0, 100_000, 20_000)
        assert len(np.unique(ids)) < 20_000
        assert 20_000 / fit_popularity(UseHistogram.of(ids)).uses == pytest.approx(100_000, rel=0.1)

    @pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
    def test_zipf_laws_are_within_reach(self, exponent: float) -> None:
        truth = UseHistogram.of(zipf_trace(100_000, 500_000, exponent, seed=1))
        law = fit_popularity(truth)
        num_ids = round(truth.lookups / law.uses)
        again = UseHistogram.of(popularity_trace(law, num_ids, truth.lookups, seed=2))
        assert again.distance(truth) <= 0.02
        assert again.distinct == pytest.approx(truth.distinct, rel=0.02)

    @given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(2, 8))
    @settings(max_examples=30)
    def test_any_log_has_a_fit(self, ids: list[int], num_bins: int) -> None:
        law = fit_popularity(UseHistogram.of(ids, num_bins=num_bins))
        assert law.coverage(1.0) == pytest.approx(1)

    @given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 12))
    def test_least_squares_equal_those_of_scipy(self, seed: int, num_unknowns: int, extra: int) -> None:
        rng = np.random.default_rng(seed)
        design, target = rng.normal(size=(num_unknowns + extra, num_unknowns)), rng.normal(size=num_unknowns + extra)
        np.testing.assert_allclose(_non_negative_least_squares(design, target), nnls(design, target)[0], atol=1e-8)


class TestTraces:
    def test_frequencies_follow_the_curve(self) -> None:
        law, length = Popularity((1, 5, 0, 40)), 400_000
        expected = length * np.diff(law.coverage(np.arange(21) / 20))
        drawn = np.bincount(popularity_trace(law, 20, length, seed=4), minlength=20)
        assert (np.abs(drawn - expected) < 5 * np.sqrt(expected)).all()

    @pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
    def test_frequencies_follow_zipf(self, exponent: float) -> None:
        weights = np.arange(1, 31) ** -exponent
        expected = 300_000 * weights / weights.sum()
        drawn = np.bincount(zipf_trace(30, 300_000, exponent, seed=4), minlength=30)
        assert (np.abs(drawn - expected) < 5 * np.sqrt(expected)).all()

    @given(st.integers(1, 2**48), st.integers(0, 50), seeds)
    def test_ids_lie_in_the_table(self, num_ids: int, length: int, seed: int) -> None:
        ids = popularity_trace(META_2021, num_ids, length, seed=seed)
        assert (ids.dtype, ids.shape) == (np.int64, (length,))
        assert ((ids >= 0) & (ids < num_ids)).all()
        np.testing.assert_array_equal(ids, popularity_trace(META_2021, num_ids, length, seed=seed))

    @given(st.integers(1, 500), st.integers(0, 50), st.floats(0, 3), seeds)
    def test_zipf_ids_lie_in_the_table(self, num_ids: int, length: int, exponent: float, seed: int) -> None:
        ids = zipf_trace(num_ids, length, exponent, seed)
        assert (ids.dtype, ids.shape) == (np.int64, (length,))
        assert ((ids >= 0) & (ids < num_ids)).all()
        np.testing.assert_array_equal(ids, zipf_trace(num_ids, length, exponent, seed))

    def test_a_shorter_trace_is_the_start_of_a_longer_one(self) -> None:
        long = popularity_trace(META_2021, 1000, 100, seed=9)
        np.testing.assert_array_equal(popularity_trace(META_2021, 1000, 10, seed=9), long[:10])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [((0, 1, 1.0), "1 to"), ((5, -1, 1.0), "length"), ((5, 1, -1.0), "exponent"), ((5, 1, 1.0, -1), "seed")],
    )
    def test_bad_input(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(InputError, match=message):
            zipf_trace(*arguments)

    def test_bad_input_by_popularity(self) -> None:
        for num_ids, length, message in ((0, 1, "1 to"), (2**48 + 1, 1, "1 to"), (5, -1, "length")):
            with pytest.raises(InputError, match=message):
                popularity_trace(META_2021, num_ids, length)


class TestScatter:
    @given(st.integers(1, 3000), seeds | st.tuples(seeds, st.integers(0, 100)))
    def test_is_one_to_one(self, num_ids: int, seed: int | tuple[int, int]) -> None:
        assert sorted(scatter(np.arange(num_ids), num_ids, seed=seed).tolist()) == list(range(num_ids))

    @given(st.integers(1, 2**48), st.data(), seeds)
    def test_is_one_to_one_on_large_tables(self, num_ids: int, data: st.DataObject, seed: int) -> None:
        ids = data.draw(st.lists(st.integers(0, num_ids - 1), unique=True, max_size=30))
        renamed = scatter(ids, num_ids, seed=seed)
        assert len(set(renamed.tolist())) == len(ids)
        assert all(0 <= i < num_ids for i in renamed)

    def test_leaves_no_order(self) -> None:
        num_ids = 100_000
        renamed = scatter(np.arange(num_ids), num_ids, seed=3)
        others = scatter(np.arange(num_ids), num_ids, seed=4)
        for a, b in ((np.arange(num_ids), renamed), (renamed[:-1], renamed[1:]), (renamed, others)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
        # The first thousand fall on pages of a hundred as a random thousand do: 632 of 1,000 pages are hit.
        assert len(np.unique(renamed[:1000] // 100)) == pytest.approx(632, abs=60)

    def test_keeps_the_shape(self) -> None:
        ids = np.arange(6, dtype=np.int32).reshape(2, 3)
        np.testing.assert_array_equal(scatter(ids, 9), scatter(ids.ravel(), 9).reshape(2, 3))
        assert scatter([], 9).shape == (0,)

    @pytest.mark.parametrize(
        ("ids", "num_ids", "message"),
        [([0.5], 3, "whole numbers"), ([3], 3, "must lie in"), ([-1], 3, "must lie in"), ([], 0, "1 to")],
    )
    def test_bad_input(self, ids: list[float], num_ids: int, message: str) -> None:
        with pytest.raises(InputError, match=message):
            scatter(ids, num_ids)

    def test_bad_seed(self) -> None:
        with pytest.raises(InputError, match="seed"):
            scatter([0], 3, seed=(1, -1))


class TestCriteoLike:
    @given(st.integers(0, 60), st.integers(1, 70), st.integers(0, 5), st.integers(0, 60))
    def test_batches_are_slices_of_one_log(self, num_rows: int, batch_size: int, seed: int, start: int) -> None:
        log = CriteoLike(num_rows, cardinalities=(1, 3, 1000), seed=seed)
        start = min(start, num_rows)
        whole = log.rows(start, num_rows)
        batches = list(log.batches(batch_size, start=start))
        assert sum(len(batch.label) for batch in batches) == num_rows - start
        for i, column in enumerate(whole):
            if batches:
                np.testing.assert_array_equal(np.concatenate([batch[i] for batch in batches]), column)

    def test_a_longer_log_starts_alike(self) -> None:
        for short, long in zip(CriteoLike(50).rows(0, 50), CriteoLike(500).rows(0, 50), strict=True):
            np.testing.assert_array_equal(short, long)

    def test_same_log_in_another_process(self) -> None:
        code = (
            "import hashlib; from vitalfew.data.synthetic import CriteoLike\n"
            "batch = CriteoLike(10_000, seed=5).rows(4_000, 6_000)\n"
            "print(hashlib.sha256(b''.join(column.tobytes() for column in batch)).hexdigest())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        ours = CriteoLike(10_000, seed=5).rows(0, 10_000)
        digest = hashlib.sha256(b"".join(column[4_000:6_000].tobytes() for column in ours)).hexdigest()
        assert done.stdout.strip() == digest

    def test_shapes_and_ranges(self) -> None:
        batch = CriteoLike(5000).rows(0, 5000)
        assert [column.dtype for column in batch] == [np.float32, np.float32, np.int64, np.float32]
        assert [column.shape for column in batch] == [(5000,), (5000, 13), (5000, 26), (5000,)]
        assert (batch.ids >= 0).all()
        assert (batch.ids < CRITEO_KAGGLE_ROWS).all()
        assert set(np.unique(batch.label)) == {0, 1}
        assert (batch.dense >= 0).all()
        counts = np.expm1(batch.dense.astype(np.float64))
        np.testing.assert_allclose(counts, counts.round(), atol=1e-2)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("popularity", [META_2021, META_2022])
    def test_labels_follow_the_truth(self, seed: int, popularity: Popularity) -> None:
        batch = CriteoLike(100_000, popularity=popularity, seed=seed).rows(0, 100_000)
        assert batch.label.mean() == pytest.approx(0.25, abs=0.01)
        assert 0.78 <= roc_auc_score(batch.label, batch.truth) <= 0.82
        chance = 1 / (1 + np.exp(-batch.truth.astype(np.float64)))
        for part in np.array_split(np.argsort(chance), 10):
            spread = np.sqrt((chance[part] * (1 - chance[part])).sum())
            assert abs((batch.label[part] - chance[part]).sum()) < 5 * spread

    @pytest.mark.parametrize("cardinalities", [(1,), (3,), (10, 20), (1000,) * 40])
    def test_labels_of_other_shapes(self, cardinalities: tuple[int, ...]) -> None:
        batch = CriteoLike(50_000, cardinalities=cardinalities).rows(0, 50_000)
        assert batch.label.mean() == pytest.approx(0.25, abs=0.02)
        assert 0.77 <= roc_auc_score(batch.label, batch.truth) <= 0.83

    def test_skew_is_that_of_the_curve(self) -> None:
        log = CriteoLike(100_000, scatter=False)
        ids = log.rows(0, 100_000).ids
        for share in (0.001, 0.01, 0.1):
            covered = (ids[:, 2] < share * CRITEO_KAGGLE_ROWS[2]).mean()
            assert covered == pytest.approx(META_2021.coverage(share), abs=0.01)

    def test_fields_are_independent(self) -> None:
        ids = CriteoLike(20_000, cardinalities=(10_000,) * 4, scatter=False).rows(0, 20_000).ids
        related = np.corrcoef(ids < 100, rowvar=False) - np.eye(4)
        assert np.abs(related).max() < 0.05

    def test_scatter_renames_and_changes_nothing_else(self) -> None:
        settings = {"cardinalities": (3, 500, 2_000_000), "seed": 8}
        plain = CriteoLike(1000, scatter=False, **settings).rows(0, 1000)
        scattered = CriteoLike(1000, **settings).rows(0, 1000)
        for field, num_ids in enumerate((3, 500, 2_000_000)):
            expected = scatter(plain.ids[:, field], num_ids, seed=(8, field))
            np.testing.assert_array_equal(scattered.ids[:, field], expected)
        for name in ("label", "dense", "truth"):
            np.testing.assert_array_equal(getattr(scattered, name), getattr(plain, name))

    def test_seeds_differ(self) -> None:
        a, b = (CriteoLike(1000, seed=seed).rows(0, 1000) for seed in (1, 2))
        assert (a.ids[:, 2] == b.ids[:, 2]).mean() < 0.01
        assert abs(np.corrcoef(a.truth, b.truth)[0, 1]) < 0.2

    def test_a_model_can_learn(self) -> None:
        num_train, cardinalities = 80_000, (20, 50, 200, 1000)
        batch = CriteoLike(100_000, cardinalities=cardinalities, seed=1).rows(0, 100_000)
        one_hot = [batch.dense] + [batch.ids[:, f, None] == np.arange(12) for f in range(2)]
        features = np.hstack([np.asarray(part, np.float32) for part in one_hot])
        model = LinearRegression().fit(features[:num_train], batch.label[:num_train])
        learned = roc_auc_score(batch.label[num_train:], model.predict(features[num_train:]))
        best = roc_auc_score(batch.label[num_train:], batch.truth[num_train:])
        assert 0.6 < learned < best

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_rows": -1}, "num_rows"),
            ({"num_rows": 1, "cardinalities": ()}, "one table or more"),
            ({"num_rows": 1, "cardinalities": (5, 0)}, "1 to"),
            ({"num_rows": 1, "seed": -1}, "seed"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            CriteoLike(**settings)

    def test_bad_rows(self) -> None:
        log = CriteoLike(10, cardinalities=(5,))
        for start, stop in ((-1, 3), (3, 2), (0, 11)):
            with pytest.raises(InputError, match="rows must lie in"):
                log.rows(start, stop)
        with pytest.raises(InputError, match="batch_size"):
            next(log.batches(0))
        with pytest.raises(InputError, match="start"):
            next(log.batches(1, start=11))


class TestWrite:
    def test_file_holds_the_log(self, tmp_path: Path) -> None:
        log, seen = CriteoLike(150_000, cardinalities=(7, 5_000_000), seed=3), []
        write_criteo_like(tmp_path / "log.parquet", log, progress=lambda done, total: seen.append((done, total)))
        table = pq.read_table(tmp_path / "log.parquet")
        assert table.column_names == ["label", *(f"I{i}" for i in range(1, 14)), "C1", "C2"]
        batch = log.rows(0, 150_000)
        np.testing.assert_array_equal(table["label"].to_numpy(), batch.label)
        for i in range(13):
            np.testing.assert_array_equal(table[f"I{i + 1}"].to_numpy(), batch.dense[:, i])
        for i in range(2):
            np.testing.assert_array_equal(table[f"C{i + 1}"].to_numpy(), batch.ids[:, i])
        assert seen == [(65_536, 150_000), (131_072, 150_000), (150_000, 150_000)]
        assert table.schema.metadata[b"synthetic"].decode() == repr(log)

    def test_time_grows_over_seven_days(self, tmp_path: Path) -> None:
        write_criteo_like(tmp_path / "log.parquet", CriteoLike(70_000, cardinalities=(7,)), time=True)
        table = pq.read_table(tmp_path / "log.parquet")
        assert table.schema.field("time").type == pa.timestamp("us")
        time = table["time"].to_numpy().astype("datetime64[us]").astype(np.int64)
        assert time[0] == 0
        assert (np.diff(time) > 0).all()
        assert time[-1] < 7 * 86_400_000_000 <= time[-1] + 2 * np.diff(time).max()

    @pytest.mark.parametrize("num_rows", [0, 10])
    def test_a_number_of_rows_will_do(self, num_rows: int, tmp_path: Path) -> None:
        write_criteo_like(tmp_path / "log.parquet", num_rows, time=True)
        assert pq.read_metadata(tmp_path / "log.parquet").num_rows == num_rows
        assert len(pq.read_schema(tmp_path / "log.parquet").names) == 1 + 13 + 26 + 1

    def test_stopped_write_leaves_the_former_file(self, tmp_path: Path) -> None:
        (tmp_path / "log.parquet").write_text("former")

        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_criteo_like(tmp_path / "log.parquet", CriteoLike(10, cardinalities=(5,)), progress=stop)
        assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("log.parquet", "former")]
