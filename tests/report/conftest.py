"""One receipt that holds something of everything, and a way to read a page."""

from __future__ import annotations

import dataclasses

import pytest

from vitalfew.core import Curve, Declined, Line, Pair, Prediction, Quality, Receipt, Rule, judge


def curve(name: str, n: int, slope: float) -> Curve:
    weights = [(k + 1) ** -slope for k in range(n)]
    total, done, points = sum(weights), 0.0, []
    for k, weight in enumerate(weights):
        done += weight
        points.append(((k + 1) / n, done / total))
    return Curve(name, tuple(points), n)


@pytest.fixture(scope="session")
def receipt() -> Receipt:
    rule = Rule("equal work", tolerance=0.001)
    pairs = [Pair(s, "base" if s % 2 else "few", 206.0 + s, 31.5 - s / 9, 0.75, 0.7499 + s / 1e5) for s in range(4)]
    comparison = judge(rule, pairs, metric="AUC")
    return Receipt(
        "DLRM on the flights of 2013",
        "fused sparse rows",
        (
            Line("time per epoch", "s", 41.2, 6.3, "measured", 6.24, 6.37),
            Line("samples", "samples/s", 8174.0, 53_456.0, "measured"),
            Line("bytes written", "B", 19_293_798.0, 1_184_890.0, "counted"),
            Line("energy", "J", 1930.0, 318.0, "modelled", note="45 W per busy core"),
            Line("rows on the fast tier", "rows", None, 21_350.0, "counted"),
        ),
        comparison.verdict,
        comparison.why,
        str(rule),
        (comparison.quality, Quality("log loss", 0.482, 0.483, 0.001, None, None, 0.001, "unclear")),
        tuple(pairs),
        None,
        (Line("profiling pass", "s", None, 3.4, "measured"),),
        (Declined("look-ahead cache", "all tables fit in memory"),),
        (Prediction("time per epoch", "s", 7.0, 6.3, "bandwidth model"),),
        tuple(curve(f"column {i}", 3 * (i + 1) ** 2, i / 10) for i in range(9)),
        ("the last tenth of the log is the test set",),
        {"torch": "2.6", "cpu": {"model": "EPYC", "flags": ["avx2", "avx512f"]}, "deterministic": True},
        "vitalfew train --pairs 4",
        "2025-03-14",
    )


@pytest.fixture(scope="session")
def hostile(receipt: Receipt) -> Receipt:
    """The same receipt with something nasty in every text."""

    def spoil(value: object) -> object:
        nasty = "<script>alert('x')</script> & \"|`[red]\x1b[31m\x00"
        if isinstance(value, str):
            return value + nasty
        if isinstance(value, dict):
            return {key if key in fields else key + nasty: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    kinds = (Receipt, Line, Pair, Quality, Declined, Prediction, Curve)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    spoiled = spoil(receipt.to_dict())
    assert isinstance(spoiled, dict)
    spoiled["verdict"] = receipt.verdict
    for fixed, names in {"lines": ["how"], "overhead": ["how"], "pairs": ["first"], "quality": ["finding"]}.items():
        for item, original in zip(spoiled[fixed], receipt.to_dict()[fixed], strict=True):
            item.update({name: original[name] for name in names})
    return Receipt.from_dict(spoiled)
