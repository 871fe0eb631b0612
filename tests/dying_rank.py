"""sample.py whose last rank is killed in the middle of its third batch: torchrun ... -m tests.dying_rank [settings]."""
import os
import signal

import numpy as np

import sample
from utils.runtime.errors import run_script

draw, begun = sample.Sampler.draw, []


def draw_twice(self: sample.Sampler, *arguments) -> np.ndarray:
    begun.append(arguments)
    if os.environ["RANK"] == "1" and len(begun) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, *arguments)


if __name__ == "__main__":
    sample.Sampler.draw = draw_twice
    run_script(sample.main)
