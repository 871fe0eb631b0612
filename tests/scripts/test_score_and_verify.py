"""plot_distributions.py and verify_fr.py on patterns in place of faces, with a small random recogniser."""
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plot_distributions
import verify_fr
from models.backbones import MobileFaceNet
from models.published import backbone_digest
from tests.running import run
from utils.evaluation import all_pairs, face_sets
from utils.evaluation.variety import against_real, halves, within_identity
from utils.evaluation.verification import IJBCMeta, ijb, ten_fold
from utils.faces.aligned import write_kept
from utils.faces.template import TEMPLATES, centre_crop, warp
from utils.recognition import scorer
from utils.recognition.embedding import embed as embedding
from utils.runtime.errors import UserError
from utils.runtime.files import write_bytes, write_json, write_text
from utils.runtime.records import note

PEOPLE, IMAGES = 12, 3


def picture(person: int, number: int, size: int = 112) -> np.ndarray:
    """[size, size, 3] uint8: a pattern of the person's own, a little different in each image."""
    own = np.random.default_rng(person).integers(0, 256, (7, 7, 3))
    other = np.random.default_rng(1000 * person + number).integers(0, 256, (7, 7, 3))
    pattern = (0.7 * own + 0.3 * other).astype(np.uint8)
    return np.asarray(Image.fromarray(pattern).resize((size, size), Image.Resampling.BICUBIC))


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def verification(output: Path) -> dict:
    """What was written of the one backbone that no training made."""
    file, = output.glob("verification/recogniser-*/verification.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """An output folder with a recogniser and one aligned run, `run`: PEOPLE identities x IMAGES."""
    output = tmp_path_factory.mktemp("output")
    torch.manual_seed(0)
    torch.save(MobileFaceNet(num_features=32).state_dict(), output / "recogniser.pth")
    aligned = output / "run" / "aligned"
    kept = {f"p{i:02d}": [aligned / f"p{i:02d}" / f"{k}.png" for k in range(IMAGES)] for i in range(PEOPLE)}
    for i, files in enumerate(kept.values()):
        for k, file in enumerate(files):
            write_bytes(file, png(picture(i, k)))
    write_kept(aligned, kept)
    write_json(aligned / "align.json", {"decides": {"align.template": "arcface_shifted"}})
    write_json(output / "run" / "run.json", {"decides": {}, "config": {
        "guidance": {"w": 0.5, "schedule": "constant"}, "negatives": {"strategy": "far"}}})
    return output


@pytest.fixture(scope="module")
def settings(output) -> list[str]:
    recogniser = output / "recogniser.pth"
    return [f"paths.output={output}", "paths.run=run", "device=cpu", f"scores.recogniser={recogniser}",
            f"verify.backbone={recogniser}"]


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch) -> None:
    monkeypatch.setattr(plot_distributions, "REPLICATES", 50)


@pytest.fixture(scope="module")
def backbone(output) -> MobileFaceNet:
    network = MobileFaceNet(num_features=32)
    network.load_state_dict(torch.load(output / "recogniser.pth", weights_only=True))
    return network.eval()


def embed(backbone: MobileFaceNet, faces: list[np.ndarray]) -> np.ndarray:
    """Embedding and mirror image's, [N, 64], written out."""
    x = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        return torch.cat([backbone(x), backbone(x.flip(3))], dim=1).numpy()


# ---- stage 5 ---------------------------------------------------------------------------------------------------------

def test_scores_of_a_run(output, settings, backbone, capsys):
    run(plot_distributions, *settings)
    folder = output / "run" / "scores" / "recogniser"
    metrics = json.loads((folder / "metrics.json").read_text())
    saved = np.load(folder / "embeddings.npz", allow_pickle=False)
    faces = [picture(i, k) for i in range(PEOPLE) for k in range(IMAGES)]
    expected = embed(backbone, faces)[:, :32]
    assert np.abs(saved["embeddings"] - expected).max() < 1e-4
    assert saved["paths"][5] == "p01/2.png"

    unit = expected.astype(np.float64) / np.linalg.norm(expected, axis=1, keepdims=True)
    cosines, person = unit @ unit.T, np.repeat(np.arange(PEOPLE), IMAGES)
    upper = np.triu(np.ones_like(cosines, dtype=bool), 1)
    genuine = cosines[upper & (person[:, None] == person)]
    impostor = cosines[upper & (person[:, None] != person)]
    assert (metrics["genuine_pairs"], metrics["impostor_pairs"]) == (len(genuine), len(impostor)) == (36, 594)
    fdr = (genuine.mean() - impostor.mean()) ** 2 / (genuine.var() + impostor.var())
    assert metrics["fdr"] == pytest.approx(fdr, rel=1e-4)
    low, high = metrics["intervals"]["fdr"]
    assert low < metrics["fdr"] * 1.2 and high > metrics["fdr"] * 0.8 and low < high
    assert Image.open(folder / "distributions.png").size[0] > 500
    within, _ = within_identity(expected, person)
    assert metrics["vendi_images"] == IMAGES
    for name in ("vendi", "distance"):
        assert metrics[name] == pytest.approx(within[name].mean(), abs=1e-4)
        low, high = metrics["intervals"][name]
        assert low < metrics[name] < high
    assert 1 < metrics["vendi"] < IMAGES and "coverage" not in metrics
    printed = capsys.readouterr().out
    assert f"| {metrics['vendi']:.3f} (" in printed and f") of {IMAGES} |" in printed
    assert f"{metrics['fdr']:.3f}" in printed and "| paper: far | 0.0390 | 0.0780 | 0.1790 |" in printed
    assert "most similar identities" in printed


@pytest.mark.slow
def test_scores_are_kept_until_the_faces_change(output, settings):
    run(plot_distributions, *settings)
    metrics = output / "run" / "scores" / "recogniser" / "metrics.json"
    before, text = metrics.stat().st_mtime_ns, metrics.read_text()
    run(plot_distributions, *settings)
    assert metrics.stat().st_mtime_ns == before
    run(plot_distributions, *settings, "scores.identities=11", "scores.images_per_identity=2")
    smaller = json.loads(metrics.read_text())
    assert (smaller["identities"], smaller["images"]) == (11, 22)
    assert len(np.load(metrics.with_name("bootstrap.npz"))["identities"]) == 11
    run(plot_distributions, *settings, "scores.identities=9")  # too few to resample: no interval of others is left
    assert not metrics.with_name("bootstrap.npz").exists()
    run(plot_distributions, *settings)
    assert json.loads(metrics.read_text())["fdr"] == json.loads(text)["fdr"]


def test_a_run_that_is_not_there_is_named(settings):
    with pytest.raises(UserError, match="nowhere/aligned/kept.csv: no such file .aligned faces.; run align.py$"):
        run(plot_distributions, *settings, "paths.run=nowhere")


def test_what_selected_the_faces_does_not_score_them(output, settings):
    record = output / "run" / "aligned" / "align.json"
    before = record.read_text()
    note(record, selected_by=backbone_digest(output / "recogniser.pth"))
    with pytest.raises(UserError, match="scores.recogniser: has selected the faces of .*aligned .align.band., and what"):
        run(plot_distributions, *settings)
    record.write_text(before)


@pytest.mark.slow
def test_real_faces_beside_a_run(output, settings, backbone, capsys, monkeypatch):
    """Those of a folder that align.py wrote and those of any other folder; their embeddings are made once."""
    pytest.importorskip("prdc")
    real = output / "real"
    faces = {f"q{i:02d}": [picture(100 + i, k) for k in range(2)] for i in range(30)}
    for name, images in faces.items():
        for k, image in enumerate(images):
            write_bytes(real / name / f"{k}.png", png(image))
    with pytest.raises(UserError, match="real: its faces lie on the template arcface, those to compare with on arcface_shifted"):
        run(plot_distributions, *settings, f"scores.real={real}")
    record = output / "run" / "aligned" / "align.json"
    shifted = record.read_text()
    write_json(record, {"decides": {"align.template": "arcface"}})
    run(plot_distributions, *settings, f"scores.real={real}")
    printed, folder = capsys.readouterr().out, output / "run" / "scores" / "recogniser"
    metrics = json.loads((folder / "metrics.json").read_text())
    own = embed(backbone, [picture(i, k) for i in range(PEOPLE) for k in range(IMAGES)])[:, :32]
    others = embed(backbone, [image for images in faces.values() for image in images])[:, :32]
    expected, _ = against_real(own, np.repeat(np.arange(PEOPLE), IMAGES), halves(others, np.repeat(list(faces), 2)))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert metrics["real_faces"] == 30 and 0 < metrics["frechet"] > metrics["real_frechet"]
    assert "| real faces against others, 30 each |" in printed
    assert f" | {metrics['recall']:.3f} | {metrics['frechet']:.3f} |" in printed

    write_kept(real, {name: [real / name / "0.png"] for name in faces})  # now as if align.py had made it
    write_json(real / "align.json", {"decides": {"align.template": "arcface"}})
    calls = []
    monkeypatch.setattr(scorer, "embed", lambda backbone, faces, *rest: calls.append(len(faces)) or np.eye(
        len(faces), 32, dtype=np.float32) + 0.1)
    run(plot_distributions, *settings, f"scores.real={real}")
    assert calls == [30]  # the run's own are kept
    again = json.loads((folder / "metrics.json").read_text())
    assert again["real_faces"] == 15 and again["vendi"] == metrics["vendi"]
    record.write_text(shifted)


def test_an_overlay_of_two_runs(output, settings):
    for name in ("aligned", "run.json"):
        if not (output / "other" / name).exists():
            (output / "other").mkdir(exist_ok=True)
            (output / "other" / name).symlink_to(output / "run" / name)
    run(plot_distributions, *settings, "scores.overlay=run,other")
    folder = output / "scores" / "recogniser"
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[4].endswith(" 1.00 (1.00 to 1.00) |") and lines[5].endswith(" 1.00 |")  # the same faces
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| run", "| paper: far", "| other", "| paper: far"]
    rows = (folder / "variety.md").read_text().splitlines()
    assert rows[2].startswith("| run | ") and rows[3] == rows[2].replace("| run |", "| other |")
    assert Image.open(folder / "distributions.png").size[0] > 500
    panels = np.asarray(Image.open(folder / "faces.png").convert("RGB"))
    left, right = np.array_split(panels[panels.shape[0] // 4 :], 2, axis=1)
    assert left.std() > 20 and abs(left.mean() - right.mean()) < 3


@pytest.mark.parametrize("override, words", [
    ("scores.recogniser=", ["scores.recogniser"]), ("scores.recogniser=nowhere.pth", ["nowhere.pth"]),
    ("paths.run=nowhere", ["nowhere", "align.py"])])
def test_scoring_names_what_is_missing(settings, override, words):
    with pytest.raises(UserError) as caught:
        run(plot_distributions, *settings, override)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "[]", '{"format": 2, "decides": {}}', '{"decides'],
                         ids=["none", "list", "empty", "truncated"])
def test_a_run_whose_alignment_has_no_record_is_refused_in_one_line(settings, lfw, tmp_path, text):
    (tmp_path / "run" / "aligned").mkdir(parents=True)
    (tmp_path / "run" / "aligned" / "kept.csv").write_text("identity,image\na,0.png\na,1.png\n")
    if text is not None:
        (tmp_path / "run" / "aligned" / "align.json").write_text(text)
    for script, more in ((plot_distributions, []), (verify_fr, [*lfw, f"verify.lfw_faces={tmp_path / 'run' / 'aligned'}"])):
        with pytest.raises(UserError, match="run/aligned/align.json: ") as caught:
            run(script, *settings, f"paths.output={tmp_path}", *more)
        assert "\n" not in str(caught.value)


# ---- stage 7 ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lfw(output) -> list[str]:
    """20 pairs in LFW's layout; one image of them was not detected and must be cropped from the original."""
    pairs, aligned, images = ["10\t1"], output / "lfw" / "aligned", output / "lfw" / "images"
    for fold in range(10):
        pairs += [f"P{fold}\t1\t2", f"P{fold}\t1\tP{(fold + 1) % 10}\t2"]
        for k in (1, 2):
            name = f"P{fold}/P{fold}_{k:04d}"
            write_bytes(images / f"{name}.jpg", png(picture(fold, k, 250)))
            if (fold, k) != (3, 2):
                write_bytes(aligned / f"{name}.png", png(picture(fold, k)))
    write_text(output / "lfw" / "pairs.txt", "\n".join(pairs) + "\n")
    write_json(aligned / "align.json", {"format": 2, "decides": {"align.template": "arcface", "align.images": str(images)}})
    return [f"verify.lfw_pairs={output / 'lfw' / 'pairs.txt'}", f"verify.lfw_faces={aligned}"]


def test_lfw_counts_every_pair_and_crops_what_was_not_detected(output, settings, lfw, backbone, capsys):
    run(verify_fr, *settings, *lfw)
    result = verification(output)
    assert result["counts"]["LFW"] == {"pairs": 20, "centre crops": 1}

    def face(fold: int, k: int) -> np.ndarray:
        if (fold, k) == (3, 2):
            return centre_crop(picture(3, 2, 250), TEMPLATES["arcface"])
        return picture(fold, k)

    first, second, same = [], [], []
    for fold in range(10):
        first += [face(fold, 1)] * 2
        second += [face(fold, 2), face((fold + 1) % 10, 2)]
        same += [True, False]
    sides = [embed(backbone, faces) for faces in (first, second)]
    mean, std = ten_fold(*(side[:, :32] + side[:, 32:] for side in sides), same)
    assert result["per_cent"]["LFW"] == pytest.approx(100 * mean) and mean > 0.6
    assert result["standard_deviation"]["LFW"] == pytest.approx(100 * std)
    assert "| paper: NegFaceDiff (CASIA) | 98.98 |" in capsys.readouterr().out


def test_lfw_without_the_original_of_an_undetected_image(output, settings, lfw):
    original = output / "lfw" / "images" / "P3" / "P3_0002.jpg"
    moved = original.rename(output / "moved.jpg")
    try:
        with pytest.raises(UserError, match="P3_0002.png: there is no such aligned face, and no image of it in .*lfw/images"):
            run(verify_fr, *settings, *lfw)
    finally:
        moved.rename(original)


def test_shifted_faces_of_lfw_are_moved_back_for_a_network_that_must_have_them_so(output, settings, lfw, monkeypatch):
    """Faces that lie 8 px further left, as recorded, give the same result as unshifted ones, but for the border."""
    network = MobileFaceNet(num_features=32, width=96).eval()
    monkeypatch.setattr(verify_fr, "load_backbone", lambda file: network)
    run(verify_fr, *settings, *lfw)
    unshifted = verification(output)["per_cent"]["LFW"]
    shifted = output / "lfw shifted" / "aligned"
    for file in (output / "lfw" / "aligned").glob("*/*.png"):
        write_bytes(shifted / file.parent.name / file.name, png(np.roll(np.asarray(Image.open(file)), -8, axis=1)))
    record = json.loads((output / "lfw" / "aligned" / "align.json").read_text())
    record["decides"]["align.template"] = "arcface_shifted"
    write_json(shifted / "align.json", record)
    seen = {}
    ten_folds = verify_fr.ten_fold
    monkeypatch.setattr(verify_fr, "ten_fold", lambda first, second, same, *source: seen.update(first=first) or ten_folds(
        first, second, same))
    run(verify_fr, *settings, *lfw, f"verify.lfw_faces={shifted}")
    assert verification(output)["per_cent"]["LFW"] == pytest.approx(unshifted)
    expected = [embed(network, [picture(fold, 1)]) for fold in range(10)]
    np.testing.assert_allclose(seen["first"][::2], [both[0, :32] + both[0, 32:] for both in expected], rtol=0, atol=1e-4)


def test_several_pair_lists_and_all_pairs(output, settings, lfw, backbone, capsys, monkeypatch):
    """Two lists beside each other, all pairs of a whole folder and of chosen people, from one embedding of each image."""
    monkeypatch.setattr(all_pairs, "FEWEST", 1)
    folder, pairs = output / "lfw" / "aligned", output / "lfw" / "pairs.txt"
    second = output / "other" / "celeba_pairs.txt"
    lines = pairs.read_text().splitlines()
    write_text(second, "\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    write_text(output / "people.txt", "\n".join(f"P{k}" for k in range(3, 8)) + "\n")
    write_text(folder / "failures.csv", "identity,image,reason\nP3,P3_0002.jpg,no face found\nP3,notes.txt,is no image\n")
    counts = []
    monkeypatch.setattr(verify_fr, "embed", lambda backbone, faces, **rest: counts.append(len(faces)) or embedding(
        backbone, faces, **rest))
    run(verify_fr, *settings, f"verify.lfw_pairs={pairs},{second}", f"verify.lfw_faces={folder}",
        f"verify.all_pairs={folder},{folder}", f"verify.people={output / 'people.txt'}")
    result, printed = verification(output), capsys.readouterr().out
    assert counts == [20]
    assert list(result["per_cent"]) == ["LFW", "celeba"]
    assert result["counts"] == {name: {"pairs": 20, "centre crops": 1} for name in ("LFW", "celeba")}
    header, ours, paper, *_ = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert header[-1] == "celeba |" and ours[-1] == f"{result['per_cent']['celeba']:.2f} |" and paper[1] == "98.00"

    both = embed(backbone, [centre_crop(picture(3, 2, 250), TEMPLATES["arcface"]) if (fold, k) == (3, 2) else picture(fold, k)
                            for fold in range(10) for k in (1, 2)])
    sums, person = both[:, :32] + both[:, 32:], np.arange(10).repeat(2)
    for name, chosen in ((str(folder), person >= 0), (f"{folder} ({output / 'people.txt'})", (person >= 3) & (person < 8))):
        expected = all_pairs.tar_at_far(sums[chosen], person[chosen])
        found = result["all_pairs"][name]
        assert found["images"] == chosen.sum() and found["centre crops"] == 1
        assert found["impostor_pairs"] == expected.impostor_pairs
        assert found["per_cent"] == ({"TAR@1e-2": pytest.approx(100 * expected.tar[0.01])} if chosen.all() else {})
        assert f"| {name} | {chosen.sum()} |" in printed

    # the first images of each person alone; of one image there are no genuine pairs
    run(verify_fr, *settings, f"verify.all_pairs={folder}", "verify.images_per_identity=2")
    assert verification(output)["all_pairs"][str(folder)]["per_cent"] == result["all_pairs"][str(folder)]["per_cent"]
    with pytest.raises(UserError, match="no genuine pair"):
        run(verify_fr, *settings, f"verify.all_pairs={folder}", "verify.images_per_identity=1")
    (folder / "failures.csv").unlink()

    # of a run's own samples the images are in the run
    own = output / "own" / "aligned"
    for file in folder.glob("*/*.png"):
        write_bytes(own / file.parent.name / file.name, file.read_bytes())
    write_bytes(output / "own" / "samples" / "P3" / "P3_0002.png", png(picture(3, 2, 250)))
    write_text(own / "failures.csv", "identity,image,reason\nP3,P3_0002.png,no face found\n")
    write_json(own / "align.json", {"format": 2, "decides": {"align.template": "arcface", "align.images": ""}})
    run(verify_fr, *settings, f"verify.all_pairs={own}")
    assert verification(output)["all_pairs"][str(own)]["per_cent"] == result["all_pairs"][str(folder)]["per_cent"]


def test_images_of_one_name_are_refused_and_a_suffix_may_be_in_capitals(tmp_path):
    write_bytes(tmp_path / "p" / "1.JPG", png(picture(0, 0)))
    assert face_sets.face_sets([str(tmp_path)], [])[0].faces == {"p": ["p/1"]}
    for name in ("2", "3"):
        write_bytes(tmp_path / "q" / f"{name}.png", png(picture(1, 0)))
    for most, taken in ((0, ["q/2", "q/3"]), (1, ["q/2"]), (2, ["q/2", "q/3"])):
        assert face_sets.face_sets([str(tmp_path)], [], most)[0].faces == {"p": ["p/1"], "q": taken}
    assert face_sets.image_file(tmp_path, "p/1") == tmp_path / "p" / "1.JPG"
    write_bytes(tmp_path / "p" / "1.png", png(picture(0, 1)))
    with pytest.raises(UserError, match="1.png: another image is called p/1 too; rename one of them"):
        face_sets.face_sets([str(tmp_path)], [])


@pytest.mark.parametrize("overrides, words", [
    (["verify.lfw_pairs={lfw}/pairs.txt,{lfw}/pairs.txt", "verify.lfw_faces={lfw}/aligned,{lfw}/aligned,{lfw}/aligned"],
     "verify.lfw_faces: 3 folders for the pair lists"),
    (["verify.all_pairs={lfw}/aligned", "verify.people=a,b"], "verify.people: 2 lists for 1 folders"),
    (["verify.all_pairs={lfw}/aligned", "verify.people={lfw}/people.txt"], "people.txt:1: 'P33' is not there to be chosen"),
    (["verify.all_pairs=nowhere"], "nowhere: no such folder"),
    (["verify.lfw_pairs={lfw}/pairs.txt", "verify.lfw_faces={lfw}/aligned", "verify.bins={lfw}"],
     "verify.lfw_pairs: LFW is in verify.bins too")])
def test_folders_and_lists_that_do_not_fit_are_refused(output, settings, lfw, overrides, words):
    write_text(output / "lfw" / "people.txt", "P33\n")
    write_bytes(output / "lfw" / "lfw.bin", b"")
    with pytest.raises(UserError) as caught:
        run(verify_fr, *settings, *(override.format(lfw=output / "lfw") for override in overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_bins_and_ijbc(output, settings, backbone):
    bins, ijbc = output / "bins", output / "ijbc"
    same = [True, False] * 5
    images = [image for pair in range(10) for image in (picture(pair, 0), picture(pair if same[pair] else pair + 50, 1))]
    for stem in ("lfw", "cfp_fp"):
        write_bytes(bins / f"{stem}.bin", pickle.dumps(([png(image) for image in images], same)))

    rng = np.random.default_rng(0)
    points = TEMPLATES["arcface"] * 1.5 + rng.normal(0, 2, (8, 5, 2))
    crops = [picture(k // 2, k, 180) for k in range(8)]
    for k, crop in enumerate(crops):
        write_bytes(ijbc / "loose_crop" / f"{k}.jpg", png(crop))
    template, media, faceness = np.arange(8) // 2, np.arange(8), rng.uniform(0.5, 1, 8).round(3)
    pairs = [(a, b, int(a // 2 == b // 2)) for a in range(4) for b in range(a + 1, 4)]
    folder = ijbc / "meta"
    write_text(folder / "ijbc_face_tid_mid.txt",
                    "".join(f"{k}.jpg {template[k]} {media[k]}\n" for k in range(8)))
    write_text(folder / "ijbc_name_5pts_score.txt", "".join(
        f"{k}.jpg {' '.join(map(str, points[k].astype(np.float32).ravel()))} {faceness[k]}\n" for k in range(8)))
    write_text(folder / "ijbc_template_pair_label.txt", "".join("{} {} {}\n".format(*pair) for pair in pairs))

    run(verify_fr, *settings, f"verify.bins={bins}", f"verify.ijbc={ijbc}")
    result = verification(output)["per_cent"]
    both = embed(backbone, images)
    sums = both[:, :32] + both[:, 32:]
    assert result["LFW"] == result["CFP-FP"] == pytest.approx(100 * ten_fold(sums[0::2], sums[1::2], same)[0])
    aligned = [warp(crop, landmarks, TEMPLATES["arcface"]) for crop, landmarks in zip(crops, points, strict=True)]
    p1, p2, label = np.array(pairs).T
    meta = IJBCMeta(None, None, faceness, template, media, p1, p2, label)
    _, tar = ijb(embed(backbone, aligned), meta, [1e-5, 1e-4])
    assert [result["IJB-C TAR@1e-5"], result["IJB-C TAR@1e-4"]] == pytest.approx((100 * tar).tolist())


@pytest.mark.parametrize("overrides, words", [
    ([], ["verify", "no benchmark"]), (["verify.bins=nowhere"], ["nowhere", "lfw.bin"]),
    (["verify.lfw_pairs=nowhere.txt"], ["nowhere.txt"]), (["verify.ijbc=nowhere"], ["ijbc_face_tid_mid.txt"]),
    (["verify.backbone=nowhere.pth", "verify.bins=x"], ["nowhere.pth"])])
def test_verification_names_what_is_missing(settings, overrides, words):
    with pytest.raises(UserError) as caught:
        run(verify_fr, *settings, *overrides)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
