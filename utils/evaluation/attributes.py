"""Who is in a set of faces: sex, age and ethnicity, estimated from embeddings by a classifier trained on labelled faces."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

AGES = {"18 to 29": 30, "30 to 44": 45, "45 to 59": 60, "60 and over": 200}  # name -> the first age beyond it
TESTED_PART = 5  # one labelled face in that many tests the classifier
# Embeddings have unit length, so their numbers are small, and the usual strength of the penalty (1) would be far too much.
C = 30.0


@dataclass(frozen=True)
class Attribute:
    """A classifier of one attribute."""

    name: str
    classifier: LogisticRegression  # of embeddings
    accuracy: float  # on labelled faces that it was not trained on
    majority: float  # what always guessing the commonest class would get


def age_group(age: int) -> str:
    return next(name for name, beyond in AGES.items() if age < beyond)


def fit(embeddings: np.ndarray, labels: Mapping[str, Sequence[str]]) -> list[Attribute]:
    """A logistic regression for each attribute.

    Args:
        embeddings: [N, D], unit norm, of faces of different people.
        labels: attribute -> the N faces' classes.
    """
    attributes = []
    tested = np.random.default_rng(0).permutation(len(embeddings)) % TESTED_PART == 0
    for name, classes in labels.items():
        classes = np.asarray(classes)
        classifier = LogisticRegression(C=C, max_iter=1000).fit(embeddings[~tested], classes[~tested])
        _, counts = np.unique(classes[tested], return_counts=True)
        attributes.append(Attribute(name, classifier, classifier.score(embeddings[tested], classes[tested]),
                                    counts.max() / counts.sum()))
    return attributes


def shares(attribute: Attribute, embeddings: np.ndarray) -> dict[str, float]:
    """The estimated share of each class: the mean of its probability over the faces, which errs less than counting guesses."""
    return dict(zip(attribute.classifier.classes_.tolist(), attribute.classifier.predict_proba(embeddings).mean(axis=0).tolist(),
                    strict=True))
