"""Stage 2: for each identity, the context whose pull is subtracted when its images are sampled.

Reads:  <output>/contexts/<name>.npz (stage 1)
Writes: <output>/contexts/<name>.negatives-<kind>.npz   ids [N], negatives [N, D] float32 (zeros: null), index [N] int64
        (-1: no identity of the list), similarity [N] float32 (NaN: null), the digest of the contexts they belong to
        <output>/contexts/<name>.negatives-<kind>.json  the settings, versions and digests they were made with
        <kind>: the strategy, with the pool, seed or file where one is set

    python create_negative_contexts.py
    python create_negative_contexts.py --preset paper_casia negatives.strategy=close
    python create_negative_contexts.py negatives.strategy=custom negatives.custom_file=pairs.csv
"""
if __name__ == "__main__":
    from utils.runtime.errors import listen
    listen()  # the imports take seconds
from dataclasses import asdict

import numpy as np

from config import places
from config.load import load_config
from utils.identities import contexts as identity_contexts
from utils.identities import negatives
from utils.runtime.errors import run_script
from utils.runtime.files import array_digest, file_digest
from utils.runtime.records import Record, State


def main() -> None:
    config = load_config(__doc__, reads=("paths", "contexts", "negatives"),
                         choices={"negatives.strategy": (*negatives.STRATEGIES, "custom")})
    settings = config.negatives
    ids, contexts = identity_contexts.read(places.contexts_file(config))

    # Leave finished negatives alone
    decides = {"negatives.strategy": settings.strategy, "negatives.pool": settings.pool, "negatives.seed": settings.seed,
               "contexts": identity_contexts.digest(ids, contexts)}
    custom = None
    if settings.strategy == "custom":
        custom = negatives.read_custom(settings.custom_file, ids)
        decides["negatives.custom_file"] = file_digest(settings.custom_file)
    file = places.negatives_file(config)
    record = Record(file.with_suffix(".json"), decides, "contexts.name", target=file,
                    sources=[settings.custom_file] if settings.strategy == "custom" else ())
    if record.state() is State.DONE:
        print(f"{file}: exists, made with the same settings")
        return

    # Select
    vectors, index, similarity = negatives.select(contexts, settings.strategy, settings.seed, settings.pool) \
        if custom is None else negatives.from_choice(contexts, custom)

    # Save
    with record.making(digest=array_digest(vectors), config=asdict(config)) as is_new:
        if is_new:
            negatives.write(file, ids, vectors, index, similarity, decides["contexts"])
    summary = "the zero vector for all"
    if vectors.any():
        summary = "cosine to the negative: lowest {:.3f}, median {:.3f}, highest {:.3f}".format(
            *np.quantile(similarity, (0, 0.5, 1)))
    print(f"{file}: written; {len(ids)} identities, {settings.strategy}; {summary}")


if __name__ == "__main__":
    run_script(main)
