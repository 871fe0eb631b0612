import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from models.backbones import BACKBONES, IRESNET_BLOCKS, IBasicBlock, IResNet, MobileFaceNet, build

DATA = Path(__file__).parents[1] / "data"
SHARED = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[2] / ".." / "shared"))
CASIA = SHARED / "data" / "recognisers" / "mobilefacenet_casia.ckpt"


def shapes(network: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def iresnet18() -> IResNet:
    torch.manual_seed(0)
    return IResNet(IRESNET_BLOCKS["iresnet18"], num_features=8, dropout=0.4).eval()


@pytest.mark.parametrize("name", ["iresnet18", "iresnet50", "iresnet100"])
def test_iresnets_have_the_published_names_and_shapes(name):
    with torch.device("meta"):
        network = BACKBONES[name](0.4)
    [published] = [shapes for model, shapes in json.loads((DATA / "checkpoint_shapes.json").read_text()).items()
                   if model.startswith(f"{name}_512")]
    assert shapes(network) == published


def test_iresnet34_has_its_published_block_counts():
    with torch.device("meta"):
        network = BACKBONES["iresnet34"](0.0)
    assert [len(getattr(network, f"layer{k}")) for k in (1, 2, 3, 4)] == [3, 4, 6, 3]


def test_backbones_are_a_plain_dict_of_networks_by_their_dropout():
    assert type(BACKBONES) is dict
    assert list(BACKBONES) == ["iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet10", "mobilefacenet"]
    for name, make in BACKBONES.items():
        with torch.device("meta"):
            network = make(0.3)
        last = network.linear1.conv if name == "mobilefacenet" else network.fc
        assert len(last.weight) == network.num_features == (128 if name in ("mobilefacenet", "iresnet10") else 512)
        assert [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)] == \
            ([] if name == "mobilefacenet" else [0.3])
        assert not getattr(network, "on_arcface", False)  # so both templates' faces are shown as they are


def test_iresnet_maps_faces_to_embeddings_and_freezes_the_last_scale(iresnet18):
    assert iresnet18(torch.randn(2, 3, 112, 112)).shape == (2, 8)
    assert torch.equal(iresnet18.features.weight, torch.ones(8))
    assert [name for name, weight in iresnet18.named_parameters() if not weight.requires_grad] == ["features.weight"]
    assert abs(iresnet18.layer4[0].conv1.weight.std().item() - 0.1) < 0.001


@torch.no_grad()
def test_iresnet10_sees_faces_at_half_their_size():
    network = BACKBONES["iresnet10"](0.4).eval()
    faces = torch.randn(2, 3, 56, 56)
    (half, quarter), embeddings = network.with_early_features(torch.nn.functional.interpolate(faces, scale_factor=2))
    x = network.prelu(network.bn1(network.conv1(faces)))
    assert torch.allclose(half, network.layer1(x), atol=1e-5) and half.shape == (2, 32, 28, 28)
    assert quarter.shape == (2, 64, 14, 14) and embeddings.shape == (2, 128)


def test_iresnet_block_is_the_published_one():
    block = IBasicBlock(64, 128, stride=2).eval()
    x = torch.randn(1, 64, 8, 8)
    y = block.bn3(block.conv2(block.prelu(block.bn2(block.conv1(block.bn1(x)))))) + block.downsample(x)
    assert torch.equal(block(x), y) and y.shape == (1, 128, 4, 4)
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2)


def test_dropout_drops_only_while_training(iresnet18):
    network, faces = deepcopy(iresnet18), torch.randn(2, 3, 112, 112)
    assert torch.equal(network(faces), network(faces))
    network.train()
    assert not torch.equal(network(faces), network(faces))


@pytest.mark.parametrize("make", [lambda iresnet18: iresnet18, lambda iresnet18: MobileFaceNet(num_features=8).eval()],
                         ids=["iresnet18", "mobilefacenet"])
def test_embeddings_keep_fp32_inside_autocast(iresnet18, make):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        embeddings = make(iresnet18)(torch.randn(2, 3, 112, 112))
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, embeddings.bfloat16().float())


def test_early_features_come_with_the_same_embeddings(iresnet18):
    faces = torch.randn(2, 3, 112, 112)
    for network in (iresnet18, MobileFaceNet(num_features=8).eval()):
        early, embeddings = network.with_early_features(faces)
        assert [feature.shape for feature in early] == [(2, 64, 56, 56), (2, 128 if network is iresnet18 else 64, 28, 28)]
        assert torch.equal(embeddings, network(faces))


def test_mobilefacenet_96_cuts_its_columns_out_of_an_unshifted_face():
    network = MobileFaceNet(width=96).eval()
    faces = torch.randn(1, 3, 112, 112)
    other = faces.clone()
    other[..., :8] = 0
    other[..., 104:] = 0
    assert torch.equal(network(faces), network(other))
    for column in (8, 103):
        other = faces.clone()
        other[..., column] = 0
        assert not torch.equal(network(faces), network(other))
    assert network.on_arcface  # whoever embeds shifted faces moves them back for it


def test_mobilefacenet_112_sees_every_column():
    network = MobileFaceNet(num_features=64, width=112).eval()
    faces = torch.randn(1, 3, 112, 112)
    for column in (0, 111):
        other = faces.clone()
        other[..., column] = 0
        assert not torch.equal(network(faces), network(other))
    assert network(faces).shape == (1, 64) and not network.on_arcface


@pytest.mark.parametrize("make", [
    lambda iresnet18: iresnet18, lambda iresnet18: IResNet(IRESNET_BLOCKS["iresnet34"], num_features=8),
    lambda iresnet18: BACKBONES["iresnet10"](0.4), lambda iresnet18: MobileFaceNet(num_features=128, width=96),
    lambda iresnet18: MobileFaceNet(num_features=32, width=112)],
    ids=["iresnet18", "iresnet34", "iresnet10", "mobilefacenet 96", "mobilefacenet 112"])
@torch.no_grad()
def test_build_recognises_and_fills_the_network(iresnet18, make):
    network = make(iresnet18).eval()
    built = build(network.state_dict())
    assert not built.training and built.num_features == network.num_features
    faces = torch.randn(1, 3, 112, 112)
    assert torch.equal(built(faces), network(faces))


def test_build_refuses_what_it_does_not_know(iresnet18):
    weights = iresnet18.state_dict()
    with pytest.raises(ValueError, match="neither of iresnet"):
        build({"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="neither of iresnet"):
        build({name: tensor for name, tensor in weights.items() if not name.startswith("layer3")})
    with pytest.raises(ValueError, match="'features.bias' is missing"):
        build({name: tensor for name, tensor in weights.items() if name != "features.bias"})
    with pytest.raises(ValueError, match="'bn1.weight' is of shape .32., not .64."):
        build(weights | {"bn1.weight": torch.ones(32)})
    with pytest.raises(ValueError, match="'extra' is superfluous"):
        build(weights | {"extra": torch.ones(1)})


@pytest.mark.skipif(not CASIA.is_file(), reason="the shared data with the pretrained MobileFaceNet is not here")
def test_the_published_mobilefacenet_loads_strictly():
    weights = torch.load(CASIA, map_location="cpu", weights_only=True)["net_state_dict"]
    network = build(weights)
    assert network.width == 96
    assert network(torch.zeros(1, 3, 112, 112)).shape == (1, 128)
