"""Which rows are kept, and which of them are held back for validation: a cluster of near duplicates as one.

The hash of a cluster's first row decides for all of it, so that rows which are added at the end of a file, or in
files named later, move no earlier one; unless a row joins two clusters, which are on one side from then on.
"""

import logging

import numpy as np
from numpy.typing import NDArray

from pipeline.recipe import Data
from train.cleaning.duplicates import Labels, Signatures, equal, near, same_prompt

TEMPLATE_ROWS = 20  # a cluster of at least so many rows, and of more than half of all, is a template, no duplicate

log = logging.getLogger("truetune")


def sides(rows: Signatures, data: Data) -> tuple[Labels, NDArray[np.bool_]]:
    """For each row, the first row that it repeats (itself if it is to be kept), and whether it is for validation."""
    same, alike = equal(rows), near(rows, data.clean.similarity)
    first = alike if data.clean.near_duplicates else same if data.clean.duplicates else np.arange(len(rows))
    kept = first == np.arange(len(rows))
    clusters = without_templates(same_prompt(rows, alike), same)
    place = np.cumsum(kept) - 1  # of each row among those that are kept; a cluster's first one is
    held = np.zeros(len(rows), bool)
    held[kept] = held_back(rows["digest"][kept], place[clusters[kept]], data.validation, data.validation_rows)
    if beside := int((place[clusters[kept]] != place[kept]).sum()):
        log.info("data: %d rows are on the side of a near duplicate or of another answer to their prompt", beside)
    return first, held


def held_back(digests: NDArray[np.uint64], clusters: NDArray[np.int64], share: float, most: int) -> NDArray[np.bool_]:
    """Whether each row is for validation, shape (rows,); rows of one cluster are on one side.

    Args:
        digests: a hash of each row and the seed, evenly spread over 64 bits.
        clusters: the index of the first row of each row's cluster; that one's digest decides for all.
        share: of the rows that are held back. It is halved until at most `most` are, so that a growing file moves
            rows to the training side, seldom, and never from it.
    """
    if share == 0 or not len(digests):
        return np.zeros(len(digests), bool)
    positions = digests[clusters] / 2.0**64
    held = positions < share
    while held.sum() > most:
        share /= 2
        held = positions < share
    return held if held.any() else positions == positions.min()


def without_templates(clusters: NDArray[np.int64], equal: NDArray[np.int64]) -> NDArray[np.int64]:
    """`clusters`, of which one that fills half of all rows is left to exact duplicates: a prompt makes it alike."""
    sizes = np.bincount(clusters, minlength=1)
    largest = sizes.argmax()
    if sizes[largest] < TEMPLATE_ROWS or 2 * sizes[largest] <= len(clusters):
        return clusters
    log.info(
        "data: %d of %d rows are alike: taken for a template, they are split one by one", max(sizes), len(clusters)
    )
    return np.where(clusters == largest, equal, clusters)
