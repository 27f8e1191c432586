"""Files of implicit feedback: the quirks that real ones have, and negatives that are none of the positives."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.data.implicit import read_adjacency, read_bags, read_libfm, read_pairs
from vitalfew.data.negatives import negatives

READERS = [read_pairs, read_adjacency, read_bags, read_libfm]


@pytest.mark.parametrize("text", ["1 2\n3 4\n", "1 2\r\n3 4\r\n", "1 2 \n3 4  ", "\t1\t2\n\n3 4", "01 2\n3 0004\n\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_pairs(write, text, packed):
    path = write(gzip.compress(text.encode()) if packed else text, "log.txt")
    pairs = read_pairs(path)
    assert (pairs.users.tolist(), pairs.items.tolist()) == ([1, 3], [2, 4])
    assert (pairs.num_users, pairs.num_items) == (4, 5)


def test_adjacency_rows_may_be_empty(write):
    pairs = read_adjacency(write("0 5 6\n1\n2 \r\n\n0 7\n9"))
    assert (pairs.users.tolist(), pairs.items.tolist()) == ([0, 0, 0], [5, 6, 7])
    assert (pairs.num_users, pairs.num_items) == (10, 8)


@pytest.mark.parametrize(
    ("text", "bags"),
    [("1 2\n\n3", [[1, 2], [], [3]]), ("1 2\n\n", [[1, 2], []]), ("\n7 7 \n", [[], [7, 7]]), ("7", [[7]])],
)
def test_bags(write, text, bags):
    ids, offsets = read_bags(write(text))
    assert [part.tolist() for part in np.split(ids, offsets[1:-1])] == bags


def test_libfm(write):
    rows = read_libfm(write("1 0:1 7:0.25 \r\n-1 3:-2e3\n\n0.5\n+1 4:.5"))
    assert rows.labels.tolist() == [1, -1, 0.5, 1]
    assert rows.ids.tolist() == [0, 7, 3, 4]
    assert rows.values.tolist() == [1, 0.25, -2000, 0.5]
    assert rows.offsets.tolist() == [0, 2, 3, 3, 4]
    with pytest.raises(InputError, match="row 1 has 1 features, row 0 has 2"):
        rows.fields()


@given(st.lists(st.lists(st.integers(0, 10**18 - 1), max_size=5), min_size=1, max_size=8).filter(any))
def test_bags_come_back(tmp_path_factory, bags):
    path = tmp_path_factory.mktemp("bags") / "bags.dat"
    path.write_text("".join(" ".join(map(str, bag)) + "\n" for bag in bags))
    ids, offsets = read_bags(path)
    assert [part.tolist() for part in np.split(ids, offsets[1:-1])] == bags


@pytest.mark.parametrize(
    ("read", "text", "line"),
    [
        (read_pairs, "1 2\n3\n", 2),
        (read_pairs, "1 2\n\n1 2 3", 3),
        (read_pairs, "1 2\r\n1 -2\r\n", 2),
        (read_pairs, "1 2\n1 2.0", 2),
        (read_pairs, "user item\n1 2", 1),
        (read_pairs, "1 2\n1 1234567890123456789", 2),
        (read_adjacency, "1 2\n1 a\n", 2),
        (read_bags, "1\n2\n3,4\n", 3),
        (read_bags, "1\n\xe9\n", 2),
        (read_libfm, "1 2:1\n1 2\n", 2),
        (read_libfm, "1 2:1\n3:1 2:1\n", 2),
        (read_libfm, "1 2:1\n1 :1\n", 2),
        (read_libfm, "1 2:1\n1 2:\n", 2),
        (read_libfm, "1 2:1\n1 2: 1\n", 2),
        (read_libfm, "1 2:1\n1 2:3:1\n", 2),
        (read_libfm, "1 2:1\n1 2.5:1\n", 2),
        (read_libfm, "1 2:1\n1 2:1.2.3\n", 2),
        (read_libfm, "1 2:1\nnan 2:1\n", 2),
        (read_libfm, "1 2:1\n1 2:1_0\n", 2),
        (read_libfm, "1 2:1\n1 2:1e999\n", 2),
        (read_libfm, "1 2:1\n-1e999 2:1\n", 2),
        (read_libfm, "1 2:1\n1 2:" + 40 * "1", 2),
    ],
)
def test_errors_name_file_and_line(write, read, text, line):
    path = write(text)
    with pytest.raises(InputError, match=rf"line {line} of `{path}`"):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_files_that_are_none(tmp_path, write, read):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "absent")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    for nothing in ("", " \n\r\n"):
        with pytest.raises(InputError, match="is empty"):
            read(write(nothing))
    with pytest.raises(InputError, match="is damaged"):
        read(write(gzip.compress(b"1 2\n" * 1000)[:-9], "cut.gz"))
    damaged = bytearray(gzip.compress(b"1 2\n" * 1000))
    damaged[20] ^= 255
    with pytest.raises(InputError, match="is damaged"):
        read(write(bytes(damaged), "damaged.gz"))


def test_users_without_any_item(write):
    with pytest.raises(InputError, match="no user of"):
        read_adjacency(write("1\n2\n"))


# Counts as stated in the read-me file of the data folder; each file as it was published.


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "users", "pairs", "distinct", "item_space"),
    [("amazon-book", 52_643, 603_378, 82_629, 91_599), ("gowalla", 29_858, 217_242, 38_546, 40_981)],
)
def test_real_adjacency(real_logs, name, users, pairs, distinct, item_space):
    found = read_adjacency(real_logs / name / "test.txt.gz")
    assert (found.num_users, len(found.items), found.num_items) == (users, pairs, item_space)
    assert len(np.unique(found.items)) == distinct
    assert users - len(np.unique(found.users)) == (4 if name == "amazon-book" else 0)


@pytest.mark.data
def test_real_pairs(real_logs):
    found = read_pairs(real_logs / "video-games" / "Video.txt.gz")
    assert len(found.users) == 287_107
    assert (found.users.min(), found.num_users - 1, len(np.unique(found.users))) == (1, 31_013, 31_013)
    assert (found.items.min(), found.num_items - 1, len(np.unique(found.items))) == (1, 23_715, 23_715)
    lengths = np.bincount(found.users)[1:]
    assert (round(lengths.mean(), 1), (lengths >= 21).sum()) == (9.3, 1_746)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "bags", "accesses", "distinct", "median", "longest"),
    [
        ("retail/retail.dat.gz", 88_162, 908_576, 16_470, 8, 76),
        ("kosarak/kosarak_part.dat.gz", 36_683, 294_022, 17_034, 3, 699),
    ],
)
def test_real_bags(real_logs, name, bags, accesses, distinct, median, longest):
    ids, offsets = read_bags(real_logs / name)
    lengths = np.diff(offsets)
    assert (len(lengths), len(ids), len(np.unique(ids))) == (bags, accesses, distinct)
    assert (np.median(lengths), lengths.max()) == (median, longest)
    repeated = accesses - len(np.unique(np.repeat(np.arange(bags), lengths) * (ids.max() + 1) + ids))
    assert repeated == ("kosarak" in name)


@pytest.mark.data
@pytest.mark.parametrize(("part", "rows", "positive"), [("validation", 57_722, 19_063), ("test", 28_860, 9_536)])
def test_real_libfm(real_logs, part, rows, positive):
    found = read_libfm(real_logs / "frappe" / f"{part}.libfm.gz")
    assert found.fields().shape == (rows, 10)
    assert (np.unique(found.labels).tolist(), (found.labels == 1).sum()) == ([-1, 1], positive)
    assert (found.values == 1).all()
    assert found.ids.max() < 5_382


@st.composite
def some_pairs(draw):
    num_items = draw(st.integers(2, 12))
    pair = st.tuples(st.integers(-3, 5), st.integers(0, num_items - 1))
    pairs = draw(st.lists(pair, min_size=1, max_size=40))
    lacking = {user: set(range(num_items)) - {i for u, i in pairs if u == user} for user, _ in pairs}
    return [pair for pair in pairs if lacking[pair[0]]], num_items


@given(some_pairs().filter(lambda found: found[0]), st.integers(1, 5), st.sampled_from(["uniform", "popularity"]))
def test_no_negative_is_a_positive(found, per_positive, by):
    pairs, num_items = found
    users, items = np.array(pairs).T
    popular = set(items)
    if by == "popularity" and any(popular <= {i for u, i in pairs if u == user} for user in users):
        with pytest.raises(InputError, match="has every item there is to draw from"):
            negatives((users, items), num_items, by=by)
        return
    samples = negatives((users, items), num_items, per_positive=per_positive, by=by)
    shaped = [column.reshape(len(pairs), 1 + per_positive) for column in samples]
    assert (shaped[0] == users[:, None]).all()
    assert (shaped[1][:, 0] == items).all()
    assert (shaped[2] == [1] + [0] * per_positive).all()
    drawn = set(zip(samples.user[samples.label == 0].tolist(), samples.item[samples.label == 0].tolist(), strict=True))
    assert not drawn & set(pairs)
    assert all(0 <= item < num_items for _, item in drawn)
    if by == "popularity":
        assert {item for _, item in drawn} <= popular


@pytest.mark.parametrize("by", ["uniform", "popularity"])
def test_negatives_are_drawn_in_proportion(by):
    """User 0 has items 1 and 4 of six; what is left comes as often as its weight says."""
    rng = np.random.default_rng(0)
    users = np.concatenate([[0, 0], rng.integers(1, 60, 400)])
    items = np.concatenate([[1, 4], rng.integers(0, 6, 400)])
    items[2:] = np.where(users[2:] % 5 == items[2:], 5, items[2:])  # every other user lacks an item as well
    few = (users == 0) | (users % 7 == 1)
    users, items = users[few], items[few]
    drawn = negatives((users, items), 6, per_positive=20_000, by=by)
    found = np.bincount(drawn.item[(drawn.user == 0) & (drawn.label == 0)], minlength=6)
    weight = np.ones(6) if by == "uniform" else np.bincount(items, minlength=6).astype(float)
    weight[[1, 4]] = 0
    assert found / found.sum() == pytest.approx(weight / weight.sum(), abs=0.01)


def test_a_user_who_lacks_one_item_gets_it():
    samples = negatives(([7, 7, 7], [0, 1, 3]), 4)
    assert samples.item[samples.label == 0].tolist() == [2] * 12


def test_what_is_known_besides_is_no_negative():
    samples = negatives(([0], [1]), 5, per_positive=50, known=([0, 0, 3], [0, 4, 2]))
    assert set(samples.item[1:].tolist()) == {2, 3}


def test_a_user_known_besides_may_have_everything():
    assert negatives(([0], [0]), 2, known=([1, 1], [0, 1])).item[1:].tolist() == [1] * 4
    with pytest.raises(InputError, match="which no int64 holds"):
        negatives((np.array([2**63 + 5], np.uint64), [0]), 3)


def test_the_seed_decides():
    pairs = (np.arange(100), np.arange(100))
    first, again, other = (negatives(pairs, 1000, seed=seed).item for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("positives", "kwargs", "message"),
    [
        (([0, 0], [0, 1]), {}, "user 0 has every item"),
        (([0], [2]), {}, "items go from 2 to 2"),
        (([0], [-1]), {}, "items go from -1"),
        (([0, 1], [0]), {}, "items are int64 of shape"),
        (([0.5], [0]), {}, "users are float64"),
        (([0], [0]), {"per_positive": 0}, "per_positive must be 1 or more"),
        (([0], [0]), {"by": "rank"}, "no way to draw 'rank'"),
    ],
)
def test_bad_input(positives, kwargs, message):
    with pytest.raises(InputError, match=message):
        negatives(positives, 2, **kwargs)
