# SPDX-License-Identifier: GPL-3.0-or-later
"""Benchmark runs as a table and as a page with plots.

A run is what the role ``bench`` writes: ``label``, ``host``, ``service``, ``model``, ``task``, ``date``, ``workload`` and
``levels``, one row of the module ``vllm_bench`` for each number of clients.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Run = Mapping[str, Any]
Row = Mapping[str, Any]

# Heading, key of the row, digits. Columns that no row has are left out: an embedder has no first token.
COLUMNS = (
    ("clients", "concurrency", 0),
    ("requests/s", "requests_per_s", 2),
    ("output tokens/s", "output_tokens_per_s", 0),
    ("all tokens/s", "total_tokens_per_s", 0),
    ("first token ms", "median_ttft_ms", 0),
    ("per token ms", "median_tpot_ms", 1),
    ("latency ms", "mean_e2el_ms", 0),
    ("p99 ms", "p99_e2el_ms", 0),
    ("GPU %", "gpu_utilization_percent", 0),
)
# What decides whether a run was faster: an embedder makes no tokens.
THROUGHPUT = {"generate": "output_tokens_per_s", "embed": "requests_per_s", "score": "requests_per_s"}
UNITS = {"output_tokens_per_s": "output tokens/s", "requests_per_s": "requests/s"}
SAME = ("service", "host", "model", "task", "workload")


def comparable(run: Run, other: Run) -> bool:
    """Whether both measured the same service with the same load."""
    return all(run.get(key) == other.get(key) for key in SAME)


def previous(run: Run, others: Sequence[Run]) -> Run | None:
    """The latest of the others that measured the same before this run."""
    earlier = [other for other in others if comparable(run, other) and other["date"] < run["date"]]
    return max(earlier, key=lambda other: str(other["date"]), default=None)


def changes(run: Run, before: Run) -> list[dict[str, Any]]:
    """For each number of clients that both have: ``concurrency``, ``throughput_percent`` and ``latency_percent``, how
    much higher they are now; None where one of them was not measured."""

    def percent(now: Row, then: Row, key: str) -> float | None:
        return round(100 * (now[key] / then[key] - 1), 1) if now.get(key) and then.get(key) else None

    old = {row["concurrency"]: row for row in before["levels"]}
    key = THROUGHPUT[run["task"]]
    return [
        {
            "concurrency": row["concurrency"],
            "throughput_percent": percent(row, old[row["concurrency"]], key),
            "latency_percent": percent(row, old[row["concurrency"]], "mean_e2el_ms"),
        }
        for row in run["levels"]
        if row["concurrency"] in old
    ]


def _cells(run: Run, before: Run | None) -> tuple[list[str], list[list[str]]]:
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in run["levels"])]
    heads = [head for head, _, _ in columns]
    against = {change["concurrency"]: change for change in changes(run, before)} if before else {}
    if against:
        heads += ["throughput", "latency"]
    body = []
    for row in run["levels"]:
        cells = ["-" if row.get(key) is None else f"{row[key]:,.{digits}f}" for _, key, digits in columns]
        if against:
            change = against.get(row["concurrency"], {})
            values = [change.get("throughput_percent"), change.get("latency_percent")]
            cells += ["-" if value is None else f"{value:+.1f}%" for value in values]
        body.append(cells)
    return heads, body


def title(run: Run) -> str:
    """One line that says what was measured."""
    work = run["workload"]
    lengths = f"{work['input_len']} tokens in" + (f", {work['output_len']} out" if run["task"] == "generate" else "")
    label = f"{run['label']}: " if run.get("label") else ""
    return f"{label}{run['service']} on {run['host']} ({run['model']}), {lengths}, {run['date']}"


def _compared(before: Run | None) -> str:
    return f"compared with {before['date']}" if before else "no earlier run of the same load to compare with"


def as_text(run: Run, before: Run | None = None) -> str:
    """The run as a table of plain text, with what changed since the run before."""
    heads, body = _cells(run, before)
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *body]]
    return "\n".join([title(run), *lines, _compared(before)])


# ----------------------------------------------------------------------------------------------------------- page

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1d1d1f;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .4rem}
.plots{display:flex;flex-wrap:wrap;gap:1.5rem}svg{flex:1 1 30rem;max-width:100%;height:auto}
svg text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#ddd}.axis{stroke:#555}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.15rem 0 .15rem 1.2rem;text-align:right}
td:first-child,th:first-child{padding-left:0}th{font-weight:600;border-bottom:1px solid #ccc}
.legend span{display:inline-block;margin-right:1.4rem}.legend i{display:inline-block;width:1.6rem;border-top:3px solid;
margin-right:.4rem;vertical-align:.25rem}
"""
# Told apart by people who see colours differently, too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 70, 20, 30, 45


def ticks(highest: float) -> list[float]:
    """Four to eight round values from 0 to the first one at or above the highest."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    count = math.ceil(highest / step - 1e-9)
    return [step * index for index in range(count + 1)]


def _plot(heading: str, lines: Sequence[tuple[str, str, str, Sequence[tuple[float, float]]]]) -> str:
    """An SVG of lines (name, colour, dash, points) over the number of clients, which is on a logarithmic scale."""
    points = [point for _, _, _, line in lines for point in line]
    places = sorted({x for x, _ in points})
    marks = ticks(max(y for _, y in points))
    low, high = math.log2(places[0]), math.log2(places[-1])

    def across(x: float) -> float:
        share = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - y / marks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(heading)}" xmlns="http://www.w3.org/2000/svg">',
        f'<text x="{LEFT}" y="16" font-weight="600">{escape(heading)}</text>',
    ]
    for mark in marks:
        y = up(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:,.4g}</text>')
    for place in places:
        parts.append(f'<text x="{across(place):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{place:g}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">clients at once</text>')
    for name, colour, dash, line in lines:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
        )
        for x, y in line:
            note = f"{name}: {y:,.1f} at {x:g} clients"
            parts.append(
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{colour}"><title>{escape(note)}</title></circle>'
            )
    return "\n".join([*parts, "</svg>"])


def _line(run: Run, key: str) -> list[tuple[float, float]]:
    return [(row["concurrency"], row[key]) for row in run["levels"] if row.get(key) is not None]


def _name(run: Run) -> str:
    return f"{run['label']} ({run['date']})" if run.get("label") else str(run["date"])


def as_html(runs: Sequence[Run], heading: str = "vLLM benchmark", shown: int | None = None) -> str:
    """The first run, and the latest so many of the others that are comparable, as one page that needs nothing else: plots
    of throughput and latency over the number of clients, then each run's table, compared as the one of plain text is."""
    others = [other for other in runs[1:] if comparable(runs[0], other)]
    others.sort(key=lambda other: str(other["date"]), reverse=True)
    runs, there = [runs[0], *others[:shown]], [runs[0], *others]
    key = THROUGHPUT[runs[0]["task"]]
    plots = []
    for words, wanted in (
        (UNITS[key], [(key, "")]),
        (
            "latency of a whole request, ms: mean, and 99th percentile dashed",
            [("mean_e2el_ms", ""), ("p99_e2el_ms", "5 4")],
        ),
        ("time to the first token, ms: median", [("median_ttft_ms", "")]),
    ):
        lines = [
            (_name(run), COLOURS[index % len(COLOURS)], dash, _line(run, one))
            for index, run in enumerate(runs)
            for one, dash in wanted
        ]
        lines = [line for line in lines if line[3]]
        if lines:
            plots.append(_plot(words, lines))
    legend = "".join(
        f'<span><i style="border-color:{COLOURS[index % len(COLOURS)]}"></i>{escape(_name(run))}</span>'
        for index, run in enumerate(runs)
    )
    tables = []
    for run in runs:
        before = previous(run, there)
        heads, body = _cells(run, before)
        rows = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
        rows += ["".join(f"<td>{escape(cell)}</td>" for cell in cells) for cells in body]
        tables.append(
            f"<h2>{escape(title(run))}</h2>\n<table>"
            + "\n".join(f"<tr>{row}</tr>" for row in rows)
            + f"</table>\n<p>{escape(_compared(before))}</p>"
        )
    parts = "\n".join([f'<p class="legend">{legend}</p>', f'<div class="plots">{"".join(plots)}</div>', *tables])
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(heading)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{escape(heading)}</h1>
{parts}
</body>
</html>
"""
