"""Every published container: what it holds is loaded, and what is wrong with it is said in one line."""
import hashlib
import os
import pickle
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from models import context_files, ncnn_backbone, random_weights
from models.backbones import MobileFaceNet
from models.published import backbone_digest, frozen, load_backbone, load_contexts, load_diffusion, load_first_stage
from models.random_weights import DECODER_FILE, ENCODER_FILE
from models.schedule import linear_betas
from utils.diffusion.solvers import sample
from utils.runtime.errors import UserError

CONFIG = Path(".hydra") / "config.yaml"
EMA = Path("checkpoints") / "ema_averaged_model.ckpt"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    random_weights.write(folder, "small")
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def fault(load, *arguments, **options) -> str:
    """The error's message, which is one line and, after what is wrong, names the fix."""
    with pytest.raises(UserError) as error:
        load(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and ": " in message and "; " in message
    return message


def edit_config(folder: Path, **changes) -> None:
    """Set values by their dotted names, written with two underscores."""
    config = yaml.safe_load((folder / CONFIG).read_text())
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    (folder / CONFIG).write_text(yaml.safe_dump(config))


def edit_checkpoint(folder: Path, edit) -> None:
    checkpoint = torch.load(folder / EMA, weights_only=True)
    torch.save(edit(checkpoint), folder / EMA)


class Malicious:
    """A pickle of this makes the file `marker` when it is read without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


# ---- diffusion -------------------------------------------------------------------------------------------------------

def test_diffusion_folder(original):
    unet, settings = load_diffusion(original)
    assert settings["T"] == 1000 and settings["image_size"] == 64 and settings["latent_shape"] == (3, 16, 16)
    assert torch.equal(settings["betas"], linear_betas())
    checkpoint = torch.load(original / EMA, weights_only=True)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, checkpoint[f"eps_model.{name}"])
    assert not unet.training


def test_tables_computed_in_float32_are_accepted(folder):
    """As the published code computed them, from sums of logarithms."""
    betas = linear_betas()
    alpha_bars = (1 - betas).log().cumsum(0).exp()
    edit_checkpoint(folder, lambda checkpoint: checkpoint | {
        "alpha_bars": alpha_bars, "sqrt_one_minus_alpha_bars": (1 - alpha_bars).sqrt(),
        "one_minus_alphas_over_sqrt_one_minus_alpha_bars": (1 - (1 - betas)) / (1 - alpha_bars).sqrt()})
    load_diffusion(folder)


def test_module_prefix(folder):
    edit_checkpoint(folder, lambda checkpoint: {f"module.{name}": tensor for name, tensor in checkpoint.items()})
    assert load_diffusion(folder)[1]["T"] == 1000


def test_safetensors_in_the_same_layout(folder):
    save_file(torch.load(folder / EMA, weights_only=True), (folder / EMA).with_suffix(".safetensors"))
    (folder / EMA).unlink()
    assert load_diffusion(folder)[1]["T"] == 1000


def test_step_and_raw_weights(folder):
    marked = {70_000: 7.0, 125_000: 12.5}
    for step, value in marked.items():
        edit_checkpoint(folder, lambda checkpoint, value=value: checkpoint | {
            "eps_model.final.bias": torch.full((3,), value)})
        shutil.copy(folder / EMA, folder / "checkpoints" / f"ema_averaged_model_{step}.ckpt")
    edit_checkpoint(folder, lambda checkpoint: checkpoint | {"eps_model.final.bias": torch.full((3,), 1.0)})
    shutil.move(folder / EMA, folder / "checkpoints" / "model.ckpt")
    for step, value in marked.items():
        assert load_diffusion(folder, step=step)[0].final.bias[0] == value
    assert load_diffusion(folder, ema=False)[0].final.bias[0] == 1
    assert "70000, 125000" in fault(load_diffusion, folder, step=100_000)
    assert "model_70000.ckpt: no such file" in fault(load_diffusion, folder, step=70_000, ema=False)
    assert "ema_averaged_model.ckpt: no such file" in fault(load_diffusion, folder)


def test_interpolations(folder):
    """Nested ones, one inside a string, whole sections, and ones elsewhere that cannot be resolved."""
    edit_config(folder, constants__size_of={"latents": 64}, constants__space="latents", constants__px="6",
                constants__image_size="${constants.size_of.${constants.space}}",
                paths={"data": "${oc.env:DATA}/faces"}, sizes={"T": 1000}, diffusion__T="${again.T}",
                again="${sizes}", model__condition_type="C${letter}", letter="A")
    assert load_diffusion(folder)[1]["latent_shape"] == (3, 16, 16)


@pytest.mark.parametrize(("change", "words"), [
    ({"constants__image_size": "${dataset.size}"}, "constants.image_size: cannot be resolved (Interpolation key 'dataset.size'"),
    ({"constants__image_size": "${oc.env:SIZE}"}, "'${oc.env:SIZE}' cannot be resolved"),
    ({"constants__image_size": "${a}", "a": "${b}", "b": "${a}"}, "cannot be resolved (Recursive interpolation detected)"),
    ({"constants": {}}, "constants.image_size: is missing"),
    ({"constants__image_size": -1}, "constants.image_size: -1"),
    ({"latent_diffusion": False}, "latent_diffusion"),
    ({"diffusion__schedule_type": "cosine"}, "'cosine'"),
    ({"model__condition_type": "AdaGN"}, "model.condition_type: 'AdaGN'"),
    ({"model__n_context_classes": 10}, "model.n_context_classes: 10"),
    ({"model__width": 10}, "'width'"),
    ({"model": [1]}, "model: [1] describes no network"),
    ({"diffusion__prediction": "x_0"}, "diffusion.prediction: 'x_0' is not supported"),
    ({"diffusion__T": 500}, "disagree: 'betas' is of shape [1000], not [500]"),
    ({"model__initial_channels": 64}, "disagree: 'eps_model.image_proj.weight' is of shape"),
    ({"model__n_blocks_per_resolution": 2}, "disagree: 'eps_model.down.1.res.norm1.weight' is missing"),
    ({"model__is_attention": [False, False]}, "attn.x_proj_in.weight' is superfluous")])
def test_configurations_at_fault(folder, change, words):
    edit_config(folder, **change)
    message = fault(load_diffusion, folder)
    assert words in message and "config.yaml" in message


@pytest.mark.parametrize(("edit", "words"), [
    (lambda checkpoint: checkpoint | {"betas": checkpoint["betas"] * 2}, "'betas' is not that of the linear schedule"),
    (lambda checkpoint: checkpoint | {"alpha_bars": checkpoint["alpha_bars"] ** 2}, "'alpha_bars' is not"),
    (lambda checkpoint: {name: tensor for name, tensor in checkpoint.items() if name != "eps_model.norm.bias"},
     "'eps_model.norm.bias' is missing"),
    (lambda checkpoint: checkpoint | {"eps_model.extra": torch.zeros(1)}, "'eps_model.extra' is superfluous"),
    (lambda checkpoint: [1, 2], "holds no state dict"),
    (lambda checkpoint: {"step": 3}, "holds no state dict")])
def test_checkpoints_at_fault(folder, edit, words):
    edit_checkpoint(folder, edit)
    message = fault(load_diffusion, folder)
    assert words in message and "ema_averaged_model.ckpt" in message


def test_missing_files(folder):
    assert "nowhere" in fault(load_diffusion, folder / "nowhere")
    (folder / CONFIG).write_text("model: [unclosed")
    assert "config.yaml" in fault(load_diffusion, folder)
    (folder / CONFIG).unlink()
    assert "config.yaml" in fault(load_diffusion, folder)
    assert "none.pt" in fault(load_first_stage, folder / "none.pt", folder / DECODER_FILE)
    assert "none.pth" in fault(load_backbone, folder / "none.pth")
    assert "none.npy" in fault(load_contexts, folder / "none.npy")


# ---- damaged and malicious files -------------------------------------------------------------------------------------

READERS = {
    "ema_averaged_model.ckpt": lambda file: load_diffusion(file.parent.parent),
    ENCODER_FILE: lambda file: load_first_stage(file, file.parent / DECODER_FILE),
    "backbone.pth": load_backbone,
    "contexts.npy": load_contexts,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("length", [0, 10, 1000, 0.5])
def test_truncated(folder, name, length):
    file = folder / ("checkpoints" if name.endswith("ckpt") else "") / name
    torch.save({"0": np.ones(512, np.float32), "1": np.ones(512, np.float32)}, folder / "contexts.npy")
    torch.save(MobileFaceNet().state_dict(), folder / "backbone.pth")
    whole = file.read_bytes()
    file.write_bytes(whole[:int(length * len(whole)) if length < 1 else length])
    message = fault(READERS[name], file)
    assert name in message and "damaged" in message


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_no_file_runs_code(folder, tmp_path, name, container):
    file = folder / ("checkpoints" if name.endswith("ckpt") else "") / name
    marker = tmp_path / "ran"
    content = {"0": 1.0, "evil": Malicious(marker)}
    if container == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "zip")
    message = fault(READERS[name], file)
    assert name in message and "system" in message and "not read" in message
    assert not marker.exists()
    os.system(f"touch '{marker}'")
    assert marker.exists()  # so the command would have worked


# ---- first stage -----------------------------------------------------------------------------------------------------

def test_first_stage_halves(original, tmp_path):
    autoencoder = load_first_stage(original / ENCODER_FILE, original / DECODER_FILE)
    assert autoencoder.factor == 4 and not autoencoder.training
    for file in (ENCODER_FILE, DECODER_FILE):
        save_file(torch.load(original / file, weights_only=True), tmp_path / f"{file}.safetensors")
    again = load_first_stage(tmp_path / f"{ENCODER_FILE}.safetensors", tmp_path / f"{DECODER_FILE}.safetensors")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in autoencoder.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_whole_ldm_checkpoint(original, tmp_path, monkeypatch, prefix):
    """As Lightning wrote it: the state dict beside the classes of callbacks, which nobody here has installed."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    state = {**torch.load(original / ENCODER_FILE, weights_only=True),
             **torch.load(original / DECODER_FILE, weights_only=True)}
    others = {"loss.discriminator.main.0.weight": torch.zeros(1)} if not prefix else {
        "model.diffusion_model.out.0.weight": torch.zeros(1), "betas": torch.zeros(1)}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"epoch": 3, "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
                    "state_dict": {prefix + name: tensor for name, tensor in state.items()} | others},
                   tmp_path / "model.ckpt")
    halves = load_first_stage(original / ENCODER_FILE, original / DECODER_FILE).state_dict()
    for encoder_file, decoder_file in [("model.ckpt", "model.ckpt"), (ENCODER_FILE, "model.ckpt")]:
        shutil.copy(original / ENCODER_FILE, tmp_path)
        whole = load_first_stage(tmp_path / encoder_file, tmp_path / decoder_file).state_dict()
        assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in halves)


def test_first_stages_at_fault(folder):
    message = fault(load_first_stage, folder / DECODER_FILE, folder / ENCODER_FILE)
    assert "is missing" in message and ENCODER_FILE in message
    message = fault(load_first_stage, folder / EMA, folder / DECODER_FILE)
    assert "ema_averaged_model.ckpt: 'betas' is of no VQ first stage" in message


# ---- recognisers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 7, "net_state_dict": state},
                                  lambda state: {"state_dict": {f"module.{name}": state[name] for name in state}}])
def test_backbone_containers(tmp_path, wrap):
    torch.manual_seed(0)
    network = MobileFaceNet(128, 96).eval()
    torch.save(wrap(network.state_dict()), tmp_path / "backbone.pth")
    faces = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "backbone.pth")(faces), network(faces))


def test_other_networks_are_no_backbone(original):
    assert ENCODER_FILE in fault(load_backbone, original / ENCODER_FILE)


def test_an_ncnn_recogniser_needs_its_package_and_both_files(tmp_path, monkeypatch):
    param = tmp_path / "net.param"
    assert "net.param: no such file" in fault(load_backbone, param)
    param.write_text("7767517")
    monkeypatch.setitem(sys.modules, "ncnn", None)  # as where it is not installed
    assert fault(load_backbone, param).endswith("needs the package ncnn; pip install ncnn")
    monkeypatch.setitem(sys.modules, "ncnn", types.ModuleType("ncnn"))
    assert "net.bin: no such file" in fault(load_backbone, param)


def test_ncnn_is_given_no_network_that_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ncnn", types.ModuleType("ncnn"))  # without Net: reading it would fail
    (tmp_path / "net.param").write_text("7767517")
    (tmp_path / "net.bin").write_bytes(b"weights")
    message = fault(load_backbone, tmp_path / "net.param")
    assert "net.param: is no network that is known here" in message and backbone_digest(tmp_path / "net.param") in message


class FirstColumns:
    """Stands in for ncnn: a network whose embedding is the first 16 columns of the face's first row."""

    class Net(types.SimpleNamespace):
        def __init__(self) -> None:
            super().__init__(opt=types.SimpleNamespace(), load_param=lambda file: 0, load_model=lambda file: 0)

        def create_extractor(self) -> types.SimpleNamespace:
            given = {}
            return types.SimpleNamespace(input=given.__setitem__, extract=lambda name: (0, given["data"][0, 0, :16]))

    Mat = staticmethod(np.array)


@pytest.fixture
def ncnn_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(sys.modules, "ncnn", FirstColumns)
    (tmp_path / "net.param").write_text("7767517")
    (tmp_path / "net.bin").write_bytes(b"weights")
    monkeypatch.setattr(ncnn_backbone, "TRUSTED", {backbone_digest(tmp_path / "net.param")})
    return tmp_path / "net.param"


def test_an_ncnn_recogniser_is_shown_what_it_was_made_for(ncnn_file):
    backbone = load_backbone(ncnn_file)
    faces = torch.rand(2, 3, 112, 112) * 2 - 1
    torch.testing.assert_close(backbone(faces), faces[:, 0, 0, :16] * 127.5 / 128)
    assert backbone.on_arcface  # whoever embeds shifted faces moves them back for it


def test_training_is_refused_a_recogniser_without_gradients(ncnn_file):
    message = fault(frozen, load_backbone(ncnn_file), ncnn_file, torch.device("cpu"))
    assert message.startswith(f"{ncnn_file}: ") and "set contexts.recogniser" in message
    network = frozen(MobileFaceNet(), "net.pth", torch.device("cpu"))
    assert not network.training and not any(weight.requires_grad for weight in network.parameters())


def test_the_digest_of_a_recogniser_is_that_of_all_its_files(ncnn_file, tmp_path):
    torch.save(MobileFaceNet().state_dict(), tmp_path / "backbone.pth")
    assert backbone_digest(tmp_path / "backbone.pth") == hashlib.sha256((tmp_path / "backbone.pth").read_bytes()).hexdigest()
    parts = [hashlib.sha256(content).hexdigest() for content in (b"7767517", b"weights")]
    assert backbone_digest(ncnn_file) == hashlib.sha256("".join(parts).encode()).hexdigest()


# ---- contexts --------------------------------------------------------------------------------------------------------

def vectors(rows: int = 4, width: int = 512) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


def save_as_numpy_1_did(contexts: dict[str, np.ndarray], file: Path) -> None:
    """The same pickle, in which numpy's constructor has the name that numpy 1 gave it."""
    torch.save(contexts, file)
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if name.endswith("data.pkl"):
                assert data.count(b"cnumpy._core.multiarray\n") == 1
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            archive.writestr(name, data)


def save_legacy(contexts: dict[str, np.ndarray], file: Path) -> None:
    torch.save(contexts, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, save_as_numpy_1_did, save_legacy])
def test_published_contexts(tmp_path, save):
    rows = vectors()
    save(dict(zip(("0", "00012", "2", "anna"), rows, strict=True)), tmp_path / "contexts.npy")
    ids, contexts = load_contexts(tmp_path / "contexts.npy")
    assert ids == ["0", "12", "2", "anna"]
    assert contexts.dtype == np.float32
    assert np.allclose(contexts, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-7)


def test_plain_arrays_are_normalised(tmp_path):
    rows = vectors().astype(np.float64)
    np.save(tmp_path / "contexts.npy", rows)
    ids, contexts = load_contexts(tmp_path / "contexts.npy")
    assert ids == ["0", "1", "2", "3"] and contexts.dtype == np.float32
    assert np.allclose(contexts, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-7)


@pytest.mark.parametrize("convert", [
    torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.double, torch.nn.Parameter, lambda row: row.clone().requires_grad_(),
    lambda row: row.numpy(), lambda row: row.double().numpy(), lambda row: row.half().numpy(), torch.Tensor.tolist])
def test_contexts_of_any_float_type_are_read(tmp_path, convert):
    rows = torch.from_numpy(vectors()).bfloat16().float()
    torch.save({np.str_(name): convert(row) for name, row in zip("abcd", rows, strict=True)}, tmp_path / "contexts.pt")
    ids, contexts = load_contexts(tmp_path / "contexts.pt")
    assert ids == list("abcd") and contexts.dtype == np.float32
    assert np.allclose(contexts, torch.nn.functional.normalize(rows), atol=1e-6)


@pytest.mark.parametrize("row, words", [
    (torch.ones(1).expand(10**9), "is expanded"), (torch.ones(4, dtype=torch.complex64), "is complex"),
    (torch.tensor([1, torch.nan]), "NaN"), (torch.ones(4).to_sparse(), "no plain tensor"), ("text", "not floats [N, D]"),
    (torch.empty(4, device="meta"), "no plain tensor"), (torch.ones(4, dtype=torch.int64), "not floats [N, D]")])
def test_vectors_that_are_no_plain_floats_are_refused(tmp_path, row, words):
    torch.save({"a": row, "b": row}, tmp_path / "contexts.pt")
    assert words in fault(load_contexts, tmp_path / "contexts.pt")


def test_vectors_that_share_one_memory_cannot_multiply(tmp_path):
    one = torch.ones(100_000)
    torch.save({str(number): one for number in range(100)}, tmp_path / "contexts.pt")
    assert "larger than the file" in fault(load_contexts, tmp_path / "contexts.pt")


def test_the_suffix_of_contexts_does_not_matter(tmp_path):
    context_files.write(tmp_path / "ours.npz", list("abcd"), context_files.normalise(vectors()))
    for name in ("ours.npy", "ours.pt", "ours"):
        shutil.copy(tmp_path / "ours.npz", tmp_path / name)
        assert load_contexts(tmp_path / name)[0] == list("abcd")


def test_our_own_contexts_come_back_bit_for_bit(tmp_path):
    contexts = context_files.normalise(vectors(5))
    context_files.write(tmp_path / "ours.npz", list("abcde"), contexts)
    ids, again = load_contexts(tmp_path / "ours.npz")
    assert ids == list("abcde") and np.array_equal(again, contexts)


@pytest.mark.parametrize(("content", "words"), [
    (vectors() * np.array([[1], [1], [np.nan], [1]], np.float32), "row 2 holds NaN"),
    (vectors() * np.array([[1], [0], [1], [1]], np.float32), "row 1 is all zeros"),
    (vectors(rows=1), "at least two"), (vectors()[0], "shape (512,)"), (np.float32(3), "not floats [N, D]"),
    (vectors()[None], "shape (1, 4, 512)"), (np.ones((3, 512), np.int64), "int64"),
    (np.array([{"a": 1}], dtype=object), "is not a whole array of numbers"),
    (dict(zip(("1", "01"), vectors(2), strict=True)), "'1' occurs more than once"),
    ({"0": vectors()[0], "1": vectors()[1][:100]}, "differ in shape"),
    ({"0": vectors()[0]}, "at least two"), ({}, "no vectors by identity"), ([1, 2], "no vectors by identity"),
    ({"0": "text", "1": "text"}, "not floats [N, D]")])
def test_contexts_at_fault(tmp_path, content, words):
    file = tmp_path / "contexts.npy"
    if isinstance(content, np.ndarray | np.float32):
        np.save(file, content)
    else:
        torch.save(content, file)
    message = fault(load_contexts, file)
    assert words in message and message.startswith(str(file))


# ---- random weights --------------------------------------------------------------------------------------------------

def test_random_weights_depend_on_the_seed_alone(original, tmp_path):
    random_weights.write(tmp_path / "same", "small", seed=0)
    random_weights.write(tmp_path / "other", "small", seed=1)
    for file in (EMA, Path(ENCODER_FILE), Path(DECODER_FILE)):
        first, same, other = (torch.load(folder / file, weights_only=True)
                              for folder in (original, tmp_path / "same", tmp_path / "other"))
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)
        assert all(tensor.any() for tensor in first.values())


def test_random_weights_make_finite_pictures_with_contrast(original):
    unet, settings = load_diffusion(original)
    autoencoder = load_first_stage(original / ENCODER_FILE, original / DECODER_FILE)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(2, *settings["latent_shape"], generator=generator)
    pictures = []
    with torch.inference_mode():
        for context in torch.nn.functional.normalize(torch.randn(2, 512, generator=generator)):
            tokens = unet.context_tokens(context.expand(2, -1))
            x_0 = sample(lambda x, t, tokens=tokens: unet(x, torch.full((2,), t), tokens), x_T, "ddim", 20, None)
            pictures.append(autoencoder.decode(x_0))
    assert torch.stack(pictures).isfinite().all()
    assert 0.3 < pictures[0].std() < 1.5
    assert (pictures[0] - pictures[1]).abs().mean() > 1e-3  # the same noise, another identity
    assert (pictures[0][0] - pictures[0][1]).abs().mean() > 0.1  # the same identity, other noise
