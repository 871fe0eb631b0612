"""Weights in the order in which oneDNN's kernels read them. On CPUs they are otherwise reordered at every call, and products
in float32 are left to a library that is half as fast on some.
"""
import platform

import torch
from torch import Tensor, nn

KERNELS = torch.ops.mkldnn  # what torch.compile's freezing calls too
PREPACKED = KERNELS._linear_pointwise, KERNELS._convolution_pointwise


def prepack(network: nn.Module) -> None:
    """Have a network's convolutions and linear layers read prepacked weights, on x86 CPUs; else it stays as it is.

    It takes no training after that, and no autocast: layers compute in the type of their weights.
    """
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return
    # bfloat16 is refused by oneDNN where the CPU has no instructions that it can be computed with
    dtypes = {torch.float32, torch.bfloat16} if KERNELS._is_mkldnn_bf16_supported() else {torch.float32}
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.device.type == "cpu" and layer.weight.dtype in dtypes:
            layer.forward = PrepackedLinear(layer) if isinstance(layer, nn.Linear) else PrepackedConvolution(layer)


class PrepackedLinear:
    """A linear layer's forward; its weights are packed for the shape of the input, anew where that changes.

    Packed for no shape in particular they would be in an order that is as slow as none.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.shape, self.weight = layer, torch.Size(), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.shape:
            self.shape, self.weight = x.shape, self.pack(x.shape)
        return self.compute(x)

    def pack(self, shape: torch.Size) -> Tensor:
        return KERNELS._reorder_linear_weight(self.layer.weight.detach(), shape.numel() // shape[-1])

    def compute(self, x: Tensor) -> Tensor:
        return KERNELS._linear_pointwise(x, self.weight, self.layer.bias, "none", [], "")


class PrepackedConvolution(PrepackedLinear):
    """The same of a convolution."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.how = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups

    def pack(self, shape: torch.Size) -> Tensor:
        return KERNELS._reorder_convolution_weight(self.layer.weight.detach(), *self.how, list(shape))

    def compute(self, x: Tensor) -> Tensor:
        return KERNELS._convolution_pointwise(x, self.weight, self.layer.bias, *self.how, "none", [], "")
