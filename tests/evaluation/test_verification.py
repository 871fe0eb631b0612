"""Pair protocols against plain implementations, IJB against golden values, and the readers against hostile files."""
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config.config import Config
from config.load import settings
from tests.runtime.mutations import check_reader
from utils.evaluation import verification
from utils.evaluation.verification import BENCHMARKS, IJBCMeta, decode, ijb, read_bin, read_ijbc_meta, read_lfw_pairs, ten_fold
from utils.runtime.errors import UserError

DATA = Path(__file__).parents[1] / "data"


# ---- ten folds -------------------------------------------------------------------------------------------------------

def plain_ten_fold(a, b, same):
    """The protocol in explicit loops: folds, thresholds, pairs."""
    distances = []
    for u, v in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        u, v = u / np.sqrt(sum(u * u)), v / np.sqrt(sum(v * v))
        distances.append(sum((u - v) ** 2))
    n, accuracies, start = len(same), [], 0
    for fold in range(10):
        stop = start + n // 10 + (fold < n % 10)
        inside, outside = range(start, stop), [*range(start), *range(stop, n)]
        best_threshold, best_right = None, -1
        for k in range(400):
            right = sum((distances[p] < k * 0.01) == same[p] for p in outside)
            if right > best_right:
                best_threshold, best_right = k * 0.01, right
        accuracies.append(sum((distances[p] < best_threshold) == same[p] for p in inside) / len(inside))
        start = stop
    return np.mean(accuracies), np.std(accuracies)


@pytest.mark.parametrize(("pairs", "noise"), [(200, 0.8), (93, 1.5), (10, 1.0)])
def test_ten_fold_equals_a_plain_implementation(pairs, noise):
    rng = np.random.default_rng(pairs)
    a = rng.normal(size=(pairs, 16)).astype(np.float32)
    same = rng.random(pairs) < 0.5
    b = np.where(same[:, None], a, rng.normal(size=a.shape)) + noise * rng.normal(size=a.shape)
    assert ten_fold(a, b, same) == pytest.approx(plain_ten_fold(a, b, same), abs=1e-12)


def test_folds_follow_the_order_and_ties_take_the_lowest_threshold():
    # Every matched pair has distance 0.5, every mismatched one 1.5: the best threshold is the first above 0.5, so the
    # tenth fold's matched pairs at 0.6 are all missed, its mismatched ones are right.
    distance = np.tile([0.5, 1.5], 50)
    distance[90::2] = 0.6
    same = np.tile([True, False], 50)
    angle = np.arccos(1 - distance / 2)
    a = np.tile([1.0, 0.0], (100, 1))
    b = np.stack((np.cos(angle), np.sin(angle)), axis=1)
    mean, std = ten_fold(a, b, same)
    assert mean == pytest.approx(0.95)
    assert std == pytest.approx(0.15)


@pytest.mark.parametrize("break_it", [
    lambda a, b, same: (a[:9], b[:9], same[:9]),
    lambda a, b, same: (a, b[:-1], same),
    lambda a, b, same: (a, b, same[:-1]),
    lambda a, b, same: (np.where(np.arange(20)[:, None] == 7, np.nan, a), b, same),
    lambda a, b, same: (a, np.where(np.arange(20)[:, None] == 7, 0, b), same),
])
def test_pairs_that_cannot_be_scored_are_refused(break_it):
    rng = np.random.default_rng(0)
    with pytest.raises(UserError):
        ten_fold(*break_it(rng.normal(size=(20, 4)), rng.normal(size=(20, 4)), rng.random(20) < 0.5))


# ---- IJB -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "ijb_small.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def meta_of(arrays) -> IJBCMeta:
    return IJBCMeta(None, None, *(arrays[name] for name in ("faceness", "template", "media", "p1", "p2", "label")))


def test_ijb_equals_the_golden_values(golden, monkeypatch):
    score, tar = ijb(golden["features"], meta_of(golden), golden["far"])
    np.testing.assert_allclose(score, golden["score"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(tar, golden["tar_nearest_fpr"])
    monkeypatch.setattr(verification, "IMAGE_BLOCK", 50)
    monkeypatch.setattr(verification, "PAIR_BLOCK", 1000)
    in_blocks, _ = ijb(golden["features"], meta_of(golden), golden["far"])
    np.testing.assert_allclose(in_blocks, score, rtol=0, atol=1e-12)


def test_ijb_does_not_depend_on_the_order_or_numbering_of_images(golden):
    order = np.random.default_rng(0).permutation(len(golden["template"]))
    shuffled = golden | {name: golden[name][order] for name in ("features", "faceness", "template", "media")}
    for name in ("template", "p1", "p2"):
        shuffled[name] = shuffled[name] * 37 + 5
    score, tar = ijb(shuffled["features"], meta_of(shuffled), shuffled["far"])
    np.testing.assert_allclose(score, golden["score"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(tar, golden["tar_nearest_fpr"])


def test_a_media_number_shared_by_two_templates_is_two_media():
    features = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]], dtype=np.float32)
    meta = IJBCMeta(None, None, np.ones(4), *map(np.array, ([1, 1, 1, 2], [8, 8, 9, 8], [1, 2], [2, 2], [0, 1])))
    score, _ = ijb(features, meta, [0.1])
    # template 1: mean of (1, 0) and (0, 1), plus (0, 1) = (0.5, 1.5); template 2: (1, 1)
    np.testing.assert_allclose(score, [2 / np.sqrt(2.5 * 2), 1])


@pytest.mark.parametrize(("change", "message"), [
    ({"faceness": 0}, "IJB templates"),
    ({"features": np.nan}, "IJB templates"),
])
def test_ijb_refuses_templates_that_have_no_direction(golden, change, message):
    broken = golden | {name: np.full_like(golden[name], value) for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        ijb(broken["features"], meta_of(broken), broken["far"])


POINTS = "1.jpg 38 51 73 52 56 71 41 92 70 92 0.5\n2.jpg 1.5 2 8 2 5 6 2 9 7 10 0.25\n"


def write_meta(folder, media="1.jpg 1 10\n2.jpg 2 11\n", points=POINTS, pairs="1 2 0\n1 1 1\n"):
    for name, text in (("face_tid_mid", media), ("name_5pts_score", points), ("template_pair_label", pairs)):
        (folder / f"ijbc_{name}.txt").write_text(text)
    return folder


def test_ijbc_meta_files_are_read(tmp_path):
    meta = read_ijbc_meta(write_meta(tmp_path))
    assert meta.names.tolist() == ["1.jpg", "2.jpg"]
    assert meta.template.tolist() == [1, 2] and meta.media.tolist() == [10, 11]
    np.testing.assert_array_equal(meta.landmarks[1], [[1.5, 2], [8, 2], [5, 6], [2, 9], [7, 10]])
    assert meta.faceness.tolist() == [0.5, 0.25]
    assert (meta.p1.tolist(), meta.p2.tolist(), meta.label.tolist()) == ([1, 1], [2, 1], [0, 1])


@pytest.mark.parametrize(("change", "message"), [
    ({"media": "1.jpg 1 10\n2.jpg 2\n"}, "tid_mid.txt: line 2 is not"),
    ({"points": "1.jpg 1 2 3 4 5 6 7 8 9 10\n"}, "score.txt: line 1 is not"),
    ({"pairs": "1 2 0\n\n1 x 1\n"}, "label.txt: line 3 is not"),
    ({"pairs": "1 2 0\n1 2 2\n"}, "neither 0 nor 1"),
    ({"pairs": "1 2 0.5\n"}, "line 1 is not"),
    ({"media": "2.jpg 2 11\n1.jpg 1 10\n"}, "same order"),
    ({"points": POINTS.replace("1.5", "nan")}, "score.txt: the landmarks of 2.jpg are not finite; "),
    ({"points": POINTS.replace("1.5", "-inf")}, "score.txt: the landmarks of 2.jpg are not finite; "),
    ({"points": POINTS.replace("1.5 2 8 2 5 6 2 9 7 10", "1 2 3 4 5 6 7 8 9 10")}, "the landmarks of 2.jpg coincide or lie on a"),
    ({"points": POINTS.replace("1.5 2 8 2 5 6 2 9 7 10", "5 5 5 5 5 5 5 5 5 5")}, "the landmarks of 2.jpg coincide or lie on a"),
    ({"points": POINTS.replace("38 51 73 52 56 71 41 92 70 92", "73 52 38 51 56 71 70 92 41 92")}, "of 1.jpg are mirrored"),
    ({"points": POINTS.replace("0.25", "nan")}, "score.txt: the score of 2.jpg is not finite; "),
    ({"pairs": "1 99999999999999999999 0\n"}, "label.txt: line 1 is not"),
    ({"pairs": "1 2 0\n2 1 0\n"}, "label.txt: all its labels are equal; "),
    ({"pairs": "1 2 0\n1 9 1\n"}, "label.txt: names template 9, which has no image in ijbc_face_tid_mid.txt; "),
])
def test_malformed_meta_lines_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read_ijbc_meta(write_meta(tmp_path, **change))


@pytest.mark.filterwarnings("ignore:loadtxt")
def test_empty_and_missing_meta_files_are_named(tmp_path):
    write_meta(tmp_path, pairs="")
    with pytest.raises(UserError, match="label.txt: is empty"):
        read_ijbc_meta(tmp_path)
    (tmp_path / "ijbc_template_pair_label.txt").unlink()
    with pytest.raises(UserError, match="label.txt: no such file"):
        read_ijbc_meta(tmp_path)


# ---- pairs.txt -------------------------------------------------------------------------------------------------------

PAIRS = "1\t2\nAnn_Lee\t1\t4\nBo\t2\t13\nAnn_Lee\t1\tBo\t2\nBo\t1\tCy_El\t20\n"


def test_lfw_pairs_are_read_in_order(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    pairs, same = read_lfw_pairs(tmp_path / "pairs.txt")
    assert pairs[0] == ("Ann_Lee/Ann_Lee_0001", "Ann_Lee/Ann_Lee_0004")
    assert pairs[3] == ("Bo/Bo_0001", "Cy_El/Cy_El_0020")
    assert same.tolist() == [True, False, True, False]  # dealt into ten folds


def test_pairs_of_two_folds_are_dealt_into_ten(tmp_path):
    """As LFW's folds 9 and 10 alone would be: in their own order a fold would be of one kind."""
    lines = ["2\t20", *(line for fold in range(2) for kind in ("A\t{}\t0", "A\t{}\tB\t0") for line in (
        kind.format(20 * fold + k) for k in range(20)))]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    pairs, same = read_lfw_pairs(tmp_path / "pairs.txt")
    assert same.reshape(10, 8).tolist() == [[True] * 4 + [False] * 4] * 10
    numbers = [int(first[-4:]) for first, _ in pairs]
    assert numbers[:8] == [0, 1, 2, 3] * 2 and sorted(numbers) == sorted([*range(40)] * 2)
    (tmp_path / "pairs.txt").write_text("\n".join(["10\t4", *lines[1:]]) + "\n")  # ten folds stay as they are
    assert read_lfw_pairs(tmp_path / "pairs.txt")[1].tolist() == ([True] * 20 + [False] * 20) * 2


@pytest.mark.parametrize(("text", "message"), [
    ("", "line 1"), ("Ann\t1\t2\n", "line 1"), (PAIRS.replace("\t13", ""), "line 3"),
    (PAIRS.replace("13", "x"), "line 3"), (PAIRS.replace("13", "1" * 5000), "line 3"),
    (PAIRS.replace("Bo\t2", "../Bo\t2"), "line 3"), (PAIRS.replace("Bo\t2", "B\0o\t2"), "line 3"), ("0 0\n", "holds 0 matched"),
    (PAIRS[:-15], "holds 2 matched and 1 mismatched"),
])
def test_malformed_pairs_are_named(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_lfw_pairs(tmp_path / "pairs.txt")


def test_pairs_may_begin_with_a_byte_order_mark_but_must_be_utf_8(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS, encoding="utf-8-sig")
    assert len(read_lfw_pairs(tmp_path / "pairs.txt")[0]) == 4
    (tmp_path / "pairs.txt").write_text(PAIRS, encoding="utf-16")
    with pytest.raises(UserError, match=r"pairs.txt: is not UTF-8 \(.*; save the pairs as UTF-8$"):
        read_lfw_pairs(tmp_path / "pairs.txt")


# ---- .bin benchmarks -------------------------------------------------------------------------------------------------

def test_benchmarks_are_a_plain_dict_of_insightfaces_files():
    assert type(BENCHMARKS) is dict
    assert list(BENCHMARKS) == ["LFW", "AgeDB-30", "CFP-FP", "CALFW", "CPLFW"]  # in the order of the paper's table
    files = [f"{stem}.bin" for stem in BENCHMARKS.values()]
    assert files == ["lfw.bin", "agedb_30.bin", "cfp_fp.bin", "calfw.bin", "cplfw.bin"]
    [bins] = [field for name, field in settings(Config) if name == "verify.bins"]
    assert all(file in bins.metadata["help"] for file in files)


ENCODED = [b"\xff\xd8first", b"\x00\xe9second", b"third", b"fourth"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("images", "same"), [
    (ENCODED, [True, False]),
    ([np.frombuffer(image, np.uint8).copy() for image in ENCODED], [np.True_, np.False_]),
    (ENCODED, np.array([True, False])),
], ids=["bytes", "arrays", "label array"])
def test_bin_files_of_every_protocol_are_read(tmp_path, protocol, images, same):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, same), protocol))
    read, labels = read_bin(tmp_path / "lfw.bin")
    assert read == ENCODED
    assert labels.dtype == bool and labels.tolist() == [True, False]


def test_bin_files_of_numpy_1_and_of_python_2_are_read(tmp_path):
    arrays = [np.frombuffer(image, np.uint8).copy() for image in ENCODED]
    numpy_1 = pickle.dumps((arrays, [np.True_, np.False_]), 2).replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "numpy_1.bin").write_bytes(numpy_1)
    assert read_bin(tmp_path / "numpy_1.bin")[0] == ENCODED
    # protocol 2 as Python 2 writes it: str becomes (SHORT_)BINSTRING
    strings = b"".join(b"U" + bytes([len(image)]) + image for image in ENCODED)
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
             b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02b1K\x00K\x01\x87R"
             b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x00tb")
    for name, same in (("list", b"](\x88\x89e"), ("array", array)):
        (tmp_path / f"python_2_{name}.bin").write_bytes(b"\x80\x02](" + strings + b"e" + same + b"\x86.")
        images, labels = read_bin(tmp_path / f"python_2_{name}.bin")
        assert images == ENCODED and labels.tolist() == [True, False]


class Run:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Build(Run):
    """Unpickles by calling a function and setting the state of what it gives."""

    def __init__(self, function, arguments, state):
        self.call = function, arguments, state


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("attack", [
    Run(os.remove, "trace"), Run(eval, "__import__('os').remove('trace')"), Run(getattr, "", "join"),
    Run(np.load, "trace"), Run(np.fromfile, "trace"),
], ids=lambda attack: attack.call[0].__name__)
def test_a_malicious_bin_file_runs_nothing(tmp_path, monkeypatch, protocol, attack):
    monkeypatch.chdir(tmp_path)
    Path("trace").touch()
    Path("lfw.bin").write_bytes(pickle.dumps(([attack], [True]), protocol))
    with pytest.raises(UserError, match=f"lfw.bin: .* asks to load .*{attack.call[0].__name__}"):
        read_bin("lfw.bin")
    assert Path("trace").exists()


@pytest.mark.parametrize("content", [
    b"", b"not a pickle", pickle.dumps((ENCODED, [True, False]))[:-20], pickle.dumps(ENCODED), pickle.dumps(3),
    pickle.dumps((ENCODED[:3], [True, False])), pickle.dumps(([], [])), pickle.dumps(([10**12] * 2, [True])),
    pickle.dumps((["text"] * 2, [True])),
], ids=["empty", "text", "truncated", "no labels", "a number", "odd", "no pairs", "numbers", "strings"])
def test_damaged_bin_files_are_named(tmp_path, content):
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(UserError, match="lfw.bin: .*; download it again"):
        read_bin(tmp_path / "lfw.bin")


def test_an_array_that_would_corrupt_the_memory_is_refused(tmp_path):
    """Of type object, with flags that make numpy take the file's bytes for pointers."""
    array = np.zeros(4, np.uint8)
    state = (3, "|", None, None, None, -1, -1, 63)
    hostile = Build(array.__reduce__()[0], (np.ndarray, (0,), b"b"),
                    (1, (4,), Build(np.dtype, ("O8", False, True), state), False, b"\x41" * 32))
    for protocol in range(2, 6):
        (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([hostile] * 2, [True]), protocol))
        with pytest.raises(UserError, match="lfw.bin: .*not plain numbers"):
            read_bin(tmp_path / "lfw.bin")


@pytest.mark.parametrize("same", [[2], ["yes"], [None], [[True]], [np.float32(np.nan)], [np.ones(1)], {True: 1}.items()])
def test_a_label_is_true_or_false(tmp_path, same):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((ENCODED[:2], list(same))))
    with pytest.raises(UserError, match="neither True nor False|is not a .bin benchmark"):
        read_bin(tmp_path / "lfw.bin")


def test_what_one_pickle_names_often_is_made_once(tmp_path):
    image = np.zeros(10**6, np.uint8)
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([image] * 2000, [True] * 1000)))
    images, _ = read_bin(tmp_path / "lfw.bin")
    assert len(images) == 2000 and len({id(image) for image in images}) == 1


def test_a_missing_bin_file_is_named(tmp_path):
    with pytest.raises(UserError, match="lfw.bin: no such file"):
        read_bin(tmp_path / "lfw.bin")


PIXELS = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)


def png(size: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(PIXELS[:size, :size]).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("encoded", [
    b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n", png(111), png(112)[:200],
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xea\x60\0\0\xea\x60\x08\2\0\0\0"],
    ids=["nothing", "EPS", "another size", "cut", "60,000 x 60,000"])
def test_an_image_of_a_benchmark_that_is_none_is_refused(encoded):
    with pytest.raises(UserError, match="verify.bins: an image is damaged or not 112 x 112; "):
        decode(encoded)
    np.testing.assert_array_equal(decode(png(112)), PIXELS)


# ---- random damage ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", range(2, 6))
def test_damaged_bin_files_are_read_or_refused(tmp_path, protocol):
    images = [np.frombuffer(image, np.uint8).copy() for image in ENCODED[:2]] + ENCODED[2:]
    file = tmp_path / "lfw.bin"
    check_reader(file, pickle.dumps((images, [np.True_, False]), protocol), lambda: read_bin(file))


def test_damaged_pairs_are_read_or_refused(tmp_path):
    check_reader(tmp_path / "pairs.txt", PAIRS.encode(), lambda: read_lfw_pairs(tmp_path / "pairs.txt"))


@pytest.mark.parametrize("name", ["face_tid_mid", "name_5pts_score", "template_pair_label"])
def test_damaged_meta_files_are_read_or_refused(tmp_path, name):
    file = write_meta(tmp_path) / f"ijbc_{name}.txt"
    check_reader(file, file.read_bytes(), lambda: read_ijbc_meta(tmp_path))
