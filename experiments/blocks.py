"""Differences between arms that were measured in blocks, here the seeds: what a seed does to all arms alike cancels out.

An arm is compared in all seeds that have any of the arms, not only in its own: the others tell how lucky its seeds were, and how
far one measurement strays. With two arms that have the same seeds this is Student's paired t test.
"""
import math
from collections.abc import Mapping

import numpy as np
from scipy.stats import t as student

Values = Mapping[tuple[str, int], float]  # of an arm in a seed


def contrast(values: Values, arm: str, base: str, level: float = 0.9) -> tuple[float, float, float] | None:
    """`arm` less `base` by least squares of value = arm + seed + noise, the noise of one variance for all, and the limits of its
    interval by Student's t (the additive model of randomised blocks: Montgomery, Design and Analysis of Experiments, chapter 4).

    Returns:
        The difference and its limits, NaN where nothing tells the noise; None where no chain of shared seeds links the two.
    """
    if not {arm, base} <= {of for of, _ in values}:
        return None
    arms, seeds = (list(dict.fromkeys(names)) for names in zip(*values, strict=True))
    design = np.array([[of == one for one in arms] + [seed == one for one in seeds] for of, seed in values], dtype=float)
    wanted = np.array([(one == arm) - (one == base) for one in arms] + [0] * len(seeds), dtype=float)
    solve, found = np.linalg.pinv(design), np.array(list(values.values()))
    weights = wanted @ solve  # of each value in the difference
    if not np.allclose(weights @ design, wanted):
        return None
    value, noise = float(weights @ found), found - design @ (solve @ found)
    freedom = len(found) - np.linalg.matrix_rank(design)
    if not freedom:
        return value, math.nan, math.nan
    reach = student.ppf((1 + level) / 2, freedom) * math.sqrt(noise @ noise / freedom * (weights @ weights))
    return value, value - reach, value + reach
