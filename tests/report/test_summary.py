from types import SimpleNamespace

import numpy as np
import pytest

from vitopt.report.summary import baseline_of, headline, highlights


def titles(found):
    return {one.title: one for one in found}


def test_baseline_is_the_one_the_others_were_compared_with(comparison):
    records = comparison[0]

    assert baseline_of(records).variant.name == "fp32"
    assert baseline_of(records, "bf16").variant.name == "fp32"


def test_baseline_of_the_recipe_counts_where_nothing_was_compared(make: SimpleNamespace):
    records = [make.record("a", p50_ms={1: 1.0}), make.record("b", p50_ms={1: 1.0})]

    assert baseline_of(records, "b") is records[1]
    assert baseline_of(records) is None


def test_headline_says_who_loses_and_what_may_hide(comparison):
    records = comparison[0]

    text = headline(records, records[0], None)

    assert "fp32 on 40 images" in text and "a loss is shown for nf4;" in text
    hidden = -records[1].versus_baseline.top1_delta_ci95_points[0]
    assert f"no loss is shown for the others, but up to {hidden:.1f} points" in text
    assert "others" not in headline([records[0], records[2]], records[0], None)
    assert "loss is shown for any variant, but up to" in headline(records[:2], records[0], None)


@pytest.mark.parametrize(
    ("failures", "words"),
    [(("no", None), "baseline a failed"), (("no", "no"), "No variant"), ((None, None), "random pixels")],
)
def test_headline_where_there_is_nothing_to_compare(make: SimpleNamespace, failures, words):
    records = [make.record(name, failure=failure) for name, failure in zip("ab", failures, strict=True)]

    assert words in headline(records, records[0], None)


def test_of_different_sessions_the_fastest_is_told_by_its_speed_up(make: SimpleNamespace):
    times = {1: 4.0}
    records = [
        make.record("fp32", p50_ms=times, baseline_of=("earlier",)),
        make.record("new", p50_ms={1: 2.0}, baseline_ms=times),
        make.record("old", p50_ms={1: 3.0}, baseline_ms={1: 9.0}, measured_together="earlier"),
    ]

    fastest = titles(highlights(records, records[0]))["Fastest at batch 1"]

    assert fastest.names == ("old",) and fastest.figure == "3.00x"
    alone = titles(highlights(records[:2], records[0]))["Fastest at batch 1"]
    assert alone.names == ("new",) and alone.figure == "2.00 ms"


def test_highlights_are_smallest_fastest_and_most_faithful(comparison):
    records = comparison[0]

    found = titles(highlights(records, records[0]))

    assert list(found) == ["Smallest", "Fastest at batch 1", "Fastest at batch 8", "Most faithful"]
    assert found["Smallest"].names == ("nf4",)
    assert found["Smallest"].figure == "3.60 MB"
    assert found["Smallest"].text.startswith("5.6x smaller than fp32; loses")
    assert found["Fastest at batch 1"].names == ("bf16",)
    assert found["Fastest at batch 1"].text.startswith("against fp32: 1.50x faster (1.42 to 1.58)")
    assert found["Most faithful"].names == ("bf16",)
    assert found["Most faithful"].figure == "KL 0"


def test_highlights_name_equals_together_and_who_is_not_measurably_slower(make: SimpleNamespace):
    records = [make.record(name, p50_ms={1: ms}) for name, ms in (("a", 5.0), ("b", 5.05), ("c", 9.0))]
    # Its rounds differ more than the two variants do.
    rounds = np.reshape(records[1].latency[0].samples_ms, (10, 10)) * np.resize([0.9, 1.1], (10, 1))
    noisy = records[1].latency[0].model_copy(update={"samples_ms": tuple(rounds.ravel())})
    records[1] = records[1].model_copy(update={"latency": (noisy,)})
    records.append(make.record("large", weight_bytes=30_000_000))

    found = titles(highlights(records, None))

    assert found["Smallest"].names == ("a", "b", "c")
    assert found["Fastest at batch 1"].names == ("a",)
    assert found["Fastest at batch 1"].text == "not measurably faster than b"


def test_none_is_the_best_of_equals_or_alone(make: SimpleNamespace):
    assert highlights([make.record("a"), make.record("b")], None) == []
    assert highlights([make.record("a", p50_ms={1: 5.0}), make.record("b", failure="no")], None) == []


def test_most_faithful_shows_the_figure_that_it_ranks_by(make: SimpleNamespace):
    before = make.predictions(images=400, sharpness=3)
    against = ("fp32", before)
    # Flips nothing and is far less certain everywhere; the other flips one image.
    flat, sharp = make.predictions(images=400, sharpness=0), make.predictions((3,), 400, sharpness=3)
    records = [
        make.record("fp32", predictions=before),
        make.record("flat", predictions=flat, baseline=against),
        make.record("sharp", predictions=sharp, baseline=against),
    ]
    assert records[1].versus_baseline.agreement_percent > records[2].versus_baseline.agreement_percent

    best = min(records[1:], key=lambda record: record.versus_baseline.mean_kl_divergence)
    found = titles(highlights(records, records[0]))["Most faithful"]
    assert found.names == (best.variant.name,)
    assert found.figure == f"KL {best.versus_baseline.mean_kl_divergence:.2g}"
