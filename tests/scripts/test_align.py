"""align.py on drawn faces, and on some of LFW where it is at hand."""
import csv
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import align
from models import published
from tests.drawn_face import draw_face, landmarks_at
from utils.faces.aligned import read_aligned, read_kept
from utils.faces.template import ARCFACE, TEMPLATES, similarity_transform
from utils.identities import contexts as identity_contexts
from utils.runtime.errors import UserError
from utils.runtime.files import read_json

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SHARED_DIR", ROOT / ".." / "shared"))
LFW = SHARED / "data" / "lfw" / "lfw-deepfunneled.tar"


def save(file: Path, image: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)


@pytest.fixture
def images(tmp_path) -> Path:
    """Three identities: `Ann` with three faces, `Bé  b` with two and three failures, `Cy` with one face."""
    folder = tmp_path / "my images"
    for k, size in enumerate((250, 64, 128)):
        save(folder / "Ann" / f"{k}.png", draw_face(size))
    save(folder / "Bé  b" / "first é.jpg", draw_face(250))
    save(folder / "Bé  b" / "second.png", draw_face(300))
    save(folder / "Bé  b" / "noise.png", np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    (folder / "Bé  b" / "torn.png").write_bytes((folder / "Bé  b" / "second.png").read_bytes()[:2000])
    (folder / "Bé  b" / "text.jpg").write_text("no image")
    save(folder / "Cy" / "0.png", draw_face(250))
    return folder


@pytest.fixture
def run(images, monkeypatch, capsys):
    """Run align.py's main with settings; returns the run's folder of aligned faces and what was printed."""
    def run_with(*settings: str) -> tuple[Path, str]:
        monkeypatch.setattr(sys, "argv", ["align.py", "device=cpu", f"paths.output={images.parent / 'out'}",
                                          "paths.run=test", f"align.images={images}", "align.processes=1",
                                          "align.keep_images=2", *settings])
        align.main()
        return images.parent / "out" / "test" / "aligned", capsys.readouterr().out
    return run_with


def failures(aligned: Path) -> dict[tuple[str, str], str]:
    with open(aligned / "failures.csv", encoding="utf-8", newline="") as file:
        return {(row["identity"], row["image"]): row["reason"] for row in csv.DictReader(file)}


def faces(aligned: Path) -> dict[str, bytes]:
    return {str(file.relative_to(aligned)): file.read_bytes() for file in aligned.glob("*/*.png")}


@pytest.mark.parametrize("template", TEMPLATES)
def test_faces_lie_on_the_template(run, images, template):
    aligned, _ = run(f"align.template={template}")
    for size, k in ((250, 0), (64, 1), (128, 2)):
        face = read_aligned(aligned / "Ann" / f"{k}.png").astype(float)
        assert face.shape == (112, 112, 3)
        shape = similarity_transform(landmarks_at(size), ARCFACE)
        eyes = landmarks_at(size)[:2] @ shape[:, :2].T + shape[:, 2] + (TEMPLATES[template] - ARCFACE)[:2]
        for x, y in eyes:  # the pupil is the darkest place around
            x, y = round(x), round(y)
            around = face[y - 6:y + 7, x - 6:x + 7].sum(axis=2)
            dark = np.argwhere(around < around.min() + 60).mean(axis=0) - 6
            assert np.abs(dark).max() < 3.5


def test_failures_are_listed_with_their_reasons_and_the_selection_is_kept(run):
    aligned, printed = run()
    reasons = failures(aligned)
    assert list(reasons) == [("Bé  b", "noise.png"), ("Bé  b", "text.jpg"), ("Bé  b", "torn.png")]
    assert reasons["Bé  b", "noise.png"] == "no face found"
    assert all(reasons["Bé  b", name].startswith("is not a readable image") for name in ("text.jpg", "torn.png"))
    assert sorted(faces(aligned)) == ["Ann/0.png", "Ann/1.png", "Ann/2.png", "Bé  b/first é.png", "Bé  b/second.png",
                                      "Cy/0.png"]
    assert read_kept(aligned) == {"Ann": [aligned / "Ann" / "0.png", aligned / "Ann" / "1.png"],
                                  "Bé  b": [aligned / "Bé  b" / "first é.png", aligned / "Bé  b" / "second.png"]}
    assert "6 of 9 faces aligned (66.67%), 3 failed" in printed
    assert "2 of 3 identities have 2 or more faces, 2 of them are kept" in printed


def test_running_again_leaves_done_and_failed_images_alone_and_selects_anew(run, images, monkeypatch):
    aligned, _ = run()
    before = {file: file.stat().st_mtime_ns for file in aligned.glob("*/*.png")}
    assert len(before) == 6
    tried = []
    monkeypatch.setattr(align.FaceBatches, "__getitem__", lambda work, number: tried.append(work.batches[number]))
    run("align.keep_images=3", "align.keep_identities=1")
    assert not tried and {file: file.stat().st_mtime_ns for file in aligned.glob("*/*.png")} == before
    assert {name: len(files) for name, files in read_kept(aligned).items()} == {"Ann": 3}
    monkeypatch.undo()
    assert len(failures(aligned)) == 3


def test_a_list_of_failures_that_the_faces_contradict_is_not_believed(run):
    aligned, _ = run()
    before, failed = {file: file.read_bytes() for file in aligned.glob("*/*.png")}, failures(aligned)
    (aligned / "failures.csv").write_text("identity,image,reason\nAnn,0.png,no face found\n", encoding="utf-8")
    _, printed = run()
    assert "4 of this process's 9 images are left to align" in printed and failures(aligned) == failed
    assert {file: file.read_bytes() for file in aligned.glob("*/*.png")} == before


def test_a_list_of_kept_faces_that_was_cut_is_refused_until_it_is_written_again(run):
    aligned, _ = run()
    kept, whole = aligned / "kept.csv", read_kept(aligned)
    kept.write_text("".join(kept.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="kept.csv: is not the list that align.py wrote; run align.py again"):
        read_kept(aligned)
    run()
    assert read_kept(aligned) == whole


@pytest.mark.slow
def test_two_ranks_leave_the_same_bytes(run, images, monkeypatch):
    monkeypatch.setattr(align, "BATCH", 2)
    aligned, _ = run()
    output = images.parent / "out"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.tiny_align",
                    "device=cpu", f"paths.output={output}", "paths.run=ranks", f"align.images={images}", "align.processes=1",
                    "align.keep_images=2"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
                   timeout=240)
    ranks = output / "ranks" / "aligned"
    assert len(faces(aligned)) == 6 and faces(ranks) == faces(aligned)
    for name in ("failures", "sources", "kept"):
        assert (ranks / f"{name}.csv").read_text() == (aligned / f"{name}.csv").read_text()


def test_half_a_face_is_made_again_and_new_images_are_added(run, images):
    aligned, _ = run()
    whole = faces(aligned)
    (aligned / "Ann" / "1.png").write_bytes(whole["Ann/1.png"][:-20])
    run()
    assert faces(aligned) == whole
    save(images / "Cy" / "1.png", draw_face(250))
    run()
    assert faces(aligned).keys() - whole.keys() == {"Cy/1.png"} and faces(aligned).items() >= whole.items()


def test_a_photo_that_was_replaced_is_aligned_anew_whatever_its_size_and_time(run, images):
    aligned, _ = run()
    before, photo = faces(aligned), images / "Ann" / "0.png"
    status, other = photo.stat(), images / "Bé  b" / "second.png"
    save(photo, draw_face(250, skin=(120, 90, 70)))
    os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    other_bytes = other.read_bytes()
    other.write_text("torn")  # a photo that was good
    (images / "Bé  b" / "torn.png").write_bytes(other_bytes)  # and one that was not
    run()
    after = faces(aligned)
    assert after["Ann/0.png"] != before["Ann/0.png"] and after["Ann/1.png"] == before["Ann/1.png"]
    assert "Bé  b/second.png" not in after and after["Bé  b/torn.png"] == before["Bé  b/second.png"]
    assert ("Bé  b", "second.png") in failures(aligned) and ("Bé  b", "torn.png") not in failures(aligned)


def test_the_face_of_a_photo_that_is_gone_goes_too(run, images):
    aligned, _ = run()
    (images / "Ann" / "1.png").unlink()
    (images / "Bé  b" / "noise.png").unlink()
    run()
    assert "Ann/1.png" not in faces(aligned) and ("Bé  b", "noise.png") not in failures(aligned)
    assert [file.name for file in read_kept(aligned)["Ann"]] == ["0.png", "2.png"]


def test_what_is_no_image_is_counted_and_listed(run, images):
    (images / "Ann" / "notes.txt").write_text("x")
    (images / "Ann" / ".hidden").write_text("x")
    (images / "Cy" / "new.heic").write_bytes(b"ftypheic")
    (images / "loose.png").write_bytes(b"")
    aligned, printed = run()
    assert failures(aligned)["Ann", "notes.txt"] == "is no image by its name" and ("Ann", ".hidden") not in failures(aligned)
    assert failures(aligned)["Cy", "new.heic"].startswith("is not a readable image")
    assert "6 of 10 faces aligned (60.00%), 4 failed" in printed and "1 other files are no images by their names" in printed
    assert f"1 images lie in no identity folder, {images / 'loose.png'} for one; they were left out" in printed


def test_a_name_that_is_not_utf_8_goes_all_the_way(run, images):
    name = os.fsdecode(b"caf\xe9")
    save(images / "Dee" / f"{name}.png", draw_face(250))
    (images / "Dee" / f"{name}2.jpg").write_bytes(b"x")
    aligned, _ = run("align.keep_images=1")
    assert [file.name for file in read_kept(aligned)["Dee"]] == [f"{name}.png"]
    run("align.keep_images=1")
    assert (aligned / "Dee" / f"{name}.png").is_file()


def test_faces_without_their_record_are_not_taken_for_ours(run):
    aligned, _ = run()
    (aligned / "align.json").unlink()
    with pytest.raises(UserError, match="aligned: has no record of how it was made .*set paths.run to another name"):
        run("align.template=arcface_shifted")


def test_a_folder_made_with_other_settings_is_refused(run):
    aligned, _ = run()
    for setting in ("align.template=arcface_shifted", "align.minimum_face=40"):
        with pytest.raises(UserError, match=f"made with {setting.split('=')[0]} = .*paths.run"):
            run(setting)
    assert len(faces(aligned)) == 6


def test_two_images_that_would_be_one_face_are_refused(run, images):
    save(images / "Ann" / "0.jpg", draw_face(64))
    with pytest.raises(UserError, match="0.png: would be aligned to the same file as 0.jpg"):
        run()


def test_a_run_without_samples_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["align.py", "device=cpu", f"paths.output={tmp_path}", "paths.run=none"])
    with pytest.raises(UserError, match=r"none/samples: no such folder"):
        align.main()


# ---- the band ---------------------------------------------------------------------------------------------------------

class Colours(torch.nn.Module):
    """A recogniser of the mean colour, against grey: an embedding [B, 3]."""

    seen: list[int] = []

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(faces))
        return faces.mean(dim=(2, 3)) + torch.tensor([0.3, 0.1, 0.2])


@pytest.fixture
def banded(run, images, monkeypatch):
    """`run` with contexts of the three identities, 3 wide, and Colours as their recogniser."""
    monkeypatch.setattr(published, "load_backbone", lambda file: Colours())
    monkeypatch.setattr(Colours, "seen", [])
    for name in ("contexts", "scores"):
        (images.parent / f"{name}.pt").write_bytes(name.encode())
    identity_contexts.write(images.parent / "out" / "contexts" / "mine.npz", ["Ann", "Bé  b", "Cy"],
                            identity_contexts.normalise(np.array([[1.0, 1, 1], [1, 0, -1], [1, 2, 2]])))
    return partial(run, "contexts.name=mine", f"contexts.recogniser={images.parent / 'contexts.pt'}",
                   f"scores.recogniser={images.parent / 'scores.pt'}", "align.keep_images=1")


def cosines_by_hand(aligned: Path) -> dict[str, float]:
    contexts = dict(zip(*identity_contexts.read(aligned.parents[1] / "contexts" / "mine.npz"), strict=True))
    found = {}
    for name in faces(aligned):
        v = contexts[name.partition("/")[0]].astype(np.float64)
        n = (np.asarray(Image.open(aligned / name)) / 127.5 - 1).mean(axis=(0, 1)) + [0.3, 0.1, 0.2]
        found[name] = v.dot(n) / v.dot(v) ** 0.5 / n.dot(n) ** 0.5
    return found


def listed(aligned: Path) -> dict[str, str]:
    with open(aligned / "outside_band.csv", encoding="utf-8", newline="") as file:
        return {f"{row['identity']}/{row['image']}": row["reason"] for row in csv.DictReader(file)}


def selection(aligned: Path) -> tuple:
    """The band by which the faces were selected, and its recogniser, by their record."""
    record = read_json(aligned / "align.json")
    return record["config"]["align"]["band"], record["selected_by"]


def test_faces_outside_the_band_are_listed_and_not_kept(banded):
    aligned, _ = banded()
    everyone, cosines = read_kept(aligned), cosines_by_hand(aligned)
    assert not (aligned / "outside_band.csv").exists() and not Colours.seen
    low, *_, high = sorted(cosines.values())
    middle = sorted(cosines.values())[len(cosines) // 2]
    lowest, highest = (low + middle) / 2, high - 1e-5
    aligned, printed = banded(f"align.band={lowest},{highest}")
    outside = listed(aligned)
    expected = {name: f"cosine {cosine:.4f} is " + (f"above {highest:g}" if cosine > highest else f"below {lowest:g}")
                for name, cosine in cosines.items() if not lowest <= cosine <= highest}
    assert outside == expected and len({reason.split()[3] for reason in outside.values()} & {"above"}) == 1
    assert 2 <= len(outside) < len(cosines)
    kept = {f"{identity}/{face.name}" for identity, files in read_kept(aligned).items() for face in files}
    for identity in everyone:  # the first that lies in the band
        inside = [name for name in sorted(cosines) if name.startswith(f"{identity}/") and name not in outside]
        assert {name for name in kept if name.startswith(f"{identity}/")} == set(inside[:1])
    assert faces(aligned).keys() == cosines.keys()  # none is removed
    above = sum("above" in reason for reason in outside.values())
    assert f"{len(outside)} of 6 faces lie outside the band, {len(outside) - above} below and {above} above" in printed
    inside = 6 - len(outside)
    assert f"{inside} of the first 9 images lie in the band ({inside / 9:.1%}); sample about {-(-9 // inside)} of each" in printed
    assert "6 of 9 faces aligned (66.67%), 3 failed" in printed


def test_another_band_takes_no_embedding_and_none_leaves_no_list(banded, images):
    aligned, _ = banded("align.band=-1,1")
    assert listed(aligned) == {} and sum(Colours.seen) == 6
    assert selection(aligned) == ([-1, 1], published.backbone_digest(images.parent / "contexts.pt"))
    kept = read_kept(aligned)
    banded("align.band=0.99999,1")
    assert len(listed(aligned)) > 0 and sum(Colours.seen) == 6
    banded()
    assert not (aligned / "outside_band.csv").exists() and read_kept(aligned) == kept
    assert selection(aligned) == ([], None)
    save(images / "Cy" / "1.png", draw_face(250, skin=(120, 90, 70)))
    banded("align.band=-1,1")
    assert sum(Colours.seen) == 6 + 7


def test_what_the_band_cannot_be_told_by_is_said_before_anything_is_aligned(banded, images, monkeypatch):
    def refused(words: str, *settings: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            banded("align.band=0.2,0.8", *settings)
        assert "\n" not in str(caught.value) and not (images.parent / "out" / "test").exists()

    refused("nowhere.ckpt: .*contexts.recogniser.*is not included", "contexts.recogniser=nowhere.ckpt")
    refused("scores.recogniser: is contexts.recogniser too", f"scores.recogniser={images.parent / 'contexts.pt'}")
    refused("theirs.npz: no such file", "contexts.name=theirs")
    record = images.parent / "out" / "contexts" / "mine.json"
    record.write_text('{"decides": {"contexts.recogniser": "0"}}')
    refused("contexts.pt is another recogniser than that of which .*mine.npz are the contexts")
    record.write_text(f'{{"decides": {{"contexts.recogniser": "{published.backbone_digest(images.parent / "contexts.pt")}"}}}}')
    save(images / "Dee" / "0.png", draw_face(64))
    refused("align.band: 'Dee' is no identity of .*mine.npz")


def test_a_recogniser_of_another_width_is_refused(banded, monkeypatch):
    monkeypatch.setattr(Colours, "forward", lambda self, faces: faces.mean(dim=(1, 2, 3))[:, None].repeat(1, 5))
    with pytest.raises(UserError, match="contexts.recogniser: its embeddings are 5 wide, the contexts are 3; "):
        banded("align.band=0.2,0.8")


def test_the_contexts_must_be_those_of_the_run(banded, images, monkeypatch):
    run_folder = images.parent / "out" / "test"
    (run_folder / "samples").parent.mkdir(parents=True)
    (images).rename(run_folder / "samples")
    (run_folder / "run.json").write_text('{"decides": {"contexts": "others"}}')
    with pytest.raises(UserError, match="mine.npz: holds other contexts than those of .*test; give the settings `contexts`"):
        banded("align.band=0.2,0.8", "align.images=")


@pytest.mark.slow
def test_killed_and_continued_and_split_in_processes_the_faces_are_the_same(run, images, monkeypatch):
    for k in range(40):
        save(images / "Di" / f"{k:02}.png", draw_face(230 + k))
    monkeypatch.setattr(align, "BATCH", 4)
    aligned, _ = run()
    reference, reasons = faces(aligned), failures(aligned)
    assert len(reference) == 46

    command = [sys.executable, "-c", "import align; align.BATCH = 4; align.main()", "device=cpu", "paths.run=killed",
               f"paths.output={images.parent / 'out'}", f"align.images={images}", "align.processes=2", "align.keep_images=2"]
    killed = images.parent / "out" / "killed" / "aligned"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(faces(killed)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = faces(killed)
    assert 3 <= len(done) < 46 and done.items() <= reference.items()

    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert faces(killed) == reference and failures(killed) == reasons
    assert not list(killed.glob("failures.rank*"))


@pytest.mark.skipif(not LFW.is_file(), reason="LFW is not at hand: put it into SHARED_DIR/data/lfw")
def test_faces_of_lfw(run, images):
    with tarfile.open(LFW) as archive:
        members = [member for member, _ in zip(archive, range(40), strict=False) if member.name.endswith(".jpg")][:24]
        archive.extractall(images.parent / "lfw", members, filter="data")
    aligned, printed = run(f"align.images={images.parent / 'lfw' / 'lfw-deepfunneled'}")
    assert f"{len(members)} of {len(members)} faces aligned (100.00%)" in printed and len(members) >= 12
