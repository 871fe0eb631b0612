"""Reads the published weights and contexts, whatever their container. No file gets to run code: see state_dicts.py."""
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import backbones, context_files
from models.autoencoder import DECODER_PREFIXES, ENCODER_PREFIXES, Autoencoder, from_published
from models.hydra_config import HydraConfig
from models.ncnn_backbone import NcnnBackbone
from models.schedule import linear_betas, schedule_tables
from models.state_dicts import DOWNLOAD, container, first_difference, read_state_dict, read_torch, tensor_fault
from models.unet import ConditionalUNet
from utils.runtime import foreign_arrays
from utils.runtime.errors import UserError, is_out_of_memory
from utils.runtime.files import file_digest, require_file, text_digest

EPS_PREFIX = "eps_model."  # of the network's parameters; the schedule's tables have none
LATENT_FACTOR = 4  # image size / latent size of the published first stage, VQ-f4; the diffusion folder does not tell
IMAGE_SIZES = 8, 8192  # px
MOST_STEPS = 100_000  # T
MOST_CHANNELS, MOST_LEVELS, MOST_BLOCKS = 65_536, 8, 64  # of a network; blocks per resolution
LDM_PREFIX = "first_stage_model."  # of the first stage inside a whole latent diffusion model of LDM


# ---- the diffusion model ---------------------------------------------------------------------------------------------

def load_diffusion(folder: Path | str, step: int | None = None,
                   ema: bool = True) -> tuple[ConditionalUNet, dict[str, Any]]:
    """The epsilon network of a published folder, float32, in eval mode, and the settings to sample it with.

    Args:
        folder: holds `.hydra/config.yaml` and `checkpoints/`.
        step: the training step of the checkpoint; None is the last.
        ema: the averaged weights (`ema_averaged_model*`), else the raw ones (`model*`).
    Returns:
        the network and {T, betas: [T] float32, image_size: in pixels, latent_shape: (C, h, w), prediction: `eps` (as
        published) or `v`}.
    Raises:
        UserError: a file is missing, damaged or would run code; there is no such step; the model is of a kind that is
            not supported; configuration and weights disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; get the diffusion model from its authors, or correct model.diffusion")
    config = HydraConfig(folder / ".hydra" / "config.yaml")
    weights_file = checkpoint_file(folder / "checkpoints", step, ema)

    T, schedule, image_size = config["diffusion.T"], config["diffusion.schedule_type"], config["constants.image_size"]
    if schedule != "linear" or not is_whole(T, 2, MOST_STEPS):
        raise config.error("diffusion", f"schedule '{schedule}' with T = {T} is not supported; use a model trained "
                           f"with the linear schedule in 2 to {MOST_STEPS:,} steps")
    prediction = config["diffusion"].get("prediction", "eps")
    if prediction not in ("eps", "v"):
        raise config.error("diffusion.prediction", f"'{prediction}' is not supported; use a model that predicts eps or v")
    if config["latent_diffusion"] is not True:
        raise config.error("latent_diffusion", "models of pixels are not supported; use a model of latents")
    if not is_whole(image_size, *IMAGE_SIZES) or image_size % LATENT_FACTOR:
        raise config.error("constants.image_size", f"{image_size} is no multiple of {LATENT_FACTOR} from {IMAGE_SIZES[0]} to "
                           f"{IMAGE_SIZES[1]}; {DOWNLOAD}")
    unet = build_unet(config)
    smallest = LATENT_FACTOR * 2 ** (len(config["model.channel_multipliers"]) - 1)
    if image_size % smallest:
        raise config.error("constants.image_size", f"{image_size} is no multiple of {smallest}, which the network halves it "
                           f"by; {DOWNLOAD}")
    tables = schedule_tables(linear_betas(T))

    weights = read_state_dict(weights_file, "the diffusion model's weights")
    eps_model = {EPS_PREFIX + name: tensor for name, tensor in unet.state_dict().items()}
    fault = first_difference(eps_model | tables, weights)
    for name, table in tables.items():
        # The published tables were computed in float32, in which 1 - alpha_bar keeps three digits at the first steps.
        if fault is None and not torch.allclose(weights[name].float(), table, rtol=1e-3, atol=1e-6):
            fault = f"'{name}' is not that of the {schedule} schedule with T = {T}"
    if fault is not None:
        raise UserError(f"{weights_file}: config and weights disagree: {fault}; take .hydra/config.yaml and the "
                        "checkpoint from one model")
    unet.load_state_dict({name: weights[EPS_PREFIX + name].float() for name in unet.state_dict()}, assign=True)
    latent_size = image_size // LATENT_FACTOR
    return unet.eval(), {"T": T, "betas": tables["betas"], "image_size": image_size,
                         "latent_shape": (unet.image_proj.in_channels, latent_size, latent_size),
                         "prediction": prediction}


def checkpoint_file(folder: Path, step: int | None, ema: bool) -> Path:
    """The checkpoint of `step` in `folder`, as published (.ckpt) or as .safetensors; UserError where there is none."""
    stem = "ema_averaged_model" if ema else "model"
    for suffix in (".ckpt", ".safetensors"):
        file = folder / f"{stem}{'' if step is None else f'_{step}'}{suffix}"
        if file.is_file():
            return file
    if step is None:
        raise UserError(f"{folder / stem}.ckpt: no such file, nor such .safetensors; {DOWNLOAD}, or correct model.diffusion")
    steps = sorted(int(found[1]) for file in folder.glob(f"{stem}_*")
                   if (found := re.fullmatch(rf"{stem}_(\d+)\.(ckpt|safetensors)", file.name)))
    raise UserError(f"{folder / stem}_{step}.ckpt: no such file; choose a step that is there "
                    f"({', '.join(map(str, steps)) or 'none is'}), or set model.step=0 for the last")


def build_unet(config: HydraConfig) -> ConditionalUNet:
    """The network that the section `model` describes, without weights (on the meta device)."""
    section = config["model"]
    if not isinstance(section, dict):
        raise config.error("model", f"{section!r} describes no network; {DOWNLOAD}")
    arguments = {key: value for key, value in section.items() if key != "_target_"}
    for key, value in arguments.items():
        if fault := argument_fault(key, value):
            raise config.error(f"model.{key}", f"{value!r} {fault}; {DOWNLOAD}")
    try:
        if arguments["initial_channels"] * math.prod(arguments["channel_multipliers"]) > MOST_CHANNELS:
            raise ValueError(f"more than {MOST_CHANNELS:,} channels")
        with torch.device("meta"):
            return ConditionalUNet(**arguments)
    except UserError as error:
        raise UserError(f"{config.file}: model.{error}") from None
    except Exception as error:  # whatever the combination is refused by
        if is_out_of_memory(error):
            raise
        raise config.error("model", f"describes no network that is known here ({type(error).__name__}: {error}); "
                           f"{DOWNLOAD}") from None


def argument_fault(key: str, value: Any) -> str | None:
    """Why a value cannot be the network's, in words; None where it may be, or is of a key that the network judges."""
    if key in ("input_channels", "initial_channels", "context_input_channels", "context_channels", "attention_head_channels"):
        return None if is_whole(value, 1, MOST_CHANNELS) else f"is no whole number from 1 to {MOST_CHANNELS}"
    if key == "attention_heads":
        return None if is_whole(value, -1, MOST_CHANNELS) else f"is no whole number from -1 to {MOST_CHANNELS}"
    if key == "n_blocks_per_resolution":
        return None if is_whole(value, 1, MOST_BLOCKS) else f"is no whole number from 1 to {MOST_BLOCKS}"
    if key in ("channel_multipliers", "is_attention"):
        if not (isinstance(value, list) and 1 <= len(value) <= MOST_LEVELS):
            return f"is no list of 1 to {MOST_LEVELS}"
        if key == "is_attention":
            return None if all(isinstance(item, bool) for item in value) else "is no list of true and false"
        return None if all(is_whole(item, 1, MOST_CHANNELS) for item in value) else "has a multiplier that is none"
    if key == "learn_empty_context":
        return None if isinstance(value, bool) else "is neither true nor false"
    if key == "context_dropout_probability":
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and 0 <= value <= 1 else "is no number from 0 to 1"
    return None


def is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


# ---- the first stage -------------------------------------------------------------------------------------------------

def load_first_stage(encoder_file: Path | str, decoder_file: Path | str) -> Autoencoder:
    """The VQ first stage, float32, in eval mode, its sizes inferred from the shapes.

    Args:
        encoder_file, decoder_file: the two published halves (.pt or .safetensors); a whole LDM `model.ckpt` may stand
            for either or both.
    Raises:
        UserError: a file is missing, damaged or would run code, or the two do not make a first stage.
    """
    encoder = first_stage_half(encoder_file, ENCODER_PREFIXES, "model.first_stage_encoder")
    decoder = first_stage_half(decoder_file, DECODER_PREFIXES, "model.first_stage_decoder")
    try:
        return from_published(encoder, decoder).eval()
    except ValueError as error:
        raise UserError(f"{encoder_file} and {decoder_file}: make no VQ first stage: {error}; "
                        "take both halves from one model") from None


def first_stage_half(file: Path | str, prefixes: tuple[str, ...], setting: str) -> dict[str, Tensor]:
    """The parameters whose names begin with `prefixes`; what else may stand in the file is the other half and loss."""
    state = read_state_dict(file, setting)
    state = {name.removeprefix(LDM_PREFIX): tensor for name, tensor in state.items()
             if name.startswith(LDM_PREFIX)} or state
    for name in state:
        if not name.startswith((*ENCODER_PREFIXES, *DECODER_PREFIXES, "loss.")):
            raise UserError(f"{file}: '{name}' is of no VQ first stage; choose the first stage's file")
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


# ---- recognisers and contexts ----------------------------------------------------------------------------------------

def load_backbone(file: Path | str, setting: str = "contexts.recogniser") -> nn.Module:
    """A recogniser, in eval mode: faces [B, 3, 112, 112] in [-1, 1] RGB -> embeddings [B, D]. Its `file` is the file's path.

    Args:
        setting: what the file is to the user, for the error.
    Raises:
        UserError: the file is missing, damaged, would run code, or is of no network in models/backbones.py.
    """
    if Path(file).suffix == ".param":  # ncnn's
        backbone = NcnnBackbone(require_file(file, setting, "get it from its authors, or correct the setting"))
    else:
        try:
            backbone = backbones.build(read_state_dict(file, setting))
        except ValueError as error:
            raise UserError(f"{file}: {error}; choose the weights of a supported recogniser") from None
    backbone.file = str(file)
    return backbone


def frozen(backbone: nn.Module, file: Path | str, device: torch.device) -> nn.Module:
    """The backbone on a device, to train through: its weights stay. Raises UserError where it gives no gradients (ncnn)."""
    if not hasattr(backbone, "with_early_features"):
        raise UserError(f"{file}: training needs gradients through the recogniser, which ncnn does not give; set "
                        "contexts.recogniser to weights in another format")
    return backbone.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()


def backbone_digest(file: Path | str) -> str:
    """The digest of a recogniser's file; of one in ncnn's format, of both files."""
    digests = [file_digest(file) for file in backbone_files(file)]
    return text_digest("".join(digests)) if len(digests) > 1 else digests[0]


def backbone_files(file: Path | str) -> list[Path]:
    """The files of a recogniser: in ncnn's format the weights lie beside the one that is given."""
    file = Path(file)
    return [file, file.with_suffix(".bin")] if file.suffix == ".param" else [file]


def load_contexts(file: Path | str) -> tuple[list[str], np.ndarray]:
    """Identity contexts: ids and [N, D] float32 of unit norm.

    Args:
        file: what `models.context_files.write` wrote (.npz); a published dict of vectors by identity, which torch.save
            wrote; or a plain .npy array [N, D], whose rows are then called 0, 1, ... The first bytes tell, not the suffix.
    Raises:
        UserError: the file is missing, damaged or would run code, or models.context_files.check_contexts refuses it.
    """
    file = require_file(file, "contexts.file", "get it from its authors, or correct the setting")
    with foreign_arrays.reading(file, "a file of contexts", DOWNLOAD):
        kind = container(file)
        if kind == "safetensors":
            raise UserError(f"{file}: is a .safetensors file, not contexts (.npz, .npy, or by torch.save); choose another file")
        if kind == "zip":
            with zipfile.ZipFile(file) as archive:
                is_torch = any(name.endswith("/data.pkl") for name in archive.namelist())
            if not is_torch:
                return context_files.read(file, fix=DOWNLOAD)
        ids, vectors = _plain_array(file) if kind == "npy" else _torch_dict(file)
        context_files.check_vectors(file, vectors)
        contexts = context_files.normalise(vectors)
        context_files.check_contexts(file, ids, contexts)
    return ids, contexts


def _plain_array(file: Path) -> tuple[list[str], np.ndarray]:
    size = foreign_arrays.require_regular(file)
    with foreign_arrays.reading(file, "a whole array of numbers", DOWNLOAD), open(file, "rb") as stream:
        vectors = np.atleast_1d(foreign_arrays.read_npy(stream, size))
    return [str(row) for row in range(len(vectors))], vectors


def _torch_dict(file: Path) -> tuple[list[str], np.ndarray]:
    by_id = read_torch(file)
    if not isinstance(by_id, Mapping) or not by_id:
        raise UserError(f"{file}: holds no vectors by identity; choose a file of contexts")
    ids = [str(int(key)) if re.fullmatch("[0-9]{1,18}", str(key)) else str(key) for key in by_id]
    vectors = [_vector(value) for value in by_id.values()]
    if len({vector.shape for vector in vectors}) > 1:
        raise UserError(f"{file}: its vectors differ in shape ({vectors[0].shape} and others); {DOWNLOAD}")
    if sum(vector.nbytes for vector in vectors) > 2 * max(file.stat().st_size, 2**20):
        raise UserError(f"{file}: its vectors are larger than the file; {DOWNLOAD}")
    return ids, np.stack(vectors)


def _vector(value: Any) -> np.ndarray:
    """A vector in any float type, whether or not it was trained. Raises ValueError where it is no plain tensor."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    if fault := tensor_fault(value):
        raise ValueError(f"a vector {fault}")
    value = value.detach()
    return (value if value.dtype == torch.float64 or not value.is_floating_point() else value.float()).numpy()
