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

    source: str = setting("uniform", "uniform: drawn on the unit sphere; published: read from contexts.file; "
                          "extracted: embeddings of the faces in contexts.faces",
                          choices=("uniform", "published", "extracted"), paper="uniform")
    number: int = setting(100, "contexts drawn (uniform)", minimum=2, paper="15000")
    dimension: int = setting(512, "width of a context; the diffusion model decides it", minimum=2, paper="512")
    seed: int = setting(0, "seed of the draw (uniform)", minimum=0, paper="unseeded")
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

    diffusion: str = setting("output/random-small", "folder with .hydra/config.yaml and checkpoints/, as published")
    step: int = setting(0, "checkpoint of that training step; 0: the final one", unit="steps", minimum=0)
    ema: bool = setting(True, "the averaged weights; false: the raw ones", paper="true")
    first_stage_encoder: str = setting("output/random-small/first_stage_encoder_state_dict.pt",
                                       "encoder half of the VQ first stage, or a whole LDM model.ckpt")
    first_stage_decoder: str = setting("output/random-small/first_stage_decoder_state_dict.pt",
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

    identities: int = setting(8, "the first so many contexts are sampled", minimum=1,
                              paper="10050, of which alignment keeps 10000")
    images_per_identity: int = setting(8, "images of each identity", minimum=1, paper="50; AdaptDiff: 60")
    solver: str = setting("dpm++", "ddpm (arXiv 2006.11239), ddim (2010.02502, eta 0) or dpm++ "
                          "(DPM-Solver++ 2M, 2211.01095)", choices=("ddpm", "ddim", "dpm++"), paper="ddpm; ablation: ddim")
    steps: int = setting(20, "denoising steps, evenly spaced over the model's T", minimum=1,
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
    template: str = setting("arcface_shifted", "arcface: the benchmarks'; arcface_shifted: 8 px further left, "
                            "as in the paper's training crops", choices=("arcface", "arcface_shifted"),
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

    recogniser: str = setting("", "weights of the recogniser that scores; not the one that made the contexts",
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
    compile: bool = setting(True, "on a GPU: fuse the network's operations by torch.compile; the first steps take minutes")
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
    preset: str = ""  # filled in by config/load.py


DEFAULT_PRESET = "demo"

PAPER = {
    "contexts.number": 15000,
    "negatives.pool": 10050,
    "sampling.identities": 10050,
    "sampling.images_per_identity": 50,
    "sampling.solver": "ddpm",
    "sampling.steps": 1000,
    "sampling.as_published": True,
    "sampling.batch_size": 50,
    "sampling.precision": "fp32",
    "align.keep_identities": 10000,
    "align.keep_images": 50,
    "scores.recogniser": "data/published/ElasticCos.pth",
    "scores.identities": 1000,
    "scores.images_per_identity": 20,
    "fr.held_out_identities": 500,
    "fr.augmentation": "randaugment",
    "fr.epochs": 200,
    "fr.batch_size": 128,
    "model.first_stage_encoder": "data/published/first_stage_encoder_state_dict.pt",
    "model.first_stage_decoder": "data/published/first_stage_decoder_state_dict.pt",
}

LFW = {  # make lfw: alignment, verification and scores of real faces
    "paths.run": "lfw",
    "align.images": "data/lfw/lfw-deepfunneled",
    "align.template": "arcface",
    "align.minimum_face": 30,  # photographs have smaller faces than generated portraits
    "scores.recogniser": "data/mobilefacenet_casia.ckpt",
    "verify.backbone": "data/mobilefacenet_casia.ckpt",
    "verify.lfw_faces": "output/lfw/aligned",
    "verify.lfw_images": "data/lfw/lfw-deepfunneled",
    "verify.lfw_pairs": "data/lfw/pairs.txt",
}

PRESETS = {
    "demo": {},
    "lfw": LFW,
    "paper_ffhq": PAPER | {"model.diffusion": "data/published/idiff-face-ffhq"},
    "paper_casia": PAPER | {"model.diffusion": "data/published/idiff-face-casia"},
}
