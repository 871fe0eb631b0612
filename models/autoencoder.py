"""The VQ first stage (VQ-f4 of LDM, arXiv 2112.10752) on diffusers' VQModel, filled from the two published halves."""
import re
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer
from scipy.spatial import cKDTree
from torch import Tensor, nn

from models.state_dicts import first_difference

ENCODER_PREFIXES = ("encoder.", "quant_conv.")
DECODER_PREFIXES = ("decoder.", "quantize.", "post_quant_conv.")

# diffusers' names -> LDM's, where they differ. The numbers of the decoder's levels differ too: see published_name.
RENAMES = (
    (r"down_blocks\.(\d+)", r"down.\1"),
    (r"((?:down|up)\.\d+)\.resnets", r"\1.block"),
    (r"downsamplers\.0", "downsample"),
    (r"upsamplers\.0", "upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


class Autoencoder(nn.Module):
    """Images <-> latents. There is no latent scale factor.

    Args:
        block_out_channels: channels at each resolution of the encoder, each half the one before.
        layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
        latent_channels: channels between the encoder and `quant_conv`.
        code_channels: C, the channels of the latents.
        num_codes: size of the codebook.
        code_parts: how many codes a position has, each for C / code_parts of its channels (product quantisation,
            10.1109/TPAMI.2010.57, with one codebook for all parts); the published stage has one.
        image_channels: channels of the images.
    """

    def __init__(self, block_out_channels: tuple[int, ...], layers_per_block: int, latent_channels: int,
                 code_channels: int, num_codes: int, code_parts: int = 1, image_channels: int = 3) -> None:
        super().__init__()
        self.levels = levels = len(block_out_channels)
        self.channels = code_channels
        self.factor = 2 ** (levels - 1)  # image size / latent size
        self.vq = VQModel(
            in_channels=image_channels, out_channels=image_channels, block_out_channels=block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers_per_block, latent_channels=latent_channels, vq_embed_dim=code_channels,
            num_vq_embeddings=num_codes)
        if code_parts > 1:
            self.vq.quantize = VectorQuantizer(num_codes, code_channels // code_parts, beta=0.25)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, H / factor, W / factor], not quantised."""
        return self.vq.encode(images).latents

    def decode(self, latents: Tensor, quantised: bool = True) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, factor * h, factor * w], in about [-1, 1] (not clipped).

        Args:
            quantised: by the codes nearest to the latents; else as they are.
        """
        return self.vq.decode(self.quantize(latents) if quantised else latents, force_not_quantize=True).sample

    def quantize(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> the nearest codes at each position, [B, C, h, w]; NaN where a latent is not finite."""
        parts = latents.unflatten(1, (-1, self.vq.quantize.vq_embed_dim)).flatten(0, 1)
        quantized = self.vq.quantize.embedding(self.codes(parts)).permute(0, 3, 1, 2)
        quantized = quantized.unflatten(0, (len(latents), -1)).flatten(1, 2)
        return quantized.where(latents.isfinite().all(dim=1, keepdim=True), torch.nan)

    @torch.no_grad()
    def codes(self, latents: Tensor) -> Tensor:
        """Latents [B, width of the codebook, h, w] -> the index of the nearest code at each position, [B, h, w] int64.

        Always in float32 or more, whatever the autocast or the weights: rounding would land on another code.
        """
        codebook = self.vq.quantize.embedding.weight.float()
        points = latents.float().permute(0, 2, 3, 1).nan_to_num()
        if points.device.type == "cpu":  # a k-d tree of a codebook of few dimensions: a tenth of the time of all distances
            nearest = cKDTree(codebook.numpy()).query(points.flatten(0, 2).numpy(), workers=torch.get_num_threads())[1]
            return torch.from_numpy(nearest).view(points.shape[:3])
        # By differences, since TF32 could round a matrix product; one image at a time, to bound the memory.
        return torch.stack([torch.cdist(image.flatten(0, 1), codebook, compute_mode="donot_use_mm_for_euclid_dist")
                            .argmin(dim=1).view(image.shape[:2]) for image in points])


def from_published(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> Autoencoder:
    """The autoencoder that the two published halves (LDM's names) hold, float32; its sizes follow from their shapes.

    Raises:
        ValueError: a parameter is missing, superfluous, or not of the shape that the others imply; names the first.
    """
    published = {**encoder, **decoder}
    with torch.device("meta"):
        autoencoder = Autoencoder(**sizes(published))
    expected_encoder, expected_decoder = to_published(autoencoder)
    if fault := first_difference({**expected_encoder, **expected_decoder}, published):
        raise ValueError(fault)
    state = {ours: published[published_name(ours, autoencoder.levels)].float().reshape(parameter.shape)
             for ours, parameter in autoencoder.vq.state_dict().items()}
    autoencoder.vq.load_state_dict(state, assign=True)
    return autoencoder


def to_published(autoencoder: Autoencoder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's and the decoder's half, with LDM's names and shapes: what `from_published` reads."""
    state = {}
    for ours, tensor in autoencoder.vq.state_dict().items():
        name = published_name(ours, autoencoder.levels)
        is_projection = ".attn_1." in name and tensor.dim() == 2  # LDM writes these linear layers as 1x1 convolutions
        state[name] = tensor[:, :, None, None] if is_projection else tensor
    return ({name: tensor for name, tensor in state.items() if name.startswith(ENCODER_PREFIXES)},
            {name: tensor for name, tensor in state.items() if name.startswith(DECODER_PREFIXES)})


def published_name(ours: str, levels: int) -> str:
    """LDM's name of the parameter that VQModel calls `ours`."""
    # LDM counts the decoder's levels from the image, diffusers from the latents.
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", ours)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def sizes(published: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of Autoencoder that the shapes of LDM's parameters imply; ValueError where one is missing."""
    def conv(level: int, block: int) -> str:
        return f"encoder.down.{level}.block.{block}.conv1.weight"

    further_levels = takewhile(lambda level: conv(level, 0) in published, count(1))
    further_blocks = takewhile(lambda block: conv(0, block) in published, count(1))
    try:
        channels, width = published["quant_conv.weight"].shape[0], published["quantize.embedding.weight"].shape[1]
        if not width or channels % width:
            raise ValueError(f"'quantize.embedding.weight' is {width} wide, which does not divide the {channels} channels of "
                             "'quant_conv.weight'")
        return {
            "block_out_channels": tuple(published[conv(level, 0)].shape[0] for level in (0, *further_levels)),
            "layers_per_block": 1 + len(list(further_blocks)),
            "latent_channels": published["encoder.conv_out.weight"].shape[0],
            "code_channels": channels,
            "num_codes": published["quantize.embedding.weight"].shape[0],
            "code_parts": channels // width,
            "image_channels": published["encoder.conv_in.weight"].shape[1],
        }
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
