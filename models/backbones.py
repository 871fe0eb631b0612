"""Recognition networks: iresnet18/34/50/100 and MobileFaceNet under their published parameter names, and a small iresnet10.

Every network takes faces [B, 3, 112, 112] RGB in [-1, 1] and returns embeddings [B, D], not normalised. `on_arcface`: it
was made for faces on the unshifted template, and shifted ones (8 px further left) must be moved back for it.
"""
import math
import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from models.state_dicts import first_difference

IRESNET_BLOCKS = {"iresnet18": (2, 2, 2, 2), "iresnet34": (3, 4, 6, 3),
                  "iresnet50": (3, 4, 14, 3), "iresnet100": (3, 13, 30, 3)}
SMALL_BLOCKS, SMALL = (1, 1, 1, 1), {"channels": 32, "shrink": 2}  # iresnet10: a sixtieth of iresnet50's operations


# ---- iresnet ---------------------------------------------------------------------------------------------------------

class IBasicBlock(nn.Module):
    """Residual block of the improved ResNet (Duta et al. 2020, arXiv 2004.04989) in ArcFace's form: BN first, PReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                                            nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return residual + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """The ResNet of ArcFace and CosFace training (insightface's iresnet).

    Args:
        blocks: residual blocks in each of the four layers; the first of a layer halves the resolution.
        num_features: D, the embedding's width.
        dropout: probability of dropping a value of the last feature map while training.
        channels: of the first layer; each further one has twice as many.
        shrink: how many times smaller the network sees the faces.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_features: int = 512, dropout: float = 0.0, channels: int = 64,
                 shrink: int = 1) -> None:
        super().__init__()
        self.num_features, self.shrink = num_features, shrink
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        channels_in = channels
        for number, count in enumerate(blocks):
            layer = [IBasicBlock(channels_in if k == 0 else channels << number, channels << number, stride=2 if k == 0 else 1)
                     for k in range(count)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*layer))
            channels_in = channels << number
        self.bn2 = nn.BatchNorm2d(channels_in)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels_in * math.ceil(7 / shrink) ** 2, num_features)
        self.features = nn.BatchNorm1d(num_features)
        # The head normalises the embedding, so a learned scale per dimension would only drift.
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return self.with_early_features(faces)[1]

    def with_early_features(self, faces: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The feature maps at a half and a quarter of the resolution that the network sees, and the embeddings."""
        faces = F.avg_pool2d(faces, self.shrink) if self.shrink > 1 else faces
        half = self.layer1(self.prelu(self.bn1(self.conv1(faces))))
        quarter = self.layer2(half)
        x = self.layer4(self.layer3(quarter))
        x = self.dropout(self.bn2(x)).flatten(1)
        # Autocast's 16 bits would round the embedding itself; the two last layers cost next to nothing in fp32.
        with torch.autocast(x.device.type, enabled=False):
            return [half, quarter], self.features(self.fc(x.to(self.fc.weight.dtype)))


# ---- MobileFaceNet ---------------------------------------------------------------------------------------------------

class ConvBlock(nn.Module):
    """Convolution and BN, with a PReLU unless it is linear."""

    def __init__(self, channels_in: int, channels: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int = 0, groups: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.prelu = nn.Identity() if linear else nn.PReLU(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Inverted residual of MobileNetV2 with PReLU: expand 1x1, depthwise 3x3, project 1x1."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.has_shortcut = stride == 1 and channels_in == channels
        wide = channels_in * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.PReLU(wide),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.PReLU(wide),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileFaceNet(nn.Module):
    """MobileFaceNet (Chen et al. 2018, arXiv 1804.07573): 1 million parameters, quick on a CPU.

    Args:
        num_features: D, the embedding's width.
        width: of the input in px. 96 cuts its 96 columns out of a face on the unshifted template (the published CASIA
            weights); 112 sees the whole face.
    """

    BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
    FIRST_COLUMN = 8  # of the 96

    def __init__(self, num_features: int = 128, width: int = 112) -> None:
        super().__init__()
        self.num_features, self.width = num_features, width
        self.on_arcface = width == 96
        self.conv1 = ConvBlock(3, 64, 3, stride=2, padding=1)
        self.dw_conv1 = ConvBlock(64, 64, 3, padding=1, groups=64)
        blocks, channels_in = [], 64
        for expansion, channels, repeats, first_stride in self.BOTTLENECKS:
            for k in range(repeats):
                blocks.append(Bottleneck(channels_in, channels, first_stride if k == 0 else 1, expansion))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = ConvBlock(128, 512, 1)
        self.linear7 = ConvBlock(512, 512, (7, width // 16), groups=512, linear=True)
        self.linear1 = ConvBlock(512, num_features, 1, linear=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return self.with_early_features(faces)[1]

    def with_early_features(self, faces: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The feature maps at a half and a quarter of the resolution, and the embeddings."""
        if self.width == 96:
            faces = faces[..., self.FIRST_COLUMN : self.FIRST_COLUMN + self.width]
        # The published weights expect (x - 127.5) / 128 of grey levels x; faces come as (x - 127.5) / 127.5.
        half = self.dw_conv1(self.conv1(faces * (127.5 / 128)))
        quarter = self.blocks[: self.BOTTLENECKS[0][2]](half)
        x = self.linear7(self.conv2(self.blocks[self.BOTTLENECKS[0][2] :](quarter)))
        # As in IResNet, the embedding itself is not rounded to autocast's 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            return [half, quarter], self.linear1(x.to(self.linear1.conv.weight.dtype)).flatten(1)


# ---- the registry ----------------------------------------------------------------------------------------------------

# Name -> network for training, from (dropout before the embedding).
BACKBONES: dict[str, Callable[[float], nn.Module]] = {
    **{name: partial(IResNet, blocks, 512) for name, blocks in IRESNET_BLOCKS.items()},
    "iresnet10": partial(IResNet, SMALL_BLOCKS, 128, **SMALL),
    "mobilefacenet": lambda dropout: MobileFaceNet(128),  # it has none
}


# ---- from a state dict -----------------------------------------------------------------------------------------------

def build(state_dict: Mapping[str, torch.Tensor]) -> IResNet | MobileFaceNet:
    """The network a state dict belongs to, recognised by names and shapes, filled with its weights, in eval mode.

    Raises:
        ValueError: the weights are of no network known here, or one of them is missing, superfluous or misshapen.
    """
    with torch.device("meta"):
        network = _empty_network(state_dict)
    if fault := first_difference(network.state_dict(), state_dict):
        raise ValueError(fault)
    network = network.to_empty(device="cpu")
    network.load_state_dict(state_dict)
    return network.eval()


def _empty_network(state_dict: Mapping[str, torch.Tensor]) -> IResNet | MobileFaceNet:
    if "linear7.conv.weight" in state_dict and "linear1.conv.weight" in state_dict:
        width = 16 * state_dict["linear7.conv.weight"].shape[-1]
        if width in (96, 112):
            return MobileFaceNet(len(state_dict["linear1.conv.weight"]), width)
    if "fc.weight" in state_dict:
        in_layers = {found.groups() for name in state_dict if (found := re.match(r"layer([1-4])\.(\d+)\.", name))}
        blocks = tuple(sum(layer == number for layer, _ in in_layers) for number in "1234")
        if blocks in (*IRESNET_BLOCKS.values(), SMALL_BLOCKS):
            return IResNet(blocks, len(state_dict["fc.weight"]), **(SMALL if blocks == SMALL_BLOCKS else {}))
    raise ValueError("the weights are neither of iresnet10/18/34/50/100 nor of MobileFaceNet")
