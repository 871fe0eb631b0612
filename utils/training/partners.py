"""Other images of the same person."""
import numpy as np


class Partners:
    """Other images of the same person.

    Args:
        labels: [N] identities, those of one person side by side.
    """

    def __init__(self, labels: np.ndarray) -> None:
        _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        self.first, self.count = first[inverse], counts[inverse]

    def other(self, numbers: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """For each image number another one of the same person, by a number in [0, 1); itself where there is none."""
        first, others = self.first[numbers], self.count[numbers] - 1
        step = 1 + np.minimum((uniform * others).astype(int), np.maximum(others - 1, 0))
        return first + (numbers - first + step) % self.count[numbers]
