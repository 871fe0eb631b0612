"""Embedding and scoring on a GPU that is not there: what is fetched, and how often."""
import numpy as np
import pytest
import torch

from models.backbones import BACKBONES
from tests.gpu.fake import CUDA, fake_gpu
from tests.tiny_training import TinyNet
from utils.evaluation import scores
from utils.recognition import embedding
from utils.recognition.embedding import embed


def embedded(backbone: torch.nn.Module, faces: int, mirror: bool = False, bf16: bool = False) -> tuple[np.ndarray, dict, int]:
    """Embeddings of blank faces, the types of what was computed, and the number of copies to the host."""
    with fake_gpu() as gpu, torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        gpu.may_leave = True
        found = embed(backbone, range(faces), CUDA, mirror=mirror, read=lambda _: np.zeros((112, 112, 3), np.uint8))
        return found, gpu.types, gpu.to_host


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet18"])
def test_backbones_on_the_device(name, bf16):
    backbone = BACKBONES[name](0.0)
    found, types, _ = embedded(backbone, 2, bf16=bf16)
    assert found.shape == (2, backbone.num_features) and found.dtype == np.float32
    convolutions = {kind for operation, kind in types if operation == "convolution"}
    # MobileFaceNet's last layer is a convolution, and embeddings are not rounded
    assert convolutions == ({torch.bfloat16} if bf16 else set()) | ({torch.float32} if not bf16 or name != "iresnet18" else set())


def test_a_batch_is_fetched_once(monkeypatch):
    monkeypatch.setitem(embedding.BATCH, "cuda", 4)
    found, _, fetched = embedded(TinyNet(0.0), 10, mirror=True)
    assert found.shape == (10, 32) and fetched == 3


def test_scores_are_counted_on_the_device():
    """Blocks away from the diagonal wait for nothing; on it, how many pairs are genuine is asked for. Then counts and sums."""
    labels = np.repeat(np.arange(6), 2)
    embeddings = np.random.default_rng(0).standard_normal((12, 8))
    with pytest.MonkeyPatch.context() as patch, fake_gpu() as gpu:
        patch.setattr(scores, "BLOCK", 4)
        gpu.may_leave = True
        counted = scores.score_distributions(embeddings, labels, CUDA)
        assert counted.genuine_counts.shape == (scores.BINS,)
        assert gpu.to_host == 2 * 3 + 2 * 3  # three diagonal blocks; of each kind counts and two moments
        scores.most_similar_identities(embeddings, labels, CUDA)
    with fake_gpu() as gpu, pytest.raises(AssertionError, match="waits for the device"):
        scores.score_distributions(embeddings, labels, CUDA)  # the rehearsal would have noticed
