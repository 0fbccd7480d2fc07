"""Which rows are equal, nearly equal, or answer the same prompt: by signatures of some 200 bytes a row.

Near duplicates are found by MinHash (Broder 1997) over runs of 5 characters, which need no notion of a word and so
serve every script, and by locality-sensitive hashing: rows that share one of 16 bands of 8 hashes are compared.
The comparison estimates the Jaccard similarity from the lowest 8 bits of the 128 hashes (Li and Koenig 2010).

A label names a group of rows: it is the index of the group's first row.
"""

import hashlib
import json
import logging
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.recipe import Data
from train.reading.row import texts

ENCODER = json.JSONEncoder(sort_keys=True)  # json.dumps would make one a row
WORD = re.compile(r"\w+")
RUN = 5  # characters; Mining of Massive Datasets, section 3.2.2, has 5 for texts as short as e-mails
BANDS, HASHES, SEED = 16, 128, 42
NEIGHBOURS = 32  # rows of one band that each is compared with, so that a band of a million rows stays cheap
SIGNATURE = np.dtype([("digest", "<u8"), ("prompt", "<u8"), ("bands", "<u4", (BANDS,)), ("sketch", "u1", (HASHES,))])

Signatures = NDArray[np.void]
Labels = NDArray[np.int64]


def signatures(values: list[dict[str, Any]], seed: int) -> Signatures:
    """One `SIGNATURE` a row, shape (rows,); `digest`, of the seed and the row, is its place in the split as well."""
    from rensa import RMinHash

    found = np.zeros(len(values), SIGNATURE)
    if not values:
        return found
    found["digest"] = [_digest([seed, value]) for value in values]
    found["prompt"] = [_digest(_prompt(value)) for value in values]
    runs, offsets = _runs([_compared(value) for value in values])
    minima = np.array(RMinHash.digest_matrix_from_flat_token_hashes(runs, offsets, HASHES, SEED).to_rows(), np.uint32)
    found["sketch"] = minima & 0xFF
    found["bands"] = _folded(minima.reshape(len(values), BANDS, -1))
    return found


def equal(rows: Signatures) -> Labels:
    """The label of each row's exact duplicates, shape (rows,)."""
    return _first(rows["digest"])


def near(rows: Signatures, similarity: float) -> Labels:
    """The label of each row's near duplicates: those of an estimated Jaccard similarity from `similarity` on,
    and theirs in turn. Equal rows are near duplicates whatever the similarity.
    """
    labels = equal(rows)
    single = np.flatnonzero(labels == np.arange(len(rows)))  # one of equal rows is enough to compare
    single = single[np.argsort(rows["digest"][single], kind="stable")]  # neighbours do not depend on the files' order
    for band in range(BANDS):
        keys = rows["bands"][single, band]
        order = np.argsort(keys, kind="stable")
        keys, shared = keys[order], np.arange(len(order))
        for distance in range(1, NEIGHBOURS + 1):
            shared = shared[shared < len(order) - distance]
            shared = shared[keys[shared] == keys[shared + distance]]
            if not len(shared):
                break
            left, right = single[order[shared]], single[order[shared + distance]]
            apart = labels[left] != labels[right]
            left, right = left[apart], right[apart]
            alike = _similarity(rows["sketch"], left, right) >= similarity
            labels = joined(labels, left[alike], right[alike])
    return labels


def same_prompt(rows: Signatures, labels: Labels) -> Labels:
    """`labels` with those groups made one that hold answers to the same prompt."""
    return joined(labels, np.arange(len(rows)), _first(rows["prompt"]))


def joined(labels: Labels, left: Labels, right: Labels) -> Labels:
    """`labels` after the groups of the rows `left` and of the rows `right` are made one, pair by pair."""
    labels = labels.copy()
    while (labels[left] != labels[right]).any():
        lowest = np.minimum(labels[left], labels[right])
        np.minimum.at(labels, labels[left], lowest)
        np.minimum.at(labels, labels[right], lowest)
        while (labels != (shorter := labels[labels])).any():
            labels = shorter
    return labels


def _first(keys: NDArray[np.uint64]) -> Labels:
    """The index of the first row that has the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _similarity(sketches: NDArray[np.uint8], left: Labels, right: Labels, step: int = 1 << 18) -> NDArray[np.float64]:
    """Estimated Jaccard similarities of pairs; 8 bits of two hashes are equal by chance once in 256."""
    pieces = [slice(at, at + step) for at in range(0, len(left), step)]
    equal = [(sketches[left[piece]] == sketches[right[piece]]).mean(axis=1) for piece in pieces]
    return (np.concatenate([np.empty(0), *equal]) - 1 / 256) / (1 - 1 / 256)


def _digest(value: Any) -> int:
    """64 bits of SHA-256: two of a million different rows get the same one with a probability below 1e-7."""
    text = ENCODER.encode(value)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _prompt(value: dict[str, Any]) -> Any:
    """What the last answer answers, by its words and without the system prompt; plain text answers nothing."""
    asked = "\n".join(texts({"messages": _spoken(value)[:-1]}))
    return " ".join(WORD.findall(asked.casefold())) or asked or value


def _compared(value: dict[str, Any]) -> str:
    """The whole conversation without its system prompt, which many share; case and white space do not count."""
    return " ".join("\n".join(texts(value | {"messages": _spoken(value)})).casefold().split())


def _spoken(value: dict[str, Any]) -> list[dict[str, Any]]:
    return [message for message in value.get("messages", ()) if message["role"] != "system"]


def _runs(compared: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The hashes of all runs of `RUN` characters, text after text, and where each text's begin and the last one's end.

    A text is followed by zeros, so that it has as many runs as characters, and an empty one has one.
    """
    padded = [(text or "\0") + "\0" * (RUN - 1) for text in compared]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes = np.zeros(len(codes) - RUN + 1, np.uint64)
    for place in range(RUN):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[place : place + len(hashes)]
    lengths = np.array([len(text) for text in padded])
    ends = np.cumsum(lengths)
    inside = np.ones(len(codes), bool)
    for place in range(1, RUN):
        inside[ends - place] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - RUN + 1)]).astype(np.uint64)
    return _mixed(hashes[inside[: len(hashes)]]), offsets


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, after which every bit depends on every character."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def _folded(bands: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A hash of 32 bits for each band of hashes along the last axis."""
    folded = np.zeros(bands.shape[:-1], np.uint64)
    for place in range(bands.shape[-1]):
        folded = _mixed(folded + bands[..., place])
    return (folded >> np.uint64(32)).astype(np.uint32)


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
