"""The score of a generator in training, on a generator whose images show what they were asked for."""
import numpy as np
import pytest
import torch
from PIL import Image

from utils.diffusion.noise import gaussian
from utils.evaluation.scores import metrics, score_distributions
from utils.training import validation
from utils.training.validation import held_out_scores, plot_curves


class Painter:
    """In place of a LatentDiffusion: an image's colour is its context, and a tenth of its noise."""

    latent_shape, device, dtype = (1, 1, 3), torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.asked = []

    def images(self, contexts, negatives, noise, guide, solver, steps) -> torch.Tensor:
        assert negatives is None and guide is validation.unguided and (solver, steps) == ("dpm++", 15)
        x_T = noise(1000)
        self.asked.append((contexts.numpy(), x_T))
        return (contexts / 2 + 0.1 * x_T[:, 0, 0])[:, :, None, None].expand(-1, -1, 8, 8).clamp(-1, 1)


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3))


def test_each_held_out_person_is_drawn_four_times_each_image_from_its_own_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "BATCH", 7)
    contexts = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0].astype(np.float32)
    contexts = np.concatenate([contexts, -contexts])
    painter = Painter()
    found = held_out_scores(painter, contexts, mean_colour, 5, tmp_path / "samples.png")
    shown, x_T = (np.concatenate(parts) for parts in zip(*painter.asked, strict=True))
    assert len(painter.asked) == 4 and max(len(part) for part, _ in painter.asked) <= 7
    labels, numbers = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
    np.testing.assert_array_equal(shown, contexts[labels])
    expected = [gaussian(5, [label], [number], 1000, shape=(1, 1, 3), device=painter.device)[0]
                for label, number in zip(labels.tolist(), numbers.tolist(), strict=True)]
    np.testing.assert_array_equal(x_T, torch.stack(expected))

    colours = (contexts[labels] / 2 + 0.1 * x_T[:, 0, 0]).clip(-1, 1)
    by_hand = metrics(score_distributions(colours, labels))
    assert found == pytest.approx({"fdr": by_hand["fdr"], "genuine": by_hand["genuine_mean"],
                                   "impostor": by_hand["impostor_mean"]}, rel=1e-4)
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    assert sheet.shape == (6 * 96, 4 * 96, 3)
    centres = sheet[48::96, 48::96].reshape(24, 3) / 127.5 - 1
    np.testing.assert_allclose(centres, colours, rtol=0, atol=1 / 127)


def test_curves_are_drawn_whatever_the_log_holds(tmp_path):
    for log in ([], [{"minutes": 1.0, "loss": 2.0, "fdr": None}], [{"minutes": 1.0, "loss": 2.0}, {"minutes": 2.0, "fdr": 3.0}]):
        plot_curves(log, tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").size[0] > 500
