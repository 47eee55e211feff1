"""Boosted trees in NumPy: features in, log-odds out, and how much each feature added to them.

Walking a tree, each split moves the expected value of the node; the move belongs to the split's feature (Saabas' path
attribution). The moves of a feature, summed over all trees, are its contribution. Contributions and `base` sum to the
log-odds exactly. Fitting is scikit-learn's; a server doesn't need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class BoostedTrees:
    """Trees as arrays [trees, nodes], padded to the largest tree.

    base: log-odds before the first tree, with the expected values of all roots. left, right: the children of a node; a
    leaf is its own child. feature, threshold: a node's split; a value up to the threshold goes left. value: a node's
    expected addition to the log-odds. depth: the longest way from a root to a leaf.
    """

    base: float
    left: Ints
    right: Ints
    feature: Ints
    threshold: Floats
    value: Floats
    depth: int

    @classmethod
    def from_sklearn(cls, model: Any) -> BoostedTrees:
        """Convert a fitted GradientBoostingClassifier of two classes."""
        trees = [estimator.tree_ for estimator in model.estimators_[:, 0]]
        width = max(tree.node_count for tree in trees)
        shape = len(trees), width
        itself = np.broadcast_to(np.arange(width), shape)
        left, right = itself.copy(), itself.copy()
        feature, threshold, value = np.zeros(shape, int), np.zeros(shape), np.zeros(shape)
        for row, tree in enumerate(trees):
            count = tree.node_count
            inner = np.flatnonzero(tree.children_left >= 0)
            left[row, inner], right[row, inner] = tree.children_left[inner], tree.children_right[inner]
            feature[row, inner], threshold[row, inner] = tree.feature[inner], tree.threshold[inner]
            # scikit-learn stores the gradient step in leaves alone: a node's value is the mean of its leaves'.
            value[row, :count] = model.learning_rate * _expected(tree)
        prior = float(np.clip(model.init_.class_prior_[1], 1e-9, 1 - 1e-9))
        base = float(np.log(prior / (1 - prior)) + value[:, 0].sum())
        return cls(base, left, right, feature, threshold, value, max(tree.max_depth for tree in trees))

    def contributions(self, features: NDArray[Any]) -> Floats:
        """features [n, features] → each feature's addition to the log-odds [n, features]."""
        # As scikit-learn, which compares in single precision.
        features = np.asarray(features, np.float32)
        count, trees = len(features), np.arange(len(self.left))
        added = np.zeros(features.shape)
        rows = np.repeat(np.arange(count), len(trees)).reshape(count, -1)
        node = np.zeros((count, len(trees)), np.int64)
        for _ in range(self.depth):
            split = self.feature[trees, node]
            goes_left = features[rows, split] <= self.threshold[trees, node]
            child = np.where(goes_left, self.left[trees, node], self.right[trees, node])
            np.add.at(added, (rows, split), self.value[trees, child] - self.value[trees, node])
            node = child
        return added

    def log_odds(self, features: NDArray[Any]) -> Floats:
        """features [n, features] → log-odds [n]."""
        total: Floats = self.base + self.contributions(features).sum(axis=1)
        return total

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        arrays = {name: getattr(self, name).tolist() for name in ("left", "right", "feature", "threshold", "value")}
        return {"base": self.base, "depth": self.depth, **arrays}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> BoostedTrees:
        """The inverse of `to_dict`. Raises `KeyError` or `ValueError`."""
        arrays: dict[str, Any] = {name: np.array(table[name], np.int64) for name in ("left", "right", "feature")}
        arrays |= {name: np.array(table[name], np.float64) for name in ("threshold", "value")}
        return cls(base=float(table["base"]), depth=int(table["depth"]), **arrays)


def _expected(tree: Any) -> Floats:
    """Each node's expected value [nodes]: a leaf's own, else the mean of the children's, weighted by their records."""
    value = np.array(tree.value[:, 0, 0], np.float64)
    weight = np.array(tree.weighted_n_node_samples, np.float64)
    for node in range(tree.node_count - 1, -1, -1):  # children come after their parents
        left, right = tree.children_left[node], tree.children_right[node]
        if left >= 0:
            value[node] = (weight[left] * value[left] + weight[right] * value[right]) / (weight[left] + weight[right])
    return value
