"""A drawn face that MTCNN takes for one: its landmarks are known, and no real person's picture is needed."""
import cv2
import numpy as np

SIDE = 256  # px, of the drawing before it is scaled
LANDMARKS = np.array([(104, 120), (152, 120), (128, 150), (110, 175), (146, 175)])  # px of the drawing


def draw_face(size: int = SIDE, skin: tuple[int, int, int] = (215, 170, 140)) -> np.ndarray:
    """[size, size, 3] uint8 RGB; scaled by area or bilinearly, so that LANDMARKS scale as pixel centres do."""
    image = np.full((SIDE, SIDE, 3), (90, 110, 130), np.uint8)

    def ellipse(centre, axes, colour, start=0, end=360, thickness=-1):
        cv2.ellipse(image, centre, axes, 0, start, end, colour, thickness, cv2.LINE_AA)

    ellipse((128, 115), (66, 84), (60, 40, 30))  # hair
    cv2.rectangle(image, (105, 190), (151, 256), (190, 145, 115), -1)  # neck
    ellipse((128, 134), (56, 74), skin)
    for x, y in LANDMARKS[:2].tolist():
        ellipse((x, y), (12, 6), (245, 240, 235))
        ellipse((x, y), (6, 6), (60, 40, 30))
        ellipse((x, y), (3, 3), (10, 10, 10))
        ellipse((x, y - 14), (15, 5), (70, 45, 35), 190, 350, 4)  # brow
    ellipse((128, 150), (11, 7), (185, 135, 110))  # nose
    for x in (122, 134):
        ellipse((x, 153), (3, 2), (110, 70, 60))
    cv2.line(image, (124, 122), (121, 146), (195, 150, 120), 2, cv2.LINE_AA)
    ellipse((128, 175), (20, 7), (170, 70, 70))  # mouth
    cv2.line(image, (109, 175), (147, 175), (110, 40, 40), 2, cv2.LINE_AA)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < SIDE else cv2.INTER_LINEAR)


def landmarks_at(size: int) -> np.ndarray:
    """Where draw_face(size) has its landmarks: [5, 2], px."""
    return (LANDMARKS + 0.5) * (size / SIDE) - 0.5
