"""A multistep solver fitted to the embedded weights of models/demo, as in S4S (arXiv 2502.17423): its numbers.

FITTED[steps] has for each step (timestep, a, b_0, b_1, ...): x_next = a x_t + b_0 x_0(now) + b_1 x_0(a step before) + ...
Written by `python -m experiments.solvers fit`.
"""
FITTED: dict[int, tuple[tuple[float, ...], ...]] = {}
