"""A generator trained here is written as published ones are, and read back as the same network."""
import pytest
import torch

from models.published import load_diffusion
from models.published_writer import trained_weights, write_diffusion
from models.schedule import linear_betas
from models.sizes import build, unet_settings
from models.unet import ConditionalUNet
from utils.runtime.errors import UserError


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build("small", context_dimension=24)[0]


@pytest.fixture(scope="module", params=["eps", "v"])
def folder(request, unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / request.param
    write_diffusion(folder, unet_settings("small", 24), unet.state_dict(), linear_betas(), 64, request.param)
    return folder


def test_what_is_written_is_read(folder, unet):
    again, described = load_diffusion(folder)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in unet.state_dict().items())
    assert again.context_dropout.p == 0.25 and again.context_emb.in_features == 24
    assert torch.equal(described.pop("betas"), linear_betas())
    assert described == {"T": 1000, "image_size": 64, "latent_shape": (3, 16, 16), "prediction": folder.name}


def test_a_training_on_scaled_contexts_goes_on_from_weights_of_unit_ones(folder, unet):
    weights = trained_weights(folder, unet, 4.0, folder.name)
    scaled = weights.pop("context_emb.weight")
    torch.testing.assert_close(scaled * 4, unet.context_emb.weight.detach())
    assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in weights.items())


def test_another_first_stage_begins_with_new_first_and_last_layers(folder, unet):
    trained, _ = load_diffusion(folder)
    settings = unet_settings("small", 24) | {"input_channels": 5}
    other = ConditionalUNet(**settings)
    weights = trained_weights(folder, other, 1.0, folder.name)
    assert other.load_state_dict(weights, strict=False) == (["image_proj.weight", "final.weight", "final.bias"], [])
    assert all(torch.equal(weight, trained.state_dict()[name]) for name, weight in weights.items())


def test_another_network_is_nothing_to_begin_with(folder, unet):
    with torch.device("meta"):
        other = build("small", context_dimension=16)[0]
    fault = r"diffusion.start_from: .*'context_emb.weight' is of shape \[32, 24\], not \[32, 16\]; give the settings"
    with pytest.raises(UserError, match=fault):
        trained_weights(folder, other, 1.0, folder.name)
    predicts = {"eps": "v", "v": "eps"}[folder.name]
    with pytest.raises(UserError, match=f"it predicts {folder.name}; give"):
        trained_weights(folder, unet, 1.0, predicts)
