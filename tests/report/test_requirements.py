import pytest

from vitopt.recipe import RequireSpec
from vitopt.records import Requirement
from vitopt.report.requirements import asked, requirement_parts, requirement_sentence


def test_every_key_has_words():
    for key in RequireSpec.model_fields.keys() - {"batch_size"}:
        assert " 2" in asked(key, 2.0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"name": "max_top1_drop", "limit": 0.5, "measured": 2.0, "ci95": (-0.91, 5.04), "decision": "undecided",
             "reason": "about 370 more images would likely decide it"},
            "loss of top-1 at most 0.5 points: 2 (-0.91 to 5.04), not shown: about 370 more images would likely "
            "decide it",
        ),
        (
            {"name": "min_speedup", "limit": 1.2, "measured": 1.5, "ci95": (1.4, 1.6), "decision": "shown",
             "batch_size": 8},
            "speed-up at least 1.2x at batch 8: 1.5 (1.4 to 1.6), met",
        ),
        (
            {"name": "auto.max_top1_drop", "limit": 0.5, "measured": 3.0, "ci95": (0.5004, 5.0), "decision": "failed"},
            "floor of skip: auto: loss of top-1 at most 0.5 points: 3 (0.5004 to 5), missed",
        ),
        (
            {"name": "max_p99_ms", "limit": 20, "measured": None, "decision": "undecided", "reason": "not timed"},
            "p99 at most 20 ms: not shown: not timed",
        ),
        ({"name": "max_megabytes", "limit": 20, "measured": 3.6, "ci95": (3.6, 3.6), "decision": "shown"},
         "weights at most 20 MB: 3.6, met"),
    ],
)  # fmt: skip
def test_a_requirement_in_one_line(fields, text):
    assert requirement_sentence(Requirement(**fields)) == text


def test_an_end_that_is_not_known_is_said():
    one = Requirement(name="max_p99_ms", limit=20, measured=18, ci95=(17.0, None), decision="undecided", reason="why")
    assert requirement_parts(one) == ("p99 at most 20 ms", "18 (17 to –), not shown: why")
