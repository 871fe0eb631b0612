"""From continuous latents to a codebook: the second phase of training the first stage."""
from collections.abc import Callable

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from models.autoencoder import Autoencoder
from utils.runtime.ranks import Ranks

KMEANS_LATENTS = 400_000


@torch.no_grad()
def quantise(autoencoder: Autoencoder, rows: np.ndarray, batch_of: Callable[[np.ndarray], torch.Tensor], ranks: Ranks,
             seed: int) -> None:
    """Bring latents to mean 0 and variance 1, put the codebook where they are (k-means), and freeze the encoder.

    Args:
        rows: of the training images.
        batch_of: some rows -> their images [B, 3, H, W] in [-1, 1] on the device.
    """
    vq = autoencoder.vq
    chosen = np.random.default_rng(seed).permutation(rows)[:8192]
    latents = torch.cat([autoencoder.encode(batch_of(chosen[start : start + 64])).float().cpu()
                         for start in range(0, len(chosen), 64)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    points = ((latents - mean[:, None, None]) / std[:, None, None]).permute(0, 2, 3, 1)
    points = points.reshape(-1, vq.quantize.vq_embed_dim).numpy()  # of each part of the channels
    points = np.random.default_rng(seed).permutation(points)[:KMEANS_LATENTS]
    kmeans = MiniBatchKMeans(vq.quantize.n_e, batch_size=16_384, max_iter=10, n_init=1, init="random", random_state=seed,
                             reassignment_ratio=0.001)
    codes = torch.from_numpy(kmeans.fit(points).cluster_centers_)
    # quant_conv gives normalised latents, post_quant_conv takes them back
    mean, std, codes = (tensor.to(ranks.device) for tensor in (mean, std, codes))
    vq.quant_conv.weight /= std[:, None, None, None]
    vq.quant_conv.bias.copy_((vq.quant_conv.bias - mean) / std)
    vq.post_quant_conv.bias += vq.post_quant_conv.weight[:, :, 0, 0] @ mean
    vq.post_quant_conv.weight *= std[:, None, None]
    vq.quantize.embedding.weight.copy_(codes)
    for parameter in vq.state_dict().values():
        ranks.broadcast(parameter)
    freeze_encoder(autoencoder)


def freeze_encoder(autoencoder: Autoencoder) -> None:
    for module in (autoencoder.vq.encoder, autoencoder.vq.quant_conv, autoencoder.vq.quantize):
        module.requires_grad_(False)
        for parameter in module.parameters():
            parameter.grad = None
