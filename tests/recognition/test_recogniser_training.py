"""What a recogniser is trained on and in which order, its loss by hand, and its score on held-out people."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.margin_heads import CosFace
from utils.faces.packed import PackedFaces
from utils.recognition.recogniser_training import RecogniserLoss, TrainingSet, epoch_order, verification_accuracy
from utils.runtime.errors import UserError


def packed(counts: list[int]) -> PackedFaces:
    """People p00, p01, ... with that many images each; a face is of one grey level, the person's number."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.broadcast_to(labels[:, None, None, None].astype(np.uint8), (len(labels), 112, 112, 3))
    names = np.array([f"p{k:02d}" for k in range(len(counts))])
    return PackedFaces(images, labels, names, np.array([f"{names[label]}/{k}.png" for label, count in enumerate(counts)
                                                        for k in range(count)]))


# ---- the training set ------------------------------------------------------------------------------------------------

def test_a_tenth_of_the_people_with_pairs_is_held_out_and_the_others_are_classes():
    faces = packed([1, 3, 2] * 10)  # a third has one image and can make no genuine pair
    data = TrainingSet.choose(faces, keep=None)
    assert data.held_out_identities == ["p01", "p10", "p20"]  # of the twenty with two or more: the first, 7th and 14th
    held_out = np.isin(faces.labels, (1, 10, 20))
    assert data.held_out_rows.tolist() == np.flatnonzero(held_out).tolist()
    assert data.held_out_labels.tolist() == faces.labels[held_out].tolist()
    assert data.rows.tolist() == np.flatnonzero(~held_out).tolist()
    assert data.num_classes == 27 and sorted(set(data.labels.tolist())) == list(range(27))
    people = [person for person in range(30) if person not in (1, 10, 20)]
    assert [people[label] for label in data.labels] == faces.labels[~held_out].tolist()
    assert data.empty_identities == []


def test_a_keep_list_chooses_images_but_not_who_is_held_out():
    faces = packed([2] * 8)
    everything = TrainingSet.choose(faces, keep=None)
    assert everything.held_out_identities == ["p00", "p04"]
    data = TrainingSet.choose(faces, keep={"p01/1.png", "p02/0.png", "p02/1.png", "p00/0.png", "p07/1.png"})
    assert data.held_out_identities == everything.held_out_identities
    assert data.held_out_rows.tolist() == everything.held_out_rows.tolist()
    assert faces.paths[data.rows].tolist() == ["p01/1.png", "p02/0.png", "p02/1.png", "p07/1.png"]
    assert data.labels.tolist() == [0, 1, 1, 2] and data.num_classes == 3
    assert data.empty_identities == ["p03", "p05", "p06"]


@pytest.mark.parametrize("counts, words", [([2, 2, 2], "2 of 3 people, 3 of whom are eligible"),
                                           ([1, 1, 1, 1, 2], "2 of 5 people, 1 of whom are eligible")])
def test_too_few_people_are_refused(counts, words):
    with pytest.raises(UserError, match=words):
        TrainingSet.choose(packed(counts), keep=None)


# ---- the order -------------------------------------------------------------------------------------------------------

def test_an_epoch_shows_every_image_but_the_dropped_ones_once():
    orders = []
    for epoch in range(3):
        order, dropped = epoch_order(23, 5, seed=1, epoch=epoch)
        assert order.shape == (4, 5) and dropped.shape == (3,)
        assert sorted([*order.ravel(), *dropped]) == list(range(23))
        again, dropped_again = epoch_order(23, 5, seed=1, epoch=epoch)
        assert np.array_equal(order, again) and np.array_equal(dropped, dropped_again)
        orders.append(order.ravel().tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch_order(23, 5, seed=2, epoch=0)[0].ravel().tolist() != orders[0]


def test_images_are_left_out_in_turn():
    left_out = np.zeros(23, dtype=int)
    for epoch in range(23):
        left_out[epoch_order(23, 5, seed=1, epoch=epoch)[1]] += 1
        assert np.ptp(left_out) <= 1
    assert (left_out == 3).all()  # 23 epochs of 3 images


def test_fewer_images_than_a_batch_are_refused():
    assert epoch_order(5, 5, seed=0, epoch=0)[0].shape == (1, 5)
    with pytest.raises(UserError, match="fr.batch_size: one batch on all devices takes 6 images, there are 5; lower it"):
        epoch_order(5, 6, seed=0, epoch=0)


# ---- the loss and the score ------------------------------------------------------------------------------------------

class MeanColours(nn.Module):
    """Embeddings [B, 3] of faces [B, 3, 112, 112]: their mean colour, through a matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Linear(3, 3, bias=False)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        return self.matrix(faces.mean(dim=(2, 3)))


def test_the_loss_is_cosface_s_cross_entropy_and_notes_probabilities_without_the_margin():
    backbone, head = MeanColours(), CosFace(3, 4, s=8.0, m=0.35)
    compiled, probability = [], torch.zeros(10)
    loss = RecogniserLoss(backbone, head, False, lambda network: compiled.append(network) or network, probability)
    assert compiled == [backbone]
    faces, labels = torch.randn(5, 3, 112, 112), torch.tensor([0, 3, 1, 1, 2])
    value = loss(faces, labels, torch.tensor([7, 0, 3, 9, 4]))

    embeddings = F.normalize(faces.mean(dim=(2, 3)).double() @ backbone.matrix.weight.double().T)
    cosines = embeddings @ F.normalize(head.weight.double()).T
    logits = 8 * (cosines - 0.35 * F.one_hot(labels, 4))
    by_hand = -(logits[range(5), labels] - logits.logsumexp(dim=1)).mean()
    assert value.item() == pytest.approx(by_hand.item(), abs=1e-5)
    noted = (8 * cosines).softmax(dim=1)[range(5), labels].detach()
    expected = torch.zeros(10, dtype=torch.float64).scatter(0, torch.tensor([7, 0, 3, 9, 4]), noted)
    torch.testing.assert_close(probability.double(), expected, rtol=0, atol=1e-6)

    value.backward()
    assert backbone.matrix.weight.grad.abs().sum() > 0 and head.weight.grad.abs().sum() > 0
    unnoted = RecogniserLoss(backbone, head, False, lambda network: network, None)
    assert unnoted(faces, labels, torch.arange(5)).item() == value.item()


def test_the_score_is_1_minus_eer_of_the_rows_asked_for():
    # two colours a person: of persons 0 and 1 every pair is told apart, person 2 looks once like 0 and once like 1
    colours = np.array([(250, 10, 10), (240, 12, 10), (10, 250, 10), (12, 240, 10), (251, 10, 10), (10, 251, 10)], np.uint8)
    images = np.broadcast_to(colours[:, None, None], (6, 112, 112, 3))
    backbone = MeanColours().train()
    backbone.matrix.weight.data = torch.eye(3)
    rows, labels = np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])
    assert verification_accuracy(backbone, images, rows, labels, torch.device("cpu"), bf16=False) == 1.0
    assert not backbone.training
    rows, labels = np.arange(6), np.repeat((0, 1, 2), 2)
    # genuine: two of about 1 and one of about -0.35; impostor: four of about 1 and eight of about -0.35: both errors are 1/3
    found = verification_accuracy(backbone, images, rows, labels, torch.device("cpu"), bf16=False)
    assert found == pytest.approx(2 / 3, abs=1e-9)
