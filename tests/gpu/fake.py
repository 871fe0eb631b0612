"""A GPU that is not there: shapes, types and devices as on one, and no values, so that whoever reads one is found out.

Tensors on `cuda` are torch's FakeTensors; tensors on the CPU are real and keep their values. A read of a value on the device
raises; so does a copy to the host, unless the test says that the result leaves there.
"""
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default)
HEAVY = ("convolution", "addmm", "mm", "bmm", "baddbmm", "_scaled_dot_product")  # what a precision is chosen for


class FakeGPU(TorchDispatchMode):
    """What is computed on the device.

    Attributes:
        may_leave: whether values may leave the device; they are ones.
        to_host, to_device: how many copies there were; a read of one value counts as a copy.
        types: how often matrix products, convolutions and attention gave which type, by (operation, type).
        blocking: how many of the copies to the device wait for what was begun there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.may_leave, self.to_host, self.to_device, self.blocking, self.types = False, 0, 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # where a tensor is
            with self.fake:
                return func(*args, **kwargs)
        if func is aten.scaled_dot_product_attention.default:  # a GPU's own kernel, of which there is none here
            self.types["attention", args[0].dtype] += 1
            return torch.empty_like(args[0])
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # inference mode hands such operations on whole
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and not _is(kwargs.get("device"), "cuda"):
            return func(*args, **kwargs)  # of the host's alone
        if func in READS:
            return self._leave(args[0], torch.ones((), dtype=args[0].dtype).item())
        if func is aten._to_copy.default and _is(kwargs.get("device"), "cpu"):
            return self._leave(args[0], torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype))
        if func is aten.copy_.default and args[0].device.type == "cpu":
            return self._leave(args[1], args[0].fill_(1))
        if func is aten.index.Tensor and any(index is not None and index.dtype is torch.bool for index in args[1]):
            return self._leave(args[0], args[0].flatten())  # how many are chosen is a value too
        if func in (aten._to_copy.default, aten.copy_.default) and tensors[-1].device.type == "cpu":
            self.to_device += 1
            self.blocking += not (kwargs.get("non_blocking") or (args[2:] and args[2]))
        args, kwargs = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
        with self.fake:
            made = func(*args, **kwargs)
        if func.name().removeprefix("aten::").startswith(HEAVY):
            self.types[func.name().removeprefix("aten::"), tree_leaves(made)[0].dtype] += 1
        return made

    def _as_fake(self, tensor: torch.Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _leave(self, tensor: FakeTensor, values):
        if not self.may_leave:
            raise AssertionError(f"{list(tensor.shape)} {tensor.dtype} is read by the host, which waits for the device")
        self.to_host += 1
        return values


def _is(device: torch.device | str | None, kind: str) -> bool:
    return device is not None and torch.device(device).type == kind


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Within it `cuda` can be computed on, and counts as a GPU that is fast at bfloat16; only backward passes cannot run."""
    torch._C._ensureCUDADeviceGuardSet()  # guards that do without a driver
    lifts = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in {"is_available": True, "is_bf16_supported": True, "get_device_capability": (9, 0), "device_count": 1,
                             "set_device": None, "_lazy_init": None, "empty_cache": None,
                             "mem_get_info": (8 * 10**10, 8 * 10**10)}.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)  # without these autocast switches itself off
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        swap = torch.utils.swap_tensors  # by which modules move fake weights; it refuses those that an optimiser has
        patch.setattr(torch.utils, "swap_tensors",
                      lambda a, b: None if (a.device, a.dtype) == (b.device, b.dtype) else swap(a, b))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then a copy like any other
        try:
            with FakeGPU() as gpu:
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
