"""The discriminator of image patches (PatchGAN, arXiv 1611.07004) with which LDM trains its first stages."""
from torch import nn


class PatchDiscriminator(nn.Sequential):
    """Images [B, 3, H, W] in [-1, 1] -> how real each patch looks, [B, 1, H / 4 - 2, W / 4 - 2].

    Each output sees 34 px. LDM's has one more layer, for 256 px, and batch norm; group norm does not depend on the batch.
    """

    def __init__(self, channels: int = 32) -> None:
        def layer(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(channels_in, channels_out, 4, stride, padding=1), nn.GroupNorm(8, channels_out),
                    nn.LeakyReLU(0.2)]

        super().__init__(nn.Conv2d(3, channels, 4, 2, padding=1), nn.LeakyReLU(0.2), *layer(channels, 2 * channels, 2),
                         *layer(2 * channels, 4 * channels, 1), nn.Conv2d(4 * channels, 1, 4, 1, padding=1))
