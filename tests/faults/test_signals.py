"""Stages as processes that are stopped in the middle of their work, and outputs that cannot be written to."""
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

import create_negative_contexts
import create_sample_identity_contexts
import sample
from models import random_weights
from tests.drawn_face import draw_face
from tests.faults.processes import ENVIRONMENT, ROOT, children, forked, is_alive, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
AGAIN = "run the same command again: it continues"
ALIGN = "import align; align.BATCH = 4; from utils.runtime.errors import run_script; run_script(align.main)"


def start(*command: str, output: Path) -> subprocess.Popen:
    """A command in a session of its own; what it prints comes to a file."""
    with open(output, "wb") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file,
                                start_new_session=True, preexec_fn=hear_ctrl_c)


def hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # test processes may ignore it, and what they start inherits that


def errors(output: Path) -> list[str]:
    """The lines printed that are no progress bar; there must be no traceback."""
    text = output.read_text(errors="backslashreplace")
    assert "Traceback" not in text, text
    return [line for line in re.split("[\r\n]+", text) if line.startswith("error: ")]


def made(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/*.png")}


# ---- sample.py -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A run of small random weights, whose contexts and negatives exist; paths.run is up to the test."""
    weights, output = tmp_path_factory.mktemp("weights") / "tiny", tmp_path_factory.mktemp("output")
    random_weights.write(weights, "small", seed=0)
    overrides = [
        f"paths.output={output}", "device=cpu", "contexts.source=uniform", "contexts.dimension=512", "contexts.number=12",
        f"model.diffusion={weights}", f"model.first_stage_encoder={weights / 'first_stage_encoder_state_dict.pt'}",
        f"model.first_stage_decoder={weights / 'first_stage_decoder_state_dict.pt'}", "sampling.identities=6",
        "sampling.images_per_identity=4", "sampling.batch_size=2", "sampling.solver=dpm++", "sampling.steps=8",
        "sampling.precision=fp32"]
    for script in (create_sample_identity_contexts, create_negative_contexts):
        code, printed = forked(script.main, *overrides)
        assert code == 0, printed
    return overrides


def samples(settings: list[str], run: str) -> Path:
    return Path(settings[0].removeprefix("paths.output=")) / run / "samples"


@pytest.fixture(scope="module")
def undisturbed(settings) -> dict[str, bytes]:
    code, printed = forked(sample.main, *settings, "paths.run=undisturbed")
    assert code == 0, printed
    return made(samples(settings, "undisturbed"))


def test_stopped_by_any_signal_and_continued_the_images_are_the_same(settings, undisturbed, tmp_path):
    ends = {signal.SIGTERM: (143, [f"error: terminated; {AGAIN}"]), signal.SIGINT: (130, [f"error: interrupted; {AGAIN}"]),
            signal.SIGKILL: (-9, [])}
    for sent, (code, lines) in ends.items():
        name, output = sent.name, tmp_path / sent.name
        process = start("sample.py", *settings, f"paths.run={name}", output=output)
        assert wait_until(lambda: made(samples(settings, name)) or process.poll() is not None, 60)
        process.send_signal(sent)
        assert process.wait(10) == code and errors(output) == lines
        done = made(samples(settings, name))
        assert 0 < len(done) < len(undisturbed) == 24 and done.items() <= undisturbed.items()
        parts = list(samples(settings, name).rglob(".*.part"))
        assert not parts or sent == signal.SIGKILL
        assert forked(sample.main, *settings, f"paths.run={name}")[0] == 0
        assert made(samples(settings, name)) == undisturbed


def test_the_ranks_of_a_killed_torchrun_end(settings, tmp_path):
    output = tmp_path / "output"
    torchrun = start("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "sample.py", *settings,
                     "paths.run=ranks", "sampling.identities=12", output=output)
    ranks = []
    assert wait_until(lambda: made(samples(settings, "ranks")) or torchrun.poll() is not None, 90)
    ranks = children(torchrun.pid)
    assert len(ranks) >= 2 and all(map(is_alive, ranks)), output.read_text()
    torchrun.kill()
    torchrun.wait()
    assert wait_until(lambda: not any(map(is_alive, ranks)), 3)


# ---- align.py and its workers ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for k in range(64):
        (folder / f"{k % 4}").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"{k % 4}" / f"{k}.png"), draw_face(250 + k)[..., ::-1])
    return folder


@pytest.mark.parametrize("whom, sent, code, lines", [
    ("parent", signal.SIGKILL, -9, []),
    ("parent", signal.SIGTERM, 143, [f"error: terminated; {AGAIN}"]),
    ("all", signal.SIGTERM, 143, [f"error: terminated; {AGAIN}"]),
    ("all", signal.SIGINT, 130, [f"error: interrupted; {AGAIN}"]),  # as a terminal sends it
    ("a worker", signal.SIGKILL, 2, ["error: a worker process was killed (out of memory?); set align.processes "
                                     f"(when training, the environment's OMP_NUM_THREADS) lower and {AGAIN}"])],
    ids=["killed", "terminated", "all terminated", "Ctrl-C", "a worker killed"])
def test_no_worker_outlives_a_stopped_alignment(photos, tmp_path, whom, sent, code, lines):
    process = start("-c", ALIGN, "device=cpu", f"paths.output={tmp_path}", "paths.run=a", f"align.images={photos}",
                    "align.processes=2", output=tmp_path / "output")
    assert wait_until(lambda: made(tmp_path / "a" / "aligned") or process.poll() is not None, 60)
    workers = children(process.pid)
    assert len(workers) == 2, (tmp_path / "output").read_text()
    if whom == "all":
        os.killpg(process.pid, sent)
    else:
        os.kill(process.pid if whom == "parent" else workers[0], sent)
    assert process.wait(5) == code
    assert wait_until(lambda: not any(map(is_alive, workers)), 3)
    assert errors(tmp_path / "output") == lines
    assert 0 < len(made(tmp_path / "a" / "aligned")) < 64


# ---- outputs that cannot be written to -------------------------------------------------------------------------------

def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


def read_only(folder: Path) -> Path:
    """A folder that even root cannot write to."""
    folder.mkdir(mode=0o555)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    return folder


@pytest.fixture
def outputs(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    folder = read_only(tmp_path / "read only")
    yield {"a file": tmp_path / "file", "a device": Path("/dev/null"), "a loop": tmp_path / "loop", "a long path":
           Path("/" + "a/" * 2500), "a long name": tmp_path / ("a" * 256), "read only": folder, "limited": tmp_path / "out"}
    if os.geteuid() == 0:
        subprocess.run(["umount", folder], check=True)


CANNOT = "this path cannot be used so: choose another"
OUTPUTS = {"a file": CANNOT, "a device": CANNOT, "a loop": CANNOT, "a long path": CANNOT, "a long name": CANNOT,
           "read only": "may not read or write there", "limited": "ulimit -f"}


def test_an_output_that_cannot_be_written_to_is_one_line(outputs, tmp_path):
    for kind, words in OUTPUTS.items():
        code, printed = forked(create_sample_identity_contexts.main, f"paths.output={outputs[kind]}", "device=cpu",
                               "contexts.source=uniform", prepare=limit_files if kind == "limited" else lambda: None)
        (tmp_path / "printed").write_text(printed)
        line, = errors(tmp_path / "printed")
        assert code == 2 and words in line and len(line) < 600, (kind, code, line)
        assert len(str(outputs[kind])) > 300 or f"error: {outputs[kind]}" in line


def test_a_limit_on_files_stops_sampling_in_one_line(settings, tmp_path):
    code, printed = forked(sample.main, *settings, "paths.run=limited", prepare=limit_files)
    (tmp_path / "printed").write_text(printed)
    line, = errors(tmp_path / "printed")
    assert code == 2 and "ulimit -f" in line and not list(samples(settings, "limited").parent.rglob(".*.part"))
