"""The VQ first stage against the published implementation's numbers (tests/data, golden values)."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.autoencoder import Autoencoder, from_published, published_name, to_published

DATA = Path(__file__).parents[1] / "data"
SHAPES = json.loads((DATA / "checkpoint_shapes.json").read_text())


@pytest.fixture(scope="module")
def halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return load_file(DATA / "vq_small_encoder.safetensors"), load_file(DATA / "vq_small_decoder.safetensors")


@pytest.fixture(scope="module")
def autoencoder(halves) -> Autoencoder:
    return from_published(*halves).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(DATA / "vq_small_io.safetensors")


def test_golden(autoencoder, io):
    assert (autoencoder.encode(io["image"]) - io["latent"]).abs().max() < 1e-4
    assert (autoencoder.decode(io["z"]) - io["decoded"]).abs().max() < 1e-4
    not_quantized = autoencoder.vq.decode(io["z"], force_not_quantize=True).sample
    assert (not_quantized - io["decoded_not_quantized"]).abs().max() < 1e-4
    assert (not_quantized - io["decoded"]).abs().max() > 0.01  # so decode() did quantise


def test_every_published_key_is_used_once_and_every_parameter_filled_once(autoencoder, halves):
    names = [published_name(ours, autoencoder.levels) for ours in autoencoder.vq.state_dict()]
    assert sorted(names) == sorted([*halves[0], *halves[1]])
    for exported, half in zip(to_published(autoencoder), halves, strict=True):
        assert exported.keys() == half.keys()
        assert all(torch.equal(exported[name], half[name]) for name in half)


def test_full_size_names_and_shapes():
    published = [{name: torch.empty(shape, device="meta") for name, shape in SHAPES[file].items()}
                 for file in ("first_stage_encoder_state_dict.pt", "first_stage_decoder_state_dict.pt")]
    autoencoder = from_published(*published)
    assert autoencoder.factor == 4
    for exported, half in zip(to_published(autoencoder), published, strict=True):
        assert {name: tensor.shape for name, tensor in exported.items()} == {name: half[name].shape for name in half}
    assert autoencoder.encode(torch.empty(1, 3, 128, 128, device="meta")).shape == (1, 3, 32, 32)


def test_codes_are_the_nearest_in_float64(autoencoder):
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    codebook = autoencoder.vq.quantize.embedding.weight
    distances = (z.double().movedim(1, 3)[..., None, :] - codebook.double()).square().sum(-1)
    codes = autoencoder.codes(z)
    assert torch.equal(codes, distances.argmin(dim=3))
    assert torch.equal(autoencoder.quantize(z), codebook[codes].movedim(3, 1))


def test_product_codes_are_the_nearest_of_each_part():
    """Two codes a position from one codebook, each for half of the channels; the halves of the published layout keep them."""
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), 1, latent_channels=5, code_channels=6, num_codes=40, code_parts=2).eval()
    codebook = autoencoder.vq.quantize.embedding.weight.detach()
    assert codebook.shape == (40, 3)
    codebook.normal_()
    latents = torch.randn(3, 6, 4, 4)
    quantised = autoencoder.quantize(latents)
    for part in (slice(0, 3), slice(3, 6)):
        points = latents[:, part].permute(0, 2, 3, 1).reshape(-1, 3).double()
        nearest = (points[:, None] - codebook.double()).square().sum(dim=2).argmin(dim=1)
        assert torch.equal(quantised[:, part].permute(0, 2, 3, 1).reshape(-1, 3), codebook[nearest])
    again = from_published(*to_published(autoencoder))
    assert torch.equal(again.quantize(latents), quantised) and torch.equal(again.decode(latents), autoencoder.decode(latents))


def test_the_search_stays_in_float32():
    """Codes closer together than bf16 can tell apart (1/128 at 1): a rounded search would find others."""
    torch.manual_seed(0)
    autoencoder = Autoencoder((32,), 1, latent_channels=3, code_channels=3, num_codes=512).eval()
    autoencoder.vq.quantize.embedding.weight.data = 1 + torch.rand(512, 3) / 64
    z = 1 + torch.rand(2, 3, 8, 8) / 64
    codes = autoencoder.codes(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.codes(z), codes)
        images = autoencoder.decode(z)
    assert images.dtype == torch.bfloat16
    assert len(codes.unique()) > 50


def test_bf16_weights_and_latents_are_searched_in_float32(halves, io):
    rounded = from_published(*halves).bfloat16()
    z = io["z"].bfloat16()
    codebook = rounded.vq.quantize.embedding.weight.double()
    nearest = (z.double().movedim(1, 3)[..., None, :] - codebook).square().sum(-1).argmin(dim=3)
    assert torch.equal(rounded.codes(z), nearest)
    assert rounded.decode(z).dtype == torch.bfloat16


@pytest.mark.parametrize(("change", "fault"), [
    (lambda encoder, decoder: encoder.pop("encoder.mid.attn_1.q.bias"), "'encoder.mid.attn_1.q.bias' is missing"),
    (lambda encoder, decoder: encoder.pop("encoder.conv_in.weight"), "'encoder.conv_in.weight' is missing"),
    (lambda encoder, decoder: decoder.update({"quantize.embedding.weight": torch.zeros(8, 2)}),
     "'quantize.embedding.weight' is 2 wide, which does not divide the 3 channels of 'quant_conv.weight'"),
    (lambda encoder, decoder: decoder.update({"quantize.embedding.weight": torch.zeros(8, 0)}), "is 0 wide"),
    (lambda encoder, decoder: decoder.update({"decoder.up.0.attn.0.q.bias": torch.zeros(32)}),
     "'decoder.up.0.attn.0.q.bias' is superfluous"),
    (lambda encoder, decoder: decoder.update({"decoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}),
     r"'decoder.conv_in.weight' is of shape \[32, 3, 3, 3\], not \[64, 3, 3, 3\]")])
def test_faults_are_named(halves, change, fault):
    encoder, decoder = (dict(half) for half in halves)
    change(encoder, decoder)
    with pytest.raises(ValueError, match=fault):
        from_published(encoder, decoder)
