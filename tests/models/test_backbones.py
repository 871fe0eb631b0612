import json
import os
from pathlib import Path

import pytest
import torch

from models import backbones

DATA = Path(__file__).parents[1] / "data"
SHARED = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / ".." / "shared"))
CASIA = SHARED / "data" / "recognisers" / "mobilefacenet_casia.ckpt"


def shapes(network: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", ["iresnet18", "iresnet50", "iresnet100"])
def test_iresnets_have_the_published_names_and_shapes(name):
    with torch.device("meta"):
        network = getattr(backbones, name)()
    [published] = [shapes for model, shapes in json.loads((DATA / "checkpoint_shapes.json").read_text()).items()
                   if model.startswith(f"{name}_512")]
    assert shapes(network) == published


def test_iresnet34_has_its_published_block_counts():
    with torch.device("meta"):
        network = backbones.iresnet34()
    assert [len(getattr(network, f"layer{k}")) for k in (1, 2, 3, 4)] == [3, 4, 6, 3]


def test_iresnet_maps_faces_to_embeddings_and_freezes_the_last_scale():
    network = backbones.iresnet18(num_features=32)
    assert network(torch.randn(2, 3, 112, 112)).shape == (2, 32)
    assert not network.features.weight.requires_grad
    assert torch.equal(network.features.weight, torch.ones(32))
    assert [name for name, weight in network.named_parameters() if not weight.requires_grad] == ["features.weight"]
    assert abs(network.layer4[0].conv1.weight.std().item() - 0.1) < 0.001


def test_iresnet_block_is_the_published_one():
    block = backbones.IBasicBlock(64, 128, stride=2).eval()
    x = torch.randn(1, 64, 8, 8)
    y = block.bn3(block.conv2(block.prelu(block.bn2(block.conv1(block.bn1(x)))))) + block.downsample(x)
    assert torch.equal(block(x), y) and y.shape == (1, 128, 4, 4)
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)


def test_dropout_drops_only_while_training():
    network = backbones.iresnet18(num_features=8, dropout=0.4)
    faces = torch.randn(4, 3, 112, 112)
    assert not torch.equal(network(faces), network(faces))
    network.eval()
    assert torch.equal(network(faces), network(faces))


@pytest.mark.parametrize("network", [backbones.iresnet18(num_features=8), backbones.MobileFaceNet(num_features=8)])
def test_embeddings_keep_fp32_inside_autocast(network):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = network.eval()(torch.randn(2, 3, 112, 112))
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, embeddings.bfloat16().float())


def test_mobilefacenet_96_cuts_its_columns_by_the_template():
    network = backbones.MobileFaceNet(width=96).eval()
    faces = torch.randn(1, 3, 112, 112)
    other = faces.clone()
    other[..., :8] = 0
    other[..., 104:] = 0
    assert torch.equal(network(faces, "arcface"), network(other, "arcface"))
    assert torch.equal(network(faces.roll(-8, dims=-1), "arcface_shifted"), network(faces, "arcface"))
    assert not torch.equal(network(faces, "arcface_shifted"), network(faces, "arcface"))


def test_mobilefacenet_112_sees_every_column():
    network = backbones.MobileFaceNet(num_features=64, width=112).eval()
    faces = torch.randn(1, 3, 112, 112)
    for column in (0, 111):
        other = faces.clone()
        other[..., column] = 0
        assert not torch.equal(network(faces), network(other))
    assert network(faces).shape == (1, 64)


@pytest.mark.parametrize("network", [
    backbones.iresnet18(num_features=16), backbones.iresnet34(num_features=8),
    backbones.MobileFaceNet(num_features=128, width=96), backbones.MobileFaceNet(num_features=32, width=112)])
def test_build_recognises_and_fills_the_network(network):
    network.eval()
    built = backbones.build(network.state_dict())
    assert not built.training
    faces = torch.randn(1, 3, 112, 112)
    assert torch.equal(built(faces), network(faces))


def test_build_refuses_what_it_does_not_know():
    weights = backbones.iresnet18(num_features=8).state_dict()
    with pytest.raises(ValueError, match="neither of iresnet"):
        backbones.build({"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="neither of iresnet"):
        backbones.build({name: tensor for name, tensor in weights.items() if not name.startswith("layer3")})
    with pytest.raises(ValueError, match="'features.bias' should be of shape .8., but is absent"):
        backbones.build({name: tensor for name, tensor in weights.items() if name != "features.bias"})
    with pytest.raises(ValueError, match="'bn1.weight' should be of shape .64., but is of shape .32."):
        backbones.build(weights | {"bn1.weight": torch.ones(32)})
    with pytest.raises(ValueError, match="'extra' should be absent"):
        backbones.build(weights | {"extra": torch.ones(1)})


@pytest.mark.skipif(not CASIA.is_file(), reason="the shared data with the pretrained MobileFaceNet is not here")
def test_the_published_mobilefacenet_loads_strictly():
    weights = torch.load(CASIA, map_location="cpu", weights_only=True)["net_state_dict"]
    network = backbones.build(weights)
    assert network.width == 96
    assert network(torch.zeros(1, 3, 112, 112)).shape == (1, 128)
