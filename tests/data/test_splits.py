"""Splits: near-duplicates on one side, the same sides for any order of rows and process, shares, official splits."""

import hashlib
import os
import random
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict

from shared import UserError
from shared.data.splits import cluster, split_dataset, split_rows


def random_words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(8000)}" for _ in range(count)]


def similarity(a: str, b: str) -> float:
    first, second = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a.split(), b.split()))
    return len(first & second) / len(first | second)


@pytest.fixture(scope="module")
def planted():
    """1,500 texts in random order, with the pairs planted in them: exact, near (>= 0.8), apart (0.3 to 0.5)."""
    rng = random.Random(3)
    texts, pairs = [], {"exact": [], "near": [], "apart": []}
    while len(texts) < 1500:
        words = random_words(rng, rng.randrange(100, 200))
        kind = rng.choice(["exact", "near", "apart", "alone"])
        other = list(words)
        if kind == "near":
            for place in rng.sample(range(len(words)), rng.randrange(1, 4)):
                other[place] = "new"
            if similarity(" ".join(words), " ".join(other)) < 0.8:
                continue
        elif kind == "apart":
            keep = int(0.6 * len(words))
            other[keep:] = random_words(rng, len(words) - keep)
            assert 0.3 < similarity(" ".join(words), " ".join(other)) < 0.5
        texts.append(" ".join(words))
        if kind != "alone":
            pairs[kind].append((len(texts) - 1, len(texts)))
            texts.append(" ".join(other))
    order = list(range(len(texts)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    return [texts[i] for i in order], {kind: [(place[a], place[b]) for a, b in found] for kind, found in pairs.items()}


def side_of_rows(texts: list[str], seed: int = 42) -> list[str]:
    sides = split_rows(texts, seed)
    assert sorted(row for rows in sides.values() for row in rows) == list(range(len(texts)))
    side = {row: name for name, rows in sides.items() for row in rows}
    return [side[i] for i in range(len(texts))]


def test_planted_duplicates_land_on_one_side(planted):
    texts, pairs = planted
    for seed in (1, 2, 42):
        side = side_of_rows(texts, seed)
        assert all(side[a] == side[b] for a, b in pairs["exact"])
        assert sum(side[a] == side[b] for a, b in pairs["near"]) >= 0.95 * len(pairs["near"]) > 150
    label = cluster(texts)
    assert all(label[a] == label[b] for a, b in pairs["exact"])
    assert sum(label[a] == label[b] for a, b in pairs["near"]) >= 0.95 * len(pairs["near"])


def test_texts_that_share_less_than_half_are_not_clustered(planted):
    texts, pairs = planted
    label = cluster(texts)
    assert len(pairs["apart"]) > 150 and not any(label[a] == label[b] for a, b in pairs["apart"])
    assert len(set(label)) >= len(texts) - len(pairs["exact"]) - len(pairs["near"])


def test_a_chain_of_near_duplicates_is_one_cluster():
    words = random_words(random.Random(4), 400)
    chain = [" ".join(words[n : n + 200]) for n in range(0, 201, 8)]
    assert similarity(chain[0], chain[1]) > 0.9 and similarity(chain[0], chain[-1]) == 0.0
    assert len(set(cluster([*chain, " ".join(random_words(random.Random(5), 200))]))) == 2


def test_sides_do_not_depend_on_the_order_of_rows(planted):
    texts, _ = planted
    before = dict(zip(texts, side_of_rows(texts), strict=True))
    shuffled = random.Random(6).sample(texts, len(texts))
    assert dict(zip(shuffled, side_of_rows(shuffled), strict=True)) == before
    assert [texts[i] for i in split_rows(texts)["train"]] == [shuffled[i] for i in split_rows(shuffled)["train"]]


def test_another_seed_gives_other_sides(planted):
    texts, _ = planted
    assert side_of_rows(texts, seed=1) != side_of_rows(texts, seed=2)


PROGRAM = """
import hashlib, random
from shared.data.splits import split_rows
rng = random.Random(7)
texts = [" ".join(f"w{rng.randrange(900)}" for _ in range(30)) for _ in range(300)]
print(hashlib.sha256(repr(split_rows(texts + texts[:50])).encode()).hexdigest())
"""


def test_two_processes_agree():
    digests = set()
    for hash_seed, threads in (("1", "1"), ("2", "4")):
        environment = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "RAYON_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
        }
        command = [sys.executable, "-c", PROGRAM]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1 and len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize("count", [3, 10, 57, 1000])
def test_shares_are_exact_without_duplicates(count):
    rng = random.Random(8)
    sides = split_rows([" ".join(random_words(rng, 20)) for _ in range(count)])
    tenth = max(1, round(count / 10))
    assert {name: len(rows) for name, rows in sides.items()} == {
        "train": count - 2 * tenth,
        "validation": tenth,
        "test": tenth,
    }


def test_shares_stay_close_with_duplicates_and_a_large_cluster_goes_to_train(planted):
    texts, _ = planted
    sizes = {name: len(rows) for name, rows in split_rows(texts).items()}
    assert abs(sizes["test"] - 150) <= 2 and abs(sizes["validation"] - 150) <= 2
    copies = [texts[0]] * 400
    sides = split_rows(texts[:1000] + copies)
    assert set(range(1000, 1400)) <= set(sides["train"]) and len(sides["test"]) >= 138


@pytest.mark.parametrize("texts", [[], ["one"], ["one", "two"], ["the same text"] * 50])
def test_an_empty_split_is_an_error_that_says_what_to_do(texts):
    with pytest.raises(UserError, match=f"split is empty: {len(texts)} rows make .* groups(.|\n)*Add rows that differ"):
        split_rows(texts)


def test_texts_without_words_and_broken_ones_do_not_crash():
    texts = ["", " ", "!!!", "😀", "\ud800", "??", "ok", "x" * 100_000]
    assert len(side_of_rows(texts)) == len(texts)
    assert len(set(cluster(texts[2:]))) == len(texts[2:])


def make_data(**sizes: int) -> DatasetDict:
    rng = random.Random(9)
    return DatasetDict(
        {
            name: Dataset.from_dict({"text": [f"{name} " + " ".join(random_words(rng, 20)) for _ in range(size)]})
            for name, size in sizes.items()
        }
    )


def sizes_and_sources(data: DatasetDict) -> dict[str, tuple[int, set[str]]]:
    return {name: (len(rows), {text.split()[0] for text in rows["text"]}) for name, rows in data.items()}


def text_of(row: dict) -> str:
    return row["text"]


def test_official_splits_are_kept_in_an_order_of_the_seed():
    data = make_data(train=1, validation=2, test=30, unlabelled=4)
    split = split_dataset(data, text_of)
    assert sizes_and_sources(split) == {
        "train": (1, {"train"}),
        "validation": (2, {"validation"}),
        "test": (30, {"test"}),
    }
    first, texts = list(split["test"]["text"]), list(data["test"]["text"])
    assert first != texts and sorted(first) == sorted(texts)
    assert list(split_dataset(data, text_of)["test"]["text"]) == first
    assert list(split_dataset(data, text_of, seed=7)["test"]["text"]) != first


def test_missing_splits_are_taken_from_train():
    train, validation, test = {"train"}, {"validation"}, {"test"}
    assert sizes_and_sources(split_dataset(make_data(train=100), text_of)) == {
        "train": (80, train),
        "validation": (10, train),
        "test": (10, train),
    }
    assert sizes_and_sources(split_dataset(make_data(train=100, test=7), text_of)) == {
        "train": (90, train),
        "validation": (10, train),
        "test": (7, test),
    }
    assert sizes_and_sources(split_dataset(make_data(train=100, validation=7), text_of)) == {
        "train": (90, train),
        "validation": (10, train),
        "test": (7, validation),
    }


def test_split_dataset_shares_no_row_between_sides():
    split = split_dataset(make_data(train=100, test=7), text_of)
    texts = [text for rows in split.values() for text in rows["text"]]
    assert len(texts) == len(set(texts)) == 107


def test_split_dataset_explains_what_is_missing():
    with pytest.raises(UserError, match="no train split: found test"):
        split_dataset(make_data(test=5), text_of)
    with pytest.raises(UserError, match="official test split has no rows"):
        split_dataset(make_data(train=50, test=0), text_of)
