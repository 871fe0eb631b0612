"""align.py with batches of two images: torchrun ... -m tests.tiny_align [settings]."""
import align
from utils.runtime.errors import run_script

if __name__ == "__main__":
    align.BATCH = 2
    run_script(align.main)
