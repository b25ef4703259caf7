from types import SimpleNamespace

import pytest

from vitopt.records import Requirement
from vitopt.report.summary import baseline_of, headline, highlights, ship, verdicts


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

    text = " ".join(headline(records, records[0]))

    assert text.startswith("2 variants were compared with fp32 on the same 40 images: nf4 loses accuracy; ")
    assert "A loss of up to" in text and "is not excluded" in text
    assert "fp8 failed" in text


def test_headline_names_the_best_of_those_that_hold(make: SimpleNamespace):
    before = make.predictions(images=400)
    against = ("fp32", before)
    records = [
        make.record("fp32", predictions=before, p50_ms={1: 9.0}),
        make.record("bf16", predictions=before, baseline=against, p50_ms={1: 5.0}, weight_bytes=2_000_000),
        make.record("w8a8", predictions=before, baseline=against, p50_ms={1: 6.0}, weight_bytes=1_000_000),
        make.record("nf4", predictions=make.predictions(range(200), 400), baseline=against, p50_ms={1: 1.0}),
    ]

    assert "Of those, bf16 is the fastest at batch 1 and w8a8 is the smallest." in headline(records, records[0])


def test_headline_of_equal_variants_does_not_claim_more_than_the_images_show(make: SimpleNamespace):
    before = make.predictions(images=400)
    records = [
        make.record("fp32", predictions=before),
        make.record("bf16", predictions=make.predictions((3,), 400), baseline=("fp32", before)),
    ]

    first, second = headline(records, records[0])

    assert first == "bf16 was compared with fp32 on the same 400 images: no loss of accuracy is shown."
    assert "A loss of up to 1.4 points is not excluded" in second
    assert "bf16 gives another class than fp32 on 0.25 % of the images" in second


@pytest.mark.parametrize(
    ("failures", "words"),
    [(("no", None), "baseline a failed"), (("no", "no"), "No variant"), ((None, None), "random pixels")],
)
def test_headline_where_there_is_nothing_to_compare(make: SimpleNamespace, failures, words):
    records = [make.record(name, failure=failure) for name, failure in zip("ab", failures, strict=True)]

    (sentence,) = headline(records, records[0])

    assert words in sentence


def test_highlights_are_smallest_fastest_and_most_faithful(comparison):
    records = comparison[0]

    found = titles(highlights(records, records[0]))

    assert list(found) == ["Smallest", "Fastest at batch 1", "Fastest at batch 8", "Most faithful"]
    assert found["Smallest"].names == ("nf4",)
    assert found["Smallest"].figure == "3.60 MB"
    assert found["Smallest"].text.startswith("weights 5.6x smaller than those of fp32; loses")
    assert found["Fastest at batch 1"].names == ("bf16",)
    assert found["Fastest at batch 1"].text.startswith("against fp32: 1.50x faster (1.42 to 1.58)")
    assert found["Most faithful"].names == ("bf16",)
    assert found["Most faithful"].figure == "KL 0"


def test_highlights_name_equals_together_and_who_is_not_measurably_slower(make: SimpleNamespace):
    records = [make.record(name, p50_ms={1: 5.0}) for name in "ab"] + [make.record("large", weight_bytes=30_000_000)]

    found = titles(highlights(records, None))

    assert found["Smallest"].names == ("a", "b")
    assert found["Fastest at batch 1"].text == "not measurably faster than b"


def test_none_is_the_smallest_of_equals(make: SimpleNamespace):
    assert highlights([make.record("a"), make.record("b")], None) == []


def test_one_variant_has_no_highlights(make: SimpleNamespace):
    assert highlights([make.record("a", p50_ms={1: 5.0}), make.record("b", failure="no")], None) == []


def test_verdicts_speak_of_accuracy_speed_and_size(comparison):
    records = comparison[0]

    found = verdicts(records, records[0])

    assert found["bf16"][1:] == [
        "same class as fp32 on 100.0 % of the images",
        "at batch 1: 1.50x faster (1.42 to 1.58)",
        "at batch 8: 1.80x faster (1.71 to 1.89)",
        "weights 2.0x smaller than those of fp32",
    ]
    assert found["nf4"][0].startswith("loses")
    assert found["fp8"] == ["failed: fp8 cannot run on cpu"]


def test_verdicts_say_what_is_on_disk_where_another_format_ran(make: SimpleNamespace):
    records = [make.record("nf4", "nf4"), make.record("as-bf16", "bf16", stored_format="nf4", weight_bytes=40_000_000)]

    size, stored = verdicts(records, records[0])["as-bf16"]
    assert "2.0x larger" in size
    assert "nf4" in stored and "expanded to bf16" in stored


def test_a_variant_alone_has_no_verdict(make: SimpleNamespace):
    assert verdicts([make.record("a", predictions=make.predictions())], None) == {}


def test_equals_are_named_the_smallest_together(make: SimpleNamespace):
    before = make.predictions(images=400)
    against = ("fp32", before)
    records = [
        make.record("fp32", predictions=before),
        make.record("nf4", predictions=make.predictions(range(200), 400), baseline=against),
        make.record("w8a8", predictions=before, baseline=against, weight_bytes=1_000_000),
        make.record("w8a8-compiled", predictions=before, baseline=against, weight_bytes=1_000_000),
    ]

    assert "Of those, w8a8 and w8a8-compiled are the smallest." in headline(records, records[0])


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


def test_headline_says_by_whom_requirements_are_met(make: SimpleNamespace):
    def required(decision: str) -> dict[str, object]:
        one = Requirement(name="max_kl", limit=0.1, measured=0.2, ci95=(0.1, 0.3), decision=decision)
        return {"requirements": (one,)}

    records = [make.record("fp32"), make.record("a", **required("failed")), make.record("b", **required("shown"))]

    assert "What is required is met by b and missed by a." in headline(records, records[0])
    assert "KL divergence at most 0.1 nats: 0.2 (0.1 to 0.3), missed" in verdicts(records, records[0])["a"]


def test_the_fastest_that_meets_what_is_required_is_to_ship(make: SimpleNamespace):
    def judged(name: str, p50_ms: float, decision: str):
        one = Requirement(name="max_top1_drop", limit=1.0, measured=0.0, decision=decision)
        return make.record(name, p50_ms={1: p50_ms}, baseline_ms={1: 4.0}, requirements=(one,))

    baseline = make.record("fp32", p50_ms={1: 4.0})
    slow, fast, unsure = judged("slow", 3.0, "shown"), judged("fast", 2.0, "shown"), judged("unsure", 1.0, "undecided")

    assert ship([baseline, slow, fast, unsure]).startswith("ship fast: it meets what is required and is the fastest")
    assert "2.00 ms, 2.00x" in ship([baseline, slow, fast, unsure])
    assert ship([baseline, unsure]) == "no variant is shown to meet all that is required"
    assert ship([baseline]) is None
