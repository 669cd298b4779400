"""The statistics of verify, race and judge: means, one-sided t-tests, intervals."""

import math

CONFIDENCE = 0.95


def mean_std(values) -> dict:
    """{"mean", "std"}: of the sample; None where there are too few values. None among the values is left out."""
    values = [value for value in values if value is not None]
    if not values:
        return {"mean": None, "std": None}
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "std": None}
    squares = math.fsum((value - mean) ** 2 for value in values)
    return {"mean": mean, "std": math.sqrt(squares / (len(values) - 1))}


def p_less(values, bound: float = 0.0) -> float | None:
    """One-sided p-value of a t-test that the mean of `values` is below `bound`. None for fewer than two values."""
    if len(values) < 2:
        return None
    if max(values) == min(values):  # the t statistic is infinite or 0/0
        return 0.0 if values[0] < bound else 1.0
    from scipy import stats  # takes a second to import

    return float(stats.ttest_1samp(values, bound, alternative="less").pvalue)


def half_interval(values, confidence: float = CONFIDENCE) -> float | None:
    """Half the width of the t interval of the mean. None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats

    quantile = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return quantile * mean_std(values)["std"] / math.sqrt(len(values))
