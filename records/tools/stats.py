"""The statistics of verify, race and judge: means, one-sided t-tests, intervals."""

import math

CONFIDENCE = 0.95
# What a race is decided by, unless its flags say otherwise; records are held to these.
ALPHA = 0.01  # level of the whole race, or of a record's claim
LOSS_MARGIN = 0.005  # nats per token; a third of a percent of a loss of 1.5
MIN_PAIRS = 3  # no look before this many rounds


def mean_std(values) -> dict:
    """{"mean", "std"} of a sample without its Nones; None where it is too small."""
    values = [value for value in values if value is not None]
    if not values:
        return {"mean": None, "std": None}
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "std": None}
    squares = math.fsum((value - mean) ** 2 for value in values)
    return {"mean": mean, "std": math.sqrt(squares / (len(values) - 1))}


def p_less(values, bound: float = 0.0) -> float | None:
    """One-sided p of a t-test that the mean is below `bound`. None for fewer than two values."""
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


def compare(times, losses, margin: float) -> dict:
    """What pairs of runs say. times, losses: {"reference": [...], "candidate": [...]}, paired.

    The ratio is the geometric mean of candidate time / reference time, ci the t interval of the
    paired log ratios, the four p-values those of one-sided paired t-tests."""
    slower = [math.log(b / a) for a, b in zip(times["reference"], times["candidate"], strict=True)]
    worse = [b - a for a, b in zip(losses["reference"], losses["candidate"], strict=True)]
    centre, half = mean_std(slower)["mean"], half_interval(slower)
    found = {"n": len(slower), "ratio": None, "ci": None}
    if slower:
        found["ratio"] = math.exp(centre)
    if half is not None:
        found["ci"] = [math.exp(centre - half), math.exp(centre + half)]
    return found | {
        "p_value": p_less(slower),
        "p_slower": p_less([-x for x in slower]),
        "p_loss_not_worse": p_less(worse, margin),
        "p_loss_worse": p_less([-x for x in worse], -margin),
        "loss_reference": mean_std(losses["reference"]),
        "loss_candidate": mean_std(losses["candidate"]),
    }


def verdict(found: dict, level: float) -> str | None:
    """Of what compare() found: "yes" where the candidate is faster at equal loss, "no" where it is
    slower or its loss worse, None where `level` decides neither."""
    if found["n"] < 2:
        return None
    if found["p_value"] < level and found["p_loss_not_worse"] < level:
        return "yes"
    if found["p_slower"] < level or found["p_loss_worse"] < level:
        return "no"
    return None


def times_of(race: dict) -> dict[str, list[float]]:
    """{"reference": [ms], "candidate": [ms]} of a race.json: the wall clock of each run less the
    start-up that it was measured with. Races before December 2026 timed the lines of the log."""
    if "startup_ms" not in race:
        return race["times_ms"]
    walls, starts = race["wall_ms"], race["startup_ms"]
    return {
        who: [wall - start for wall, start in zip(walls[who], starts[who], strict=True)]
        for who in ("reference", "candidate")
    }


def outcome(race: dict, margin: float | None = None) -> dict:
    """What follows from what a race measured and planned: the only place where it is computed.

    compare()'s numbers, level (of one look), faster ("yes", "no", "not shown"), and word: what is
    shown, in short."""
    margin = race["loss_margin"] if margin is None else margin
    found = compare(times_of(race), race["losses"], margin)
    level = race["alpha"] / len(race["looks"])
    faster = verdict(found, level) or "not shown"
    low, high = found["ci"] or (0.0, math.inf)
    word = "faster" if faster == "yes" else "slower" if low > 1 else "no difference shown"
    if faster != "yes" and high < 1:
        word = "less time; equal loss not shown"
    return found | {"level": level, "faster": faster, "word": word, "margin": margin}


def why_not_faster(found: dict) -> str:
    """Empty where outcome() shows that the candidate is faster, else what it does not show."""
    if found["faster"] == "yes":
        return ""
    if found["p_value"] is None or found["p_value"] >= found["level"]:
        ratio, p = shown(found["ratio"], ".3f"), shown(found["p_value"])
        return f"it does not show less time: ratio {ratio}, p = {p}"
    worse = found["loss_candidate"]["mean"] - found["loss_reference"]["mean"]
    return (
        f"it does not show a loss as good: {worse:+.4f} against the reference, "
        f"p = {found['p_loss_not_worse']:.2g} at a margin of {found['margin']:g}"
    )


def shown(value, form=".2g") -> str:
    return "?" if value is None else format(value, form)


def interval(found: dict) -> str:
    """ "0.812 [0.795, 0.829]" of what outcome() found."""
    text = shown(found["ratio"], ".3f")
    return text + " [{:.3f}, {:.3f}]".format(*found["ci"]) if found["ci"] else text


def plus_minus(values: dict, scale=1.0, digits=4) -> str:
    """ "1.4987 ± 0.0012" of a dict made by mean_std()."""
    if values["mean"] is None:
        return "?"
    text = f"{values['mean'] / scale:.{digits}f}"
    return text if values["std"] is None else f"{text} ± {values['std'] / scale:.{digits}f}"


def planned_looks(runs: int, looks: int) -> list[int]:
    """Rounds after which a race of `runs` rounds may be decided."""
    rounds = (max(MIN_PAIRS, math.ceil(runs * i / looks)) for i in range(1, looks + 1))
    return sorted({min(runs, number) for number in rounds})
