"""A recogniser in ncnn's format (<name>.param beside <name>.bin), for measurements by an independent one.

Needs the package ncnn (pip install ncnn), which the rest of the project does without. ncnn trusts what it reads: a damaged
network can crash it. So it is given none but those listed here.
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.runtime.errors import UserError
from utils.runtime.files import file_digest, require_file, text_digest

TRUSTED = {  # of models.published.backbone_digest
    "50394af6972e99812b52ee039699b203b212d1e3733b869dfafab8567458b7f3": "the independent MobileFaceNet of docs/results.md"}


class NcnnBackbone(nn.Module):
    """Faces [B, 3, 112, 112] in [-1, 1] RGB, on the unshifted template -> embeddings [B, D] float32, computed on the CPU.

    Args:
        param: the network; its input is called data, (x - 127.5) / 128 of grey levels x, and its output fc1.
    Raises:
        UserError: the package or a file is missing, it is no network of TRUSTED, or ncnn cannot read it.
    """

    on_arcface = True

    def __init__(self, param: Path) -> None:
        super().__init__()
        try:
            import ncnn
        except ImportError:
            raise UserError(f"{param}: needs the package ncnn; pip install ncnn") from None
        weights = require_file(param.with_suffix(".bin"), "the recogniser's weights", "put it beside the .param file")
        if (digest := text_digest(file_digest(param) + file_digest(weights))) not in TRUSTED:
            raise UserError(f"{param}: is no network that is known here, and ncnn can crash on a damaged one; give weights in "
                            f"another format, or, if you trust its source, add {digest} to TRUSTED in models/ncnn_backbone.py")
        self.ncnn, self.net = ncnn, ncnn.Net()
        self.net.opt.num_threads = torch.get_num_threads()
        if self.net.load_param(str(param)) or self.net.load_model(str(weights)):
            raise UserError(f"{param}: is not a network that ncnn can read; take both files from one model")

    def forward(self, faces: Tensor) -> Tensor:
        rows = [self._embed(face) for face in np.ascontiguousarray((faces.float() * (127.5 / 128)).cpu().numpy())]
        return torch.from_numpy(np.stack(rows)).to(faces.device)

    def _embed(self, face: np.ndarray) -> np.ndarray:
        extractor = self.net.create_extractor()
        extractor.input("data", self.ncnn.Mat(face))
        failed, embedding = extractor.extract("fc1")
        if failed:
            raise UserError("the ncnn network has no output fc1; give a recogniser whose input is data and output fc1")
        return np.array(embedding)
