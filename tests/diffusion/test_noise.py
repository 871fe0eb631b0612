"""utils/diffusion/noise.py: Philox's known answers, the normal distribution, and purity."""
import numpy as np
import pytest
import torch
from scipy import stats

from utils.diffusion.noise import ANNEALING, CONE, DIRECTION, W, gaussian, philox, uniform

SHAPE = (3, 32, 32)


@pytest.mark.parametrize("counter, key, words", [  # known-answer vectors of the Random123 distribution
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])
def test_philox_known_answers(counter, key, words):
    assert [int(word) for word in philox([torch.tensor([c]) for c in counter], key)] == words


def test_noise_is_bit_identical_in_any_batch_and_order():
    identities, samples = [5, 0, 7, 5, 123456], [0, 3, 2, 1, 49]
    batch = gaussian(42, identities, samples, 999, SHAPE)
    backwards = gaussian(42, identities[::-1], samples[::-1], 999, SHAPE).flip(0)
    alone = torch.stack([gaussian(42, i, k, 999, SHAPE) for i, k in zip(identities, samples, strict=True)])
    assert torch.equal(batch, alone) and torch.equal(batch, backwards)
    assert batch.dtype == torch.float32


def test_every_argument_matters():
    base = gaussian(1, 2, 3, 4, SHAPE)
    for other in (gaussian(9, 2, 3, 4, SHAPE), gaussian(1 + 2**32, 2, 3, 4, SHAPE), gaussian(1, 9, 3, 4, SHAPE),
                  gaussian(1, 2, 9, 4, SHAPE), gaussian(1, 2, 3, 9, SHAPE)):
        assert abs(np.corrcoef(base.flatten(), other.flatten())[0, 1]) < 0.08  # 4 sigma at 3,072 values


def test_noise_is_standard_normal_and_finite():
    noise = gaussian(0, list(range(300)), [0] * 300, 1000, SHAPE).flatten().double().numpy()
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, "norm").statistic < 0.002  # 921,600 values: expected near 0.0009
    assert abs(noise.mean()) < 4e-3 and abs(noise.std() - 1) < 3e-3
    assert 4.4 < np.abs(noise).max() < 6.4


def test_uniform_values_are_the_words():
    words = philox([torch.tensor([c]) for c in (0, 7, 3, 2)], (42, 0))
    assert uniform(42, 2, 3, 7, (4,)).tolist() == [(int(word) + 0.5) / 2**32 for word in words]
    torch.testing.assert_close(gaussian(42, [2, 9], [3, 1], 7, (5,)),
                               torch.special.ndtri(uniform(42, [2, 9], [3, 1], 7, (5,))).float(), rtol=0, atol=0)


def test_no_timestep_and_no_prior_has_a_tag_of_another_stream():
    timesteps = range(2**31)  # T is below
    tags = [W, CONE, DIRECTION, *(ANNEALING + t for t in (0, 1, 999, 2**31 - 4))]
    assert len(set(tags)) == 7 and all(0 <= tag < 2**32 and tag not in timesteps for tag in tags)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    for step in (0, 500, 1000):
        cpu = gaussian(42, [1, 2], [3, 4], step, SHAPE)
        gpu = gaussian(42, [1, 2], [3, 4], step, SHAPE, device="cuda").cpu()
        assert (cpu - gpu).abs().max() <= 1e-6
