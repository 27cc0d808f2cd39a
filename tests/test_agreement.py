"""Gwet's coefficients against the Handbook's example, irrCAC and hand-computed values."""

import math

import numpy as np
import pytest

from llama_jax.evals.agreement import gwet, weight_matrix

X = math.nan
# "Handbook of Inter-Rater Reliability", table of four raters and twelve units: categories 1 to 5.
FOUR_RATERS = np.array([
    [1, 1, X, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4], [4, 4, 4, 4], [1, 1, 2, 1],
    [2, 2, 2, 2], [X, 5, 5, 5], [X, X, 1, 1], [X, X, 3, X],
]) - 1  # fmt: skip
FIVE_OBSERVERS = np.array([
    [1, 1, 2, X, 2], [1, 1, 0, 1, X], [2, 3, 3, 3, X], [X, 0, 0, X, 0], [0, 0, 0, X, 0], [0, 0, 0, X, 0], [1, 0, 2, X, 1],
    [1, X, 2, 0, X], [2, 2, 2, X, 2], [2, 1, 1, 1, X], [X, 1, 0, 0, X], [0, 0, 0, 0, X], [1, 2, 2, 2, X], [3, 3, 2, 2, 3],
    [1, 1, 1, X, 1],
])  # fmt: skip


@pytest.mark.parametrize(
    "ratings, categories, weights, expected",
    [  # coefficient, low, high, observed, by chance: AC1 of the first as printed in the Handbook; the rest from irrCAC 0.4.4
        (FOUR_RATERS, 5, "identity", (0.77544, 0.46081, 1.0, 0.81818, 0.19032)),
        (FOUR_RATERS, 5, "linear", (0.85874, 0.60050, 1.0, 0.93939, 0.57096)),
        (FOUR_RATERS, 5, "quadratic", (0.91400, 0.68518, 1.0, 0.97538, 0.71370)),
        (FOUR_RATERS, 5, "ordinal", (0.89894, 0.66365, 1.0, 0.96818, 0.68516)),
        (FIVE_OBSERVERS, 4, "identity", (0.49662, 0.23502, 0.75823, 0.61556, 0.23627)),
        (FIVE_OBSERVERS, 4, "linear", (0.68964, 0.50156, 0.87772, 0.86074, 0.55130)),
        (FIVE_OBSERVERS, 4, "quadratic", (0.83043, 0.70551, 0.95536, 0.94617, 0.68256)),
        (FIVE_OBSERVERS, 4, "ordinal", (0.78534, 0.63909, 0.93159, 0.92481, 0.64974)),
    ],
)
def test_published_examples(ratings, categories, weights, expected):
    found = gwet(ratings, categories, weights=weights)
    values = (found.coefficient, found.low, found.high, found.observed, found.by_chance)
    np.testing.assert_allclose(values, expected, atol=6e-6)


def test_by_hand():
    # Two raters, two degrees, agreement on 3 of 4 items; shares 5/8 and 3/8: chance 2 * 5/8 * 3/8.
    found = gwet(np.array([[0, 0], [0, 0], [1, 1], [0, 1]]), 2)
    chance = 2 * (5 / 8) * (3 / 8)
    assert found.coefficient == pytest.approx((0.75 - chance) / (1 - chance))
    assert gwet(np.array([[2, 2, 2], [0, 0, 0]]), 5).coefficient == 1.0


def test_degrees_that_nobody_gave_count():
    ratings = np.array([[0, 1], [1, 1], [0, 0]])
    assert gwet(ratings, 7, weights="quadratic").coefficient > gwet(ratings, 2, weights="quadratic").coefficient


def test_nothing_to_compare_and_wrong_scales():
    assert gwet(np.array([[0, X], [X, 1]]), 2) is None
    alone = gwet(np.array([[0, 0]]), 2)  # strict JSON knows no NaN
    assert (alone.low, alone.high) == (None, None) and alone.coefficient == 1
    with pytest.raises(ValueError, match=r"expected ratings 0\.\.4, got .*5"):
        gwet(np.array([[5.0, 1.0]]), 5)
    with pytest.raises(ValueError, match="one of identity, ordinal"):
        weight_matrix(3, "cubic")
