import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from vitopt.measure.paired import PairedCounts, holm, mcnemar_exact_p, paired_counts


class TestMcnemarExactP:
    @pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 5), (6, 16), (30, 12), (700, 780)])
    def test_equals_statsmodels(self, lost, gained):
        expected = mcnemar([[100, lost], [gained, 50]], exact=True).pvalue if lost + gained else 1.0
        assert mcnemar_exact_p(lost, gained) == pytest.approx(expected, rel=1e-9)

    def test_rejects_a_negative_count(self):
        with pytest.raises(ValueError, match="cannot be negative, got -1 and 3"):
            mcnemar_exact_p(-1, 3)


class TestHolm:
    @pytest.mark.parametrize("p_values", [[0.03], [0.01, 0.04, 0.03], [0.2, 0.001, 0.02, 0.02, 1.0], [0.5, 0.6]])
    def test_equals_statsmodels(self, p_values):
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])

    def test_of_nothing_is_nothing(self):
        assert holm([]) == []


class TestPairedCounts:
    def test_counts_each_kind(self):
        baseline = np.array([True, True, True, False, False, True])
        variant = np.array([True, False, False, True, False, True])
        assert paired_counts(baseline, variant) == PairedCounts(2, 2, 1, 1)

    @pytest.mark.parametrize(
        ("baseline", "variant", "message"),
        [
            ([True], [True, False], r"got shapes \(1,\) and \(2,\)"),
            ([], [], r"got shapes \(0,\)"),
            ([3, 4], [3, 4], "arrays of bool, got int64"),
            ([[True]], [[True]], r"got shapes \(1, 1\) and \(1, 1\)"),
        ],
    )
    def test_rejects(self, baseline, variant, message):
        with pytest.raises(ValueError, match=message):
            paired_counts(baseline, variant)
