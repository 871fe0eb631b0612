"""Every setting of every stage. Edit the values here, or override them by name on the command line:

    python sample.py guidance.w=1.0 guidance.schedule=linear
    python sample.py --preset paper_casia sampling.solver=ddim sampling.steps=200
    python sample.py --help

The values in the classes are the preset `demo`: a miniature that runs on a laptop in minutes. PRESETS, at the end, lists
what the other presets change; add your own there. `paper` beside a setting is the value of NegFaceDiff
(arXiv 2508.09661), or of AdaptDiff (arXiv 2603.29569) where it says so.
"""
from dataclasses import dataclass, field


def setting(default, help, *, choices=None, unit=None, minimum=None, maximum=None, paper=None):
    """A setting with what `--help` says of it and what its values are checked against."""
    return field(default=default, metadata=dict(help=help, choices=choices, unit=unit, minimum=minimum,
                                                maximum=maximum, paper=paper))


@dataclass(frozen=True)
class Paths:
    output: str = setting("output", "folder that everything is written to")
    run: str = setting("", "name of the run's folder in paths.output; empty: <preset>/<a name from the settings>")


@dataclass(frozen=True)
class Contexts:
    """Stage 1: the identities, as recognition embeddings of unit length."""

    source: str = setting("gaussian", "uniform: drawn on the unit sphere; gaussian: from the distribution of real "
                          "embeddings in contexts.statistics; published: read from contexts.file; extracted: embeddings "
                          "of the faces in contexts.faces",
                          choices=("uniform", "gaussian", "published", "extracted"), paper="uniform")
    number: int = setting(100, "contexts drawn (uniform, gaussian)", minimum=2, paper="15000")
    dimension: int = setting(128, "width of a context (uniform); the diffusion model decides it", minimum=2, paper="512")
    seed: int = setting(0, "seed of the draw (uniform, gaussian)", minimum=0, paper="unseeded")
    statistics: str = setting("models/demo/context_statistics.npz", "gaussian: mean and covariance of real embeddings, as "
                              "train_diffusion.py writes them")
    file: str = setting("", "published: a contexts file (.npy of the published code, plain .npy, or .npz)")
    faces: str = setting("", "extracted: a folder of identity folders with face images")
    recogniser: str = setting("", "extracted: weights of the recogniser that embeds the faces",
                              paper="ElasticFace-Arc R100")
    per: str = setting("identity", "extracted: one context per identity (the mean) or per image",
                       choices=("identity", "image"))
    name: str = setting("", "name of the contexts file in <output>/contexts; empty: made from these settings")


@dataclass(frozen=True)
class Negatives:
    """Stage 2: for each identity, the one whose pull is subtracted."""

    strategy: str = setting("far", "which other identity, by cosine similarity: close (highest), mid (median), "
                            "far (lowest), rand (any other), null (the zero vector), custom (negatives.custom_file)",
                            choices=("close", "mid", "far", "rand", "null", "custom"), paper="all but custom; far is best")
    pool: int = setting(0, "negatives are chosen among the first so many contexts; 0: all", unit="contexts",
                        minimum=0, paper="10050")
    seed: int = setting(0, "seed of rand", minimum=0, paper="unseeded")
    custom_file: str = setting("", "custom: a CSV with the columns identity, negative")


@dataclass(frozen=True)
class Model:
    """The identity-conditioned latent diffusion model (IDiff-Face, arXiv 2308.04995)."""

    diffusion: str = setting("models/demo", "folder with .hydra/config.yaml and checkpoints/, as published")
    step: int = setting(0, "checkpoint of that training step; 0: the final one", unit="steps", minimum=0)
    ema: bool = setting(True, "the averaged weights; false: the raw ones", paper="true")
    first_stage_encoder: str = setting("models/demo/first_stage_encoder.safetensors",
                                       "encoder half of the VQ first stage, or a whole LDM model.ckpt")
    first_stage_decoder: str = setting("models/demo/first_stage_decoder.safetensors",
                                       "decoder half of the VQ first stage, or a whole LDM model.ckpt")


@dataclass(frozen=True)
class Guidance:
    """Equation 3: eps = (1 + w) eps(x_t, t, c_pos) - w eps(x_t, t, c_neg)."""

    w: float = setting(0.5, "scale of the negative context; 0 is off: the IDiff-Face baseline, one pass",
                       minimum=0.0, paper="0.5; AdaptDiff: 1.0")
    schedule: str = setting("constant", "w(t): constant; linear: w (1 - t/T), growing towards the image; reverse: w t/T; "
                            "interval: w where t lies in guidance.interval, else 0 (arXiv 2404.07724)",
                            choices=("constant", "linear", "reverse", "interval"), paper="constant; AdaptDiff: linear")
    interval: tuple[int, ...] = setting((0, 999), "interval: lowest and highest timestep t that is guided",
                                        unit="timesteps", minimum=0)


@dataclass(frozen=True)
class Sampling:
    """Stage 3: from contexts to images."""

    identities: int = setting(32, "the first so many contexts are sampled", minimum=1,
                              paper="10050, of which alignment keeps 10000")
    images_per_identity: int = setting(6, "images of each identity", minimum=1, paper="50; AdaptDiff: 60")
    solver: str = setting("dpm++", "ddpm (arXiv 2006.11239), ddim (2010.02502, eta 0) or dpm++ "
                          "(DPM-Solver++ 2M, 2211.01095)", choices=("ddpm", "ddim", "dpm++"), paper="ddpm; ablation: ddim")
    steps: int = setting(15, "denoising steps, evenly spaced over the model's T", minimum=1,
                         paper="1000 (ddpm), 200 (ddim)")
    as_published: bool = setting(False, "ddpm and ddim exactly as the published code runs them, habits included",
                                 paper="true")
    batch_size: int = setting(16, "images denoised together, of whatever identities", minimum=1, paper="50")
    precision: str = setting("auto", "fp32, bf16, or auto: bf16 where the device is fast at it",
                             choices=("auto", "fp32", "bf16"), paper="fp32")
    seed: int = setting(42, "seed of the noise; image (identity, k) has its own stream", minimum=0, paper="42")


@dataclass(frozen=True)
class Align:
    """Stage 4: five landmarks (MTCNN), similarity transform to 112 x 112."""

    images: str = setting("", "folder of identity folders to align; empty: the run's samples")
    template: str = setting("arcface", "arcface: the benchmarks'; arcface_shifted: 8 px further left, as in the paper's "
                            "training crops", choices=("arcface", "arcface_shifted"),
                            paper="arcface_shifted")
    minimum_face: int = setting(60, "smallest face to look for, by its longer side, in an image whose shorter side is "
                                "128 px; it scales with the image", unit="px of 128", minimum=1, maximum=127, paper="60")
    batch_size: int = setting(64, "images detected together", minimum=1)
    processes: int = setting(0, "worker processes of each rank, each with its detector; 0: one a core (a GPU: 4 at most)",
                             minimum=0)
    keep_identities: int = setting(0, "keep the first so many identities with enough faces; 0: all", minimum=0,
                                   paper="10000")
    keep_images: int = setting(0, "faces that an identity must have to be kept; its first so many are kept; 0: all of "
                               "every identity", minimum=0, paper="50")


@dataclass(frozen=True)
class Scores:
    """Stage 5: genuine and impostor distributions."""

    recogniser: str = setting("models/demo/recogniser.safetensors", "weights of the recogniser that scores; not the one "
                              "that made the contexts",
                              paper="ElasticFace-Cos R100")
    identities: int = setting(0, "score the first so many identities; 0: all", minimum=0, paper="1000")
    images_per_identity: int = setting(0, "score the first so many images of each; 0: all", minimum=0, paper="20")
    batch_size: int = setting(64, "faces embedded together", minimum=1)
    bootstrap: int = setting(1000, "resamples of the identities for the 90% intervals, of up to 1000 identities; "
                             "0: none", minimum=0)
    overlay: tuple[str, ...] = setting((), "runs to draw over one another and to tabulate, by run folder, "
                                       "separated by commas; empty: this run alone")


@dataclass(frozen=True)
class FR:
    """Stage 6: training the recogniser (CosFace, arXiv 1801.09414)."""

    images: str = setting("", "folder of identity folders with aligned faces; empty: the run's kept ones")
    name: str = setting("", "name of the training; empty: <head>-<backbone>")
    identities: int = setting(0, "train on the first so many identities; 0: all", minimum=0, paper="10000")
    images_per_identity: int = setting(0, "train on the first so many images of each; 0: all", minimum=0, paper="50")
    minimum_images: int = setting(1, "leave out identities with fewer images", minimum=1)
    leave_out: str = setting("", "file with the names of identities to leave out, one a line: those of a benchmark, say")
    keep_list: str = setting("", "train on the images of this keep-list only (a DynUnc file of an original training)")
    held_out_identities: int = setting(0, "identities set apart to steer the schedule, early stopping and the best "
                                       "checkpoint; 0: a tenth, at most 500", minimum=0,
                                       paper="none: steered by the benchmarks")
    backbone: str = setting("iresnet50", "network", choices=("iresnet18", "iresnet34", "iresnet50", "iresnet100",
                                                              "mobilefacenet"), paper="iresnet50")
    head: str = setting("cosface", "margin loss", choices=("cosface", "arcface", "adaface"), paper="cosface")
    embedding_size: int = setting(512, "width of an embedding", minimum=2, paper="512")
    scale: float = setting(64.0, "s: scale of the cosines", minimum=1.0, paper="64")
    margin: float = setting(0.35, "m: margin (CosFace 0.35, ArcFace 0.5, AdaFace 0.4)", minimum=0.0, paper="0.35")
    dropout: float = setting(0.4, "dropout before the embedding", minimum=0.0, maximum=0.9, paper="0.4")
    augmentation: str = setting("flip", "flip, or randaugment: flip, then RandAugment(4, 16)",
                                choices=("none", "flip", "randaugment"), paper="both")
    epochs: int = setting(4, "at the most", minimum=1, paper="200; 40 with steps")
    batch_size: int = setting(32, "images a device", minimum=2, paper="128 on each of 4 GPUs")
    learning_rate: float = setting(0.1, "for a total batch of 512; it scales with the total batch", minimum=0.0, paper="0.1")
    momentum: float = setting(0.9, "of SGD", minimum=0.0, maximum=1.0, paper="0.9")
    weight_decay: float = setting(5e-4, "of SGD", minimum=0.0, paper="5e-4")
    gradient_clip: float = setting(5.0, "largest gradient norm, of backbone and head separately", minimum=0.0, paper="5")
    schedule: str = setting("plateau", "plateau: x 0.1 after fr.patience epochs without a better held-out score; "
                            "steps: x 0.1 at fr.milestones", choices=("plateau", "steps"), paper="plateau")
    patience: int = setting(4, "plateau", unit="epochs", minimum=0, paper="4")
    early_stop: int = setting(6, "plateau: stop after so many epochs without a better score", unit="epochs", minimum=1,
                              paper="6")
    milestones: tuple[int, ...] = setting((22, 30, 35), "steps", unit="epochs", minimum=1, paper="22, 30, 35")
    precision: str = setting("auto", "fp32, bf16, or auto: bf16 where the device is fast at it",
                             choices=("auto", "fp32", "bf16"), paper="fp32")
    compile: bool = setting(False, "fuse the network's operations by torch.compile: long trainings are faster, their first "
                            "steps take a minute or more")
    seed: int = setting(0, "seed of weights, order and augmentation", minimum=0)
    is_original_train: bool = setting(False, "also write what DynUnc pruning needs: each image's probability of its class "
                                      "at every epoch, scores and keep-lists")
    dynunc_window: int = setting(10, "DynUnc: sliding window J", unit="epochs", minimum=2, paper="10 (He et al. 2023)")
    keep_fractions: tuple[float, ...] = setting((0.9, 0.75, 0.5), "DynUnc: fractions of the images to keep",
                                                minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class Verify:
    """Stage 7: benchmarks; each is measured where its files are given."""

    backbone: str = setting("", "backbone to verify; empty: that of the run's training")
    lfw_faces: str = setting("", "folder with LFW, aligned by align.py with align.template=arcface")
    lfw_images: str = setting("", "folder with LFW as downloaded: centre crops for images without a detected face")
    lfw_pairs: str = setting("", "LFW's pairs.txt")
    bins: str = setting("", "folder with insightface's lfw.bin, agedb_30.bin, cfp_fp.bin, calfw.bin, cplfw.bin")
    ijbc: str = setting("", "folder with IJB-C: loose_crop/ and meta/")
    batch_size: int = setting(64, "faces embedded together", minimum=1)


@dataclass(frozen=True)
class Training:
    """Stage 0: the faces that the autoencoder and the diffusion model are trained on."""

    faces: str = setting("data/lfw/lfw-deepfunneled", "folder of identity folders, or of images, each of another person")
    leave_out: str = setting("", "file with the names of identities to leave out, one a line: those of a benchmark, say")
    crop: str = setting("aligned", "aligned: each face is found and cut out along its landmarks; whole: the images are "
                        "cut-out faces already", choices=("aligned", "whole"), paper="whole (FFHQ)")
    margin: int = setting(12, "aligned: what is shown around the recognisers' canvas", unit="px of 112", minimum=0)
    image_size: int = setting(64, "height and width of the images", unit="px", minimum=16, paper="128")
    recogniser: str = setting("data/mobilefacenet_casia.ckpt", "weights of the recogniser that makes the contexts",
                              paper="ElasticFace-Arc R100")
    held_out_identities: int = setting(0, "identities that are not trained on: checkpoints are chosen by images of the "
                                       "first ones, the rest is for tests; 0: one in 25, 2 to 200", minimum=0)
    precision: str = setting("auto", "fp32, bf16, or auto: bf16 where the device is fast at it",
                             choices=("auto", "fp32", "bf16"), paper="fp16")
    compile: bool = setting(True, "fuse the network's operations by torch.compile; the first steps take a minute or more")
    seed: int = setting(0, "seed of weights, order and noise", minimum=0)
    name: str = setting("", "name of the folder in <output>/training; empty: the preset's")


@dataclass(frozen=True)
class AutoencoderTraining:
    """Stage 0a: the VQ first stage. The paper takes LDM's, trained for ffhq256."""

    channels: tuple[int, ...] = setting((32, 64, 64), "at each resolution, each half the one before; multiples of 32",
                                        minimum=32, paper="128, 256, 512")
    layers: int = setting(1, "residual blocks at each resolution of the encoder; the decoder has one more", minimum=1,
                          paper="2")
    code_channels: int = setting(4, "channels of a latent", minimum=1, paper="3")
    codes: int = setting(8192, "size of the codebook", minimum=2, paper="8192")
    perceptual: float = setting(0.1, "weight of the difference of the recogniser's early features", minimum=0.0)
    identity: float = setting(0.05, "weight of 1 - cosine of the recogniser's embeddings", minimum=0.0)
    batch_size: int = setting(16, "images on all devices together", minimum=2)
    learning_rate: float = setting(8e-4, "of AdamW, at its highest", minimum=0.0)
    minutes: float = setting(15.0, "length of the training by the clock; 0: autoencoder.steps", minimum=0.0)
    steps: int = setting(100_000, "length of the training where minutes is 0", unit="updates", minimum=1)


@dataclass(frozen=True)
class DiffusionTraining:
    """Stage 0b: the identity-conditioned diffusion model (IDiff-Face, arXiv 2308.04995)."""

    initial_channels: int = setting(64, "channels at the first resolution, a multiple of 32", minimum=32, paper="96")
    channel_multipliers: tuple[int, ...] = setting((1, 3), "one per resolution, cumulative", minimum=1, paper="1,2,2,2")
    attention: tuple[bool, ...] = setting((False, True), "one per resolution", paper="false,true,true,true")
    blocks: int = setting(1, "residual blocks at each resolution on the way down; one more on the way up", minimum=1,
                          paper="2")
    context_channels: int = setting(128, "width of the projected context, a multiple of 32", minimum=32, paper="256")
    context_dropout: float = setting(0.05, "CPD: dropout on the projected context", minimum=0.0, maximum=0.9,
                                     paper="0.25 or 0.5")
    null_contexts: float = setting(0.1, "part of the contexts that are the zero vector", minimum=0.0, maximum=1.0,
                                   paper="0")
    same_person: float = setting(0.15, "part of the contexts that are of another image of the same person, where there "
                                 "is one", minimum=0.0, maximum=1.0, paper="0")
    context_noise: float = setting(0.05, "standard deviation of noise on contexts, whose numbers are scaled to about 1",
                                   minimum=0.0, paper="0")
    latent_noise: float = setting(0.05, "standard deviation of noise on the latents", minimum=0.0, paper="0")
    flip: bool = setting(True, "half of the images mirrored", paper="true")
    scale_contexts: bool = setting(True, "train on contexts whose numbers are about 1, rather than of unit length; the "
                                   "saved weights take unit contexts all the same", paper="false")
    prediction: str = setting("v", "what the network predicts: eps, or v (arXiv 2202.00512)", choices=("eps", "v"),
                              paper="eps")
    identity: float = setting(0.6, "weight of 1 - cosine between the context and the recogniser's embedding of what the "
                              "network draws by a few steps of DDIM, for an eighth of a batch", minimum=0.0, paper="0")
    start_from: str = setting("", "folder of trained weights to begin with, of the same first stage; empty: begin anew")
    optimizer: str = setting("adamw", "adam, or adamw with weight decay 0.01", choices=("adam", "adamw"), paper="adam")
    learning_rate: float = setting(6e-4, "at its highest", minimum=0.0, paper="1e-4")
    schedule: str = setting("flat_cosine", "flat_cosine: warm-up, flat, cosine to zero; warm_restarts: cosines of 10,000, "
                            "20,000, ... updates", choices=("flat_cosine", "warm_restarts"), paper="warm_restarts")
    batch_size: int = setting(64, "images on all devices together", minimum=1, paper="512")
    minutes: float = setting(90.0, "length of the training by the clock; 0: diffusion.steps", minimum=0.0)
    steps: int = setting(150_000, "length of the training where minutes is 0", unit="updates", minimum=1, paper="150000")
    validations: int = setting(5, "how often images of the validation identities are drawn and scored", minimum=1)


@dataclass(frozen=True)
class Config:
    device: str = setting("auto", "auto: GPUs where there are any, else the CPU", choices=("auto", "cpu", "cuda"))
    paths: Paths = Paths()
    contexts: Contexts = Contexts()
    negatives: Negatives = Negatives()
    model: Model = Model()
    guidance: Guidance = Guidance()
    sampling: Sampling = Sampling()
    align: Align = Align()
    scores: Scores = Scores()
    fr: FR = FR()
    verify: Verify = Verify()
    training: Training = Training()
    autoencoder: AutoencoderTraining = AutoencoderTraining()
    diffusion: DiffusionTraining = DiffusionTraining()
    preset: str = ""  # filled in by config/load.py


DEFAULT_PRESET = "demo"

PAPER = {
    "contexts.source": "uniform",
    "contexts.number": 15000,
    "contexts.dimension": 512,
    "negatives.pool": 10050,
    "sampling.identities": 10050,
    "sampling.images_per_identity": 50,
    "sampling.solver": "ddpm",
    "sampling.steps": 1000,
    "sampling.as_published": True,
    "sampling.batch_size": 50,
    "sampling.precision": "fp32",
    "align.template": "arcface_shifted",
    "align.keep_identities": 10000,
    "align.keep_images": 50,
    "scores.recogniser": "data/published/ElasticCos.pth",
    "scores.identities": 1000,
    "scores.images_per_identity": 20,
    "fr.held_out_identities": 500,
    "fr.augmentation": "randaugment",
    "fr.epochs": 200,
    "fr.compile": True,
    "fr.batch_size": 128,
    "model.first_stage_encoder": "data/published/first_stage_encoder_state_dict.pt",
    "model.first_stage_decoder": "data/published/first_stage_decoder_state_dict.pt",
    "training.faces": "data/ffhq",
    "training.crop": "whole",
    "training.image_size": 128,
    "training.recogniser": "data/published/295672backbone.pth",
    "autoencoder.channels": (128, 256, 512),
    "autoencoder.layers": 2,
    "autoencoder.code_channels": 3,
    "autoencoder.minutes": 0.0,
    "diffusion.initial_channels": 96,
    "diffusion.channel_multipliers": (1, 2, 2, 2),
    "diffusion.attention": (False, True, True, True),
    "diffusion.blocks": 2,
    "diffusion.context_channels": 256,
    "diffusion.context_dropout": 0.25,
    "diffusion.null_contexts": 0.0,
    "diffusion.same_person": 0.0,
    "diffusion.context_noise": 0.0,
    "diffusion.latent_noise": 0.0,
    "diffusion.scale_contexts": False,
    "diffusion.prediction": "eps",
    "diffusion.identity": 0.0,
    "diffusion.optimizer": "adam",
    "diffusion.learning_rate": 1e-4,
    "diffusion.schedule": "warm_restarts",
    "diffusion.batch_size": 512,
    "diffusion.minutes": 0.0,
}

LFW = {  # make lfw: alignment, verification and scores of real faces
    "paths.run": "lfw",
    "align.images": "data/lfw/lfw-deepfunneled",
    "align.minimum_face": 30,  # photographs have smaller faces than generated portraits
    "scores.recogniser": "data/mobilefacenet_casia.ckpt",
    "verify.backbone": "data/mobilefacenet_casia.ckpt",
    "verify.lfw_faces": "output/lfw/aligned",
    "verify.lfw_images": "data/lfw/lfw-deepfunneled",
    "verify.lfw_pairs": "data/lfw/pairs.txt",
}

EXPERIMENT = {  # make experiment: the strategies compared on real numbers of identities, and recognisers trained on each
    "contexts.number": 1000,
    "sampling.identities": 500,
    "sampling.images_per_identity": 20,
    "sampling.steps": 20,  # those of the tables in docs/experiment.md
    "sampling.batch_size": 50,
    "fr.backbone": "mobilefacenet",
    "fr.embedding_size": 128,
    "fr.scale": 16.0,  # with these a small network learns from a few thousand images (README: trained on LFW alone)
    "fr.margin": 0.05,
    "fr.learning_rate": 0.15,
    "fr.epochs": 7,
    "fr.schedule": "steps",
    "fr.milestones": (5,),
    "fr.compile": True,
    "verify.lfw_faces": "output/lfw/aligned",
    "verify.lfw_images": "data/lfw/lfw-deepfunneled",
    "verify.lfw_pairs": "data/lfw/pairs.txt",
}

PRESETS = {
    "demo": {},
    "lfw": LFW,
    "experiment": EXPERIMENT,
    "paper_ffhq": PAPER | {"model.diffusion": "data/published/idiff-face-ffhq"},
    "paper_casia": PAPER | {"model.diffusion": "data/published/idiff-face-casia", "training.faces": "data/casia-webface"},
}
