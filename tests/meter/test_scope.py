"""The laws of scopes, on a pretended machine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitalfew.core.errors import InputError
from vitalfew.meter import Scope, count, current, scope
from vitalfew.meter.instruments import Instruments

from .conftest import Bench

# A tree is the seconds before each child and after the last, and the children.
seconds = st.floats(0, 1e4)
trees = st.recursive(
    st.tuples(seconds, st.just([])), lambda inner: st.tuples(seconds, st.lists(inner, max_size=4)), max_leaves=20
)


def run(tree, bench: Bench, instruments: Instruments | None = None) -> Scope:
    spent, inside = tree
    with scope("node", instruments=instruments) as node:
        bench.work(spent)
        count("rows", 2, "rows")
        for child in inside:
            run(child, bench)
            bench.work(spent / 3)
    return node


def nodes(root: Scope):
    yield root
    for child in root.children:
        yield from nodes(child)


def named(figures):
    return {figure.name: figure for figure in figures}


@given(trees)
def test_exclusive_figures_add_up_to_the_root(tree):
    bench = Bench()
    root = run(tree, bench, bench.instruments())
    shares = [named(node.exclusive()) for node in nodes(root)]
    for name in ("wall", "cpu", "rows", "energy_package0", "energy_process"):
        total = math.fsum(share[name].value for share in shares)
        assert math.isclose(total, root[name].value, rel_tol=1e-9, abs_tol=1e-9)
        assert all(share[name].value >= 0 for share in shares)
    assert root["rows"].value == 2 * len(shares)


@given(trees)
def test_a_part_is_never_more_than_the_whole(tree):
    bench = Bench()
    for node in nodes(run(tree, bench, bench.instruments())):
        for child in node.children:
            assert child["wall"].value <= node["wall"].value * (1 + 1e-12)


@given(trees)
def test_the_tree_prints_and_becomes_plain_values(tree):
    bench = Bench()
    root = run(tree, bench, bench.instruments())
    assert root.tree().splitlines()[2].startswith("node")
    assert root.to_dict()["name"] == "node"


def test_threads_have_stacks_of_their_own(bench):
    instruments = bench.instruments()
    barrier = threading.Barrier(4)

    def work(name):
        barrier.wait()
        with scope(name, instruments=instruments) as outer:
            barrier.wait()
            with scope("inner"):
                count("rows", 1, "rows")
            barrier.wait()
        return outer

    with scope("main", instruments=instruments) as main, concurrent.futures.ThreadPoolExecutor(4) as pool:
        outers = list(pool.map(work, "abcd"))
    assert main.children == []
    for outer, name in zip(outers, "abcd", strict=True):
        assert (outer.name, outer.parent, outer["rows"].value) == (name, None, 1)
        assert [child.name for child in outer.children] == ["inner"]


def test_tasks_nest_below_their_starter_and_their_overlap_is_marked(bench):
    async def task():
        with scope("task") as inner:
            await asyncio.sleep(0)
            assert current() is inner

    async def main():
        with scope("main", instruments=bench.instruments()) as outer:
            await asyncio.gather(task(), task())
        return outer

    outer = asyncio.run(main())
    assert [child.name for child in outer.children] == ["task", "task"]
    assert outer.marks == ["overlap"]
    assert "wall" not in named(outer.exclusive())


def test_a_thousand_scopes_at_once(bench):
    instruments = bench.instruments()
    opened = [scope(str(number), instruments=instruments).__enter__() for number in range(1000)]
    bench.work(5)
    opened[0].__exit__(None, None, None)
    assert {node["wall"].value for node in opened} == {5.0}
    assert current() is None


def test_an_exception_keeps_the_books_and_is_marked(bench):
    outer = scope("outer", instruments=bench.instruments())

    def fail():
        with outer:
            bench.work(1)
            with scope("inner"):
                bench.work(2)
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert outer.failed
    assert outer.children[0].failed
    assert (outer["wall"].value, outer.children[0]["wall"].value) == (3, 2)
    assert current() is None


def test_a_scope_that_ends_before_its_inner_one_ends_it(bench):
    outer = scope("outer", instruments=bench.instruments()).__enter__()
    inner = scope("inner").__enter__()
    bench.work(2)
    outer.__exit__(None, None, None)
    bench.work(40)
    inner.__exit__(None, None, None)
    assert inner.marks == ["cut short"]
    assert outer.marks == []
    assert (outer["wall"].value, inner["wall"].value) == (2, 2)
    assert named(outer.exclusive())["wall"].value == 0
    with scope("next", instruments=bench.instruments()) as following:
        pass
    assert following.parent is None


def test_a_generator_that_is_left_early_has_not_failed(bench):
    def rows():
        with scope("rows", instruments=bench.instruments()) as inside:
            found.append(inside)
            yield 1

    found: list[Scope] = []
    generator = rows()
    next(generator)
    generator.close()
    assert found[0].marks == []
    assert current() is None


def test_a_decorated_function_is_a_scope_per_call(bench):
    @scope("load")
    def load(amount):
        """Load."""
        bench.work(amount)
        return amount

    def bare(amount):
        with scope("load"):
            bench.work(amount)

    with scope("root", instruments=bench.instruments()) as decorated:
        assert [load(1), load(2)] == [1, 2]
    with scope("root", instruments=bench.instruments()) as managed:
        bare(1)
        bare(2)
    assert load.__doc__ == "Load."
    assert decorated.to_dict() == managed.to_dict()


def test_a_decorated_coroutine_is_measured_until_it_is_done(bench):
    timer = scope("load", instruments=bench.instruments())

    @timer
    async def load():
        await asyncio.sleep(0)
        bench.work(3)
        return 7

    assert asyncio.run(load()) == 7
    assert timer.last is not None
    assert timer.last["wall"].value == 3


def test_a_generator_function_is_refused():
    def rows():
        yield 1

    with pytest.raises(InputError, match="is a generator"):
        scope("rows")(rows)


@pytest.mark.parametrize(("field", "lost"), [("wall", "wall"), ("cpu", "cpu")])
def test_a_clock_that_went_backwards_gives_no_figure(bench, field, lost):
    with scope("outer", instruments=bench.instruments()) as outer:
        before = getattr(bench, field)
        with scope("inner") as inner:
            setattr(bench, field, before - 1)
        setattr(bench, field, before + 5)
    assert inner.marks == ["clock"]
    assert lost not in named(inner.figures())
    assert "energy_process" not in named(inner.figures())
    assert outer[lost].value == 5
    assert lost not in named(outer.exclusive())
    assert "-" in outer.tree()


@pytest.mark.parametrize("wall", [math.nan, math.inf])
def test_an_absurd_clock_gives_no_figure(bench, wall):
    with scope("a", instruments=bench.instruments()) as span:
        bench.wall = wall
    assert span.marks == ["clock"]
    assert "wall" not in named(span.figures())


def test_a_suspended_machine_gives_no_wall_time(bench):
    with scope("a", instruments=bench.instruments()) as span:
        bench.work(1)
        bench.asleep = 3600.0
    assert span.marks == ["clock"]
    assert "wall" not in named(span.figures())
    assert span["cpu"].value == 0.5


def test_children_appear_only_when_they_used_time(bench):
    with scope("a", instruments=bench.instruments()) as outer:
        bench.cpu_children = 4.0
        with scope("b") as inner:
            pass
    assert named(outer.exclusive())["cpu_children"].value == 4
    assert "cpu_children" not in named(inner.figures())
    # The model takes the processor time of the children too.
    assert outer["energy_process"].value == 5 * 4


def test_no_disk_counter_no_figure(bench):
    bench.disk = None
    with scope("a", instruments=bench.instruments()) as span:
        pass
    assert not {"read", "written"} & set(named(span.figures()))


def test_counts_go_to_all_scopes_around(bench):
    with scope("outer", instruments=bench.instruments()) as outer:
        outer.count("sent", 10, unit="B")
        with scope("inner") as inner:
            count("sent", 5, "B")
            outer.count("sent", 1, "B")
    assert (outer["sent"].value, inner["sent"].value) == (16, 5)
    assert named(outer.exclusive())["sent"].value == 11
    assert outer["sent"].how == "counted"


def test_counts_from_many_threads_lose_nothing(bench):
    with scope("a", instruments=bench.instruments()) as span:
        threads = [
            threading.Thread(target=lambda: [span.count("rows", 1, "rows") for _ in range(2000)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert span["rows"].value == 8000


def test_a_count_without_a_scope_is_nobodys():
    count("sent", 5, "B")


@pytest.mark.parametrize(
    ("name", "amount", "unit"),
    [
        ("sent", -1, "B"),
        ("sent", math.nan, "B"),
        ("wall", 1, "s"),
        ("energy_x", 1, "J"),
        ("rows", 1, "B"),
        ("", 1, "B"),
    ],
)
def test_bad_counts_are_refused(bench, name, amount, unit):
    with scope("outer", instruments=bench.instruments()) as outer:
        outer.count("rows", 1, "rows")
        with scope("inner"), pytest.raises(InputError):
            count(name, amount, unit)
    assert outer["rows"].value == 1


def test_misuse_is_refused(bench):
    span = scope("a", instruments=bench.instruments())
    with pytest.raises(InputError, match="never opened"):
        span.__exit__(None, None, None)
    with span, pytest.raises(InputError, match="has not ended"):
        span.figures()
    with pytest.raises(InputError, match="used before"), span:
        pass
    with pytest.raises(InputError, match="not open"):
        span.count("rows", 1, "rows")
    with pytest.raises(InputError, match="no figure 'grams'"):
        span["grams"]
    with pytest.raises(InputError, match="needs a name"):
        scope("")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_no_figures_of_the_scope_but_can_open_its_own():
    program = """
import os
from vitalfew.meter import current, scope
with scope("outer") as outer:
    child = os.fork()
    if child == 0:
        assert current() is None
        with scope("own") as own:
            pass
        assert own.parent is None and own["wall"].value >= 0
if child == 0:
    assert outer.marks == ["forked"], outer.marks
    os._exit(7)
assert os.waitpid(child, 0)[1] == 7 << 8
assert outer.marks == [] and outer.children == []
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_every_source_is_read_twice_per_scope(bench):
    with scope("outer", instruments=bench.instruments()), scope("inner"):
        pass
    assert bench.counter.reads == 4


def test_equal_names_are_one_line_of_the_tree(bench):
    with scope("train", instruments=bench.instruments()) as train:
        for _ in range(3):
            with scope("step"):
                bench.work(2)
                count("flops", 1e9, "FLOP")
    lines = train.tree().splitlines()
    assert lines[0].split()[:3] == ["scope", "wall", "cpu"]
    assert lines[1].split()[:2] == ["measured", "measured"]
    assert lines[3].split()[:4] == ["step", "x3", "6", "s"]
    assert "3 GFLOP" in lines[3]
    assert any(line.startswith("energy_process: 15 J (6-36 J), modelled") for line in lines)
