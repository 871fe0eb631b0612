"""sample.py --verify: a run is what its records say, or the first thing that is not is named."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import create_negative_contexts
import create_sample_identity_contexts
import sample
from models import random_weights
from tests.running import run
from utils.runtime.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a run of 3 identities x 2, and the weights that drew it."""
    output, weights = tmp_path_factory.mktemp("output"), tmp_path_factory.mktemp("weights") / "tiny"
    random_weights.write(weights, "small", seed=0)
    settings = [f"paths.output={output}", "paths.run=run", "device=cpu", "contexts.source=uniform", "contexts.dimension=512",
                "contexts.number=6", f"model.diffusion={weights}", "negatives.pool=0",
                f"model.first_stage_encoder={weights / 'first_stage_encoder_state_dict.pt'}",
                f"model.first_stage_decoder={weights / 'first_stage_decoder_state_dict.pt'}",
                "sampling.identities=3", "sampling.images_per_identity=2", "sampling.batch_size=4",
                "sampling.solver=dpm++", "sampling.steps=2"]
    for script in (create_sample_identity_contexts, create_negative_contexts, sample):
        run(script, *settings)
    return output / "run", weights


def refused(words: str, *arguments: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run(sample, "--verify", *arguments)
    assert "\n" not in str(caught.value)


def test_an_untouched_run_is_drawn_again_to_the_last_bit(made, capsys):
    run(sample, "--verify", str(made[0]), "9")
    assert "6 images drawn again: the same bytes" in capsys.readouterr().out


def test_one_pixel_of_one_image_is_noticed(made):
    file = made[0] / "samples" / "000001" / "1.png"
    before = file.read_bytes()
    pixels = np.array(Image.open(file))
    pixels[5, 7, 0] ^= 1
    Image.fromarray(pixels).save(file)
    refused("000001/1.png: is not the image that its run draws", str(made[0]), "9")
    file.write_bytes(before)


def test_other_negatives_and_other_weights_are_noticed(made):
    folder, weights = made
    negatives = next((folder.parent / "contexts").glob("*negatives-far.npz"))
    before = negatives.read_bytes()
    with np.load(negatives) as archive:
        arrays = dict(archive)
    np.savez(negatives, **(arrays | {"negatives": -arrays["negatives"]}))
    refused("negatives-far.npz: is not the file that .*negatives-far.json tells of", str(folder))
    negatives.write_bytes(before)
    kept = shutil.copytree(weights, weights.parent / "kept")
    random_weights.write(weights, "small", seed=1)
    refused("run: was made with other weights than there are now", str(folder))
    shutil.rmtree(weights)
    shutil.copytree(kept, weights)


@pytest.mark.parametrize("config", [None, [], {}, {"sampling": 3}])
def test_a_record_without_its_settings_is_refused(made, config):
    record = made[0] / "run.json"
    before = record.read_text()
    record.write_text(json.dumps(json.loads(before) | {"config": config}))
    refused("run.json: does not say what the settings were; give the folder of a run", str(made[0]))
    record.write_text(before)


@pytest.mark.parametrize("arguments, words", [
    ([], "write python sample.py --verify"), (["nowhere"], "nowhere/run.json: no such file")])
def test_what_is_no_run_is_refused(arguments, words):
    refused(words, *arguments)
