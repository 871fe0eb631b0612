import numpy as np

from experiments import memorisation
from models.published import backbone_digest
from utils.identities.contexts import normalise
from utils.runtime.files import file_digest


def test_the_nearest_training_face_is_found_in_blocks(monkeypatch):
    monkeypatch.setattr(memorisation, "BLOCK", 3)
    generator = np.random.default_rng(0)
    generated, trained = (normalise(generator.standard_normal((number, 8))) for number in (10, 7))
    highest, nearest = memorisation.nearest_of(generated, trained)
    for row, (similarity, number) in enumerate(zip(highest, nearest, strict=True)):
        cosines = [float(generated[row] @ other) for other in trained]
        assert number == int(np.argmax(cosines)) and abs(similarity - max(cosines)) < 1e-6


def test_other_weights_beside_an_ncnn_network_are_another_recogniser(tmp_path):
    param, weights = tmp_path / "net.param", tmp_path / "net.bin"
    param.write_text("layers")
    weights.write_bytes(b"1")
    first = backbone_digest(param)
    weights.write_bytes(b"2")
    assert backbone_digest(param) != first
    assert backbone_digest(weights) == file_digest(weights)
