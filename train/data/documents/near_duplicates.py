"""Find near duplicates: documents that share most of their runs of three words.

    shingles     the set of all runs of _WORDS words of a document, without case and punctuation
    similarity   J(A, B) = |A and B| / |A or B|, the Jaccard index of two sets of shingles
    signature    MinHash: _HASHES hash functions, each with its smallest value over the set. Two
                 signatures agree in one hash with probability J (Broder 1997). rensa computes them
    bands        two documents are compared if all hashes of one band of `rows` hashes agree, which
                 happens with probability 1 - (1 - J**rows)**bands

A document whose words are changed at random places in 10 % of the text has J = 0.57 with the
original: a run of three words survives with probability 0.9**3 = 0.73, and 0.73 / (2 - 0.73) =
0.57. Unrelated documents have J below 0.1.

While the source is read, the signatures are written to temporary files, one byte per hash. Then
each band is read by itself, so memory holds about 40 bytes per document. Equal hashes of a band
form a group; its members are compared with the first of the group. Members that differ from it form
the next group, for at most _ROUNDS rounds. Of two similar documents the later one is dropped,
unless the earlier one is dropped itself.
"""

from pathlib import Path

import numpy as np

from ....errors import InputError
from .text_batch import TextBatch, mix

USUAL_SIMILARITY = 0.4
_WORDS = 3
_HASHES = 128
_SEED = 1
_ROUNDS = 16
_MOST_ROWS = 8
# The bands must find a pair at the threshold with at least this probability.
_RECALL = 0.9
# Bytes of two unequal hashes agree with this probability.
_CHANCE = 1 / 256


def rows_per_band(similarity: float) -> int:
    """Return the maximum number of rows with which pairs at the threshold are still found."""
    rows = 1
    for more in range(2, _MOST_ROWS + 1):
        if 1 - (1 - similarity**more) ** (_HASHES // more) >= _RECALL:
            rows = more
    return rows


def signatures(batch: TextBatch) -> np.ndarray:
    """Return MinHash signatures, (documents, _HASHES) uint32.

    A document with fewer than _WORDS words has a signature of its own, a row of zeros.
    """
    try:
        import rensa
    except ImportError:
        raise InputError(
            "near_duplicates: expected the package rensa, found none; pip install 'tritium[data]'"
        ) from None
    hashes, documents = batch.ngrams(_WORDS)
    counts = np.bincount(documents, minlength=len(batch))
    offsets = np.concatenate([[0], np.cumsum(counts)]).tolist()
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, _HASHES, _SEED)
    rows = np.array(matrix.to_rows(), np.uint32).reshape(len(batch), _HASHES)
    rows[counts == 0] = 0
    return rows


class NearDuplicates:
    """The signatures of a corpus, in files of a folder.

    Args:
        folder: for temporary files, which `find` deletes.
        similarity: smallest J of near duplicates, in [0.2, 1].
    """

    def __init__(self, folder: Path, similarity: float):
        self._similarity = similarity
        self._rows = rows_per_band(similarity)
        bands = _HASHES // self._rows
        self._paths = [folder / f"near-{name}.tmp" for name in ("bytes", *range(bands))]
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115 - closed by find
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        """Add the signatures of the next documents, (n, _HASHES) uint32."""
        self._count += len(rows)
        self._files[0].write(_low_bytes(rows).tobytes())
        has_words = rows.any(axis=1)
        for band, file in enumerate(self._files[1:]):
            keys = np.full(len(rows), band, np.uint64)
            for column in range(band * self._rows, (band + 1) * self._rows):
                keys = mix(keys ^ rows[:, column])
            keys[~has_words] = 0  # in no group
            file.write(keys.tobytes())

    def find(self) -> np.ndarray:
        """Return for each document the earlier document that it repeats, or -1; (documents,)."""
        for file in self._files:
            file.close()
        if not self._count:
            return np.empty(0, np.int64)
        found = [np.empty((0, 2), np.int64)]
        signature = np.memmap(self._paths[0], np.uint8, "r", shape=(self._count, _HASHES))
        for path in self._paths[1:]:
            found += self._pairs_of_band(np.fromfile(path, np.uint64), signature)
        del signature  # Windows cannot delete a mapped file
        self.delete()
        return _keep_first(np.unique(np.concatenate(found), axis=0), self._count)

    def delete(self) -> None:
        """Delete the temporary files."""
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)

    def _pairs_of_band(self, keys: np.ndarray, signature: np.ndarray) -> list[np.ndarray]:
        """Return similar pairs (later, earlier) among documents with the same key."""
        order = np.argsort(keys, kind="stable")
        order = order[np.searchsorted(keys[order], 1) :]
        found = []
        for _ in range(_ROUNDS):
            # keep the groups of two or more
            group = keys[order]
            is_first = np.ones(len(order), bool)
            is_first[1:] = group[1:] != group[:-1]
            first = np.flatnonzero(is_first)
            sizes = np.diff(first, append=len(order))
            leaders = np.repeat(order[first], sizes)[~is_first]
            members = order[~is_first]
            if not len(members):
                break
            # compare each member with the first of its group
            is_similar = self._are_similar(signature, members, leaders)
            found.append(np.stack([members[is_similar], leaders[is_similar]], axis=1))
            order = members[~is_similar]
        return found

    def _are_similar(self, signature: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        least = self._similarity * (1 - _CHANCE) + _CHANCE
        result = np.empty(len(a), bool)
        for start in range(0, len(a), 1 << 14):
            part = slice(start, start + (1 << 14))
            agree = np.count_nonzero(signature[a[part]] == signature[b[part]], axis=1)
            result[part] = agree >= least * _HASHES
        return result


def _low_bytes(rows: np.ndarray) -> np.ndarray:
    """Reduce each hash to one byte."""
    return (rows * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


def _keep_first(pairs: np.ndarray, count: int) -> np.ndarray:
    """Choose the documents to drop. pairs: (n, 2), later and earlier document, sorted."""
    repeats = np.full(count, -1, np.int64)
    for later, earlier in pairs.tolist():
        if repeats[later] < 0 and repeats[earlier] < 0:
            repeats[later] = earlier
    return repeats


def check_similarity(similarity: float) -> None:
    """Raise InputError unless the threshold is 0 (off) or in [0.2, 1]."""
    if similarity != 0 and not 0.2 <= similarity <= 1:
        raise InputError(
            f"near_duplicates: expected 0 (off) or a similarity from 0.2 to 1, got {similarity}; "
            f"{USUAL_SIMILARITY} is usual"
        )
