"""Stage 2: for each identity, the other identity whose pull is subtracted when its images are sampled.

Reads:  <output>/contexts/<name>.npz (stage 1)
Writes: <output>/contexts/<name>.negatives-<strategy>.npz   ids [N], index [N] int64 (-1: the zero vector),
        similarity [N] float32 (NaN for the zero vector), and the digest of the contexts they belong to
        <output>/contexts/<name>.negatives-<strategy>.json  the settings, versions and digests they were made with

    python create_negative_contexts.py
    python create_negative_contexts.py negatives.strategy=close negatives.pool=10050
    python create_negative_contexts.py negatives.strategy=custom negatives.custom_file=pairs.csv
"""
from dataclasses import asdict

import numpy as np

from config.load import load_config
from utils.identities import contexts as identity_contexts
from utils.identities import negatives
from utils.runtime import files as runs
from utils.runtime.errors import run_script


def main() -> None:
    config = load_config(__doc__)
    settings = config.negatives
    ids, contexts = identity_contexts.read(runs.contexts_file(config))

    # Leave finished negatives alone
    chosen_by = negatives.chosen_by(settings.strategy, settings.pool, settings.seed)
    decides = {"strategy": settings.strategy, "contexts": identity_contexts.digest(ids, contexts)} | chosen_by
    custom = None
    if settings.strategy == "custom":
        custom = negatives.read_custom(settings.custom_file, ids)
        decides["custom_file"] = runs.file_digest(settings.custom_file)
    file = runs.negatives_file(config)
    if identity_contexts.made_already(file, decides):
        print(f"{file}: exists, made with the same settings")
        return

    # Select
    index, similarity = negatives.select(contexts, settings.strategy, settings.seed, settings.pool, custom)

    # Save, the negatives last: where they exist, their record does
    runs.write_json(file.with_suffix(".json"), {"decides": decides, "config": asdict(config),
                                                "versions": runs.versions()})
    negatives.write(file, ids, index, similarity, decides["contexts"], chosen_by)
    summary = "the zero vector for all"
    if settings.strategy != "null":
        summary = "cosine to the negative: lowest {:.3f}, median {:.3f}, highest {:.3f}".format(
            *np.quantile(similarity, (0, 0.5, 1)))
    print(f"{file}: written; {len(ids)} identities, {settings.strategy}; {summary}")


if __name__ == "__main__":
    run_script(main)
