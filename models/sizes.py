"""Sizes of the networks: what stage 0 trains (training.size), and what models/random_weights.py makes up."""
from typing import Any

from models.autoencoder import Autoencoder
from models.unet import ConditionalUNet

# What all of them have in common: the published condition type, in the published config's own keys.
COMMON = {"attention_heads": -1, "attention_head_channels": 32, "condition_type": "CA", "is_context_conditional": True,
          "n_context_classes": 0, "learn_empty_context": False}

# image_size: px. unet: the published config's section `model`; CPD is context_dropout_probability. first_stage: arguments of
# Autoencoder, whose latents are a quarter of the image's size.
SIZES: dict[str, dict[str, Any]] = {
    "miniature": {  # of models/demo
        "image_size": 64,
        "unet": {"initial_channels": 64, "channel_multipliers": [1, 3], "is_attention": [False, True],
                 "n_blocks_per_resolution": 1, "context_channels": 128, "context_dropout_probability": 0.05},
        "first_stage": {"block_out_channels": (32, 64, 128), "layers_per_block": 1, "latent_channels": 6, "code_channels": 6,
                        "num_codes": 8192, "code_parts": 2},
    },
    "published": {  # IDiff-Face (arXiv 2308.04995) with CPD 25%, and LDM's VQ-f4
        "image_size": 128,
        "unet": {"initial_channels": 96, "channel_multipliers": [1, 2, 2, 2], "is_attention": [False, True, True, True],
                 "n_blocks_per_resolution": 2, "context_channels": 256, "context_dropout_probability": 0.25},
        "first_stage": {"block_out_channels": (128, 256, 512), "layers_per_block": 2, "latent_channels": 3,
                        "code_channels": 3, "num_codes": 8192},
    },
    "small": {  # for tests
        "image_size": 64,
        "unet": {"initial_channels": 32, "channel_multipliers": [1, 2], "is_attention": [False, True],
                 "n_blocks_per_resolution": 1, "context_channels": 32, "context_dropout_probability": 0.25},
        "first_stage": {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "latent_channels": 3, "code_channels": 3,
                        "num_codes": 512},
    },
}


def unet_settings(size: str, context_dimension: int) -> dict[str, Any]:
    """The arguments of ConditionalUNet, as a published config's section `model` has them, for contexts of that width."""
    channels = SIZES[size]["first_stage"]["code_channels"]
    return COMMON | SIZES[size]["unet"] | {"input_channels": channels, "context_input_channels": context_dimension}


def build(size: str, context_dimension: int = 512) -> tuple[ConditionalUNet, Autoencoder]:
    """The epsilon network and the first stage of that size, as they start out."""
    return ConditionalUNet(**unet_settings(size, context_dimension)), Autoencoder(**SIZES[size]["first_stage"])
