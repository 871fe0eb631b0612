"""From continuous latents to a codebook."""
import numpy as np
import torch

from models.autoencoder import Autoencoder
from utils.runtime.ranks import Ranks
from utils.training.quantisation import quantise


def test_normalising_latents_leaves_the_pictures_as_they_were():
    torch.manual_seed(0)
    autoencoder = Autoencoder((32, 32), 1, 3, 3, 16).eval()
    autoencoder.vq.quant_conv.weight.data *= 7
    autoencoder.vq.quant_conv.bias.data += 5
    crops = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3)).astype(np.uint8)

    def images(numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(crops[numbers]).permute(0, 3, 1, 2) / 127.5 - 1

    with torch.no_grad():
        before = autoencoder.decode(autoencoder.encode(images(np.arange(20))), quantised=False)
        quantise(autoencoder, np.arange(20), images, Ranks(0, 1, torch.device("cpu")), 0)
        after = autoencoder.decode(autoencoder.encode(images(np.arange(20))), quantised=False)
        latents = autoencoder.encode(images(np.arange(20)))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)
    assert not any(weight.requires_grad for weight in autoencoder.vq.encoder.parameters())
