"""Bring figures up to date: every number in README and cards comes from a receipt or a benchmark, by this script.

    python docs/figures.py                             tables and gallery of the pages, from benchmarks/results/*.json
    python docs/figures.py runs/demo/receipt.json      also picture and figures of the README, from this receipt

A place for figures is a pair of comments, ``<!-- figures: NAME -->`` and ``<!-- /figures -->``. Where there is no
result of that name the text between them stays.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import figures_generate

from vitalfew.core import Receipt
from vitalfew.core.files import read_document, write_text
from vitalfew.report.charts import ladder_chart, pairs_chart, slices_chart
from vitalfew.report.charts.gallery import Cell, gallery_chart
from vitalfew.report.charts.slices import Point
from vitalfew.report.charts.svg import fit, text
from vitalfew.report.figures import amount, headline

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLACES = [
    ROOT / "README.md",
    *(file for room in ("methods", "guide") for file in sorted((ROOT / "docs" / room).glob("*.md"))),
]
PLACE = re.compile(r"<!-- figures: (\w+) -->\n(.*?)<!-- /figures -->", re.DOTALL)

GAP, EDGE, HEAD = 40.0, 24.0, 120.0


def style() -> str:
    """Return the report's rules for charts, in its light colours and without variables: some viewers know none."""
    page = (files("vitalfew.report") / "page.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"(--\w+): (#\w+);", page.partition("}")[0]))
    rules = [line for line in page.splitlines() if re.match(r"svg [.\w]", line) and "--tone" not in line]
    plain = re.sub(r"var\((--\w+)\)", lambda match: colours[match[1]], "\n".join(rules))
    return (
        f"svg {{ font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; }}\n{plain}\n"
        f"svg .quiet {{ fill: {colours['--muted']}; }}\n"
        + "".join(
            f"svg .curve.c{k} {{ fill: none; stroke: {colours[f'--c{k}']}; stroke-width: 2; }}\n"
            f"svg .start.c{k} {{ fill: {colours[f'--c{k}']}; }}\n"
            f"svg .label.c{k} {{ fill: {colours[f'--c{k}']}; font-size: 12px; font-weight: 600; }}\n"
            for k in range(2)
        )
        + f"svg .word {{ fill: {colours['--ink']}; font-weight: 700; letter-spacing: .06em; }}\n"
        "svg .claim { font-size: 26px; font-weight: 650; }\n"
    )


def placed(chart: str, x: float, y: float) -> tuple[str, float]:
    """Return the chart at a place inside a larger picture, and how high it is."""
    found = re.search(r'viewBox="0 0 (\S+) (\S+)"', chart)
    assert found
    width, height = map(float, found.groups())
    return chart.replace("<svg ", f'<svg x="{x}" y="{y}" width="{width}" height="{height}" ', 1), height


def machine_of(environment: Mapping[str, Any]) -> str:
    """Return the machine in a few words."""
    cores = f"{environment['usable_cores']:g} cores ({environment['cpu']})"
    return ", ".join((cores, *environment["gpus"], f"PyTorch {environment['packages']['torch']}"))


def picture(receipt: Receipt) -> str:
    """Return verdict, claim, the account and the paired runs as one SVG."""
    quality = receipt.quality[0] if receipt.quality else None
    account, high = placed(ladder_chart(receipt.lines), EDGE, HEAD)
    pairs, higher = placed(pairs_chart(receipt.pairs, quality, receipt.rule), EDGE + 480 + GAP, HEAD)
    width, height = 2 * EDGE + 2 * 480 + GAP, HEAD + max(high, higher) + EDGE
    claim = f"{receipt.verdict}: {headline(receipt)}"
    about = f"{receipt.title}. {machine_of(receipt.environment)}."
    parts = [
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" fill="#fff" stroke="#d9dee3"/>',
        text(EDGE, 34.0, receipt.verdict.upper(), "word"),
        text(EDGE, 66.0, fit(headline(receipt), width - 2 * EDGE, 26), "claim"),
        text(EDGE, 90.0, fit(about, width - 2 * EDGE, 13), "quiet"),
        account,
        pairs,
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{claim}"><title>{claim}</title>'
        f"<style>{style()}</style>{''.join(parts)}</svg>\n"
    )


def account(receipt: Receipt) -> str:
    """Return what a receipt of paired runs says, in a few sentences."""
    lines = {line.what: line for line in receipt.lines}
    quality, time, memory = receipt.quality[0], lines["training time"], lines.get("peak memory")
    rows = time.note.removesuffix(", mean of pairs")
    sentences = [
        f"{machine_of(receipt.environment)}, {len(receipt.pairs)} paired runs of one epoch over {rows}.",
        f"The plain PyTorch way took {amount(time.before, time.unit)}, fused rows {amount(time.after, time.unit)}.",
        f"{quality.metric} {quality.before:.4f} and {quality.after:.4f}: {quality.finding}.",
    ]
    if memory and memory.before and memory.after:
        sentences.append(
            f"The peak memory went from {amount(memory.before, memory.unit)} to {amount(memory.after, memory.unit)}."
        )
    return "\n".join((*sentences, f"Verdict: `{receipt.verdict}`.", ""))


def optimizer_table(body: Mapping[str, Any]) -> str:
    """Return the table of one step's times, by rule and arm."""
    rows = [
        f"| {f['rule']} | {f['arm']} | {f['median_ms']:.2f} ms | {f['times_ours']:.1f}x | {f['times_floor']:.1f}x |"
        for f in body["figures"]
    ]
    return "\n".join(
        (
            f"Measured on {machine_of(body['machine'])}; {body['distinct_rows']:,} distinct rows per batch.",
            "",
            "| rule | arm | forward, backward, update (median) | times ours | times the memory floor (best run) |",
            "| --- | --- | --: | --: | --: |",
            *rows,
            "",
        )
    )


def end_to_end_table(body: Mapping[str, Any]) -> str:
    """Return the table of whole trainings, one row per log and model."""
    rows = []
    for receipt in map(Receipt.from_dict, body["receipts"]):
        lines, quality = {line.what: line for line in receipt.lines}, receipt.quality[0]
        speed, memory = lines["training speed"], lines.get("peak memory")
        cells = [
            receipt.title,
            f"{amount(speed.before, speed.unit)} → {amount(speed.after, speed.unit)}",
            f"{quality.before:.4f} → {quality.after:.4f}",
            f"{amount(memory.before, 'B')} → {amount(memory.after, 'B')}" if memory else "-",
            f"{receipt.verdict}: {receipt.why}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        (
            f"Measured on {machine_of(body['machine'])}; plain PyTorch → fused rows.",
            "",
            "| log and model | training speed | AUC | peak memory | verdict |",
            "| --- | --: | --: | --: | --- |",
            *rows,
            "",
        )
    )


_ARMS = {
    "memory": "all in memory",
    "belady": "tenth in memory, `Belady()`",
    "lookahead": "tenth in memory, `LookAhead()`",
    "lru": "tenth in memory, LRU on demand",
    "lru_next": "tenth in memory, LRU, next batch prefetched",
    "memmap": "memory map, PyTorch",
}


def dram_budget_table(body: Mapping[str, Any]) -> str:
    """Return the table of steps with a tenth of the rows in memory, one row per arm."""

    def cell(figures: Mapping[str, float], name: str, form: str) -> str:
        return form.format(figures[name]) if name in figures else "-"

    base = body["arms"]["memory"]["median step ms"]
    rows = [
        f"| {_ARMS[name]} | {f['median step ms']:.0f} ms | {f['median step ms'] / base:.2f}x "
        f"| {cell(f, 'missed rows per step', '{:,.0f}')} | {cell(f, 'rows read / lower bound', '{:.3f}')} |"
        for name, f in body["arms"].items()
    ]
    return "\n".join(
        (
            f"Measured on {machine_of(body['machine'])}; synthetic ids over {body['rows']:,} rows",
            f"of 64 floats on disk, a DLRM, batches of 2,048, {amount(body['budget_bytes'], 'B')} for everything.",
            "",
            "| rows | step (median) | times all in memory | rows fetched per step | rows read, times the lower bound |",
            "| --- | --: | --: | --: | --: |",
            *rows,
            "",
        )
    )


def lookahead_table(body: Mapping[str, Any]) -> str:
    """Return the table of rows moved on real logs, relative to the least possible."""
    names = list(body["results"][0]["moved / bound"])
    rows = [
        f"| {r['log']}, {r['share']:.0%} | {r['miss ratio']:.2f} | "
        + " | ".join(f"{r['moved / bound'][name]:.2f}" for name in names)
        + " |"
        for r in body["results"]
    ]
    return "\n".join(
        (
            "Counted on real logs (`criteo-like` is synthetic), batches of 512; rows moved, times the least possible.",
            "",
            f"| log, rows kept | least miss ratio | {' | '.join(names)} |",
            f"| --- | --: |{' --: |' * len(names)}",
            *rows,
            "",
        )
    )


def methods_table(body: Mapping[str, Any]) -> str:
    """Return the table of every way on every log."""

    def cell(figures: Mapping[str, Any], name: str, form: str) -> str:
        found = figures.get(name)
        if found is None:
            return "-"
        shown = [form.format(found[end]) for end in ("median", "low", "high")]
        return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"

    rows = []
    for result in body["results"]:
        for way, figures in result["ways"].items():
            moved = figures["row bytes per sample"]["median"]
            cells = (
                f"{result['log']}, {way}",
                amount(figures["samples per s"]["median"], "samples/s"),
                cell(figures, "times in memory", "{:.2f}"),
                cell(figures, "times prefetch", "{:.2f}"),
                amount(moved, "B") if moved else "-",
                cell(figures, "AUC", "{:.4f}"),
                cell(figures, "log loss", "{:.4f}"),
                cell(figures, "calibration", "{:.3f}"),
            )
            rows.append(f"| {' | '.join(cells)} |")
    memory = ", ".join(f"{result['log']} {result['memory']}" for result in body["results"])
    return "\n".join(
        (
            "![Speed of every way on every log](../images/gallery.svg)",
            "",
            f"Measured on {machine_of(body['machine'])}; one epoch of a DLRM, batches of 512,",
            f"median of {body['seeds']} seeds (range). Share of the rows in memory, where the others are on disk:",
            f"{memory}. Plain and in memory have them all.",
            "",
            "| log, way | speed | times in memory | times prefetch | row bytes moved per sample | AUC | log loss "
            "| calibration |",
            "| --- | --: | --: | --: | --: | --: | --: | --: |",
            *rows,
            "",
        )
    )


def gallery(body: Mapping[str, Any]) -> str:
    """Return the picture of every way's speed on every log, in times of prefetch, and where the AUC differs."""
    cells: dict[str, dict[str, Cell]] = {}
    for result in body["results"]:
        for way, figures in result["ways"].items():
            times, difference = figures["times prefetch"], figures["AUC difference"]["median"]
            if way != "prefetch":
                cell = Cell(times["median"], times["low"], times["high"], difference)
                cells.setdefault(result["log"], {})[way] = cell
    chart = gallery_chart(cells, body["tolerance"], baseline="prefetch")
    return chart.replace("<title>", f"<style>{style()}</style><title>", 1) + "\n"


def foretold_table(body: Mapping[str, Any]) -> str:
    """Return what was foretold of training over tiers, and what came."""
    rows = [
        f"| {log} | {at['miss ratio foretold']:.3f} | {at['miss ratio']:.3f} | {at['in memory ms']:.1f} ms "
        f"| {at['step ms foretold']:.1f} ms | {at['step ms']:.1f} ms | {at['foretold / step']:.2f} |"
        for log, at in body["results"].items()
        if log != "remote"
    ]
    return "\n".join(
        (
            f"Measured on {machine_of(body['machine'])}; look-ahead, a tenth of the rows and three batches in memory.",
            "",
            "| log | miss ratio foretold | counted | step in memory | foretold | measured | foretold / measured |",
            "| --- | --: | --: | --: | --: | --: | --: |",
            *rows,
            "",
        )
    )


def stale_rows_table(body: Mapping[str, Any]) -> str:
    """Return what skipping stale rows and inputs saved and cost, and where it would pay."""
    rows = []
    for result in body["results"]:
        runs = result["runs"]
        for mode, verdict in result["verdicts"].items():
            mean = {key: sum(run[mode][key] for run in runs) / len(runs) for key in runs[0][mode]}
            rows.append(
                f"| {result['log']}, {result['optimizer']} | {mode} | {mean['frozen']:.1%} "
                f"| {mean.get('skipped', 0.0):.1%} | {mean['speed-up']:.2f}x | {-mean['auc lost']:+.4f} "
                f"| {mean['log loss lost']:+.4f} | {verdict} |"
            )
    even = [
        f"| {at['share of lookups']:.0%} | {at['frozen row updates']:.0%} | {at['speed-up, rows']:.2f}x "
        f"| {at['inputs skipped']:.0%} | {at['speed-up, inputs']:.2f}x |"
        for at in body["break even"]
    ]
    return "\n".join(
        (
            f"Measured on {machine_of(body['machine'])}, rows in memory; runs with and without take turns, means over",
            f"{len(body['results'][0]['runs'])} seeds. `criteo-like` is synthetic.",
            "",
            "| log, optimizer | mode | updates left out | inputs left out | speed | AUC | log loss | verdict |",
            "| --- | --- | --: | --: | --: | --: | --: | --- |",
            *rows,
            "",
            "![Speed by the share of lookups that are of stale rows](../images/break_even.svg)",
            "",
            "Where it would pay, on the synthetic log: rows with so many of the lookups are simply called stale.",
            "",
            "| lookups of stale rows | updates left out | speed, `rows` | inputs left out | speed, `inputs` |",
            "| --: | --: | --: | --: | --: |",
            *even,
            "",
        )
    )


def break_even(body: Mapping[str, Any]) -> str:
    """Return the chart of how fast each mode is, the more of the lookups are of stale rows."""
    shares = [f"{at['share of lookups']:.0%}" for at in body["break even"]]
    lines: dict[str, list[Point]] = {
        mode: [(at[f"speed-up, {mode}"], None, None) for at in body["break even"]] for mode in ("rows", "inputs")
    }
    chart = slices_chart(
        "Speed by the share of lookups that are of stale rows", lines, shares, what="speed, times training them",
        marks={1.0: "no gain"}, floor=0.5, below="share of the lookups that are of stale rows",
    )  # fmt: skip
    return chart.replace("<title>", f"<style>{style()}</style><title>", 1) + "\n"


def split_table(body: Mapping[str, Any]) -> str:
    """Return by grid point what splitting and reading ahead gained, and whether the trial foretold the sign."""
    points = body["results"]["points"]
    rows = [
        f"| {at['rows below'].replace('remote', 'process, ms away:')} | {at['width']} | {at['popular share']:.0%} "
        f"| {at['base ms']:.1f} ms | {at['split over base']:.2f}x | {at['base ms'] / at['prefetch ms']:.2f}x "
        f"| {at['gathering hidden']:.0%} | {'tie' if at['a tie'] else 'yes' if at['sign as foretold'] else 'no'} |"
        for at in points
    ]
    best = sum(at["split over base"] > max(1.0, at["base ms"] / at["prefetch ms"]) for at in points)
    return "\n".join(
        (
            f"Measured on {machine_of(body['machine'])}; medians of paired steps. The trial foretold the sign in",
            f"{body['results']['sign as foretold']:.0%} of {len(points)} points; ways within 3 % are a tie, and count.",
            f"Splitting was faster than both others in {best} of them.",
            "",
            "| rows below | width | popular | whole batches | split | read ahead | gathering hidden | foretold |",
            "| --- | --: | --: | --: | --: | --: | --: | --- |",
            *rows,
            "",
        )
    )


def drift_table(body: Mapping[str, Any]) -> str:
    """Return AUC, log loss, parameters and step time of each model."""
    rows = []
    for arm, at in body["models"].items():
        first, last = at["slices"][0], at["slices"][-1]
        over = last["auc_over_dot"]
        rows.append(
            f"| {arm} | {at['dense_parameters']:,} | {1e3 * at['step_seconds']:.1f} ms "
            + "".join(f"| {each['auc']['mean']:.4f} ({each['auc']['low']:.4f} to {each['auc']['high']:.4f}) "
                      for each in (first, last))
            + f"| {over['mean']:+.4f} ({over['low']:+.4f} to {over['high']:+.4f}) | {last['log_loss']['mean']:.4f} |"
        )  # fmt: skip
    count = len(next(iter(body["models"].values()))["slices"])
    return "\n".join(
        (
            f"Measured on {machine_of(body['machine'])}, one thread; flights of 2013, trained on the first half,",
            f"{body['seeds']} seeds with 95 % intervals over them, learning rate chosen per model on its last part.",
            "",
            f"| model | dense parameters | step | AUC, first later slice | AUC, slice {count} | beyond DLRM there "
            "| log loss there |",
            "| --- | --: | --: | --: | --: | --: | --: |",
            *rows,
            "",
        )
    )


def histories_table(body: Mapping[str, Any]) -> str:
    """Return AUC and log loss of a model that reads histories, beside two that do not."""
    rows = []
    for name, at in body["results"].items():
        each = ", ".join(format(run["auc"], ".4f") for run in at["runs"])
        speed = max(run["rows"] / run["seconds"] for run in at["runs"])
        rows.append(f"| {name} | {at['auc']:.4f} ({each}) | {at['log loss']:.4f} | {speed:,.0f} |")
    return "\n".join(
        (
            f"Reviews of games, histories of {body['history']}, the last fifth of each user's held back; means, and",
            f"each seed in brackets; the fastest run. Measured on {machine_of(body['machine'])}, one thread.",
            "",
            "| model | AUC | log loss | rows per second |",
            "| --- | --: | --: | --: |",
            *rows,
            "",
        )
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "optimizer": optimizer_table,
    "end_to_end": end_to_end_table,
    "dram_budget": dram_budget_table,
    "lookahead": lookahead_table,
    "methods": methods_table,
    "foretold": foretold_table,
    "stale_rows": stale_rows_table,
    "drift": drift_table,
    "split": split_table,
    "histories": histories_table,
}
for _name, _table in figures_generate.TABLES.items():
    TABLES[_name] = lambda body, table=_table: table(body, machine_of(body["machine"]))


def updated(page: str, receipt: Receipt | None = None) -> str:
    """Return the page with the figures that there are results for."""

    def fill(match: re.Match[str]) -> str:
        name, old = match.groups()
        if name == "demo":
            new = account(receipt) if receipt else old
        else:
            file = RESULTS / f"{name}.json"
            body = read_document(file, "benchmark", 1) if file.exists() else {"quick": True}
            trial = body.get("quick") or body.get("dry")  # these show that a script runs, and no figure
            new = old if trial else TABLES[name](body)
        return f"<!-- figures: {name} -->\n{new}<!-- /figures -->"

    return PLACE.sub(fill, page)


def main(arguments: list[str]) -> None:
    """Update every page that holds figures, and the picture when there is a receipt."""
    receipt = Receipt.load(arguments[0]) if arguments else None
    if receipt:
        write_text(ROOT / "docs" / "images" / "demo.svg", picture(receipt))
    if (RESULTS / "methods.json").exists():
        body = read_document(RESULTS / "methods.json", "benchmark", 1)
        write_text(ROOT / "docs" / "images" / "gallery.svg", gallery(body))
    if (RESULTS / "stale_rows.json").exists():
        body = read_document(RESULTS / "stale_rows.json", "benchmark", 1)
        write_text(ROOT / "docs" / "images" / "break_even.svg", break_even(body))
    for file in PLACES:
        write_text(file, updated(file.read_text(encoding="utf-8"), receipt))


if __name__ == "__main__":
    if len(sys.argv) > 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1:])
