"""Processes that end with the one that started them."""
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch

from tests.faults.processes import is_alive, wait_until
from utils.runtime.errors import UserError, listen
from utils.runtime.ranks import alone, die_with_parent, setup

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


def _join(pipe) -> None:
    listen()
    pipe.send("ready")
    setup("cpu")


@pytest.mark.slow
def test_a_rank_that_waits_for_a_dead_one_ends_by_sigterm(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    mine, its = multiprocessing.Pipe()
    rank = multiprocessing.get_context("spawn").Process(target=_join, args=(its,))
    rank.start()
    assert mine.recv() == "ready"
    time.sleep(1)  # by then it waits for the other
    rank.terminate()
    rank.join(10)
    ended_by = rank.exitcode
    rank.kill()
    assert ended_by == -signal.SIGTERM
