"""Time, memory and accuracy of near-duplicate clustering and the 80/10/10 split on synthetic rows.

    python benchmarks/splits_scale.py

Rows are 80 words drawn from 20,000. Of ten rows one has a planted partner with two words replaced (the similarity of
their word 5-grams is 0.7 to 1), another a partner that shares only its first 50 words (0.43). Recall is over planted
pairs of Jaccard similarity 0.8 or more, computed by brute force; precision is the share of links found that are planted
near ones.
"""

import random
import resource
import time

from shared.data.splits import cluster, split_rows

WORDS = [f"{a}{b}{c}" for a in ("ba", "do", "ku", "mi") for b in range(10) for c in range(500)]


def make_rows(count: int, seed: int) -> tuple[list[str], list[tuple[int, int]]]:
    """`count` texts in random order, and the planted pairs as row numbers."""
    rng = random.Random(seed)
    texts, partner = [], {}
    while len(texts) < count:
        words = rng.choices(WORDS, k=80)
        texts.append(" ".join(words))
        if len(texts) % 10 == 5 and len(texts) < count:
            texts.append(" ".join(words[:50] + rng.choices(WORDS, k=30)))
        elif len(texts) % 10 == 1 and len(texts) < count:
            first = rng.randrange(79)
            for place in (first, first + 1) if rng.random() < 0.5 else rng.sample(range(80), 2):
                words[place] = rng.choice(WORDS)
            partner[len(texts) - 1] = len(texts)
            texts.append(" ".join(words))
    order = list(range(count))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    return [texts[old] for old in order], [(place[a], place[b]) for a, b in partner.items()]


def jaccard(a: str, b: str) -> float:
    """Similarity of the sets of word 5-grams of two texts, 0 to 1."""
    first, second = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a.split(), b.split()))
    return len(first & second) / len(first | second)


def main() -> None:
    for count in (25_000, 50_000, 100_000):
        texts, planted = make_rows(count, seed=1)
        start = time.perf_counter()
        sides = split_rows(texts)
        seconds = time.perf_counter() - start
        sizes = " ".join(f"{name} {len(rows):,}" for name, rows in sides.items())
        print(f"{count:>7,} rows: {seconds:5.1f} s, {1e6 * seconds / count:.0f} us a row, {sizes}")
    side_of = {row: name for name, rows in sides.items() for row in rows}
    near = [(a, b) for a, b in planted if jaccard(texts[a], texts[b]) >= 0.8]
    together = sum(side_of[a] == side_of[b] for a, b in near)
    labels = cluster(texts)
    found = sum(labels[a] == labels[b] for a, b in near)
    true_links = sum(labels[a] == labels[b] for a, b in planted)
    links = len(texts) - len(set(labels))
    print(
        f"planted pairs of similarity >= 0.8: {len(near):,}; in one cluster {found:,} (recall {found / len(near):.4f})"
    )
    print(f"on one side of the split: {together:,} ({together / len(near):.4f})")
    print(f"links found: {links:,}, planted among them {true_links:,} (precision {true_links / links:.4f})")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
