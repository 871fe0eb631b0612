"""Every setting of every stage. Edit the values here, or override them by name on the command line:

    python sample.py guidance.w=1.0 guidance.schedule=linear
    python sample.py --preset paper_casia sampling.solver=ddim sampling.steps=200
    python sample.py --help

The values in the classes are the preset `demo`: a miniature that runs on a laptop in minutes. `paper` beside a setting is
the value of NegFaceDiff (arXiv 2508.09661); the presets `paper_*` are made of these. PRESETS, at the end, lists what the
other presets change; add your own there. Settings without choices here that name a method (a strategy, a solver, a
head) take theirs from the registry of that method, as `--help` of the script says.
"""
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


def setting(default, help, *, choices=None, unit=None, minimum=None, maximum=None, paper=None):
    """A setting with what `--help` says of it, what its values are checked against, and the paper's value, of its type."""
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
    number: int = setting(100, "contexts drawn (uniform, gaussian)", minimum=2, paper=15000)
    dimension: int = setting(128, "width of a context (uniform); the diffusion model decides it", minimum=2, paper=512)
    seed: int = setting(0, "seed of the draw (uniform, gaussian)", minimum=0)
    highest_cosine: float = setting(1.0, "draws that are more alike than this to one before are left out (uniform, gaussian); "
                                    "1: none", minimum=-1.0, maximum=1.0, paper=1.0)
    statistics: str = setting("models/demo/context_statistics.npz", "gaussian: mean and covariance of real embeddings, as "
                              "train_diffusion.py writes them")
    file: str = setting("", "published: a contexts file (.npy of the published code, plain .npy, or .npz)")
    faces: str = setting("", "extracted: a folder of identity folders of faces that are cut out already, as in aligned/ of "
                         "align.py; they are resized, not aligned")
    recogniser: str = setting("data/mobilefacenet_casia.ckpt", "weights of the recogniser that makes contexts: extracted ones, "
                              "and those that a generator is trained on; the paper's is ElasticFace-Arc R100",
                              paper="data/published/295672backbone.pth")
    per: str = setting("identity", "extracted: one context per identity (the mean) or per image",
                       choices=("identity", "image"))
    name: str = setting("", "name of the contexts file in <output>/contexts; empty: made from these settings")


@dataclass(frozen=True)
class Negatives:
    """Stage 2: for each identity, the context whose pull is subtracted."""

    strategy: str = setting("far", "by cosine similarity, another identity's context: close (highest), mid (median), far "
                            "(lowest); rand (any other); null (the zero vector), average (the mean direction of the others), "
                            "antipode (the negated context); custom (negatives.custom_file)", paper="far")
    pool: int = setting(0, "negatives are chosen among the first `pool` contexts; 0: all", unit="contexts", minimum=0,
                        paper=10050)
    seed: int = setting(0, "seed of rand", minimum=0)
    custom_file: str = setting("", "custom: a CSV with the columns identity, negative")


@dataclass(frozen=True)
class Model:
    """The identity-conditioned latent diffusion model (IDiff-Face, arXiv 2308.04995)."""

    diffusion: str = setting("models/demo", "folder with .hydra/config.yaml and checkpoints/, as published",
                             paper="data/published/idiff-face-casia")
    step: int = setting(0, "checkpoint of that training step; 0: the final one", unit="steps", minimum=0)
    first_stage_encoder: str = setting("models/demo/first_stage_encoder.safetensors",
                                       "encoder half of the VQ first stage, or a whole LDM model.ckpt",
                                       paper="data/published/first_stage_encoder_state_dict.pt")
    first_stage_decoder: str = setting("models/demo/first_stage_decoder.safetensors",
                                       "decoder half of the VQ first stage, or a whole LDM model.ckpt",
                                       paper="data/published/first_stage_decoder_state_dict.pt")


@dataclass(frozen=True)
class Guidance:
    """Equation 3: eps = (1 + w) eps(x_t, t, c_pos) - w eps(x_t, t, c_neg), and other rules."""

    w: float = setting(0.5, "scale of the negative context; 0 is off: the IDiff-Face baseline, one pass", minimum=0.0,
                       paper=0.5)
    rule: str = setting("negative", "negative: equation 3; apg: adaptive projected guidance (arXiv 2410.02416); "
                        "every2, every3: equation 3 with a negative pass at every second or third step only, its difference "
                        "used again between",
                        paper="negative")
    schedule: str = setting("constant", "w(t): constant; linear: w (1 - t/T), growing towards the image (AdaptDiff); reverse: "
                            "w t/T; interval: w where t lies in guidance.interval, else 0 (arXiv 2404.07724)",
                            paper="constant")
    interval: tuple[int, ...] = setting((0, 999), "interval: lowest and highest timestep t that is guided",
                                        unit="timesteps", minimum=0)


@dataclass(frozen=True)
class Variety:
    """Stage 3: what makes the images of one identity differ, beside their noise; off in the papers. docs/variety.md."""

    cone: float = setting(1.0, "lb: each image has a context of its own, at a cosine c ~ U[lb, 1] to its identity's (IDperturb, "
                          "arXiv 2602.18831); 1: off", minimum=0.0, maximum=1.0, paper=1.0)
    cone_noise: str = setting("isotropic", "cone: which way from the identity's context: isotropic, or contexts: as these are "
                              "distributed (their covariance)", choices=("isotropic", "contexts"), paper="isotropic")
    cone_bound: str = setting("fixed", "cone: fixed: variety.cone for all; safe: half the angle to the nearest other context, "
                              "where that is narrower", choices=("fixed", "safe"), paper="fixed")
    w: str = setting("constant", "each image's w: constant: guidance.w; uniform: in [0, guidance.w]; mixture: 0 or guidance.w, "
                     "half each", paper="constant")
    annealing: float = setting(0.0, "s: noise on the context early in sampling (CADS, arXiv 2310.17347: .025 to .25); 0: off",
                               minimum=0.0, paper=0.0)


@dataclass(frozen=True)
class Sampling:
    """Stage 3: from contexts to images."""

    identities: int = setting(32, "the first `identities` contexts are sampled; the paper's 10050 leave 10000 after alignment",
                              minimum=1, paper=10050)
    images_per_identity: int = setting(6, "images of each identity", minimum=1, paper=50)
    solver: str = setting("fitted", "ddpm (arXiv 2006.11239); ddim (2010.02502, eta 0); dpm++ (DPM-Solver++ 2M, 2211.01095) and "
                          "dpm++sde, its SDE variant; unipc and unipc3 (2302.04867, order 2 and 3); deis and deis3 "
                          "(2204.13902, order 2 and 3); fitted: to the embedded weights, in few steps (as in 2502.17423)",
                          paper="ddpm")
    steps: int = setting(12, "denoising steps; the paper's ablation runs ddim in 200", minimum=1, paper=1000)
    spacing: str = setting("default", "which timesteps of the model's T: leading, linspace, trailing, karras (2206.00364), "
                           "log_snr (equal steps of the log SNR); default: leading for ddpm and ddim, its own for fitted, "
                           "linspace for the others", paper="default")
    as_published: bool = setting(False, "ddpm and ddim exactly as the published code runs them, quirks included", paper=True)
    batch_size: int = setting(16, "images denoised together, of whatever identities; fewer are filled up to as many", minimum=1,
                              paper=50)
    precision: str = setting("auto", "fp32, bf16, or auto: bf16 where the device is fast at it",
                             choices=("auto", "fp32", "bf16"), paper="fp32")
    seed: int = setting(42, "seed of the noise; image (identity, k) has its own stream", minimum=0, paper=42)


@dataclass(frozen=True)
class Align:
    """Stage 4: five landmarks (MTCNN), similarity transform to 112 x 112."""

    images: str = setting("", "folder of identity folders to align; empty: the run's samples")
    template: str = setting("arcface", "arcface: the benchmarks'; arcface_shifted: 8 px further left, as in the paper's "
                            "training crops", choices=("arcface", "arcface_shifted"), paper="arcface_shifted")
    minimum_face: int = setting(60, "smallest face to look for, by its longer side, in an image whose shorter side is "
                                "128 px; it scales with the image", unit="px of 128", minimum=1, maximum=127, paper=60)
    processes: int = setting(0, "worker processes of each rank, each with its detector; 0: one per core (a GPU: one per "
                             "1,000 images, at most 4)", minimum=0)
    keep_identities: int = setting(0, "keep the first `keep_identities` identities with enough faces; 0: all", minimum=0,
                                   paper=10000)
    keep_images: int = setting(0, "faces that an identity must have to be kept, and how many of them are kept; 0: all faces "
                               "of every identity", minimum=0, paper=50)
    band: tuple[float, ...] = setting((), "lowest and highest cosine of a kept face to its identity's context, by "
                                      "contexts.recogniser, such as 0.3,0.8; empty: off", minimum=-1.0, maximum=1.0, paper=())


@dataclass(frozen=True)
class Scores:
    """Stage 5: genuine and impostor distributions."""

    recogniser: str = setting("models/demo/recogniser.safetensors", "weights of the recogniser that scores, not the one that "
                              "made the contexts; the paper's is ElasticFace-Cos R100",
                              paper="data/published/ElasticCos.pth")
    identities: int = setting(0, "score the first `identities` identities; 0: all", minimum=0, paper=1000)
    images_per_identity: int = setting(0, "score the first `images_per_identity` images of each; 0: all", minimum=0, paper=20)
    overlay: tuple[str, ...] = setting((), "runs to draw over one another and to tabulate, by run folder, "
                                       "separated by commas; empty: this run alone")
    real: str = setting("", "folder of aligned real faces (aligned/ of align.py, or any folder of 112 x 112 faces) for coverage, "
                        "recall and Frechet distance; empty: without them")


@dataclass(frozen=True)
class FR:
    """Stage 6: training the recogniser (CosFace, arXiv 1801.09414)."""

    images: str = setting("", "folder of identity folders with aligned faces; empty: the run's kept ones")
    name: str = setting("", "name of the training run; empty: <head>-<backbone>")
    identities: int = setting(0, "train on the first `identities` identities; 0: all", minimum=0, paper=10000)
    images_per_identity: int = setting(0, "train on the first `images_per_identity` images of each; 0: all", minimum=0, paper=50)
    minimum_images: int = setting(1, "leave out identities with fewer images", minimum=1)
    leave_out: str = setting("", "file with the names of identities to leave out, one per line: those of a benchmark, say")
    keep_list: str = setting("", "train on the images of this keep-list only (a DynUnc file of an original training)")
    backbone: str = setting("iresnet50", "network", paper="iresnet50")
    head: str = setting("cosface", "margin loss", paper="cosface")
    scale: float = setting(64.0, "s: scale of the cosines", minimum=1.0, paper=64.0)
    margin: float = setting(0.35, "m: margin (CosFace 0.35, ArcFace 0.5, AdaFace 0.4)", minimum=0.0, paper=0.35)
    augmentation: str = setting("flip", "flip, or randaugment: flip, then RandAugment(4, 16)",
                                choices=("none", "flip", "randaugment"), paper="randaugment")
    epochs: int = setting(4, "at most; the paper's: 40 with milestones", minimum=1, paper=200)
    batch_size: int = setting(32, "images per device; the paper's 128 are on each of 4 GPUs", minimum=2, paper=128)
    learning_rate: float = setting(0.1, "for a total batch of 512; it scales with the total batch", minimum=0.0, paper=0.1)
    milestones: tuple[int, ...] = setting((), "epochs after which the learning rate falls to a tenth (the paper's variant: "
                                          "22,30,35); empty: at the 5th epoch without a better score on held-out identities, "
                                          "with an early stop at the 6th", unit="epochs", minimum=1, paper=())
    seed: int = setting(0, "seed of weights, order and augmentation", minimum=0)
    is_original_train: bool = setting(False, "also write what DynUnc pruning needs: each image's probability of its class "
                                      "at every epoch, scores and keep-lists")


@dataclass(frozen=True)
class Verify:
    """Stage 7: benchmarks; each is measured where its files are given."""

    backbone: str = setting("", "backbone to verify; empty: that of the run's training")
    lfw_faces: tuple[str, ...] = setting((), "folder with LFW, aligned by align.py with align.template=arcface; for several pair "
                                         "lists one that holds all of it, or one each, separated by commas")
    lfw_pairs: tuple[str, ...] = setting((), "LFW's pairs.txt, or pair lists in its format, separated by commas")
    all_pairs: tuple[str, ...] = setting((), "folders of aligned faces, <identity>/<image>, whose pairs are all scored: TAR at "
                                         "FAR 1e-2, 1e-3 and, of a million impostor pairs or more, 1e-4")
    people: tuple[str, ...] = setting((), "for each folder of verify.all_pairs, a file with the names of the identities to "
                                      "score, one per line; folders beyond those are scored whole")
    images_per_identity: int = setting(0, "images of each identity of verify.all_pairs that are scored, the first ones: its "
                                       "genuine pairs grow with their square; 0: all", minimum=0)
    bins: str = setting("", "folder with insightface's lfw.bin, agedb_30.bin, cfp_fp.bin, calfw.bin, cplfw.bin")
    ijbc: str = setting("", "folder with IJB-C: loose_crop/ and meta/")


@dataclass(frozen=True)
class Training:
    """Stage 0: training the autoencoder and the diffusion model. `precision` and `compile` hold for stage 6 too."""

    faces: tuple[str, ...] = setting(("data/lfw/lfw-deepfunneled",), "folder of identity folders, or of images, "
                                     "each of a different person; several, separated by commas, are one training set, whose "
                                     "identities are called <folder>/<identity>", paper=("data/casia-webface",))
    leave_out: str = setting("", "file with the names of identities to leave out, one per line: those of a benchmark, say")
    held_out: str = setting("", "file with the names of identities to hold out, one per line; empty: one in 25, 2 to 200")
    crop: str = setting("aligned", "aligned: each face is found and cut out along its landmarks; whole: the images are "
                        "cut-out faces already", choices=("aligned", "whole"), paper="whole")
    size: str = setting("miniature", "sizes of images and networks: an entry of SIZES in models/sizes.py", paper="published")
    length: str = setting("60min", "length of a training run: minutes by the clock (90min), or updates (150000steps)",
                          paper="150000steps")
    precision: str = setting("auto", "fp32, bf16, or auto: bf16 where the device is fast at it; the paper trains the generator "
                             "in fp16, the recogniser in fp32", choices=("auto", "fp32", "bf16"), paper="fp32")
    compile: bool = setting(True, "fuse the networks' operations by torch.compile, on a CPU where there is a C++ compiler; the "
                            "first steps take a minute or more")
    adversarial: float = setting(0.0, "weight of a discriminator of patches, which judges the decoder in the last part of the "
                                 "autoencoder's training (LDM); 0: none", minimum=0.0)
    seed: int = setting(0, "seed of weights, order and noise", minimum=0)
    name: str = setting("", "name of the folder in <output>/training; empty: the preset's")


@dataclass(frozen=True)
class Diffusion:
    """Stage 0b: IDiff-Face's own recipe (arXiv 2308.04995)."""

    batch_size: int = setting(64, "images on all devices together", minimum=1, paper=512)
    learning_rate: float = setting(6e-4, "at its highest", minimum=0.0, paper=1e-4)
    start_from: str = setting("", "folder of trained weights to begin with; of latents with other channels all but the first and "
                              "last layer; empty: begin anew")


@dataclass(frozen=True)
class Extras:
    """Stage 0b: what the miniature does otherwise; all of it off in the paper's presets. utils/training/extras.py."""

    use: tuple[str, ...] = setting(("v", "adamw", "scaled_contexts", "noise", "same_person", "null_contexts"),
                                   "departures from IDiff-Face, by name, separated by commas", paper=())
    identity: float = setting(0.6, "weight of 1 - cosine between the context and the recogniser's embedding of what the "
                              "network draws by a few steps of DDIM, for an eighth of a batch", minimum=0.0, paper=0.0)


@dataclass(frozen=True)
class Config:
    device: str = setting("auto", "auto: GPUs where there are any, else the CPU", choices=("auto", "cpu", "cuda"))
    paths: Paths = Paths()
    contexts: Contexts = Contexts()
    negatives: Negatives = Negatives()
    model: Model = Model()
    guidance: Guidance = Guidance()
    variety: Variety = Variety()
    sampling: Sampling = Sampling()
    align: Align = Align()
    scores: Scores = Scores()
    fr: FR = FR()
    verify: Verify = Verify()
    training: Training = Training()
    diffusion: Diffusion = Diffusion()
    extras: Extras = Extras()
    preset: str = ""  # filled in by config/load.py


def paper_values() -> dict[str, Any]:
    """Every setting that has a paper's value, by its dotted name."""
    return {f"{group.name}.{item.name}": item.metadata["paper"] for group in fields(Config) if is_dataclass(group.default)
            for item in fields(group.default) if item.metadata["paper"] is not None}


DEFAULT_PRESET = "demo"

PAPER_CASIA = paper_values()
PAPER_FFHQ = PAPER_CASIA | {"model.diffusion": "data/published/idiff-face-ffhq", "training.faces": ("data/ffhq",)}
ADAPTDIFF = {"guidance.w": 1.0, "guidance.schedule": "linear", "sampling.images_per_identity": 60}  # arXiv 2603.29569

LFW = {  # make lfw: alignment, verification and scores of real faces
    "paths.run": "lfw",
    "align.images": "data/lfw/lfw-deepfunneled",
    "align.minimum_face": 30,  # photographs have smaller faces than generated portraits
    "scores.recogniser": "data/mobilefacenet_casia.ckpt",
    "verify.backbone": "data/mobilefacenet_casia.ckpt",
    "verify.lfw_faces": ("output/lfw/aligned",),
    "verify.lfw_pairs": ("data/lfw/pairs.txt",),
}

# Images that train better recognisers (docs/experiment.md); needs nothing that is not included.
RECOMMENDED = {
    "contexts.number": 1000,  # as it was measured: the safe bound and Far depend on them
    "variety.cone": 0.7,
    "variety.cone_noise": "contexts",
    "variety.cone_bound": "safe",
}

EXPERIMENT = {  # make experiment: recognisers trained on equal numbers of images, in minutes on two cores
    "contexts.number": 1000,
    "sampling.precision": "fp32",
    "fr.backbone": "iresnet10",
    "fr.scale": 16.0,  # with these a small network learns from a few thousand images (docs/results.md: trained on LFW alone)
    "fr.margin": 0.05,
    "fr.learning_rate": 0.4,
    "fr.epochs": 16,
    "fr.milestones": (9, 13),
    "fr.augmentation": "randaugment",
    "training.precision": "fp32",
    "training.compile": False,  # compiling takes longer than it saves
    "verify.images_per_identity": 20,  # else 92% of LFW's genuine pairs that are tested on are of one man's 530 photographs
    "verify.lfw_faces": ("output/lfw/aligned",),
    "verify.lfw_pairs": ("data/lfw/pairs.txt",),
}

PRESETS = {
    "demo": {},
    "recommended": RECOMMENDED,
    "lfw": LFW,
    "experiment": EXPERIMENT,
    "paper_ffhq": PAPER_FFHQ,
    "paper_casia": PAPER_CASIA,
    "adaptdiff_ffhq": PAPER_FFHQ | ADAPTDIFF,
    "adaptdiff_casia": PAPER_CASIA | ADAPTDIFF,
}
