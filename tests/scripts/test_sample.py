"""sample.py as people run it: small random weights in the published layout, real files, real kills."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import create_negative_contexts
import create_sample_identity_contexts
import sample
from experiments import witness
from models import published, random_weights
from models.unet import ConditionalUNet
from tests.running import run
from utils.diffusion import guidance, solvers
from utils.diffusion.annealing import annealed
from utils.diffusion.latent_diffusion import LatentDiffusion
from utils.diffusion.noise import ANNEALING, gaussian
from utils.identities.contexts import uniform
from utils.runtime.errors import UserError
from utils.runtime.smaller_batches import SmallerBatches, read_smaller_batches

ROOT = Path(__file__).parents[2]
CONTEXTS = 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    random_weights.write(folder, "small", seed=0)
    return folder


@pytest.fixture(scope="module")
def settings(weights, tmp_path_factory) -> list[str]:
    """Overrides for a small run whose contexts and negatives exist; paths.run is up to the test."""
    output = tmp_path_factory.mktemp("output")
    overrides = [
        f"paths.output={output}", "device=cpu", "contexts.source=uniform", "contexts.dimension=512",
        f"contexts.number={CONTEXTS}", f"model.diffusion={weights}",
        f"model.first_stage_encoder={weights / 'first_stage_encoder_state_dict.pt'}",
        f"model.first_stage_decoder={weights / 'first_stage_decoder_state_dict.pt'}",
        "sampling.identities=3", "sampling.images_per_identity=3", "sampling.batch_size=4", "sampling.solver=dpm++",
        "sampling.steps=3", "sampling.precision=fp32"]
    for script, extra in ((create_sample_identity_contexts, []), (create_negative_contexts, []),
                          (create_negative_contexts, ["negatives.strategy=null"])):
        run(script, *overrides, *extra)
    return overrides


def loaded(weights: Path) -> LatentDiffusion:
    """The generator, in fp32 on the CPU."""
    unet, model = published.load_diffusion(weights)
    autoencoder = published.load_first_stage(weights / "first_stage_encoder_state_dict.pt",
                                             weights / "first_stage_decoder_state_dict.pt")
    return LatentDiffusion(unet, autoencoder, model["betas"], model["latent_shape"], model["prediction"], torch.device("cpu"),
                           bf16=False)


def command(*arguments: str, torchrun: int = 0, script: Sequence[str] = ("sample.py",)) -> list[str]:
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}", "--standalone"]
    return [*launcher, *script, *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def images(settings: list[str], name: str) -> dict[str, bytes]:
    folder = Path(settings[0].removeprefix("paths.output=")) / name
    return {str(file.relative_to(folder / "samples")): file.read_bytes() for file in folder.glob("samples/*/*.png")}


@pytest.fixture(scope="module")
def reference(settings) -> dict[str, bytes]:
    """An undisturbed run's images: 3 identities x 3."""
    run(sample, *settings, "paths.run=reference")
    return images(settings, "reference")


def test_a_run_leaves_images_sheet_and_record(settings, reference):
    assert sorted(reference) == [f"{i:06d}/{k}.png" for i in range(3) for k in range(3)]
    folder = Path(settings[0].removeprefix("paths.output=")) / "reference"
    pixels = np.asarray(Image.open(folder / "samples" / "000000" / "0.png"))
    assert pixels.shape == (64, 64, 3) and pixels.std() > 5
    assert len(set(reference.values())) == 9
    assert Image.open(folder / "contact_sheet.png").size == (3 * 96, 3 * 96)
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["guidance"]["w"] == 0.5
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert [len(digest) for digest in record["decides"]["weights"]] == [64] * 4
    assert not list(folder.rglob("*.part"))


def test_a_spacing_decides_the_images_and_the_default_one_is_that_of_earlier_records(settings, reference):
    run(sample, *settings, "sampling.spacing=leading", "paths.run=leading")
    folder = Path(settings[0].removeprefix("paths.output="))
    decides = json.loads((folder / "leading" / "run.json").read_text())["decides"]
    assert (decides["sampling.spacing"], decides["timesteps"]) == ("leading", [666, 333, 0])
    assert "sampling.spacing" not in json.loads((folder / "reference" / "run.json").read_text())["decides"]
    other = images(settings, "leading")
    assert other.keys() == reference.keys() and all(other[name] != reference[name] for name in other)
    with pytest.raises(UserError, match="was made with sampling.spacing = 'leading'"):
        run(sample, *settings, "paths.run=leading")


def test_w_0_equals_the_baseline_bit_for_bit_and_costs_one_pass(settings, weights, reference, monkeypatch):
    calls = []
    forward = ConditionalUNet.forward
    monkeypatch.setattr(ConditionalUNet, "forward",
                        lambda self, x, t, c: calls.append((len(x), len(c))) or forward(self, x, t, c))
    run(sample, *settings, "guidance.w=0", "paths.run=w0")
    assert calls == [(4, 4)] * 9  # three batches of four, three steps, no second context
    off = images(settings, "w0")
    assert off.keys() == reference.keys() and all(off[name] != reference[name] for name in off)

    model = loaded(weights)
    contexts = torch.from_numpy(uniform(CONTEXTS, 512, 0))[[0, 0, 0, 1]]

    def noise(t):
        return gaussian(42, [0, 0, 0, 1], [0, 1, 2, 0], t, model.latent_shape)

    with torch.inference_mode():
        plain = solvers.sample(lambda x_t, t: model.unet(x_t, torch.full((4,), t), contexts), noise(model.T), "ddpm", 5, noise,
                               betas=model.betas)
        drawn = {w: model.latents(contexts, -contexts, noise, guidance.guided("negative", w), "ddpm", 5) for w in (0.0, 0.5)}
        assert torch.equal(drawn[0.0], plain) and not torch.equal(drawn[0.5], plain)
        assert torch.equal(model.latents(contexts, None, noise, guidance.unguided, "ddpm", 5), plain)


def test_bytes_do_not_depend_on_neighbours(settings, reference):
    """The same batch shape, other neighbours in the batch, other places in it, another order of work."""
    run(sample, *settings, "paths.run=larger", "sampling.identities=5", "sampling.images_per_identity=4")
    larger = images(settings, "larger")
    assert len(larger) == 20 and {name: larger[name] for name in reference} == reference


def test_running_again_does_nothing_and_repairs_what_is_missing_or_half_written(settings, reference):
    run(sample, *settings, "paths.run=again")
    folder = Path(settings[0].removeprefix("paths.output=")) / "again" / "samples"
    half, gone, kept = folder / "000000" / "1.png", folder / "000002" / "2.png", folder / "000001" / "0.png"
    half.write_bytes(half.read_bytes()[:-20])
    gone.unlink()
    before = kept.stat().st_mtime_ns
    run(sample, *settings, "paths.run=again")
    assert images(settings, "again") == reference and kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_two_ranks_draw_the_same_bytes(settings, reference):
    subprocess.run(command(*settings, "paths.run=ranks", torchrun=2), cwd=ROOT, env=environment(), check=True,
                   capture_output=True, timeout=240)
    assert images(settings, "ranks") == reference


@pytest.mark.slow
def test_a_rank_that_dies_loses_its_unfinished_batch_alone(settings):
    """Rank 1 is killed while it draws its third batch: its first is there whole, and no file is torn."""
    larger = [*settings, "sampling.identities=6", "sampling.images_per_identity=4", "sampling.batch_size=2"]
    run(sample, *larger, "paths.run=none_died")
    expected = images(settings, "none_died")
    died = command(*larger, "paths.run=one_died", torchrun=2, script=("-m", "tests.dying_rank"))
    ended = subprocess.run(died, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode != 0
    left = images(settings, "one_died")
    assert {"000000/2.png", "000000/3.png"} <= left.keys()  # images 0 and 1 are rank 0's, then rank 1's first batch
    assert not {"000002/2.png", "000002/3.png"} & left.keys()  # its third
    assert left.items() <= expected.items()
    run(sample, *larger, "paths.run=one_died")
    assert images(settings, "one_died") == expected


# ---- variety: what is each image's own beside its noise --------------------------------------------------------------

VARIETY = ["variety.cone=0.6", "variety.cone_noise=contexts", "variety.cone_bound=safe", "variety.w=uniform",
           "variety.annealing=0.25"]


@pytest.fixture(scope="module")
def varied(settings) -> dict[str, bytes]:
    run(sample, *settings, *VARIETY, "paths.run=varied")
    return images(settings, "varied")


def decides(settings: list[str], name: str) -> dict:
    return json.loads((Path(settings[0].removeprefix("paths.output=")) / name / "run.json").read_text())["decides"]


def test_variety_decides_the_images_and_off_is_as_in_earlier_records(settings, reference, varied, capsys):
    assert varied.keys() == reference.keys() and all(varied[name] != reference[name] for name in varied)
    said = {name: value for name, value in decides(settings, "varied").items() if name not in decides(settings, "reference")}
    assert said == {"variety.cone": 0.6, "variety.cone_noise": "contexts", "variety.cone_bound": "safe", "variety.w": "uniform",
                    "variety.annealing": 0.25}
    with pytest.raises(UserError, match="was made with variety.annealing = 0.25, now it is 0.1"):
        run(sample, *settings, *VARIETY, "variety.annealing=0.1", "paths.run=varied")
    with pytest.raises(UserError, match="was made with variety.cone = None, now it is 0.6"):
        run(sample, *settings, "variety.cone=0.6", "paths.run=reference")
    run(sample, *settings, "variety.cone_noise=contexts", "variety.cone_bound=safe", "paths.run=reference")  # of no cone
    assert images(settings, "reference") == reference
    witness.verify([str(Path(settings[0].removeprefix("paths.output=")) / "varied"), "3"])
    assert "9 images drawn again: the same bytes" in capsys.readouterr().out


def test_varied_bytes_depend_neither_on_neighbours_nor_on_restarts(settings, varied):
    run(sample, *settings, *VARIETY, "paths.run=varied_larger", "sampling.identities=5", "sampling.images_per_identity=4")
    larger = images(settings, "varied_larger")
    assert {name: larger[name] for name in varied} == varied
    folder = Path(settings[0].removeprefix("paths.output=")) / "varied_larger" / "samples"
    for name in ("000000/1.png", "000004/3.png"):
        (folder / name).unlink()
    run(sample, *settings, *VARIETY, "paths.run=varied_larger", "sampling.identities=5", "sampling.images_per_identity=4")
    assert images(settings, "varied_larger") == larger


@pytest.mark.parametrize("fewer", ["sampling.identities=2", "sampling.images_per_identity=2"])
def test_fewer_images_than_there_are_would_leave_others_among_them(settings, reference, fewer):
    with pytest.raises(UserError, match="reference: holds images beyond .*samples/.*png.; raise these to what they were"):
        run(sample, *settings, fewer, "paths.run=reference")


def test_the_record_tells_how_the_contexts_were_made_that_are_known_by_name_alone(settings):
    own = [one for one in settings if not one.startswith("contexts.")]
    named = ["contexts.name=theirs", "guidance.w=0", "paths.run=theirs", "sampling.identities=1"]
    run(create_sample_identity_contexts, *settings, "contexts.name=theirs", "contexts.seed=9")
    run(sample, *own, *named)
    folder = Path(settings[0].removeprefix("paths.output=")) / "theirs"
    made = json.loads((folder / "run.json").read_text())["config"]["contexts"]
    assert (made["source"], made["seed"], made["name"]) == ("uniform", 9, "theirs")
    assert "uniformly on the unit sphere" in (folder / "samples" / "README.md").read_text()


@pytest.mark.slow
def test_two_ranks_draw_the_same_varied_bytes(settings, varied):
    subprocess.run(command(*settings, *VARIETY, "paths.run=varied_ranks", torchrun=2), cwd=ROOT, env=environment(), check=True,
                   capture_output=True, timeout=240)
    assert images(settings, "varied_ranks") == varied


def test_each_image_has_a_context_of_its_own_and_its_identity_s_negative(settings, monkeypatch):
    seen = []
    draw = LatentDiffusion.images
    monkeypatch.setattr(LatentDiffusion, "images", lambda self, contexts, negatives, *arguments: seen.append(
        (contexts, negatives)) or draw(self, contexts, negatives, *arguments))
    run(sample, *settings, "paths.run=cone", "variety.cone=0.6")
    run(sample, *settings, "paths.run=no_cone")
    contexts, negatives = (torch.cat(some).numpy() for some in zip(*seen[:3], strict=True))
    plain, plain_negatives = (torch.cat(some).numpy() for some in zip(*seen[3:], strict=True))
    assert np.array_equal(negatives, plain_negatives)
    cosines = np.vecdot(contexts, plain, dtype=np.float64)[:9]
    assert 0.6 <= cosines.min() < cosines.max() < 1 and len(np.unique(contexts[:9], axis=0)) == 9


def test_a_mixture_is_w_or_0_for_each_image(settings, reference, monkeypatch):
    guides = []
    guided = guidance.guided
    monkeypatch.setattr(guidance, "guided", lambda **given: guides.append(given["w"]) or guided(**given))
    run(sample, *settings, "variety.w=mixture", "paths.run=alone", "sampling.batch_size=1")
    assert {(type(w), float(w)) for w in guides} == {(torch.Tensor, 0.0), (torch.Tensor, 0.5)}  # whatever its neighbours' are
    guides.clear()
    run(sample, *settings, "variety.w=mixture", "paths.run=mixture")
    run(sample, *settings, "guidance.w=0", "paths.run=no_w")
    assert guides[3:] == [0.0] * 3
    w = torch.cat([torch.full((4, 1, 1, 1), given) if isinstance(given, float) else given for given in guides[:3]])
    w = dict(zip(sorted(reference), w.flatten().tolist(), strict=False))
    assert set(w.values()) == {0.0, 0.5}
    mixture, no_w, folder = images(settings, "mixture"), images(settings, "no_w"), Path(settings[0].removeprefix("paths.output="))
    for name in reference:
        expected = folder / ("reference" if w[name] else "no_w") / "samples" / name
        other = folder / ("no_w" if w[name] else "reference") / "samples" / name
        pixels, same, different = (np.asarray(Image.open(file)).astype(int)
                                   for file in (folder / "mixture" / "samples" / name, expected, other))
        assert np.abs(pixels - same).mean() < 0.05 < np.abs(pixels - different).mean()  # last bits, of 255
    assert mixture.keys() == no_w.keys()


def test_annealed_contexts_are_those_of_every_timestep_whatever_tokens_are_kept(settings, weights):
    model = loaded(weights)
    contexts = torch.from_numpy(uniform(CONTEXTS, 512, 0))[[0, 0, 1, 2]]
    noise, of_contexts = (partial(gaussian, 42, [0, 0, 1, 2], [0, 1, 0, 0], shape=shape)
                          for shape in (model.latent_shape, (512,)))

    def change(c: torch.Tensor, t: int) -> torch.Tensor:
        return annealed(c, t, lambda t: of_contexts(ANNEALING + t), model.T, 0.25)

    def denoise(x_t: torch.Tensor, t: int) -> torch.Tensor:
        eps_pos, eps_neg = (model.unet(x_t, torch.full((4,), t), c) for c in (change(contexts, t), -contexts))
        return 1.5 * eps_pos - 0.5 * eps_neg

    with torch.inference_mode():
        expected = solvers.sample(denoise, noise(model.T), "ddim", 12, noise, betas=model.betas)
        found, plain = (model.latents(contexts, -contexts, noise, guidance.guided("negative", 0.5, change=change), "ddim", 12)
                        for change in (change, None))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    assert (found - plain).abs().mean() > 0.01


# ---- too little memory -----------------------------------------------------------------------------------------------

def too_little_memory(monkeypatch, most: int) -> list[int]:
    """A device on which more than `most` images at a time do not fit; the batch sizes that were tried."""
    tried, draw = [], LatentDiffusion.images

    def images(self, contexts, *arguments):
        tried.append(len(contexts))
        if len(contexts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return draw(self, contexts, *arguments)

    monkeypatch.setattr(LatentDiffusion, "images", images)
    return tried


def test_where_memory_runs_out_the_batch_is_halved_and_the_note_decides_the_bytes(settings, reference, monkeypatch, capsys):
    run(sample, *settings, "paths.run=twos", "sampling.batch_size=2")
    twos, folder = images(settings, "twos"), Path(settings[0].removeprefix("paths.output=")) / "halved"
    tried = too_little_memory(monkeypatch, 2)
    run(sample, *settings, "paths.run=halved")
    assert tried == [4, 2, 2, 2, 2, 2]  # one batch of four is tried; three batches of two parts, the last has one image
    printed = capsys.readouterr().out
    assert printed.count("out of memory: from here on 2 images are drawn at a time, not 4") == 1
    assert "3 of 3 batches were drawn in parts of 2 images or more" in printed
    assert images(settings, "halved") == twos  # a part is what a whole batch of that size would be
    assert json.loads((folder / "smaller_batches-0.json").read_text()) == {"0": 2, "1": 2, "2": 2}

    monkeypatch.undo()  # there is memory again: what is missing is drawn as its neighbours were, and nothing else is
    for name in ("000000/1.png", "000002/2.png"):
        (folder / "samples" / name).unlink()
    run(sample, *settings, "paths.run=halved")
    assert images(settings, "halved") == twos
    witness.verify([str(folder), "3"])
    assert "9 images drawn again: the same bytes" in capsys.readouterr().out


def test_where_one_image_does_not_fit_it_is_an_error(settings, monkeypatch):
    tried = too_little_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        run(sample, *settings, "paths.run=none_fits")
    assert tried == [4, 2, 1] and not images(settings, "none_fits")


def test_the_host_s_lack_of_memory_counts_and_other_errors_do_not(tmp_path):
    memory, sizes = SmallerBatches(tmp_path, 0, 5), []

    def make(size: int) -> str:
        sizes.append(size)
        if size > 2:
            torch.empty(2**62, dtype=torch.uint8)
        return "made"

    assert memory.make(7, make) == "made" and sizes == [5, 3, 2]
    assert SmallerBatches(tmp_path, 1, 5).noted == {7: 2}  # another rank, another run
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        memory.make(8, lambda size: torch.zeros(2) @ torch.zeros(3))
    (tmp_path / "smaller_batches-1.json").write_text('{"3": 0}')
    with pytest.raises(UserError, match="smaller_batches-1.json: is damaged"):
        read_smaller_batches(tmp_path)


@pytest.mark.slow
def test_killed_and_resumed_draws_the_same_bytes(settings, reference):
    arguments = command(*settings, "paths.run=killed", "sampling.batch_size=4")
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not images(settings, "killed") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(images(settings, "killed")) <= 9
    run(sample, *settings, "paths.run=killed")
    assert images(settings, "killed") == reference


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++"])
def test_latents_across_batch_shapes(weights, solver, record_property):
    """In fp32 the final latents agree to 1e-3; codes that flip are counted."""
    model, contexts = loaded(weights), torch.from_numpy(uniform(CONTEXTS, 512, 0))

    def latents(batch: list[int]) -> torch.Tensor:
        noise = partial(gaussian, 42, batch, [0] * len(batch), shape=model.latent_shape)
        with torch.inference_mode():
            return model.latents(contexts[batch], contexts[[i + 1 for i in batch]], noise, guidance.guided("negative", 0.5),
                                 solver, 50)

    together = latents(list(range(8)))
    alone = torch.cat([latents([i]) for i in range(8)])
    assert (together - alone).abs().max() < 1e-3
    flipped = (model.autoencoder.codes(together) != model.autoencoder.codes(alone)).float().mean().item()
    record_property("flipped_codes", flipped)
    assert flipped < 0.005


def test_bf16_stays_close_to_fp32(settings, reference):
    """bf16 keeps 8 bits of the networks' values: the pictures are the same to the eye, not to the byte."""
    run(sample, *settings, "paths.run=bf16", "sampling.precision=bf16")
    folder = Path(settings[0].removeprefix("paths.output="))
    differences = [np.abs(np.asarray(Image.open(folder / "bf16" / "samples" / name)).astype(int)
                          - np.asarray(Image.open(folder / "reference" / "samples" / name))).mean()
                   for name in reference]
    assert 0 < np.mean(differences) < 8  # of 255


@pytest.mark.parametrize("override, words", [
    ("guidance.w=1", ["reference", "guidance.w = 0.5", "1.0", "paths.run"]),
    ("sampling.seed=7", ["reference", "seed", "paths.run"]),
    ("negatives.strategy=null", ["reference", "negatives", "paths.run"]),
])
def test_a_folder_made_with_other_settings_is_refused(settings, reference, override, words):
    with pytest.raises(UserError) as caught:
        run(sample, *settings, "paths.run=reference", override)
    assert all(word in str(caught.value) for word in words)
    assert images(settings, "reference") == reference


@pytest.mark.parametrize("override, words", [
    ("contexts.number=13", ["uniform-13x512", "create_sample_identity_contexts.py"]),
    ("negatives.strategy=mid", ["negatives-mid.npz", "create_negative_contexts.py"]),
    ("negatives.pool=5", ["negatives-far-pool5.npz", "create_negative_contexts.py"]),
    ("model.diffusion=nowhere", ["nowhere"]),
    ("model.first_stage_decoder=nowhere.pt", ["nowhere.pt"]),
    ("model.step=70000", ["70000"]),
    ("sampling.steps=1001", ["sampling.steps", "1000"]),
    ("model.first_stage_encoder=models/demo/first_stage_encoder.safetensors "
     "model.first_stage_decoder=models/demo/first_stage_decoder.safetensors",
     ["models/demo/first_stage_decoder.safetensors", "of 6 channels", "another first stage, of 3 channels and 4 times"]),
    ("sampling.solver=fitted sampling.steps=8", ["sampling.solver", "other weights", "experiments.solvers fit"]),
])
def test_what_is_missing_is_named(settings, override, words):
    with pytest.raises(UserError) as caught:
        run(sample, *settings, "paths.run=refused", *override.split())
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
    assert not images(settings, "refused")


@pytest.mark.slow
def test_a_failure_is_one_line_and_exit_code_2(settings):
    result = subprocess.run(command(*settings, "paths.run=refused", "sampling.stepz=3"), cwd=ROOT, env=environment(),
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: sampling.stepz: is an unknown setting; did you mean sampling.steps?\n"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize("blocks, words, where, is_begun", [
    (80, "sample needs more room than", "/samples", False),  # 27 images of three blocks each
    (84, "No space left", ".png", True)])  # enough for them by the estimate, but not for the record and the sheet too
def test_a_full_disk(settings, tmp_path, blocks, words, where, is_begun):
    """On a disk of that many free blocks: one line, exit code 2, no part files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        output = Path(settings[0].removeprefix("paths.output="))
        subprocess.run(["cp", "-r", output / "contexts", disk], check=True)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 4096 * blocks))
        result = subprocess.run(command(*settings, f"paths.output={disk}", "paths.run=full",
                                        "sampling.images_per_identity=9"),
                                cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and len(lines) == 1
        assert words in lines[0] and where in lines[0] and "continues" in lines[0]
        assert not list(disk.rglob("*.part")) and "Traceback" not in result.stderr
        assert any(disk.glob("full/samples/*/*.png")) == is_begun
    finally:
        subprocess.run(["umount", disk], check=True)
