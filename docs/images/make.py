"""Draw the picture of the README from a receipt: `python docs/images/make.py runs/demo/receipt.json`."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

from vitalfew.core import Receipt
from vitalfew.core.files import write_text
from vitalfew.report.charts import ladder_chart, pairs_chart
from vitalfew.report.charts.svg import fit, text
from vitalfew.report.figures import headline

GAP, EDGE, HEAD = 40.0, 24.0, 96.0


def style() -> str:
    """Return the report's rules for charts, in its light colours and without variables: some viewers know none."""
    page = (files("vitalfew.report") / "page.css").read_text(encoding="utf-8")
    light = page.partition("}")[0]
    colours = dict(re.findall(r"(--\w+): (#\w+);", light))
    rules = [line for line in page.splitlines() if re.match(r"svg [.\w]", line) and "--tone" not in line]
    plain = re.sub(r"var\((--\w+)\)", lambda match: colours[match[1]], "\n".join(rules))
    return (
        f"svg {{ font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; }}\n{plain}\n"
        f".word {{ fill: {colours['--saved']}; font-weight: 700; letter-spacing: .06em; }}\n"
        ".claim { font-size: 26px; font-weight: 650; }\n"
    )


def placed(chart: str, x: float, y: float) -> tuple[str, float]:
    """Return the chart at a place inside a larger picture, and how high it is."""
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', chart).groups())
    return chart.replace("<svg ", f'<svg x="{x}" y="{y}" width="{width}" height="{height}" ', 1), height


def draw(receipt: Receipt) -> str:
    """Return verdict, claim, the account and the paired runs as one SVG."""
    quality = receipt.quality[0] if receipt.quality else None
    account, high = placed(ladder_chart(receipt.lines), EDGE, HEAD)
    pairs, higher = placed(pairs_chart(receipt.pairs, quality, receipt.rule), EDGE + 480 + GAP, HEAD)
    width, height = 2 * EDGE + 2 * 480 + GAP, HEAD + max(high, higher) + EDGE
    claim = f"{receipt.verdict}: {headline(receipt)}"
    parts = [
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8" fill="#fff" stroke="#d9dee3"/>',
        text(EDGE, 34.0, receipt.verdict.upper(), "word"),
        text(EDGE, 66.0, fit(headline(receipt), width - 2 * EDGE, 26), "claim"),
        account,
        pairs,
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{claim}"><title>{claim}</title>'
        f"<style>{style()}</style>{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(__file__).with_name("demo.svg")
    write_text(target, draw(Receipt.load(sys.argv[1])))
    print(f"wrote {target}")
