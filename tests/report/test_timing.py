from types import SimpleNamespace

from vitopt.report.timing import latency_at


def test_latency_is_found_by_batch_size(make: SimpleNamespace):
    record = make.record("a", p50_ms={1: 3.0, 8: 9.0})

    assert latency_at(record, None).batch_size == 1
    assert latency_at(record, 8).p50_ms == 9.0
    assert latency_at(record, 2) is None
    assert latency_at(make.record("b"), None) is None
