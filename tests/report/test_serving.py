import numpy as np
import pytest

from vitopt.report.page import write_report
from vitopt.report.plots import latency_load
from vitopt.report.results import gather
from vitopt.report.serving import all_rates, best_rates
from vitopt.report.summary import highlights
from vitopt.serving_record import CallerLatency, ServedRate, Serving


def latency(p50_ms, p99_ms, count=1000):
    known = p99_ms if count >= 100 else None
    limits = {"p50_ci95_ms": (p50_ms, p50_ms), "p95_ci95_ms": (None, None), "p99_ci95_ms": (0.9 * p99_ms, 1.1 * p99_ms)}
    times = {"mean_ms": p50_ms, "std_ms": 1.0, "min_ms": 1.0, "p50_ms": p50_ms, "p95_ms": p99_ms, "p99_ms": known}
    return CallerLatency(count=count, **times, **limits)


def rate(of, p50_ms, p99_ms, refused=0, **more):
    content = {"rate": of, "seconds": 20, "sent": 1000, "answered": 1000 - refused, "refused": refused, "errors": {}}
    figures = {"slowest_refusal_ms": 7.0 if refused else None, "right": 900 - refused, "mean_batch": 1.5}
    return ServedRate(**content, **figures, latency=latency(p50_ms, p99_ms), differing=0, **more)


@pytest.fixture
def served(make):
    """A record as `vitopt load` makes it: 40 requests a second keep 100 ms, 60 do not."""
    serving = Serving(
        alone=latency(15, 25),
        batch_ms={1: 10, 8: 50},
        rates=(rate(20, 18, 40), rate(40, 25, 80, cpu_percent=71.0), rate(60, 90, 160, refused=100)),
        target_p99_ms=100,
        highest_rate=40,
        price_per_hour=0.5,
        cost_per_million=3.47,
    )
    return make.record("fp32 over HTTP", "fp32", predictions=make.predictions(wrong=(0, 5)), serving=serving)


def test_the_best_rate_stands_in_one_row_with_accuracy_and_cost(served):
    table = best_rates([served])
    cells = dict(zip(table.headings, table.rows[0], strict=True))
    assert cells["requests/s that keep it"] == "40.0" and cells["p99 ms"] == "80.00 (≤ 88.00)"
    assert cells["top-1 % (95 %)"].startswith("95.0 (") and cells["a million cost"] == "3.47"
    assert cells["CPU %"] == "71" and cells["alone p99 ms"] == "25.00 (≤ 27.50)"
    assert "GPU %" not in cells and "joules/answer" not in cells  # nothing is known of them
    assert not best_rates([served.model_copy(update={"serving": None})])


def test_every_rate_tells_refusals_and_answers(served):
    (table,) = all_rates([served])
    cells = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["requests/s"] for row in cells] == ["20.0", "40.0", "60.0"]
    assert cells[2]["refused"] == "100 (≤ 7.00 ms)" and cells[2]["answered/s"] == "45.0"
    assert cells[1]["top-1 %"] == "90.0"


def test_the_curve_has_p99_above_p50_and_is_hollow_where_requests_were_refused(served):
    axes = latency_load([served]).axes[0]
    points = {line.get_xdata()[0]: line for line in axes.lines if line.get_marker() == "o"}
    assert {x: line.get_ydata()[0] for x, line in points.items()} == {20: 40, 40: 80, 60: 160}
    assert [points[x].get_markerfacecolor() == "none" for x in (20, 40, 60)] == [False, False, True]
    lines = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 3]
    assert any(np.array_equal(line, [18, 25, 90]) for line in lines)
    assert any(list(line.get_ydata()) == [100, 100] for line in axes.lines)  # the target
    few = served.serving.model_copy(
        update={"rates": (rate(5, 18, 40).model_copy(update={"latency": latency(9, 9, 50)}),)}
    )
    axes = latency_load([served.model_copy(update={"serving": few})]).axes[0]
    assert not [line for line in axes.lines if line.get_marker() == "o"]  # so few answers show no p99
    assert latency_load([served.model_copy(update={"serving": None})]) is None


def test_a_load_stands_beside_what_was_measured_offline(served, make, tmp_path):
    found = {"fp32": make.predictions(wrong=(0, 5)), served.variant.name: make.predictions(wrong=(0, 5))}
    offline = make.run(tmp_path / "run", [make.record("fp32", p50_ms={1: 20.0}, predictions=found["fp32"])], found)
    load = make.run(tmp_path / "load", [served], found)
    results = gather([offline, load], tmp_path / "page")
    assert results.records[1].versus_baseline.agreement_percent == 100
    assert not highlights(results.records, results.baseline)  # it is no other variant than the one offline
    words = write_report(results).read_text(encoding="utf-8")
    assert "Served over HTTP" in words and "fp32 over HTTP: what callers felt at each rate" in words
    assert "Latency against load" in words
    text = (tmp_path / "page" / "report.md").read_text()
    assert "| fp32 over HTTP | 100.0 | 40.0 |" in text and "plots/load.png" in text
