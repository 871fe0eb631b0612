"""What all tests share."""
import signal

import pytest
import torch

# Small tensors gain nothing from threads, and threads that wait for busy cores lose much.
torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore Ctrl-C, which their processes would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_as_before():
    """Scripts that end in this process ignore signals from then on: put back what the next test expects."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
