"""Time and peak memory of choosing negatives among many contexts, each strategy in a process of its own.

    python -m benchmarks.negatives
    python -m benchmarks.negatives 10050
"""
import argparse
import os
import resource
import subprocess
import sys
import time

from utils.identities import contexts, negatives

NUMBER, DIMENSION = 100_000, 512


def measure(strategy: str, number: int) -> None:
    points = contexts.uniform(number, DIMENSION, seed=0)
    start, cpu = time.perf_counter(), time.process_time()
    _, _, similarity = negatives.select(points, strategy)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"| {strategy} | {number:,} | {seconds:.1f} | {cpu:.1f} | {peak:.2f} | {similarity.mean():.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="?", type=int, default=NUMBER, help="contexts")
    number = parser.parse_args().number
    print(f"{DIMENSION} wide, {os.cpu_count()} cores")
    print("| strategy | contexts | seconds | CPU seconds | peak memory of the process, GiB | mean similarity |")
    print("|---|---|---|---|---|---|", flush=True)
    for strategy in negatives.STRATEGIES:
        # The peak is a process's own: one strategy must not hide behind another's.
        subprocess.run([sys.executable, "-c", f"from benchmarks.negatives import measure; "
                                              f"measure('{strategy}', {number})"], check=True)


if __name__ == "__main__":
    main()
