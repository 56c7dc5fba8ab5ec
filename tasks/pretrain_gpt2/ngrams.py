"""Unigram and trigram models of the same tokens: what a language model must beat. Used by train.py."""

import numpy as np


class Unigram:
    """Relative frequencies with one added to each count (Laplace), so that every token has a probability."""

    def __init__(self, tokens: np.ndarray, vocabulary: int):
        counts = np.bincount(tokens, minlength=vocabulary) + 1.0
        self.logs = np.log(counts / counts.sum())

    def nll(self, document: np.ndarray) -> float:
        """Summed nats of all tokens of a document but the first, which is the end-of-text token before it."""
        return -float(self.logs[document[1:]].sum())


class Trigram:
    """Interpolated Kneser-Ney (Chen & Goodman 1999, section 2.7), one discount n1 / (n1 + 2 n2) for each order.

    Args:
        tokens: (n,) token ids, documents separated by `end`; what came before an `end` is no context for what follows.
        vocabulary: number of token ids; every one gets a probability, those never seen too.
        end: id of the end-of-text token.

    Memory: about 60 bytes for each distinct trigram.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int, end: int):
        self.size, self.end = vocabulary, end
        tokens = tokens.astype(np.int64)
        u, v, w = self._triples(np.concatenate([[end], tokens]))
        trigrams, counts = np.unique((u * self.size + v) * self.size + w, return_counts=True)
        # Below the highest order a count is the number of distinct words before (continuation count).
        bigrams, before = np.unique(trigrams % self.size**2, return_counts=True)
        words, heads = np.unique(bigrams % self.size, return_counts=True)
        self.third = _Order(trigrams, counts, self.size)
        self.second = _Order(bigrams, before, self.size)
        self.first = _Order(words, heads, self.size)

    def _triples(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, v, w = row[:-2], row[1:-1], row[2:]
        return np.where(v == self.end, self.end, u), v, w

    def probabilities(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """p(w | u v) of each triple, (n,)."""
        found = self.first.interpolate(w * 0, w, np.full(len(w), 1 / self.size))
        found = self.second.interpolate(v, v * self.size + w, found)
        return self.third.interpolate(u * self.size + v, (u * self.size + v) * self.size + w, found)

    def nll(self, document: np.ndarray) -> float:
        """Summed nats of all tokens of a document but the first, which is the end-of-text token before it."""
        u, v, w = self._triples(np.concatenate([[self.end], document.astype(np.int64)]))
        return -float(np.log(self.probabilities(u, v, w)).sum())


class _Order:
    """Discounted counts of one order: sorted n-grams as integers, the last word in the lowest place."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, size: int):
        once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
        self.discount = once / (once + 2 * twice) if once else 0.5
        self.grams, self.counts = grams, counts
        self.contexts, starts = np.unique(grams // size, return_index=True)
        self.totals = np.add.reduceat(counts, starts)
        self.kinds = np.diff(np.append(starts, len(grams)))

    def interpolate(self, contexts: np.ndarray, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """The discounted estimate plus what the discount freed, shared out as the lower order says."""
        at, known = _find(self.contexts, contexts)
        gram_at, seen = _find(self.grams, grams)
        total = self.totals[at]
        own = np.where(seen, self.counts[gram_at] - self.discount, 0) / total
        return np.where(known, own + self.discount * self.kinds[at] / total * lower, lower)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each key in a sorted table, and whether it is there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def tokens_of(blocks: np.ndarray) -> np.ndarray:
    """The tokens of blocks in their order: (n,), each once, without what fills the last block."""
    row = np.concatenate([blocks[:1, 0], blocks[:, 1:].ravel()])
    return row[row >= 0]


def ngram_scores(seen, whole, documents: list[list[int]], vocabulary: int, end: int) -> dict[str, dict]:
    """Unigram and trigram of the tokens that the model saw, and a trigram of the whole training split where that is more.

    Args:
        seen: (blocks, length + 1).
        whole: the training split in the same form, or None where it is a stream.
        documents: token ids of each test document.

    Returns:
        By name, `{"nll", "tokens"}` for each document, over the same tokens as `score_documents`.
    """
    models = {"unigram": Unigram(tokens_of(seen), vocabulary), "trigram": Trigram(tokens_of(seen), vocabulary, end)}
    if whole is not None and len(whole) > len(seen):
        models["full trigram"] = Trigram(tokens_of(whole), vocabulary, end)
    rows = [np.array([end, *ids, end]) for ids in documents]
    return {
        name: {"nll": [model.nll(row) for row in rows], "tokens": [len(row) - 1 for row in rows]}
        for name, model in models.items()
    }
