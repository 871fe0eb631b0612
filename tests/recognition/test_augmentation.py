"""The 13 operations against torchvision's, image by image; and what decides which image gets which."""
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandAugment, v2
from torchvision.transforms.autoaugment import _apply_op

from utils.recognition import augmentation
from utils.recognition.augmentation import augment, draw

OPERATIONS = tuple(augmentation.OPERATIONS)
SIGNED = ("ShearX", "TranslateX", "Rotate", "Brightness", "Color", "Contrast", "Sharpness")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """[16, 3, 112, 112] uint8: noise, smooth pictures of narrow range, and one of a single colour."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (8, 3, 112, 112), generator=generator, dtype=torch.uint8)
    coarse = torch.rand(8, 3, 6, 6, generator=generator) * 180 + 30
    smooth = torch.nn.functional.interpolate(coarse, size=112, mode="bicubic").clamp(0, 255).byte()
    smooth[0] = 77
    return torch.cat([noise, smooth])


def torchvision_operation(image: torch.Tensor, name: str, magnitude: int, negative: bool) -> torch.Tensor:
    """The operation on one image as torchvision's RandAugment does it, magnitudes from torchvision's own table."""
    if name == "Grayscale":
        return v2.functional.rgb_to_grayscale(image, num_output_channels=3)
    if name == "AutoContrast":  # v1 multiplies by 255 / range and v2 divides by range / 255: they round differently
        return v2.functional.autocontrast(image)
    magnitudes, signed = RandAugment()._augmentation_space(31, (112, 112))[name]
    assert signed == (name in SIGNED)
    value = magnitudes[magnitude].item() if magnitudes.ndim else 0.0
    return _apply_op(image, name, -value if signed and negative else value, InterpolationMode.NEAREST, fill=None)


@pytest.mark.parametrize("number, name", list(enumerate(OPERATIONS)))
def test_operations_equal_torchvision_image_by_image(images, number, name):
    magnitude = torch.arange(len(images)) + 1  # every image its own bin, 1 .. 16
    for negative in (torch.arange(len(images)) % 2 == 0, torch.arange(len(images)) % 2 == 1):
        result = augmentation.apply(images, torch.full((len(images),), number), magnitude, negative)
        expected = torch.stack([torchvision_operation(image, name, k, sign) for image, k, sign in
                                zip(images, magnitude.tolist(), negative.tolist(), strict=True)])
        assert result.dtype == torch.uint8
        assert torch.equal(result, expected)
        if name not in ("Identity", "Solarize"):
            assert not torch.equal(result, images)


def test_images_of_one_batch_get_different_operations(images):
    operation = torch.arange(len(images)) % len(OPERATIONS)
    magnitude, negative = torch.full((len(images),), 9), torch.zeros(len(images), dtype=torch.bool)
    before = images.clone()
    result = augmentation.apply(images, operation, magnitude, negative)
    for k, image in enumerate(images):
        assert torch.equal(result[k], torchvision_operation(image, OPERATIONS[operation[k]], 9, False))
    assert torch.equal(images, before)
    words = draw(torch.arange(1000), seed=0, epoch=0)
    assert set((words[:, 1] % 13).tolist()) == set(range(13))


def test_four_operations_follow_one_another_after_the_flip(images):
    words = draw(torch.arange(len(images)), seed=5, epoch=2).tolist()
    result = augment(images, torch.arange(len(images)), seed=5, epoch=2, kind="randaugment")
    for k, image in enumerate(images):
        image = image.flip(-1) if words[k][0] % 2 else image
        for turn in range(4):
            operation, magnitude, sign = words[k][1 + 3 * turn:4 + 3 * turn]
            image = torchvision_operation(image, OPERATIONS[operation % 13], 1 + magnitude % 16, sign % 2 == 1)
        assert torch.equal(result[k], image)


def test_flip_alone_mirrors_half_of_the_images(images):
    many = images[:1].expand(2000, -1, -1, -1)
    result = augment(many, torch.arange(2000), seed=0, epoch=0, kind="flip")
    mirrored = (result == images[0].flip(-1)).flatten(1).all(1)
    assert (mirrored | (result == images[0]).flatten(1).all(1)).all()
    assert 900 < mirrored.sum() < 1100
    assert torch.equal(augment(images, torch.arange(16), seed=0, epoch=0, kind="none"), images)


def test_an_image_gets_the_same_whatever_its_batch(images):
    numbers = torch.tensor([70, 3, 500_000, 8, 11, 21, 34, 55, 90, 1, 2, 4, 6, 7, 9, 10])
    whole = augment(images, numbers, seed=1, epoch=3, kind="randaugment")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    for part in order.split(5):
        assert torch.equal(augment(images[part], numbers[part], seed=1, epoch=3, kind="randaugment"), whole[part])


def test_draws_differ_by_seed_epoch_and_image_and_are_uniform():
    words = draw(torch.arange(20_000), seed=0, epoch=0)
    assert words.shape == (20_000, 16)
    for other in (draw(torch.arange(20_000), 1, 0), draw(torch.arange(20_000), 0, 1), words.roll(1, dims=0)):
        assert (other == words).float().mean() < 1e-3
    for column in range(1, 13, 3):
        counts = (words[:, column] % 13).bincount(minlength=13)
        assert (counts - 20_000 / 13).abs().max() < 5 * (20_000 / 13) ** 0.5
        counts = (1 + words[:, column + 1] % 16).bincount(minlength=17)
        assert counts[0] == 0 and (counts[1:] - 1250).abs().max() < 5 * 1250 ** 0.5


def test_normalise():
    grey = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(augmentation.normalise(grey), torch.tensor([-1.0, -0.6, 1.0]))
