"""The tables of NegFaceDiff (arXiv 2508.09661), whose rows stand beside ours."""
from pathlib import Path

from config import places
from utils.faces.aligned import alignment_setting
from utils.runtime.errors import UserError
from utils.runtime.files import read_json

# EER, FMR100, FMR1000, genuine mean and standard deviation, impostor mean and standard deviation, FDR.
SCORE_COLUMNS = ("eer", "fmr100", "fmr1000", "genuine_mean", "genuine_std", "impostor_mean", "impostor_std", "fdr")
SCORES = {
    "CASIA-WebFace, real": (.076, .092, .107, .536, .215, .003, .070, 5.541),
    "LFW, real": (.002, .002, .002, .708, .099, .003, .070, 33.301),
    "w = 0": (.130, .385, .607, .226, .117, .014, .070, 2.427),
    "null": (.034, .066, .158, .377, .127, .023, .060, 6.361),
    "close": (.043, .094, .208, .345, .129, .020, .059, 5.280),
    "rand": (.040, .085, .194, .354, .129, .020, .059, 5.513),
    "mid": (.041, .083, .186, .355, .130, .019, .059, 5.526),
    "far": (.039, .078, .179, .361, .131, .019, .059, 5.687),
}
LFW_FOLDERS = ("lfw", "lfw-deepfunneled", "lfw_funneled")  # what LFW is called where it is unpacked

# Trained on 10,000 identities x 50 images of each generator, in per cent.
IJBC_FAR = {"IJB-C TAR@1e-5": 1e-5, "IJB-C TAR@1e-4": 1e-4}
VERIFICATION_COLUMNS = ("LFW", "AgeDB-30", "CFP-FP", "CALFW", "CPLFW", "mean", *IJBC_FAR)
VERIFICATION = {
    "IDiff-Face (FFHQ)": (98.00, 86.43, 85.47, 90.65, 80.45, 88.20, 20.60, 62.60),
    "NegFaceDiff (FFHQ)": (97.60, 86.53, 85.33, 90.28, 80.73, 88.10, 58.09, 73.93),
    "IDiff-Face (CASIA)": (98.93, 89.55, 91.37, 91.38, 87.38, 91.72, 7.69, 53.75),
    "NegFaceDiff (CASIA)": (98.98, 90.02, 91.67, 91.65, 88.82, 92.23, 77.38, 86.11),
    "CASIA-WebFace, real": (99.55, 94.55, 95.31, 93.78, 89.95, 94.63, 93.96, 96.05),
}
MEAN_OF = VERIFICATION_COLUMNS[:5]


def score_row(run: Path) -> str | None:
    """The row of SCORES that a run corresponds to, by the run's records; None where there is none."""
    if not places.run_record(run).is_file():
        return "LFW, real" if Path(alignment_setting(places.aligned(run), "images")).name in LFW_FOLDERS else None
    try:
        record = read_json(places.run_record(run))
        settings, decides = record["config"], record.get("decides", {})
        guidance, strategy = settings["guidance"], settings["negatives"]["strategy"]
        rule = guidance.get("rule", "negative"), guidance["w"], guidance["schedule"]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{places.run_record(run)}: does not say how the run was guided; restore it, or sample again under "
                        "another paths.run") from None
    if any(name.startswith("variety.") for name in decides):  # which the paper has none of
        return None
    if guidance["w"] == 0:
        return "w = 0"
    return strategy if strategy in SCORES and rule == ("negative", 0.5, "constant") else None
