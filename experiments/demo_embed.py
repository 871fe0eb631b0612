"""Take trained weights into models/demo/, in half precision: what the preset demo samples with.

    python -m experiments.demo_embed output/training/demo

The folder holds what train_autoencoder.py, train_diffusion.py and experiments.demo_recogniser wrote.
"""
import argparse
from pathlib import Path

from safetensors.torch import load_file

from utils.runtime.errors import UserError, run_script
from utils.runtime.files import require_file, write_bytes, write_safetensors

DEMO = Path(__file__).parents[1] / "models" / "demo"
WEIGHTS = ("checkpoints/ema_averaged_model.safetensors", "first_stage_encoder.safetensors",
           "first_stage_decoder.safetensors", "recogniser.safetensors")
OTHERS = (".hydra/config.yaml", "context_statistics.npz")
SCHEDULE = "eps_model."  # what is not of the network is the schedule's tables, which stay in float32
LIMIT = 40e6  # bytes of all of models/demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="<output>/training/<name>")
    folder = parser.parse_args().folder
    fix = "train with train_autoencoder.py, train_diffusion.py and experiments.demo_recogniser first"
    for name in (*WEIGHTS, *OTHERS):
        require_file(folder / name, "trained weights", fix)
    size = sum((folder / name).stat().st_size / (2 if name in WEIGHTS else 1) for name in (*WEIGHTS, *OTHERS))
    if size > LIMIT:
        raise UserError(f"{folder}: would make {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; train smaller networks")
    for name in WEIGHTS:
        weights = load_file(folder / name)
        is_diffusion = any(key.startswith(SCHEDULE) for key in weights)
        write_safetensors(DEMO / name, {
            key: tensor.half() if tensor.is_floating_point() and (key.startswith(SCHEDULE) or not is_diffusion) else tensor
            for key, tensor in weights.items()})
    for name in OTHERS:
        write_bytes(DEMO / name, (folder / name).read_bytes())
    print(f"{DEMO}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
