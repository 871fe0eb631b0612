"""Prepacked weights: the same numbers, faster."""
import platform

import pytest
import torch

from models.prepacked import PrepackedLinear, prepack
from models.sizes import build

CPU = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


@pytest.mark.skipif(not CPU, reason="not an x86 CPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0)])
def test_the_network_gives_the_same_numbers(dtype, tolerance):
    torch.manual_seed(0)
    unet = build("small")[0].eval().to(dtype, memory_format=torch.channels_last)
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # some begin at zero
    x_t, t = torch.randn(3, 3, 16, 16).to(dtype), torch.full((3,), 500)
    contexts = torch.nn.functional.normalize(torch.randn(6, 512)).to(dtype)
    with torch.inference_mode():
        plain = unet(x_t, t, unet.context_tokens(contexts))
        prepack(unet)
        packed, fewer = unet(x_t, t, unet.context_tokens(contexts)), unet(x_t[:2], t[:2], unet.context_tokens(contexts[:4]))
    assert sum(isinstance(vars(layer).get("forward"), PrepackedLinear) for layer in unet.modules()) > 20
    assert (packed - plain).abs().max() <= tolerance * plain.abs().max() and plain.std() > 0.01
    assert fewer.shape == (4, 3, 16, 16) and fewer.isfinite().all()  # another batch than the first


def test_what_is_not_on_a_cpu_stays_as_it_is():
    with torch.device("meta"):
        unet = build("small")[0]
    prepack(unet)
    assert not any("forward" in vars(layer) for layer in unet.modules())
