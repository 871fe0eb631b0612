"""config/places.py: names say what was chosen, and everything lies under the one output root."""
from itertools import combinations
from pathlib import Path

import pytest

from config import places
from config.load import load_config, resolve


def load(*arguments: str):
    return load_config("", arguments=arguments)


def test_a_runs_name_says_what_makes_its_images_differ():
    folders = [places.run_folder(load(*arguments)) for arguments in (
        [], ["guidance.w=0"], ["guidance.w=1"], ["guidance.schedule=linear"], ["guidance.rule=apg"],
        ["guidance.schedule=interval", "guidance.interval=200,800"], ["guidance.schedule=interval"],
        ["negatives.strategy=close"], ["negatives.strategy=rand", "negatives.seed=1"], ["negatives.pool=50"],
        ["sampling.solver=ddim"], ["sampling.steps=10"], ["sampling.spacing=trailing"], ["sampling.seed=1"],
        ["sampling.solver=ddim", "sampling.as_published=1"],
        ["variety.cone=0.7"], ["variety.cone=0.7", "variety.cone_noise=contexts"],
        ["variety.cone=0.7", "variety.cone_bound=safe"],
        ["variety.w=uniform"], ["variety.w=mixture"], ["variety.annealing=0.1"], ["contexts.highest_cosine=0.5"],
        ["contexts.seed=1"], ["contexts.source=uniform"], ["model.diffusion=other"], ["--preset", "experiment"])]
    for one, other in combinations(folders, 2):
        assert one != other
    assert folders[0] == Path("output/demo/demo_gaussian-100-seed0_far_w0.5-constant_fitted12_seed42")
    assert "_far_w0.5-interval200to800_" in folders[5].name


def test_without_guidance_no_negative_decides():
    assert places.run_folder(load("guidance.w=0", "negatives.strategy=close", "guidance.schedule=linear")) == \
        places.run_folder(load("guidance.w=0"))
    assert places.run_folder(load("guidance.w=0", "variety.w=uniform")) == places.run_folder(load("guidance.w=0"))


@pytest.mark.parametrize("arguments, name", [
    ([], "gaussian-100-seed0.negatives-far"),
    (["negatives.strategy=rand", "negatives.pool=500", "negatives.seed=3", "contexts.number=600"],
     "gaussian-600-seed0.negatives-rand-pool500-seed3"),
    (["negatives.strategy=custom", "negatives.custom_file=lists/pairs.csv"], "gaussian-100-seed0.negatives-custom-pairs"),
    (["contexts.source=uniform", "contexts.seed=2"], "uniform-100x128-seed2.negatives-far"),
    (["contexts.source=published", "contexts.file=data/ffhq.npy"], "published-ffhq.negatives-far"),
    (["contexts.source=extracted", "contexts.faces=data/ffhq", "contexts.recogniser=r50.pth", "contexts.per=image"],
     "extracted-ffhq-r50-per-image.negatives-far"),
    (["contexts.name=mine"], "mine.negatives-far"),
])
def test_contexts_and_negatives_are_named_by_what_decides_them(arguments, name):
    file = places.negatives_file(load(*arguments))
    assert file == Path("output/contexts") / f"{name}.npz"
    assert places.contexts_file(load(*arguments)).name == f"{name.partition('.')[0]}.npz"


def test_everything_lies_in_the_output_root():
    config = load("paths.output=/data/out", "paths.run=a/b")
    run = places.run_folder(config)
    assert run == Path("/data/out/a/b")
    in_run = [places.run_record(run), places.samples(run), places.contact_sheet(run), places.aligned(run),
              places.cosines(places.aligned(run)), places.outside_band(places.aligned(run)),
              places.scores(run, config), places.fr_folder(config), places.packed_faces(config, "0" * 64)]
    assert all(place.is_relative_to(run) for place in in_run) and len(set(in_run)) == len(in_run)
    elsewhere = [places.contexts_file(config), places.negatives_file(config), places.training_folder(config),
                 places.face_cache(config), places.experiment_folder(config), places.experiment_folder(config, "memorisation"),
                 places.solvers_folder(config), places.verification_file(Path("data/r50.pth"), "ab" * 32, config)]
    assert all(place.is_relative_to("/data/out") for place in elsewhere) and len(set(elsewhere)) == len(elsewhere)
    assert places.alignment_record(places.aligned(run)) == run / "aligned" / "align.json"


def test_the_runs_that_are_compared_are_those_of_the_overlay():
    assert places.run_folders(load("scores.overlay=demo/w0,demo/far")) == [Path("output/demo/w0"), Path("output/demo/far")]
    assert places.run_folders(load("paths.run=one")) == [Path("output/one")]


def test_what_lies_around_runs_may_be_absolute(monkeypatch):
    monkeypatch.chdir("/")
    assert places.around([Path("output/demo/w0"), Path("output/demo/far")]) == Path("output/demo")
    assert places.around([Path("output/demo/w0"), Path("/output/other/far")]) == Path("/output")


def test_contexts_may_be_named_by_a_folder():
    config = load("contexts.name=mine/v1.2")
    assert places.contexts_file(config) == Path("output/contexts/mine/v1.2.npz")
    assert places.negatives_file(config) == Path("output/contexts/mine/v1.2.negatives-far.npz")


def test_a_backbone_of_ours_has_its_verification_beside_it():
    config = load("paths.output=out")
    ours, digest = Path("out/a/fr/b/backbone.safetensors"), "ab" * 32
    assert places.verification_file(ours, digest, config) == Path("out/a/fr/b/verification.json")
    theirs = places.verification_file(Path("data/r50.pth"), digest, config)
    assert theirs == Path("out/verification/r50-abababab/verification.json")
    assert places.verification_file(Path("data/other/r50.pth"), "cd" * 32, config) != theirs


def test_backbones_in_one_folder_of_the_output_do_not_share_a_verification():
    config = resolve({}, {"paths.output": "out"})
    first, second = (places.verification_file(Path(f"out/mine/{name}.pth"), 64 * name, config) for name in "ab")
    assert first == Path("out/verification/a-aaaaaaaa/verification.json") and second != first


def test_the_cache_of_faces_has_a_name_whatever_way_their_folder_is_written():
    for faces in ("data/faces", "data/faces/", "data/other/../faces", "data/faces/."):
        assert places.face_cache(resolve({}, {"paths.output": "out", "training.faces": faces})) == Path("out/faces/faces")


def test_several_folders_of_faces_have_a_cache_of_their_own():
    assert places.face_cache(load("training.faces=data/lfw,~/more/celeba")) == Path("output/faces/lfw+celeba")
    assert places.face_cache(load("training.faces=data/lfw,data/celeba"), ("data/test",)) == Path("output/faces/test")
