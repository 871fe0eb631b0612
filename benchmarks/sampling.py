"""Speed of negative-guided sampling: the published algorithm beside ours, full-size network, one run, one device.

    python -m benchmarks.sampling [--batch 50] [--steps 3] [--size published] [--device auto]

Published: two eager fp32 calls a step, the context repeated for every image, attention as separate products and softmax.
Ours: what sample.py does, in fp32 and in bf16. Random weights: the speed does not depend on them.
"""
import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.prepacked import prepack
from models.sizes import SIZES, build
from utils.runtime import ranks as distributed

CONTEXT = 512
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=50, help="images denoised together")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--size", default="published", choices=tuple(SIZES), help="of the network")
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), help="of ours; default: what the device is fast at")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    device = distributed.setup(arguments.device).device
    batch, precisions = arguments.batch, arguments.precisions or fast_precisions(device)

    torch.manual_seed(0)
    unet = build(arguments.size, CONTEXT)[0].eval().to(device)
    latent = SIZES[arguments.size]["first_stage"]["code_channels"], *[SIZES[arguments.size]["image_size"] // 4] * 2
    x_t, t = torch.randn(batch, *latent, device=device), torch.full((batch,), 500, device=device)
    c_pos, c_neg = (torch.nn.functional.normalize(torch.randn(batch, CONTEXT, device=device)) for _ in range(2))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        unet(x_t[:1], t[:1], c_pos[:1])
    gflop = counter.get_total_flops() / 1e9
    print(f"{name_of(device)}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}; one call of one image: {gflop:.1f} GFLOP; batch {batch}, w = 0.5")
    rates = {PRECISIONS[name]: matrix_rate(PRECISIONS[name], device) for name in {"fp32", *precisions}}
    print("measured matrix rate:", ", ".join(f"{name} {rates[dtype] / 1e12:.3g}" for name, dtype in PRECISIONS.items()
                                             if dtype in rates), "TFLOP/s")

    def published() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return 1.5 * unet(x_t, t, c_pos) - 0.5 * unet(x_t, t, c_neg)

    def ours() -> torch.Tensor:
        eps_pos, eps_neg = unet(x_t, t, tokens).chunk(2)
        return 1.5 * eps_pos - 0.5 * eps_neg

    def baseline() -> torch.Tensor:
        return unet(x_t, t, tokens[:batch])

    rows = {}
    rows["published, fp32"] = measure(published, arguments.steps, device), torch.float32, 2
    unet, x_t = unet.to(memory_format=torch.channels_last), x_t.to(memory_format=torch.channels_last)
    for precision in precisions:
        dtype = PRECISIONS[precision]
        unet, x_t = unet.to(dtype), x_t.to(dtype)
        prepack(unet)
        with torch.inference_mode():
            tokens = unet.context_tokens(torch.cat([c_pos, c_neg]).to(dtype))
        rows[f"ours, {precision}"] = measure(ours, arguments.steps, device), dtype, 2
        rows[f"ours, {precision}, w = 0"] = measure(baseline, arguments.steps, device), dtype, 1

    print("| | ms a step | ms a step and image | images/s at 200 steps | of the matrix rate | peak memory, GB | ratio |")
    print("|---|---|---|---|---|---|---|")
    first = rows["published, fp32"][0][0]
    for name, ((seconds, peak), dtype, calls) in rows.items():
        share = calls * gflop * 1e9 * batch / seconds / rates[dtype]
        print(f"| {name} | {1e3 * seconds:.0f} | {1e3 * seconds / batch:.1f} | {batch / seconds / 200:.3g} | "
              f"{100 * share:.0f}% | {peak / 1e9:.2f} | {first / seconds:.2f} |")


def measure(step: Callable[[], torch.Tensor], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds a call (the median) and the peak memory in bytes: the GPU's, or the process's resident set on a CPU."""
    reset_peak(device)
    seconds = []
    with torch.inference_mode():
        for _ in range(steps + 1):
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[len(seconds[1:]) // 2], peak_memory(device)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def fast_precisions(device: torch.device) -> list[str]:
    """The names in PRECISIONS without bf16 where a device emulates it: a product that takes a CPU 0.1 s then takes 13 s."""
    return [name for name in PRECISIONS if name != "bf16" or distributed.use_bf16("auto", device)]


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of large matrix products, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(measure(lambda: a @ b, 1, device)[0] for _ in range(5))
    return 2 * size**3 / best


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: forget the process's peak
    except OSError:
        pass  # elsewhere the peak is that of the process so far


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
