"""Clusters of alike units, each replaced by its mean: no data needed (model folding, arXiv:2502.10216).

With the 0/1 membership M [k, n]: producers become (M M^T)^-1 M P, consumers W M^T. Exact if the units of a cluster are the
same; channels between a gate and an up projection are the same up to a factor, as they are linear in the up projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def clusters(features: Tensor, count: int) -> Tensor:
    """Ward's clusters: those pairs are merged first that add least to the sum of squares within clusters.

    Args:
        features: [n, f].
        count: clusters, between 1 and n.

    Returns:
        int64 [n], the cluster of each row, numbered by their first rows.
    """
    import scipy.cluster.hierarchy

    n = len(features)
    members: dict[int, list[int]] = {i: [i] for i in range(n)}
    if count < n:
        merges = scipy.cluster.hierarchy.ward(features.detach().double().cpu().numpy())
        for step, (a, b) in enumerate(merges[: n - count, :2].astype(np.int64).tolist()):
            members[n + step] = members.pop(a) + members.pop(b)
    labels = torch.empty(n, dtype=torch.long)
    for number, rows in enumerate(sorted(members.values(), key=min)):
        labels[rows] = number
    return labels.to(features.device)


def merge_rows(P: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of the rows of each cluster: [n, ...] -> [count, ...] float64."""
    sums = P.new_zeros(count, *P.shape[1:], dtype=torch.float64).index_add_(0, labels, P.double())
    sizes = torch.bincount(labels, minlength=count).double()
    return sums / sizes.view(-1, *[1] * (P.ndim - 1))


def merge_columns(W: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sum of the columns of each cluster: [m, n] -> [m, count] float64."""
    return W.new_zeros(W.shape[0], count, dtype=torch.float64).index_add_(1, labels, W.double())


def features_of(producers: Sequence[Tensor], W: Tensor) -> Tensor:
    """What makes two units alike: their rows in all producers and their columns in the consumer, [n, f] float64."""
    return torch.cat([*(P.double().flatten(1) for P in producers), W.double().T], dim=1)


def balanced(up: Tensor, W: Tensor) -> Tensor:
    """Factors c [n] that make c ||up_j|| = ||W_j|| / c, which changes nothing if the vector is linear in up.

    Two channels that are the same but for a factor become the same. Zero rows or columns are left as they are.
    """
    made, read = up.double().flatten(1).norm(dim=1), W.double().norm(dim=0)
    possible = (made > 0) & (read > 0)
    return torch.where(possible, (read / made.clamp_min(1e-300)).sqrt(), torch.ones_like(made))
