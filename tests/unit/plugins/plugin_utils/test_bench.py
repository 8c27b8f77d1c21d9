# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.bench_html import bench_html
from ansible_collections.baremetal.vllm.plugins.filter.bench_loss import bench_loss
from ansible_collections.baremetal.vllm.plugins.filter.bench_text import bench_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils import bench

WORK = {"input_len": 512, "output_len": 128, "prompts_per_client": 4}


def run(date: str, factor: float = 1.0, **fields: Any) -> dict[str, Any]:
    """A run whose throughput is so many times that of the plain one."""
    levels = [
        {
            "concurrency": clients,
            "requests_per_s": 2.0 * clients * factor,
            "output_tokens_per_s": 256.0 * clients * factor,
            "median_ttft_ms": 20.0,
            "mean_e2el_ms": 500 / factor,
            "p99_e2el_ms": 700 / factor,
            "gpu_utilization_percent": None,
        }
        for clients in (50, 100, 200)
    ]
    base = {"label": "", "host": "gpu1", "service": "chat", "model": "m<7b>", "task": "generate", "workload": WORK}
    return {**base, "date": date, "levels": levels, **fields}


def test_table() -> None:
    text = bench_text(run("2026-02-02", 1.1), [run("2026-02-01"), run("2026-02-03"), run("2026-01-01", 9)])
    lines = text.splitlines()
    assert lines[0] == "chat on gpu1 (m<7b>), 512 tokens in, 128 out, 2026-02-02"
    assert "GPU %" not in lines[1], "no row has it"
    assert lines[2].split() == ["50", "110.00", "14,080", "20", "455", "636", "+10.0%", "-9.1%"]
    assert lines[-1] == "compared with 2026-02-01"
    assert len({len(line) for line in lines[1:5]}) == 1


def test_only_equal_loads_are_compared() -> None:
    others = [run("2026-01-01", workload={**WORK, "input_len": 1}), run("2026-01-01", host="gpu2")]
    assert bench_text(run("2026-02-01"), others).endswith("no earlier run of the same load to compare with")
    assert bench_loss(run("2026-02-01", 0.5), others) == 0


def test_loss() -> None:
    before = run("2026-01-01")
    assert bench_loss(run("2026-02-01", 0.9), [before]) == pytest.approx(10)
    assert bench_loss(run("2026-02-01", 1.2), [before]) == 0


def test_page_needs_nothing_else() -> None:
    page = bench_html([run("2026-02-02", 2, label="tuned"), run("2026-02-01")], "a <b>")
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "a &lt;b&gt;" in page
    assert "m&lt;7b&gt;" in page
    plots = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    assert len(plots) == 3
    for plot in plots:
        for point in ET.fromstring(plot).iter("{http://www.w3.org/2000/svg}circle"):
            assert bench.LEFT <= float(point.get("cx", "nan")) <= bench.WIDTH - bench.RIGHT
            assert bench.TOP - 1 <= float(point.get("cy", "nan")) <= bench.HEIGHT - bench.BOTTOM


def test_page_compares_as_the_table_does() -> None:
    """With the last run of the same load, also where that is not shown; runs of other loads are left out."""
    other = run("2026-02-01T12", 9, workload={**WORK, "output_len": 16})
    runs = [run("2026-02-02", 0.909), other, run("2026-02-01"), run("2026-01-01", 9)]
    text, page = bench_text(runs[0], runs[1:]), bench_html(runs, shown=1)
    assert "-9.1%" in text and "-9.1%" in page
    assert "-89.9%" not in page.split("compared with 2026-02-01")[0]
    assert "-88.9%" in page and page.count("compared with") == 2, "the second one, with one that is not shown"
    assert "2026-02-01T12" not in page and page.count("<table>") == 2
    assert "no earlier run of the same load to compare with" in bench_html([run("2026-02-02"), other])


@pytest.mark.parametrize(("highest", "expected"), [(10, 2), (1637, 500), (0.07, 0.02), (164586, 50000)])
def test_ticks_are_round(highest: float, expected: float) -> None:
    marks = bench.ticks(highest)
    assert marks[1] == pytest.approx(expected)
    assert marks[-1] >= highest
    assert len(marks) <= 8


def test_one_level_and_no_throughput() -> None:
    assert "<svg" in bench_html([run("2026-02-01", levels=run("2026-02-01")["levels"][:1])])
    assert bench.ticks(0) == [0.0, 1.0]
