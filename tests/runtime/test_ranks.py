"""Processes that end with the one that started them."""
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

from tests.faults.processes import is_alive, wait_until
from utils.runtime.errors import UserError
from utils.runtime.ranks import alone, die_with_parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")


def test_a_stage_of_one_process_refuses_torchrun(monkeypatch):
    assert alone("cpu") == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["/somewhere/verify_fr.py"])
    with pytest.raises(UserError, match="torchrun: verify_fr.py runs in one process; start it with python"):
        alone("cpu")


def _sleep(pipe) -> None:
    die_with_parent()
    pipe.send(os.getpid())
    time.sleep(60)


def _start(pipe) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a script that ran in the test's process may have set another
    multiprocessing.get_context("fork").Process(target=_sleep, args=(pipe,)).start()
    time.sleep(60)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent(sent):
    here, there = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=_start, args=(there,))
    parent.start()
    assert here.poll(20)
    child = here.recv()
    assert is_alive(child)
    os.kill(parent.pid, sent)
    parent.join(10)
    assert wait_until(lambda: not is_alive(child), 3)


def _ask_of_a_dead_parent(pipe) -> None:
    if os.fork() == 0:  # its multiprocessing parent is the test, its true parent ends now
        time.sleep(0.1)
        pipe.send("begun")
        die_with_parent()
        pipe.send("went on")
    os._exit(0)


def test_a_child_whose_parent_ended_before_ends_too():
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_ask_of_a_dead_parent, args=(there,))
    process.start()
    process.join(10)
    there.close()
    assert here.recv() == "begun"
    with pytest.raises(EOFError):
        here.recv()
