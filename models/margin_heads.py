"""Classification heads with a margin: CosFace, ArcFace, AdaFace.

All three turn embeddings into s * cos(theta_j), theta_j being the angle to the weight row of class j, and make the
true class harder to reach while training. The arithmetic is in the weights' precision (fp32), inside autocast too.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


class MarginHead(nn.Module):
    """What the heads share; a subclass says by `with_margin` what becomes of the true class's cosine.

    Args:
        embedding_size: D.
        num_classes: C.
        s: scale of the logits.
        m: margin.
    """

    def __init__(self, embedding_size: int, num_classes: int, s: float, m: float) -> None:
        super().__init__()
        self.s, self.m = s, m
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, D] (not normalised) and labels [B] int64 -> logits [B, C]."""
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = self.cosine(embeddings)
            target = labels[:, None]
            norms = embeddings.detach().to(cosine.dtype).norm(dim=1, keepdim=True)
            return self.s * cosine.scatter(1, target, self.with_margin(cosine.gather(1, target), norms))

    def cosine(self, embeddings: torch.Tensor) -> torch.Tensor:
        """cos(theta) [B, C] of embeddings [B, D] with every class."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(F.normalize(embeddings.to(self.weight.dtype)), F.normalize(self.weight))

    @torch.no_grad()
    def probability(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Softmax of s * cos without the margin, at the true class: [B]. What DynUnc records."""
        return (self.s * self.cosine(embeddings)).softmax(1).gather(1, labels[:, None]).squeeze(1)

    def with_margin(self, cosine: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Cosines of the true classes [B, 1] and embedding norms [B, 1] -> the cosines to be scaled [B, 1]."""
        raise NotImplementedError


class CosFace(MarginHead):
    """cos(theta) - m (Wang et al. 2018, arXiv 1801.09414)."""

    def with_margin(self, cosine: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        return cosine - self.m


class ArcFace(MarginHead):
    """cos(theta + m) (Deng et al. 2019, arXiv 1801.07698)."""

    def with_margin(self, cosine: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        # Without the floor the root's gradient is infinite at cos = 1.
        sine = (1 - cosine.square()).clamp(min=1e-12).sqrt()
        with_m = cosine * math.cos(self.m) - sine * math.sin(self.m)
        # Beyond theta + m = pi the cosine would rise again and reward a larger angle; the authors go on linearly.
        return torch.where(cosine > -math.cos(self.m), with_m, cosine - self.m * math.sin(self.m))


class AdaFace(MarginHead):
    """cos(theta + g_angle) - g_add, both margins adapted to the image's quality (Kim et al. 2022, arXiv 2204.00964).

    The quality is the norm of the embedding *as the backbone gives it*, standardised by running statistics:
    z = h (norm - mean) / std, clipped to [-1, 1]; g_angle = -m z, g_add = m z + m.
    """

    EPS = 1e-3
    H = 0.333  # concentration: how much of the norms' spread falls inside [-1, 1]
    T_ALPHA = 0.01  # weight of the newest batch in the running mean and standard deviation of the norms

    def __init__(self, embedding_size: int, num_classes: int, s: float, m: float) -> None:
        super().__init__(embedding_size, num_classes, s, m)
        self.register_buffer("batch_mean", torch.tensor(20.0))
        self.register_buffer("batch_std", torch.tensor(100.0))

    def with_margin(self, cosine: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        norms = norms.clamp(1e-3, 100)
        if self.training:
            self.batch_mean.lerp_(norms.mean(), self.T_ALPHA)
            self.batch_std.lerp_(norms.std(), self.T_ALPHA)
        z = (self.H * (norms - self.batch_mean) / (self.batch_std + self.EPS)).clamp(-1, 1)
        theta = cosine.clamp(-1 + self.EPS, 1 - self.EPS).acos()
        return (theta - self.m * z).clamp(self.EPS, math.pi - self.EPS).cos() - (self.m * z + self.m)


HEADS: dict[str, type[MarginHead]] = {"cosface": CosFace, "arcface": ArcFace, "adaface": AdaFace}
