"""Finds wrong labels of texts from their features: no image and no trained model is needed.

The texts are random sentences about four topics, with 15 % wrong labels. Their features are TF-IDF of character
n-grams, reduced by an SVD; any features of a sentence encoder work the same way. Run: python audit_text_features.py

The same audit on the command line, with the features and labels as files:
    tadperf audit --features features.npy --labels labels.csv --out suspects.csv
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from tadperf.trust import audit_labels

TOPICS = {
    "cooking": "boil simmer garlic onion butter oven recipe flour spice pan roast taste sauce salt whisk",
    "sailing": "anchor mast harbour tide rope sail wind deck crew compass knot storm island keel rudder",
    "finance": "interest bond market share dividend loan credit tax profit budget index fund price debt yield",
    "gardening": "soil seed compost prune rose hedge water weed bloom lawn spade root harvest frost shade",
}
COMMON = "the a of and we then after before they with some good new day very about more first people time would make"
WRONG = 0.15  # share of wrong labels
WIDTH = 64  # features of a text


def write_texts(count: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Returns random texts of ten words, two about a topic and one about any topic, and the topic of each."""
    topics = rng.integers(0, len(TOPICS), count)
    words = [text.split() for text in TOPICS.values()]
    common = COMMON.split()
    texts = []
    for topic in topics:
        other = words[rng.integers(len(words))]
        chosen = [*rng.choice(words[topic], 2), rng.choice(other), *rng.choice(common, 7)]
        texts.append(" ".join(rng.permutation(chosen)))
    return texts, topics


def embed(texts: list[str]) -> np.ndarray:
    """Returns features [N, WIDTH]."""
    counts = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=2).fit_transform(texts)
    return TruncatedSVD(WIDTH, random_state=0).fit_transform(counts).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="800 texts instead of 4000")
    rng = np.random.default_rng(0)
    texts, topics = write_texts(800 if parser.parse_args().quick else 4000, rng)
    wrong = rng.random(len(texts)) < WRONG
    labels = np.where(wrong, (topics + rng.integers(1, len(TOPICS), len(texts))) % len(TOPICS), topics)

    state = audit_labels(labels, features=embed(texts), class_names=list(TOPICS))

    issues = state.issues.numpy()
    print(f"{len(texts)} texts, {wrong.sum()} wrong labels, {issues.sum()} suspected")
    print(f"precision {(issues & wrong).sum() / issues.sum():.3f}, recall {(issues & wrong).sum() / wrong.sum():.3f}")
    print(f"suggested topic right: {(state.suggested.numpy() == topics)[issues & wrong].mean():.3f}")
    for row in state.worst()[:3].tolist():
        given, suggested = (state.class_names[int(part[row])] for part in (state.given, state.suggested))
        print(f"  {given} -> {suggested}: {texts[row]}")


if __name__ == "__main__":
    main()
