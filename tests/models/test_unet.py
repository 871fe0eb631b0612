"""The epsilon network against the published implementation's numbers (tests/data, golden values)."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.unet import GROUPS, ConditionalUNet, GroupNorm
from utils.runtime.errors import UserError

DATA = Path(__file__).parents[1] / "data"
SMALL = json.loads((DATA / "configs.json").read_text())["unet_small"]
FULL = SMALL | {"initial_channels": 96, "channel_multipliers": [1, 2, 2, 2], "is_attention": [False, True, True, True],
                "n_blocks_per_resolution": 2, "context_input_channels": 512, "context_channels": 256}


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(DATA / "unet_small_io.safetensors")


@pytest.fixture(scope="module")
def unet() -> ConditionalUNet:
    network = ConditionalUNet(**SMALL)
    network.load_state_dict(load_file(DATA / "unet_small.safetensors"))
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(("output", "context"), [
    ("eps_context", lambda io: io["context"]), ("eps_negative", lambda io: io["negative_context"]),
    ("eps_zero_vector", lambda io: torch.zeros_like(io["context"])), ("eps_no_context", lambda io: None)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_golden(unet, io, output, context, memory_format):
    unet.to(memory_format=memory_format)
    for with_gradients in (True, False):  # whose group norms differ
        with torch.set_grad_enabled(with_gradients):
            eps = unet(io["x"].contiguous(memory_format=memory_format), io["t"], context(io))
        assert (eps - io[output]).abs().max() < 1e-5


@pytest.mark.parametrize("channels, side", [(64, 16), (192, 8), (96, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_of_channels_last_is_that_of_torch(channels, side, dtype):
    """Within 1e-5 of float64, in bf16 as near as torch's own; a group without variance stays finite, whatever its mean."""
    torch.manual_seed(0)
    norm, x = GroupNorm(channels).requires_grad_(False), torch.randn(4, channels, side, side) + 0.5
    norm.weight.copy_(torch.randn(channels)), norm.bias.copy_(torch.randn(channels))
    scale, shift = torch.randn(2, 4, channels)
    x[0] = 300.0
    norm, x, scale, shift = (y.to(dtype) for y in (norm, x, scale, shift))
    expected = torch.nn.functional.group_norm(x.double(), GROUPS, norm.weight.double(), norm.bias.double())
    expected = (1 + scale.double())[:, :, None, None] * expected + shift.double()[:, :, None, None]
    torchs = norm(x, scale, shift)  # with gradients
    with torch.no_grad():
        found = norm(x.contiguous(memory_format=torch.channels_last), scale, shift)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.isfinite().all()
    error, own = ((y.double() - expected)[1:] / expected[1:].abs().clamp(min=1) for y in (found, torchs))
    assert error.abs().max() < 1e-5 if dtype is torch.float32 else error.square().mean() <= own.square().mean()


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        network = ConditionalUNet(**FULL)
    published = json.loads((DATA / "checkpoint_shapes.json").read_text())["idiff_face_ema_averaged_model.ckpt"]
    published = {name.removeprefix("eps_model."): shape for name, shape in published.items()
                 if name.startswith("eps_model.")}
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in network.parameters()) == 216_341_187
    x = torch.empty(2, 3, 32, 32, device="meta")
    assert network(x, x.new_empty(2), x.new_empty(2, 512)).shape == x.shape


def test_precomputed_context_tokens(unet, io):
    tokens = unet.context_tokens(io["context"])
    assert tokens.shape[:2] == (3, 32)
    assert (unet(io["x"], io["t"], tokens) - unet(io["x"], io["t"], io["context"])).abs().max() < 1e-6


@pytest.mark.parametrize("is_attention", [[False, True], [True, True], [False, False]])
def test_both_passes_in_one_call_are_two_calls(io, is_attention):
    """Wherever the first attention block lies: on the way down, at the very start, or only in the middle."""
    torch.manual_seed(0)
    network = ConditionalUNet(**SMALL | {"is_attention": is_attention}).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    x, t, both = io["x"], io["t"], (io["context"], io["negative_context"])
    together = network(x, t, network.context_tokens(torch.cat(both))).chunk(2)
    for eps, context in zip(together, both, strict=True):
        alone = network(x, t, context)
        assert (eps - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_both_passes_share_what_no_context_reaches(unet, io):
    batches = []
    hooks = [module.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
             for module in (unet.image_proj, unet.down[0].res.conv1, unet.down[2].res.conv1,
                            unet.down[2].attn.self_attention.to_q, unet.down[2].attn.cross_attention.to_q)]
    unet(io["x"], io["t"], torch.cat([io["context"], io["negative_context"]]))
    for hook in hooks:
        hook.remove()
    assert batches == [3, 3, 3, 3, 6]


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16(unet, io, how):
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            eps = unet(io["x"], io["t"], io["context"])
    else:
        network = ConditionalUNet(**SMALL).bfloat16().eval()
        network.load_state_dict(unet.state_dict())
        eps = network(io["x"].bfloat16(), io["t"], io["context"].bfloat16())
    assert eps.dtype == torch.bfloat16
    assert (eps - io["eps_context"]).square().mean().sqrt() < 0.01


def test_starts_as_published():
    network = ConditionalUNet(**SMALL)
    assert not network(torch.randn(2, 3, 8, 8), torch.tensor([1, 999]), torch.randn(2, 24)).any()
    zeros = {name.removesuffix(".weight") for name, parameter in network.named_parameters()
             if name.endswith(".weight") and not parameter.any()}
    assert {name.rpartition(".")[2] for name in zeros} == {"conv2", "x_proj_out", "final"}
    assert len(zeros) == 8 + 4 + 1  # residual blocks, attention blocks, last layer


def test_context_dropout_only_in_training(unet, io):
    network, without = (ConditionalUNet(**SMALL | {"context_dropout_probability": p}) for p in (0.5, 0.0))
    for one in (network, without):  # copies, so that both lie alike in memory
        one.load_state_dict(unet.state_dict())
    tokens = network.train().context_tokens(io["context"])
    assert not torch.equal(tokens, network.context_tokens(io["context"]))
    assert torch.equal(network.eval().context_tokens(io["context"]), without.train().context_tokens(io["context"]))


def test_learned_empty_context(io):
    network = ConditionalUNet(**SMALL | {"learn_empty_context": True}).eval()
    assert network.state_dict()["empty_context_embedding"].shape == (SMALL["context_channels"],)
    tokens = network.context_tokens(None)
    assert torch.equal(tokens[:, :, network.middle.attn.columns],
                       network.middle.attn.context_keys_values(network.empty_context_embedding[None]))


@pytest.mark.parametrize("change", [{"condition_type": "AdaGN"}, {"n_context_classes": 10},
                                    {"is_context_conditional": False}, {"is_attention": [True]},
                                    {"initial_channels": 40}, {"context_channels": 24}])
def test_unsupported_models_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        ConditionalUNet(**SMALL | change)
