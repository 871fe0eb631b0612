"""What all tests share."""
import signal

import pytest
import torch

# Small tensors gain nothing from threads, and threads that wait for busy cores lose much.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals_as_before():
    """Scripts that end in this process ignore signals from then on: put back what the next test expects."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
