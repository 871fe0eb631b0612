"""Images of round spots, whose places can be measured to a fraction of a pixel."""
import numpy as np


def spots(places: np.ndarray, height: int, width: int, sigma: float) -> np.ndarray:
    """[H, W, 3] uint8: one bright round spot a channel, black elsewhere; `places` is [3, 2], px."""
    y, x = np.mgrid[:height, :width]
    squares = (x[..., None] - places[:, 0]) ** 2 + (y[..., None] - places[:, 1]) ** 2
    return np.round(255 * np.exp(-squares / (2 * sigma**2))).astype(np.uint8)


def centroids(image: np.ndarray) -> np.ndarray:
    """The centre of mass of each channel of [H, W, 3]: [3, 2], px."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    mass = image.astype(np.float64)
    return np.column_stack([(x[..., None] * mass).sum((0, 1)), (y[..., None] * mass).sum((0, 1))]) \
        / mass.sum((0, 1))[:, None]
