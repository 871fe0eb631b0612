"""Prepacked weights: the same numbers, faster."""
import platform

import pytest
import torch

from models.prepacked import PrepackedLinear, prepack
from models.sizes import build

X86 = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
BF16 = X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not X86, reason="not an x86 CPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0)])
def test_the_network_gives_the_same_numbers(dtype, tolerance):
    torch.manual_seed(0)
    unet = build("small")[0].eval().to(dtype, memory_format=torch.channels_last)
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # some begin at zero
    x_t, t = torch.randn(3, 3, 16, 16).to(dtype), torch.full((3,), 500)
    contexts = torch.nn.functional.normalize(torch.randn(6, 512)).to(dtype)
    def predict(images: int) -> torch.Tensor:
        return unet(x_t[:images], t[:images], unet.context_tokens(contexts[: 2 * images]))

    with torch.inference_mode():
        plain = predict(3), predict(2)
        prepack(unet)
        packed = predict(3), predict(2)  # another batch than the first is packed for anew
    layers = [layer for layer in unet.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    if dtype is torch.float32 or BF16:
        assert all(isinstance(layer.forward, PrepackedLinear) for layer in layers) and len(layers) > 20
    for ours, theirs in zip(packed, plain, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() and theirs.std() > 0.01


def test_what_is_not_on_a_cpu_stays_as_it_is():
    with torch.device("meta"):
        unet = build("small")[0]
    prepack(unet)
    assert not any("forward" in vars(layer) for layer in unet.modules())
