"""Embeddings of many faces: what the network is shown, and in which order its answers come."""
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.backbones import MobileFaceNet
from models.published import load_backbone
from utils.recognition import embedding
from utils.recognition.embedding import embed, read_unaligned
from utils.runtime.errors import UserError

CPU = torch.device("cpu")


class Columns(nn.Module):
    """The mean of each column of the red channel: an embedding [B, 112] that shows where a face was put."""

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return faces[:, 0].mean(dim=1)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (21, 112, 112, 3), dtype=np.uint8)


def columns_of(faces: np.ndarray) -> np.ndarray:
    return faces[..., 0].mean(axis=1) / 127.5 - 1


def test_every_face_is_embedded_in_order_whatever_the_batch(faces, monkeypatch):
    for size in (16, 5, 100):
        monkeypatch.setitem(embedding.BATCH, "cpu", size)
        found = embed(Columns(), range(21), CPU, read=faces.__getitem__)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, columns_of(faces), rtol=0, atol=1e-6)


def test_the_mirror_image_s_embedding_follows(faces):
    both = embed(Columns(), range(5), CPU, mirror=True, read=faces.__getitem__)
    expected = np.concatenate([columns_of(faces[:5]), columns_of(faces[:5])[:, ::-1]], axis=1)
    np.testing.assert_allclose(both, expected, rtol=0, atol=1e-6)


def test_a_network_that_gives_nan_is_refused_by_its_file(faces, tmp_path):
    network = MobileFaceNet().eval()
    with torch.no_grad():
        for weights in network.parameters():
            weights *= 1e6  # finite, but what comes of fifty layers is not
    torch.save(network.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="backbone.pth: embeds faces as numbers that are not finite; give another"):
        embed(load_backbone(tmp_path / "backbone.pth"), range(5), CPU, read=faces.__getitem__)


def test_only_a_network_made_for_the_unshifted_template_is_shown_shifted_faces_moved_back(faces):
    def shown(network: nn.Module, template: str) -> np.ndarray:
        return embed(network, range(3), CPU, template, mirror=True, read=faces.__getitem__)

    network = Columns()
    as_they_are = shown(network, "arcface")
    np.testing.assert_array_equal(shown(network, "arcface_shifted"), as_they_are)
    network.on_arcface = True
    np.testing.assert_array_equal(shown(network, "arcface"), as_they_are)
    moved, mirrored = np.split(shown(network, "arcface_shifted"), 2, axis=1)
    own = as_they_are[:, :112]
    np.testing.assert_allclose(moved[:, 8:], own[:, :-8], rtol=0, atol=1e-6)  # 8 px to the right
    np.testing.assert_allclose(moved[:, :8], np.repeat(own[:, :1], 8, axis=1), rtol=0, atol=1e-6)  # the border repeated
    np.testing.assert_array_equal(mirrored, moved[:, ::-1])  # the mirror image of the face where the network knows it


def test_the_published_mobilefacenet_sees_the_same_columns_of_shifted_and_of_unshifted_faces(faces):
    torch.manual_seed(0)
    network = MobileFaceNet(num_features=16, width=96).eval()
    unshifted = faces[:2]
    shifted = np.concatenate([unshifted[:, :, 8:], unshifted[:, :, :8]], axis=2)  # 8 px further left; what enters is not seen
    found = [embed(network, range(2), CPU, template, read=images.__getitem__)
             for template, images in (("arcface", unshifted), ("arcface_shifted", shifted))]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)
    with torch.no_grad():
        direct = network(torch.from_numpy(unshifted).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
    np.testing.assert_allclose(found[0], direct, rtol=0, atol=1e-5)


def test_faces_are_read_from_files_by_default(faces, tmp_path):
    files = [tmp_path / f"{k}.png" for k in range(3)]
    for file, face in zip(files, faces, strict=False):
        Image.fromarray(face).save(file)
    np.testing.assert_allclose(embed(Columns(), files, CPU), columns_of(faces[:3]), rtol=0, atol=1e-6)
    files[1].write_bytes(b"no image")
    with pytest.raises(UserError, match="1.png: is not a readable image"):
        embed(Columns(), files, CPU)


# ---- unaligned faces -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(56, 80), (112, 112), (250, 250)])
def test_faces_of_any_size_are_read_as_rgb_at_112(tmp_path, size):
    ramp = np.broadcast_to(np.linspace(0, 255, size[1])[None, :, None] * [0.0, 0.5, 1.0], (*size, 3))  # B, G, R
    cv2.imwrite(str(tmp_path / "face.png"), np.rint(ramp).astype(np.uint8))
    face = read_unaligned(tmp_path / "face.png")
    assert face.shape == (112, 112, 3) and face.dtype == np.uint8
    expected = np.interp((np.arange(112) + 0.5) / 112, (np.arange(size[1]) + 0.5) / size[1], np.linspace(0, 1, size[1]))
    assert np.abs(face[5, 2:-2] - np.outer(expected, [255, 127.5, 0])[2:-2]).max() < 2.5


def test_shrinking_does_not_alias(tmp_path):
    checkers = np.indices((448, 448)).sum(axis=0) % 2 * 255
    cv2.imwrite(str(tmp_path / "face.png"), checkers.astype(np.uint8))
    assert np.ptp(read_unaligned(tmp_path / "face.png")) == 0  # grey, not a pattern
