from types import SimpleNamespace

import pytest

from vitopt.report.timing import latency_at, speedup_between


def test_latency_is_found_by_batch_size(make: SimpleNamespace):
    record = make.record("a", p50_ms={1: 3.0, 8: 9.0})

    assert latency_at(record, None).batch_size == 1
    assert latency_at(record, 8).p50_ms == 9.0
    assert latency_at(record, 2) is None
    assert latency_at(make.record("b"), None) is None


def test_speedup_has_an_interval_from_the_rounds(make: SimpleNamespace):
    found = speedup_between(make.latency(1, 30.0), make.latency(1, 20.0))

    assert found.ratio == pytest.approx(1.5)
    assert found.interval.low <= 1.5 <= found.interval.high


@pytest.mark.parametrize("change", [{"rounds": 7}, {"samples_ms": ()}, {"rounds": 3}])
def test_without_matching_rounds_there_is_a_ratio_only(make: SimpleNamespace, change):
    other = make.latency(1, 20.0).model_copy(update=change)

    found = speedup_between(make.latency(1, 30.0), other)

    assert found.ratio == pytest.approx(1.5)
    assert found.interval is None
