"""Ranks and devices: every script runs on a CPU, one GPU or, through torchrun, on several, with the same code."""
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.runtime.errors import PARENT, UserError

T = TypeVar("T")
F = TypeVar("F", bound=Callable)
# How long ranks wait for one another: rank 0 may prepare the faces of a large training set alone.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process as one of several: `rank` of `world_size`, computing on `device`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Every world_size-th item from `rank` on: shards differ in length by one at most."""
        return list(items[self.rank :: self.world_size])

    def print(self, *values: object) -> None:
        """Print once, on rank 0."""
        if self.is_main:
            print(*values, flush=True)

    def on_main(self, action: Callable[[], object]) -> None:
        """Do something on rank 0, before any rank goes on."""
        if self.is_main:
            action()
        self.barrier()

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank: what is costly to find out is found out once."""
        value = [make() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(value)
        return value[0]

    def main_first(self, make: Callable[[], T]) -> T:
        """What `make` gives, on rank 0 before the others: what it caches on disk is made once."""
        if self.is_main:
            made = make()
        self.barrier()
        return made if self.is_main else make()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """The element-wise sum of `values` over all ranks; the device is waited for."""
        if self.world_size == 1:
            return torch.as_tensor(values, dtype=torch.float64).tolist()
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, mine: bool) -> bool:
        """What rank 0 says: clocks differ between ranks, and all of them must do the same."""
        return any(self.sum([self.is_main and mine])) if self.world_size > 1 else mine

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Give every rank rank 0's values, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def replicated(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module, with gradients averaged over the ranks; each rank's batch norms keep their own statistics, as published."""
        if self.world_size == 1:
            return module
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's, of this option's next name
            return DistributedDataParallel(module, broadcast_buffers=False)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def setup(device: str = "auto") -> Ranks:
    """Join the torchrun group if there is one (nccl on GPUs, gloo on CPUs) and choose this rank's device.

    Args:
        device: `auto` (GPUs where there are any, else the CPU), `cpu` or `cuda`.
    Raises:
        UserError: `cuda` is asked for and there is none, or a node has fewer GPUs than ranks.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, but this machine has no usable GPU; set device=cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun: {local_rank + 1} or more processes on a machine with {torch.cuda.device_count()} "
                        "GPUs; set --nproc_per_node to the number of GPUs, or device=cpu")
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    if world_size > 1:
        die_with_parent()
        # Who waits here for a rank that has died runs no Python: only the signal's own effect ends it. Nothing is in hand yet.
        heard = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=PATIENCE)
        signal.signal(signal.SIGTERM, heard)
    return Ranks(rank, world_size, chosen)


def alone(device: str = "auto") -> torch.device:
    """The device of a stage that runs in one process.

    Raises:
        UserError: torchrun started several, which would write the same files; else as `setup`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"torchrun: {os.path.basename(sys.argv[0])} runs in one process; start it with python")
    return setup(device).device


def die_with_parent() -> None:
    """End this process at once when the one that started it ends, however that ends (Linux; nothing elsewhere).

    Every file is written whole or not at all, so that nothing is lost.
    """
    if sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    starter = multiprocessing.parent_process()
    if os.getppid() != (starter.pid if starter else PARENT):  # it had ended before
        os._exit(1)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as `precision` (fp32, bf16, auto) says; auto: where the device is fast at it.

    Fast at it are GPUs from Ampere on, and CPUs with AMX or AVX-512 bfloat16 instructions.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # unknown to older torch: then fp32
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def compiled(function: F, device: torch.device) -> F:
    """torch.compile(function); on a CPU without the C++ compiler that it needs, the function itself."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        return function
    return torch.compile(function)
