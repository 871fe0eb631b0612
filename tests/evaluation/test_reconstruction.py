"""What an autoencoder loses, on images whose errors are known."""
import math

import pytest
import torch
from torch.nn import functional as F

from experiments.reconstruction import linear_map
from utils.evaluation.reconstruction import reconstruction_errors

LEVEL = 2 / 255  # a grey level of images in [-1, 1]


def test_errors_of_brightness_are_no_errors_of_colour():
    images = torch.rand(2, 3, 8, 8) - 0.5
    found = reconstruction_errors(images, images + 4 * LEVEL)
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / 4), abs=1e-3)
    assert found["chroma_error"] == pytest.approx(0, abs=1e-4) and found["gradient"] == pytest.approx(1, abs=1e-4)
    assert [found[name] for name in ("red", "green", "blue")] == pytest.approx([4] * 3, abs=1e-3)


def test_a_drift_of_colours_is_told_by_channel():
    images = torch.rand(2, 3, 8, 8) - 0.5
    found = reconstruction_errors(images, images + LEVEL * torch.tensor([6.0, 0, -3])[:, None, None])
    assert [found[name] for name in ("red", "green", "blue")] == pytest.approx([6, 0, -3], abs=1e-3)
    # after the mean of 1 is subtracted: 5, -1 and -4
    assert found["chroma_error"] == pytest.approx(math.sqrt((25 + 1 + 16) / 3), abs=1e-3)
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / 15), abs=1e-3)


def test_blur_has_less_gradient_and_values_beyond_the_range_are_clipped():
    images = torch.rand(2, 3, 16, 16)
    assert reconstruction_errors(images, F.avg_pool2d(images, 3, 1, 1))["gradient"] < 0.5
    stripes = torch.ones(1, 3, 4, 4)
    stripes[..., ::2] = -1
    assert reconstruction_errors(stripes, 0.5 * stripes)["gradient"] == pytest.approx(0.5)
    assert reconstruction_errors(torch.ones(1, 3, 4, 4) - stripes, 5 * stripes)["gradient"] == pytest.approx(2)


def test_a_linear_map_keeps_what_its_components_span():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(48, 3, generator=generator))[0]
    blocks = directions @ torch.randn(3, 10 * 16, generator=generator) + 0.3
    images = F.fold(blocks.reshape(48, 10, 16).transpose(0, 1), (16, 16), 4, stride=4)
    torch.testing.assert_close(linear_map(images, images, 4, 3), images, rtol=0, atol=1e-5)
    assert (linear_map(images, images, 4, 2) - images).abs().max() > 0.05
