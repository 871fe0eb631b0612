"""Are training images reproduced? Each generated face's similarity to the nearest training face.

Reads   <run>/aligned/ of scores.overlay (or of the one run), training.faces, scores.recogniser: one that neither made the
        contexts nor is trained on the generator
Writes  <output>/memorisation/memorisation.png, nearest.csv (the ten most similar pairs) and nearest.png (these pairs, which
        holds real faces: keep it to yourself)
        <output>/faces/<folder>/: the training faces' embeddings, cached

    python -m experiments.memorisation scores.recogniser=data/mobilefacenet_independent.ncnn.param \\
        scores.overlay=demo/w0,demo/far

Two measures stand beside it: how similar images of one real person are, and how similar held-out people, who cannot have
been memorised, are to the nearest of the others. Faces that are reproduced would lie with the first, not the second.
"""
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from config import places
from config.load import load_config
from models.published import load_backbone
from utils.faces.aligned import alignment_setting, read_kept
from utils.faces.images import read_image
from utils.faces.template import SIZE
from utils.identities.contexts import normalise
from utils.recognition.embedding import embed
from utils.recognition.scorer import require_template
from utils.runtime import ranks as distributed
from utils.runtime.errors import UserError, run_script
from utils.runtime.figures import contact_sheet, save_figure
from utils.runtime.files import write_csv
from utils.training import faces as training_faces

HIGHEST = 10
BLOCK = 1024  # generated faces compared at once


def main() -> None:
    config = load_config(__doc__, reads=("paths", "scores", "align", "training"))
    settings, output = config.training, Path(config.paths.output)
    ranks, cache = distributed.setup(config.device), places.face_cache(config)
    recogniser_file = Path(config.scores.recogniser)
    recogniser = load_backbone(recogniser_file)

    # the real faces, aligned as the generated ones are: trained on, and held out
    faces = training_faces.prepare(settings.faces, settings.leave_out, False, config.align.minimum_face / 128, cache, ranks)
    crops = training_faces.crops(faces, cache, SIZE, margin=0)
    real = training_faces.face_contexts(faces, cache, recogniser, recogniser_file, ranks.device)
    trained_rows, held_out, held_out_identities = training_faces.hold_out(faces, settings.held_out)
    trained = np.array(real[trained_rows])

    # the generated faces, and the nearest training face of each
    results, pairs = {}, []
    for folder in places.run_folders(config):
        aligned = places.aligned(folder)
        files = [file for kept in read_kept(aligned).values() for file in kept]
        template = alignment_setting(aligned, "template", "run align.py")
        require_template(recogniser, ",".join(settings.faces), "arcface", {template})
        name = os.path.relpath(folder, output)
        results[name], nearest = nearest_of(normalise(embed(recogniser, files, ranks.device, template)), trained)
        pairs += [(similarity, file, trained_rows[row])
                  for similarity, file, row in zip(results[name], files, nearest, strict=True)]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:HIGHEST]

    # real people's own pairs, and held-out people's nearest other person
    labels = faces.labels
    own = np.concatenate([(same @ same.T)[np.triu_indices(len(same), 1)]
                          for same in (np.array(real[labels == label]) for label in held_out_identities)])
    if not len(own):
        raise UserError(f"{','.join(settings.faces)}: no held-out person has two images, so nothing says how alike images of one "
                        "person are; give a folder of identity folders")
    others, _ = nearest_of(np.array(real[held_out]), trained)

    folder = places.experiment_folder(config, "memorisation")
    write_csv(folder / "nearest.csv", ("similarity", "generated", "training_face"), [
        (f"{similarity:.4f}", f"{file.parent.name}/{file.name}", faces.files[row].name) for similarity, file, row in pairs])
    contact_sheet([[read_image(file), np.array(crops[row])] for _, file, row in pairs], folder / "nearest.png")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(-0.2, 1, 121)
    for name, values in {"pairs of images of one real person": own,
                         "held-out real face to the nearest training face": others}.items():
        axes.hist(values, edges, density=True, alpha=0.4, label=name)
    for name, values in results.items():
        axes.hist(values, edges, density=True, histtype="step", linewidth=1.5,
                  label=f"{name}: generated face to the nearest training face")
    for number, (similarity, *_) in enumerate(pairs):
        axes.axvline(similarity, ymax=0.05, color="black", linewidth=1,
                     label="the ten highest of these" if number == 0 else None)
    axes.set(xlabel=f"cosine similarity by {recogniser_file.stem}", ylabel="density")
    axes.legend(fontsize="small")
    save_figure(figure, folder / "memorisation.png")

    for name, values in {"one real person": own, "held-out people": others, **results}.items():
        print("{}: median {:.3f}, 99th percentile {:.3f}, highest {:.3f} of {}".format(
            name, np.median(values), *np.percentile(values, (99, 100)), len(values)))
    print("the ten highest: " + ", ".join(f"{similarity:.3f}" for similarity, *_ in pairs))
    print(f"written to {folder}")


def nearest_of(embeddings: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit embedding [N, D] the highest cosine to the rows of `trained` [M, D], and that row's number; [N] each."""
    highest, nearest = [], []
    for start in range(0, len(embeddings), BLOCK):
        similarities = embeddings[start : start + BLOCK] @ trained.T
        highest.append(similarities.max(axis=1))
        nearest.append(similarities.argmax(axis=1))
    return np.concatenate(highest), np.concatenate(nearest)


if __name__ == "__main__":
    run_script(main)
