"""DD-Ranking's scores: hand-computed values, bounds and directions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tadperf.pipeline.ddranking import (
    augmentation_robust_score,
    ddranking_scores,
    label_robust_score,
    normalised_score,
)


def test_the_normalised_score_maps_its_range_to_0_and_1():
    assert (normalised_score(-1), normalised_score(1)) == (0.0, 1.0)
    assert (
        normalised_score(0)
        == pytest.approx((1 - 1 / math.e) / (math.e - 1 / math.e))
        == pytest.approx(0.268941, abs=1e-6)
    )


def test_a_score_computed_by_hand():
    """IOR = 0.7 - 0.5 = 0.2 and HLR = 0.9 - 0.6 = 0.3: alpha = 0.5 * 0.2 - 0.5 * 0.3 = -0.05."""
    lrs = label_robust_score(hard=0.6, ours=0.7, random=0.5, full=0.9)
    assert lrs == pytest.approx((math.exp(-0.05) - math.exp(-1)) / (math.exp(1) - math.exp(-1)))
    ars = augmentation_robust_score(ours=0.7, random=0.5, ours_plain=0.6, random_plain=0.5)  # beta = 0.15
    assert ars == pytest.approx((math.exp(0.15) - math.exp(-1)) / (math.exp(1) - math.exp(-1)))


def test_random_images_that_recover_the_real_data_score_as_nothing():
    assert label_robust_score(0.8, 0.8, 0.8, 0.8) == normalised_score(0)
    assert augmentation_robust_score(0.5, 0.5, 0.3, 0.3) == normalised_score(0)


def test_the_table_holds_the_mean_over_the_repeats():
    rng = np.random.default_rng(0)
    ours, random, hard, ours_plain, random_plain = rng.uniform(0.3, 0.9, (5, 4)).tolist()
    found = ddranking_scores(ours, random, hard, ours_plain, random_plain, full=[0.9, 0.8])
    lrs = [label_robust_score(h, o, r, 0.85) for h, o, r in zip(hard, ours, random, strict=True)]
    assert found["lrs"]["runs"] == pytest.approx(lrs)
    assert found["lrs"]["mean"] == pytest.approx(np.mean(lrs))
    assert found["lrs"]["std"] == pytest.approx(np.std(lrs))
    assert found["hard_label_recovery"]["mean"] == pytest.approx(0.85 - np.mean(hard))
    assert found["improvement_over_random"]["mean"] == pytest.approx(np.mean(ours) - np.mean(random))
    assert found["ars"]["mean"] == pytest.approx(
        np.mean([augmentation_robust_score(*four) for four in zip(ours, random, ours_plain, random_plain, strict=True)])
    )
