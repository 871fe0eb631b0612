"""Counter-based Gaussian noise: a pure function of (seed, identity, sample, step).

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter into 32-bit words;
the normal quantile function turns words into Gaussian values. There is no state, so an image's noise is the same whatever
the batch, the rank, the order or the number of restarts.
"""
from collections.abc import Sequence

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# What is drawn of an image beside its noise: counters in the timestep's place that no timestep and no prior reaches.
W, CONE, DIRECTION = WORD, WORD - 1, WORD - 2  # its w; the cosine and the direction of its perturbed context
ANNEALING = 2**31  # + t: condition annealing


def gaussian(seed: int, identity: int | Sequence[int] | torch.Tensor, sample: int | Sequence[int] | torch.Tensor, step: int,
             shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal values, float32: [*shape] for one image, [B, *shape] for B identities and samples.

    Args:
        seed: 0 .. 2**64 - 1.
        identity, sample: which image: sample k of identity i; two numbers, or two sequences of B numbers. Where many steps
            are drawn on a GPU, int64 tensors that are there already: a copy would wait for the step before.
        step: the timestep t of the noise; T for the prior x_T; or one of the tags above. All four counters are below 2**32.
        shape: of one image's noise, [C, H, W].
    Returns:
        The same bits for the same arguments on one kind of device; a CPU and a GPU agree to 1e-6.
    """
    # In float64, so that the last bits in which devices' logarithms differ vanish in rounding to float32.
    return torch.special.ndtri(uniform(seed, identity, sample, step, shape, device)).float()


def uniform(seed: int, identity: int | Sequence[int] | torch.Tensor, sample: int | Sequence[int] | torch.Tensor, step: int,
            shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Values between 0 and 1, neither included, float64; the arguments and shapes are those of `gaussian`."""
    single = isinstance(identity, int)
    identities = torch.as_tensor([identity] if single else identity, dtype=torch.int64, device=device)
    samples = torch.as_tensor([sample] if single else sample, dtype=torch.int64, device=device)
    size = torch.Size(shape).numel()
    blocks = torch.arange(-(-size // 4), dtype=torch.int64, device=device)  # four words a block
    words = philox((blocks[None], torch.full_like(blocks, step)[None], samples[:, None], identities[:, None]),
                   (seed & WORD, seed >> 32 & WORD))
    values = (torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :size].double() + 0.5) / 2**32
    values = values.view(len(identities), *shape)
    return values[0] if single else values


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox 4x32-10: four 32-bit counter words (int64 tensors that broadcast) and a key to four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2**64, which leaves its 64 bits right; the mask undoes the shift's sign.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((product1 >> 32 & WORD) ^ c1 ^ k0, product1 & WORD,
                          (product0 >> 32 & WORD) ^ c3 ^ k1, product0 & WORD)
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3
