"""Pictures that scripts leave beside their results."""
import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from utils.runtime.files import write_bytes


def montage(rows: Sequence[Sequence[Path | np.ndarray]], columns: int, cell: int = 96) -> np.ndarray:
    """Images side by side, a row for each sequence (an identity): [rows * cell, columns * cell, 3] uint8 RGB.

    Args:
        rows: image files, or images [H, W, 3] uint8 RGB. A file that cannot be read leaves its cell grey.
        cell: height and width of an image, px.
    """
    sheet = np.full((len(rows) * cell, columns * cell, 3), 128, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if not isinstance(image, np.ndarray):
                image = cv2.imread(str(image), cv2.IMREAD_COLOR)
                image = None if image is None else image[..., ::-1]
            if image is not None:
                larger = cell > image.shape[0]
                image = cv2.resize(image, (cell, cell), interpolation=cv2.INTER_CUBIC if larger else cv2.INTER_AREA)
                sheet[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell] = image
    return sheet


def contact_sheet(rows: Sequence[Sequence[Path | np.ndarray]], file: Path) -> None:
    """Write a `montage` as PNG."""
    sheet = montage(rows, max(len(row) for row in rows))
    write_bytes(file, cv2.imencode(".png", sheet[..., ::-1])[1].tobytes())


def save_figure(figure: Figure, file: Path) -> None:
    """Write a matplotlib figure as PNG; it is never shown, so that scripts run without a screen."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_bytes(file, image.getvalue())
