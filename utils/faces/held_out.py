"""Which identities are held out of a training run."""
import numpy as np

from utils.runtime.errors import UserError


def held_out(eligible: np.ndarray, identities: int, part: int, most: int) -> np.ndarray:
    """The numbers of the identities to hold out, evenly spread over the eligible ones.

    Args:
        eligible: [E] numbers of the identities that may be held out.
        identities: how many there are in all.
        part: one in `part` is held out, at least 2 and at most `most`.
    Raises:
        UserError: fewer than two identities would be held out, or left to train on.
    """
    number = min(most, max(2, identities // part))
    if number > min(len(eligible), identities - 2):
        raise UserError(f"faces: {number} of {identities} people, {len(eligible)} of whom are eligible, cannot be held out with "
                        "two others left to train on; give the faces of more people")
    return eligible[np.arange(number) * len(eligible) // number]
