"""Time and peak memory of all genuine and impostor pairs on the CPU, and what they make for ten times the images.

    python -m benchmarks.scores
    python -m benchmarks.scores 10000
"""
import multiprocessing
import os
import resource
import sys
import time

import numpy as np

from utils.evaluation.scores import score_distributions

NUMBER, DIMENSION, IMAGES_PER_IDENTITY = 50_000, 512, 50


def measure(number: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds of all threads, and the process's peak memory in GiB, its libraries included."""
    embeddings = np.random.default_rng(0).standard_normal((number, DIMENSION), dtype=np.float32)
    labels = np.arange(number) // IMAGES_PER_IDENTITY
    start, cpu = time.perf_counter(), time.process_time()
    score_distributions(embeddings, labels)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else NUMBER
    # The peak is a process's own: one size must not hide behind another's.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        half, whole = pool.map(measure, (number // 2, number), chunksize=1)
        pool.close()
        pool.join()  # else Python warns of a semaphore that is left
    # Time grows with the pairs, memory with the images.
    memory = whole[2] + (whole[2] - half[2]) * (10 * number - number) / (number - number // 2)
    tenfold = (whole[0] * 100, whole[1] * 100, memory)
    print(f"{DIMENSION} wide, {os.cpu_count()} cores\n| images | pairs | seconds | CPU seconds | peak memory, GiB |\n"
          "|---|---|---|---|---|")
    for name, n, (seconds, cpu, peak) in (("", number // 2, half), ("", number, whole),
                                          (" (extrapolated)", 10 * number, tenfold)):
        print(f"| {n:,}{name} | {n * (n - 1) // 2:,} | {seconds:,.1f} | {cpu:,.1f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
