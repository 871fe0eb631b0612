"""benchmarks.gpu: its page, what it skips, and its parts rehearsed on the CPU and on a GPU that is not there."""
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import embedding, gpu, parity, sampling
from tests.gpu.fake import CUDA, fake_gpu
from utils.runtime.errors import UserError
from utils.runtime.ranks import use_bf16

SAMPLING = ["H100, 16 threads, torch 2.14", "measured matrix rate: fp32 50, bf16 700 TFLOP/s",
            "| | ms a step | ms a step and image | images/s at 200 steps | of the matrix rate | peak memory, GB | ratio |",
            "|---|---|---|---|---|---|---|", "| published, fp32 | 50 | 1.0 | 5 | 90% | 3.00 | 1.00 |",
            "| ours, bf16 | 10 | 0.2 | 25 | 40% | 3.00 | 5.00 |"]


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()


def test_the_time_limits_are_25_minutes_together():
    assert sum(part.minutes for part in gpu.PARTS.values()) <= 25


def test_what_is_done_is_skipped_and_what_failed_is_run_again(tmp_path, monkeypatch):
    asked = []

    def run_part(part: gpu.Part, device: torch.device, output: str, rehearse: bool) -> dict:
        asked.append(part.command.split()[0].partition(".")[2])
        return {"command": part.command, "code": int(len(asked) == 2), "seconds": 60.0, "printed": SAMPLING}

    monkeypatch.setattr(gpu, "run_part", run_part)
    command(monkeypatch, "--rehearse", str(tmp_path), "--parts", "sampling,parity")
    page = (tmp_path / "gpu.md").read_text()
    assert asked == ["sampling", "parity"] and "The command failed with exit code 1" in page
    assert page.count("Not measured yet.") == 4 and "no figure here means anything" in page
    command(monkeypatch, "--rehearse", str(tmp_path), "--parts", "sampling,parity,demo")
    assert asked[2:] == ["parity", "demo"] and "failed" not in (tmp_path / "gpu.md").read_text()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    (tmp_path / "gpu.json").write_text(json.dumps(kept | {"machine": {"device": "H200"}}))
    with pytest.raises(UserError, match="gpu.json: is of H200"):
        command(monkeypatch, "--rehearse", str(tmp_path))


def test_the_arithmetic_for_many_gpus():
    text = gpu.arithmetic(SAMPLING)
    assert "arithmetic" in text[0].lower() and "not measured" in text[0]
    # 502,500 images x 1,000 steps at 25 images/s of 200 steps = 5,000 images x steps a second
    assert f"| ours, bf16 | 1,000 | {502_500 * 1000 / 5000 / 3600:.1f} | 3.5 | 0.44 |" in text
    assert sum(line.startswith("| published, fp32") for line in text) == 3


def test_tables_come_with_the_line_before_them():
    assert gpu.tables(["progress", *SAMPLING, "", "written"]) == [SAMPLING[1], "", *SAMPLING[2:]]


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable GPU; .*--rehearse"):
        command(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments", [(parity, "--steps 1 --images 2"),
                                               (embedding, "--faces 3 --backbones mobilefacenet")])
def test_the_branches_for_a_gpu_run(monkeypatch, capsys, script, arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split(), "--device", "cuda"])
    for name, answer in {"get_device_name": "no GPU", "synchronize": None, "max_memory_allocated": 7,
                         "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    with fake_gpu() as device:
        device.may_leave = True
        script.main()
        assert sampling.measure(lambda: torch.ones(2, device=CUDA) + 1, 1, CUDA)[1] == 7
        assert sampling.matrix_rate(torch.bfloat16, CUDA) > 0
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_the_rehearsal(tmp_path, monkeypatch):
    """As on the day, but for the demo and the negatives, which have tests of their own and run on the CPU already."""
    command(monkeypatch, "--rehearse", str(tmp_path), "--parts", "sampling,parity,training,embedding")
    parts = json.loads(Path(tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["code"] for name, part in parts.items()} == dict.fromkeys(
        ("sampling", "parity", "training", "embedding"), 0)
    page = (tmp_path / "gpu.md").read_text()
    assert "| fp32 | 0.0e+00 | 0.00 | 1.0000 |" in page  # the CPU against itself
    assert all(f"| {row} | " in page for row in ("published, fp32", "ours, fp32", "training, fp32"))
    assert all((f"| {row} | " in page) is use_bf16("auto", torch.device("cpu")) for row in ("ours, bf16", "training, bf16"))
    # untrained, without statistics its blocks double what they get, beyond what is finite
    assert "| backbone | embeddings/s |\n|---|---|\n| iresnet100 | " in page
