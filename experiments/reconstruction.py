"""How much the first stage loses: held-out faces encoded and decoded, with and without the codebook.

Reads   training.faces, model.first_stage_encoder, model.first_stage_decoder, scores.recogniser: one that the first stage was
        not trained with
Writes  <output>/reconstruction/<encoder's folder>.png: faces, above their reconstructions with and without the codebook (real
        faces: keep it to yourself)
        <output>/faces/<folder>/: the faces that were found and cut out, cached

    python -m experiments.reconstruction align.minimum_face=30 scores.recogniser=data/mobilefacenet_independent.ncnn.param

No generator behind it can be better than this. The line without the codebook says what its number of codes costs; those of linear
maps that keep as many numbers (principal components of blocks) say what the size of the latents would allow at least.
"""
import torch
from torch.nn import functional as F
from tqdm import tqdm

from config import places
from config.load import load_config
from models.published import load_backbone, load_first_stage
from models.sizes import SIZES
from utils.evaluation.reconstruction import reconstruction_errors
from utils.recognition.augmentation import network_input
from utils.runtime import ranks as distributed
from utils.runtime.errors import run_script
from utils.runtime.figures import contact_sheet
from utils.training import faces as training_faces

FACES, BATCH, SHEET = 500, 16, 12
LINEAR_BLOCKS, LINEAR_FACES = (4, 8, 16), 1000  # px; training faces that the linear maps are fitted to


@torch.no_grad()
def main() -> None:
    config = load_config(__doc__, reads=("paths", "model", "scores", "align", "training"))
    settings, ranks, cache = config.training, distributed.setup(config.device), places.face_cache(config)
    autoencoder = load_first_stage(config.model.first_stage_encoder, config.model.first_stage_decoder).to(ranks.device).eval()
    recogniser = load_backbone(config.scores.recogniser).to(ranks.device)
    whole, size = settings.crop == "whole", SIZES[settings.size]["image_size"]
    faces = training_faces.prepare(settings.faces, settings.leave_out, whole, config.align.minimum_face / 128, cache, ranks)
    margin, crops = faces.margin, training_faces.crops(faces, cache, size, faces.margin)
    rows, held_out, _ = training_faces.hold_out(faces, settings.held_out)
    chosen = training_faces.some(held_out, FACES)
    images = network_input(crops[chosen], "cpu")

    decoded = {"with the codebook": [], "without": []}
    for part in tqdm(images.split(BATCH), desc="encode and decode", unit="batch"):
        latents = autoencoder.encode(part.to(ranks.device))
        decoded["with the codebook"].append(autoencoder.decode(latents).cpu())
        decoded["without"].append(autoencoder.decode(latents, quantised=False).cpu())
    decoded = {name: torch.cat(parts).clamp(-1, 1) for name, parts in decoded.items()}

    fitted_to = network_input(crops[training_faces.some(rows, LINEAR_FACES)], "cpu")
    numbers = latents.shape[1] * latents.shape[2] ** 2 / images.shape[2] ** 2  # of a pixel
    for block in LINEAR_BLOCKS:
        decoded[f"linear, blocks of {block} px"] = linear_map(fitted_to, images, block, round(numbers * block**2)).clamp(-1, 1)

    def embeddings_of(faces: torch.Tensor) -> torch.Tensor:
        canvas = (training_faces.of_canvas(part, margin) for part in faces.split(BATCH))
        return torch.cat([recogniser(part.to(ranks.device)).float().cpu() for part in canvas])

    before = embeddings_of(images)
    print(f"{len(chosen)} held-out faces; {config.model.first_stage_encoder}")
    for name, faces_after in decoded.items():
        errors = reconstruction_errors(images, faces_after)
        cosine = F.cosine_similarity(before, embeddings_of(faces_after)).mean().item()
        print(f"{name}: PSNR {errors['psnr']:.2f} dB, chroma error {errors['chroma_error']:.2f}, mean error of red, green, blue "
              f"{errors['red']:+.2f} {errors['green']:+.2f} {errors['blue']:+.2f} grey levels, gradient {errors['gradient']:.3f}"
              f", cosine of embeddings {cosine:.3f}")
    file = places.reconstruction_sheet(config)
    rows = torch.stack([images, *decoded.values()])[:, :: max(1, len(images) // SHEET)][:, :SHEET]
    contact_sheet(((rows + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy(), file)
    print(f"{file}: faces, with the codebook, without, {', '.join(list(decoded)[2:])}")


def linear_map(fitted_to: torch.Tensor, images: torch.Tensor, block: int, numbers: int) -> torch.Tensor:
    """Images [N, 3, H, W] of which that many principal components of each block of pixels are kept."""
    def blocks(x: torch.Tensor) -> torch.Tensor:
        return F.unfold(x, block, stride=block)  # [N, 3 block^2, blocks]

    points = blocks(fitted_to).transpose(0, 1).flatten(1)
    mean = points.mean(dim=1, keepdim=True)
    kept = torch.linalg.eigh((points - mean) @ (points - mean).T)[1][:, -numbers:]
    return F.fold(kept @ (kept.T @ (blocks(images) - mean)) + mean, images.shape[2:], block, stride=block)


if __name__ == "__main__":
    run_script(main)
