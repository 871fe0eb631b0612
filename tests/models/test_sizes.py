"""models/sizes.py: the published networks' sizes, those of the embedded weights, and that all of them fit together."""
import json
from pathlib import Path

import pytest
import torch

from models.autoencoder import to_published
from models.published import load_diffusion, load_first_stage
from models.schedule import linear_betas, schedule_tables
from models.sizes import SIZES, build, unet_settings

SHAPES = json.loads((Path(__file__).parents[1] / "data" / "checkpoint_shapes.json").read_text())
DEMO = Path(__file__).parents[2] / "models" / "demo"


def test_sizes_are_a_plain_dict():
    assert type(SIZES) is dict and list(SIZES) == ["miniature", "published", "small"]


def test_published_ones_have_the_published_names_and_shapes():
    with torch.device("meta"):
        unet, autoencoder = build("published")
    encoder, decoder = to_published(autoencoder)
    ema = {f"eps_model.{name}": tensor for name, tensor in unet.state_dict().items()} | schedule_tables(linear_betas())
    for file, state in (("idiff_face_ema_averaged_model.ckpt", ema), ("first_stage_encoder_state_dict.pt", encoder),
                        ("first_stage_decoder_state_dict.pt", decoder)):
        assert {name: list(tensor.shape) for name, tensor in state.items()} == SHAPES[file]
    assert SIZES["published"]["image_size"] == 128 and unet.context_dropout.p == 0.25  # CPD


def test_miniature_ones_are_those_of_the_embedded_weights():
    with torch.device("meta"):
        unet, autoencoder = build("miniature", context_dimension=128)
    trained, described = load_diffusion(DEMO)
    first_stage = load_first_stage(DEMO / "first_stage_encoder.safetensors", DEMO / "first_stage_decoder.safetensors")
    for network, weights in ((unet, trained), (autoencoder, first_stage)):
        assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
            name: tensor.shape for name, tensor in weights.state_dict().items()}
    assert described["image_size"] == SIZES["miniature"]["image_size"]


@pytest.mark.parametrize("size", SIZES)
def test_the_network_fits_the_latents_of_the_first_stage(size):
    with torch.device("meta"):
        unet, autoencoder = build(size, context_dimension=24)
    assert autoencoder.factor == 4  # which a published diffusion folder does not tell, and models/published.py takes for granted
    pixels = SIZES[size]["image_size"]
    latents = autoencoder.encode(torch.empty(2, 3, pixels, pixels, device="meta"))
    eps = unet(latents, torch.empty(2, device="meta"), torch.empty(2, 24, device="meta"))
    assert eps.shape == latents.shape == (2, SIZES[size]["first_stage"]["code_channels"], pixels // 4, pixels // 4)


def test_settings_of_the_network_are_the_published_configs_keys():
    published = json.loads((Path(__file__).parents[1] / "data" / "configs.json").read_text())["unet_small"]
    assert unet_settings("small", 24) == published
