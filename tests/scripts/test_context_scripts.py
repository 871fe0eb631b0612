"""Stages 1 and 2 as the user runs them, and what stage 3 says of what they left."""
import errno
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.identities import contexts as identity_contexts
from utils.identities import negatives

REPOSITORY = Path(__file__).parents[2]
STAGE_1, STAGE_2, STAGE_3 = "create_sample_identity_contexts.py", "create_negative_contexts.py", "sample.py"
SMALL = ("contexts.source=uniform", "contexts.number=20", "contexts.dimension=8", "sampling.identities=5")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script in this process: (script, settings...) -> (exit code, stdout, stderr)."""
    def run_script(script, *settings):
        monkeypatch.setattr(sys, "argv", [script, f"paths.output={tmp_path}", *SMALL, *settings])
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()
    return run_script


def refused(result, *words) -> None:
    code, _, stderr = result
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    for word in words:
        assert word in stderr


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def test_stages_1_and_2_write_their_artifacts_and_run_again_without_a_change(run, tmp_path):
    name = "uniform-20x8-seed0"
    folder = tmp_path / "contexts"
    code, stdout, _ = run(STAGE_1)
    assert code == 0 and "20 contexts, 8 wide" in stdout
    ids, contexts = identity_contexts.read(folder / f"{name}.npz")
    assert ids == sorted(ids) and len(ids) == 20
    assert np.array_equal(contexts, identity_contexts.uniform(20, 8, seed=0))
    highest = identity_contexts.crowding(contexts).max()
    assert f"highest {highest:.3f}" in stdout
    assert cv2.imread(str(folder / f"{name}.crowding.png")) is not None
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["config"]["contexts"]["number"] == 20 and "numpy" in record["versions"]
    assert record["digest"] == identity_contexts.digest(ids, contexts)

    for strategy in ("far", "rand", "null", "antipode"):
        assert run(STAGE_2, f"negatives.strategy={strategy}", "negatives.pool=7", "negatives.seed=3")[0] == 0
        file = folder / f"{name}.negatives-{strategy}-pool7-seed3.npz"
        vectors, index, similarity = negatives.select(contexts, strategy, seed=3, pool=7)
        assert np.array_equal(negatives.read(file, ids, 8, record["digest"]), vectors)
        with np.load(file) as arrays:
            assert np.array_equal(arrays["index"], index) and arrays["ids"].tolist() == ids
            assert np.array_equal(arrays["similarity"], similarity, equal_nan=True)
        assert json.loads(file.with_suffix(".json").read_text())["decides"] == {
            "negatives.strategy": strategy, "negatives.pool": 7, "negatives.seed": 3, "contexts": record["digest"]}

    before = snapshot(folder)
    assert "exists" in run(STAGE_1)[1]
    assert "exists" in run(STAGE_2, "negatives.strategy=rand", "negatives.pool=7", "negatives.seed=3")[1]
    assert snapshot(folder) == before

    assert run(STAGE_2, "negatives.strategy=rand", "negatives.pool=7", "negatives.seed=4")[0] == 0  # beside the other
    after = snapshot(folder)
    assert after.keys() - before.keys() == {f"{name}.negatives-rand-pool7-seed4.{suffix}" for suffix in ("npz", "json")}
    assert after.items() >= before.items()


def test_negatives_of_one_name_made_with_other_settings_are_refused(run, tmp_path):
    assert run(STAGE_1)[0] == 0 and run(STAGE_2, "negatives.seed=3")[0] == 0
    for suffix in ("npz", "json"):
        file = tmp_path / "contexts" / f"uniform-20x8-seed0.negatives-far-seed3.{suffix}"
        file.rename(file.with_name(file.name.replace("seed3", "seed4")))
    refused(run(STAGE_2, "negatives.seed=4"), "uniform-20x8-seed0.negatives-far-seed4.npz: was made with negatives.seed = 3, "
            "now it is 4; set contexts.name to another name, or delete that file")


def test_contexts_of_one_name_made_with_other_settings_are_refused(run, tmp_path):
    assert run(STAGE_1, "contexts.name=mine")[0] == 0
    refused(run(STAGE_1, "contexts.name=mine", "contexts.seed=5"), "mine.npz: was made with contexts.seed = 0, now it is 5; "
            "set contexts.name to another name, or delete that file")
    assert run(STAGE_2, "contexts.name=mine")[0] == 0

    # The contexts are made anew: the negatives of the old ones must not pass for theirs.
    (tmp_path / "contexts" / "mine.npz").unlink()
    assert run(STAGE_1, "contexts.name=mine", "contexts.seed=5")[0] == 0
    refused(run(STAGE_2, "contexts.name=mine"), "mine.negatives-far.npz: was made from another content of contexts")


def test_negatives_need_contexts_first(run):
    refused(run(STAGE_2), "uniform-20x8-seed0.npz: no such file", "run create_sample_identity_contexts.py")


def test_unusable_contexts_are_refused_by_stage_2(run, tmp_path):
    contexts = identity_contexts.uniform(20, 8, seed=0)
    contexts[4, 2] = np.nan
    (tmp_path / "contexts").mkdir()
    np.savez(tmp_path / "contexts" / "mine.npz", ids=np.arange(20).astype(str), contexts=contexts)
    refused(run(STAGE_2, "contexts.name=mine"), "mine.npz: the context in row 4 holds NaN")
    assert [file.name for file in (tmp_path / "contexts").iterdir()] == ["mine.npz"]


def test_custom_negatives(run, tmp_path):
    assert run(STAGE_1)[0] == 0
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("identity,negative\n" + "".join(f"{row:06d},{(row + 3) % 20:06d}\n" for row in range(20)))
    settings = ("negatives.strategy=custom", f"negatives.custom_file={pairs}")
    assert run(STAGE_2, *settings)[0] == 0
    file = tmp_path / "contexts" / "uniform-20x8-seed0.negatives-custom-pairs.npz"
    ids, contexts = identity_contexts.read(tmp_path / "contexts" / "uniform-20x8-seed0.npz")
    with np.load(file) as arrays:
        assert np.array_equal(arrays["index"], (np.arange(20) + 3) % 20)
        np.testing.assert_allclose(arrays["similarity"], [contexts[i] @ contexts[(i + 3) % 20] for i in range(20)], atol=1e-6)
    found = negatives.read(file, ids, 8, identity_contexts.digest(ids, contexts))
    assert np.array_equal(found, np.roll(contexts, -3, axis=0))
    pairs.write_text(pairs.read_text().replace("000000,000003", "000000,000004"))
    refused(run(STAGE_2, *settings), "was made from another content of negatives.custom_file than")
    pairs.write_text("000000,000000\n")
    refused(run(STAGE_2, *settings), "pairs.csv:1: '000000' is its own negative")


def test_contexts_extracted_from_faces_by_a_published_recogniser(run, tmp_path):
    torch = pytest.importorskip("torch")
    from models.backbones import MobileFaceNet
    from models.published import load_backbone
    from utils.recognition.embedding import read_unaligned

    torch.manual_seed(0)
    torch.save(MobileFaceNet(num_features=32).state_dict(), tmp_path / "backbone.pth")
    rng = np.random.default_rng(0)
    for name in ("ann/1.png", "ann/2.png", "bob/1.png"):
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "faces" / name), rng.integers(0, 256, (112, 112, 3), dtype=np.uint8))
    code, _, stderr = run(STAGE_1, "contexts.source=extracted", f"contexts.faces={tmp_path / 'faces'}", "device=cpu",
                          f"contexts.recogniser={tmp_path / 'backbone.pth'}", "contexts.per=image")
    assert code == 0, stderr
    ids, contexts = identity_contexts.read(tmp_path / "contexts" / "extracted-faces-backbone-per-image.npz")
    assert ids == ["ann--1", "ann--2", "bob--1"]
    face = read_unaligned(tmp_path / "faces" / "bob" / "1.png")
    face = torch.tensor(face).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        embedding = load_backbone(tmp_path / "backbone.pth").eval()(face)[0]
    assert np.allclose(contexts[2], embedding / embedding.norm(), atol=1e-5)


def test_published_contexts(run, tmp_path):
    np.save(tmp_path / "uiface.npy", np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32) * 3)
    code, _, stderr = run(STAGE_1, "contexts.source=published", f"contexts.file={tmp_path / 'uiface.npy'}")
    assert code == 0, stderr
    ids, contexts = identity_contexts.read(tmp_path / "contexts" / "published-uiface.npz")
    assert contexts.shape == (len(ids), 8) == (6, 8) and np.allclose(np.linalg.norm(contexts, axis=1), 1, atol=1e-6)


def test_contexts_drawn_like_those_of_real_faces(run, tmp_path):
    settings = ("contexts.source=gaussian", "contexts.number=500")
    assert run(STAGE_1, *settings)[0] == 0
    _, contexts = identity_contexts.read(tmp_path / "contexts" / "gaussian-500-seed0.npz")
    mean = np.load(REPOSITORY / "models" / "demo" / "context_statistics.npz")["mean"]
    mean_of_cosines = (np.square(contexts.sum(axis=0)).sum() - 500) / (500 * 499)
    assert mean_of_cosines == pytest.approx(np.square(mean).sum(), abs=0.01)  # real people resemble one another a little
    refused(run(STAGE_1, *settings, "contexts.statistics=none.npz"), "none.npz: no such file (contexts.statistics)")


def test_later_stages_notice_that_statistics_or_custom_negatives_have_changed(run, tmp_path):
    statistics = tmp_path / "statistics.npz"
    np.savez(statistics, mean=np.zeros(8), covariance=np.eye(8))
    settings = ("contexts.source=gaussian", "contexts.number=20", f"contexts.statistics={statistics}")
    assert run(STAGE_1, *settings)[0] == 0
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("".join(f"{row:06d},{(row + 3) % 20:06d}\n" for row in range(20)))
    custom = ("negatives.strategy=custom", f"negatives.custom_file={pairs}", "sampling.identities=2", "model.diffusion=none")
    assert run(STAGE_2, *settings, *custom)[0] == 0
    refused(run(STAGE_3, *settings, *custom), "none: no such folder; get the diffusion model")  # both are as they were

    earlier = pairs.read_text()
    pairs.write_text(earlier.replace("000000,000003", "000000,000004"))
    refused(run(STAGE_3, *settings, *custom), f"{pairs}: has changed since", "run create_negative_contexts.py again")
    assert run(STAGE_2, *settings)[0] == 0  # other negatives of the same contexts
    pairs.write_text(earlier)
    np.savez(statistics, mean=np.ones(8), covariance=np.eye(8))
    for stage in (STAGE_2, STAGE_3):
        refused(run(stage, *settings, *custom), f"{statistics}: has changed since", "run create_sample_identity_contexts.py")
    statistics.unlink()
    refused(run(STAGE_3, *settings, *custom), "none: no such folder; get the diffusion model")


# ---- a full disk -----------------------------------------------------------------------------------------------------

def test_a_disk_that_fills_while_negatives_are_written_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    assert run(STAGE_1)[0] == 0
    before = snapshot(tmp_path / "contexts")
    flush = os.fsync

    def full_for_arrays(descriptor):
        if os.path.isfile(f"/proc/self/fd/{descriptor}") and Path(f"/proc/self/fd/{descriptor}").read_bytes()[:2] == b"PK":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full_for_arrays)
    refused(run(STAGE_2), "No space left on device", "run the same command again")
    after = snapshot(tmp_path / "contexts")
    record = after.pop("uniform-20x8-seed0.negatives-far.json")
    assert after == before and json.loads(record[1])
    monkeypatch.undo()


FULL_DISK = """
mount -t tmpfs -o size=64k none "$1" || exit 77
"$2" create_sample_identity_contexts.py paths.output="$1" contexts.source=uniform contexts.dimension=512 >/dev/null
echo "exit $?"; ls -A "$1/contexts"
mount -o remount,size=16m "$1"
"$2" create_sample_identity_contexts.py paths.output="$1" contexts.source=uniform contexts.dimension=512 >/dev/null
echo "exit $?"; ls -A "$1/contexts"
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a small disk, which takes Linux")
def test_on_a_disk_that_is_full_the_script_says_so_and_continues_when_there_is_space(tmp_path):
    result = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh",
                             str(tmp_path), sys.executable], cwd=REPOSITORY, capture_output=True, text=True)
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip("this machine lets no user mount a small disk")
    full, space = result.stdout.split("exit ")[1:]
    assert full.splitlines()[0] == "2" and ".part" not in full and ".npz" not in full
    assert result.stderr.count("\n") == 1 and "uniform-100x512-seed0.npz: No space left on device" in result.stderr
    assert space.splitlines()[0] == "0" and "uniform-100x512-seed0.npz" in space and ".part" not in space


def test_contexts_are_kept_apart_and_the_record_and_the_name_say_so(run, tmp_path):
    code, stdout, _ = run(STAGE_1, "contexts.highest_cosine=0.5")
    assert code == 0
    file = tmp_path / "contexts" / "uniform-20x8-seed0-apart0.5.npz"
    ids, contexts = identity_contexts.read(file)
    assert np.array_equal(contexts, identity_contexts.uniform(20, 8, 0, highest_cosine=0.5)) and len(ids) == 20
    assert identity_contexts.crowding(contexts).max() <= 0.5 + 1e-7
    assert json.loads(file.with_suffix(".json").read_text())["decides"]["contexts.highest_cosine"] == 0.5
    assert run(STAGE_1)[0] == 0
    plain = tmp_path / "contexts" / "uniform-20x8-seed0.json"
    assert json.loads(plain.read_text())["decides"] == {"contexts.source": "uniform", "contexts.number": 20,
                                                        "contexts.dimension": 8, "contexts.seed": 0}
    refused(run(STAGE_1, "contexts.highest_cosine=-0.5"), "contexts.highest_cosine: -0.5 leaves room for", "contexts.number")
    assert not (tmp_path / "contexts" / "uniform-20x8-seed0-apart-0.5.npz").exists()
