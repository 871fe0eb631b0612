"""Does another device draw the same? The included generator's noise, latents and images on it and on the CPU in fp32.

    python -m benchmarks.parity [--images 16] [--steps 15] [--device auto]

In fp32 torch lets convolutions on GPUs round their factors to TF32 by default, as sample.py does; beside it without.
"""
import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.sampling import name_of
from config.config import Config
from models.published import load_backbone
from utils.diffusion.guidance import guided
from utils.diffusion.latent_diffusion import load_model, to_uint8
from utils.diffusion.noise import gaussian
from utils.identities import contexts, negatives
from utils.runtime import ranks as distributed
from utils.runtime.files import read_npz
from utils.training.faces import MARGIN, of_canvas

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="of as many identities")
    parser.add_argument("--steps", type=int, default=15, help="of DPM-Solver++")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    device = distributed.setup(arguments.device).device
    statistics = read_npz(Path(Config().contexts.statistics), ("mean", "covariance"))
    c_pos = contexts.gaussian(arguments.images, **statistics, seed=0)
    c_neg = negatives.select(c_pos, "far")[0]
    draw = partial(drawn, torch.from_numpy(c_pos), torch.from_numpy(c_neg), arguments.steps)

    shape = load_model(Config().model, Config().sampling, CPU)[0].latent_shape
    noise = [counter_noise(arguments.images, shape, where)(1000).cpu() for where in (CPU, device)]
    print(f"{name_of(device)} against the CPU, torch {torch.__version__}; {arguments.images} images, Far-Neg w = 0.5, "
          f"DPM-Solver++ {arguments.steps}; noise differs by {(noise[0] - noise[1]).abs().max():.1e} at most")
    print("| | rms of the latents' difference, in their std | mean difference, grey levels | lowest cosine of the recogniser's "
          "embeddings |\n|---|---|---|---|")
    latents, images, embeddings = draw(CPU, False)
    for name, bf16, tf32 in (("fp32", False, True), ("fp32 without TF32", False, False), ("bf16", True, True)):
        torch.backends.cudnn.allow_tf32 = tf32
        other_latents, other_images, other_embeddings = draw(device, bf16)
        rms = (other_latents - latents).square().mean().sqrt() / latents.std()
        grey = (other_images.int() - images.int()).abs().float().mean()
        cosine = torch.nn.functional.cosine_similarity(other_embeddings, embeddings).min()
        print(f"| {name} | {rms:.1e} | {grey:.2f} | {cosine:.4f} |", flush=True)


def counter_noise(images: int, shape: tuple[int, int, int], device: torch.device):
    numbers = torch.arange(images, device=device)
    return partial(gaussian, 42, numbers, torch.zeros_like(numbers), shape=shape, device=device)


@torch.inference_mode()
def drawn(c_pos: torch.Tensor, c_neg: torch.Tensor, steps: int, device: torch.device,
          bf16: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, images (uint8) and their embeddings by the recogniser of the scores in fp32, all on the CPU."""
    config = Config()
    model, _ = load_model(config.model, replace(config.sampling, precision="bf16" if bf16 else "fp32"), device)
    arguments = c_pos, c_neg, counter_noise(len(c_pos), model.latent_shape, device), guided("negative", 0.5), "dpm++", steps
    latents, images = model.latents(*arguments).cpu(), model.images(*arguments).cpu()
    embeddings = load_backbone(config.scores.recogniser)(of_canvas(images, MARGIN))
    return latents, to_uint8(images), embeddings


if __name__ == "__main__":
    main()
