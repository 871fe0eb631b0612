"""Logits and gradients of the heads against their formulas written out class by class in float64."""
import math

import pytest
import torch

from models.margin_heads import HEADS, AdaFace, ArcFace, CosFace

EMBEDDING, CLASSES, BATCH = 16, 7, 5
MARGINS = [(CosFace, 0.35), (ArcFace, 0.5), (AdaFace, 0.4)]


def formula(head, embeddings: torch.Tensor, labels: torch.Tensor, mean: float = 0.0, std: float = 0.0) -> torch.Tensor:
    """s * (margined) cosines, one entry at a time."""
    rows = []
    for x, y in zip(embeddings, labels.tolist(), strict=True):
        row = []
        for j, w in enumerate(head.weight):
            cosine = (x @ w) / ((x @ x).sqrt() * (w @ w).sqrt())
            if j == y and isinstance(head, CosFace):
                cosine = cosine - head.m
            if j == y and isinstance(head, ArcFace):
                cosine = torch.cos(torch.acos(cosine) + head.m)
            if j == y and isinstance(head, AdaFace):
                z = min(max(0.333 * (x.detach().norm().item() - mean) / (std + 1e-3), -1.0), 1.0)
                cosine = torch.cos(torch.acos(cosine) - head.m * z) - (head.m + head.m * z)
            row.append(head.s * cosine)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(BATCH, EMBEDDING, generator=generator, dtype=torch.float64)
    # Norms from 2 to 90: AdaFace must see them, and clip at both ends.
    embeddings = embeddings / embeddings.norm(dim=1, keepdim=True) * torch.tensor([[2.0], [15], [25], [40], [90]])
    return embeddings.requires_grad_(), torch.tensor([3, 0, 6, 3, 2])


@pytest.mark.parametrize("make, m", MARGINS)
@pytest.mark.parametrize("precision, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_logits_and_gradients_equal_the_formula(make, m, precision, tolerance):
    torch.manual_seed(1)
    head = make(EMBEDDING, CLASSES, 64.0, m).to(precision)
    reference = make(EMBEDDING, CLASSES, 64.0, m).double()
    reference.load_state_dict(head.state_dict())
    embeddings, labels = case()
    mean = std = 0.0
    if make is AdaFace:
        head.batch_std.fill_(30.0)
        norms = embeddings.detach().norm(dim=1)
        mean = 0.99 * 20.0 + 0.01 * norms.mean().item()
        std = 0.99 * 30.0 + 0.01 * norms.std().item()
    expected = formula(reference, embeddings, labels, mean, std)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected_grads = torch.autograd.grad(expected, (embeddings, reference.weight), upstream)

    given = embeddings.detach().to(precision).requires_grad_()
    logits = head(given, labels)
    grads = torch.autograd.grad(logits, (given, head.weight), upstream.to(precision))
    assert logits.dtype == precision
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make, m", MARGINS)
def test_heads_compute_in_fp32_inside_autocast(make, m):
    torch.manual_seed(3)
    head = make(EMBEDDING, CLASSES, 64.0, m).eval()
    embeddings, labels = case()
    embeddings = embeddings.detach().float()
    outside = head(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(embeddings, labels), outside)
        assert torch.equal(head.cosine(embeddings), head.cosine(embeddings).float())


def test_arcface_stays_monotonic_where_the_angle_passes_pi():
    head = ArcFace(2, 2, s=1.0, m=0.5).double()
    angles = torch.linspace(math.pi - 0.6, math.pi - 1e-3, 50, dtype=torch.float64)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    logits = head(torch.stack([angles.cos(), angles.sin()], dim=1), torch.zeros(50, dtype=torch.int64))[:, 0]
    assert (logits.diff() < 0).all()


def test_arcface_gradient_is_finite_on_the_class_centre():
    head = ArcFace(4, 2, 64.0, 0.5)
    embeddings = head.weight[:1].detach().clone().requires_grad_()
    head(embeddings, torch.tensor([0])).sum().backward()
    assert embeddings.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_adaface_margin_follows_the_norm():
    """An easy image (large norm) and a hard one (small norm) of one direction get different margins."""
    head = AdaFace(EMBEDDING, CLASSES, 64.0, 0.4).double().eval()
    head.batch_std.fill_(10.0)
    direction = torch.randn(1, EMBEDDING, dtype=torch.float64)
    direction /= direction.norm()
    weak, strong = (head(norm * direction, torch.tensor([1]))[0, 1] for norm in (5.0, 60.0))
    cosine = head.cosine(direction)[0, 1]
    assert weak != strong
    z = 0.333 * (5.0 - 20.0) / (10.0 + 1e-3)
    torch.testing.assert_close(weak, 64 * (torch.cos(torch.acos(cosine) - 0.4 * z) - 0.4 * z - 0.4))
    torch.testing.assert_close(strong, 64 * (torch.cos(torch.acos(cosine) - 0.4) - 0.8))


def test_adaface_statistics_run_only_while_training():
    head = AdaFace(EMBEDDING, CLASSES, 64.0, 0.4)
    embeddings, labels = (x.float() if x.is_floating_point() else x for x in case())
    head.eval()(embeddings, labels)
    assert head.batch_mean.item() == 20 and head.batch_std.item() == 100
    head.train()(embeddings, labels)
    norms = embeddings.detach().norm(dim=1)
    assert head.batch_mean.item() == pytest.approx(0.99 * 20 + 0.01 * norms.mean().item(), rel=1e-6)
    assert head.batch_std.item() == pytest.approx(0.99 * 100 + 0.01 * norms.std().item(), rel=1e-6)
    assert {"weight", "batch_mean", "batch_std"} == set(head.state_dict())


def test_probability_is_the_softmax_without_the_margin():
    head = CosFace(EMBEDDING, CLASSES, s=8.0, m=0.35).double()
    embeddings, labels = case()
    cosine = head.cosine(embeddings)
    expected = [math.exp(8 * row[y]) / sum(math.exp(8 * c) for c in row)
                for row, y in zip(cosine.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(head.probability(embeddings, labels), torch.tensor(expected, dtype=torch.float64))
    assert not head.probability(embeddings, labels).requires_grad


def test_heads_are_a_plain_dict_made_alike():
    assert type(HEADS) is dict and HEADS == {"cosface": CosFace, "arcface": ArcFace, "adaface": AdaFace}
    for make in HEADS.values():
        head = make(EMBEDDING, CLASSES, s=8.0, m=0.2)  # as train_fr.py makes it
        assert (head.s, head.m, head.weight.shape) == (8.0, 0.2, (CLASSES, EMBEDDING))
