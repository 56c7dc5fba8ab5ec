"""Answers from logits: `decode` of shared/inference/qa_windows.py against the loop of transformers' utils_qa.py, one by one.

    python benchmarks/qa_decoding.py --questions 10000

Logits are noise with five likely answers in each window; contexts have up to 900 tokens, so that many questions have several
windows. Prints seconds and the ratio, and fails if one answer, score or null score differs.
"""

import argparse
import sys
import time

import numpy as np


def make(questions: int, seed: int = 0):
    """Windows of at most 384 tokens over made-up contexts, and logits for them."""
    from shared.inference.qa_windows import Windows

    random = np.random.default_rng(seed)
    parts, row = {"ids": [], "types": [], "spans": []}, []
    for number in range(questions):
        asked, tokens = int(random.integers(8, 20)), int(random.integers(60, 900))
        room, begin = 384 - asked - 3, 0
        ends = np.cumsum(random.integers(2, 9, tokens))
        while True:
            inside = ends[begin : begin + room]
            spans = np.full((len(inside) + asked + 3, 2), -1, dtype=np.int32)
            spans[asked + 2 : -1] = np.stack([inside - 1, inside], axis=1)
            parts["spans"].append(spans)
            row.append(number)
            if begin + room >= tokens:
                break
            begin += room - 128
    lengths = [len(spans) for spans in parts["spans"]]
    spans = np.concatenate(parts["spans"])
    windows = Windows(
        ids=np.zeros(len(spans), np.int32),
        types=np.zeros(len(spans), np.int8),
        spans=spans,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        row=np.array(row),
        answer=np.zeros((len(row), 2), int),
        cut_questions=0,
    )
    start, end = (random.normal(0, 1, len(spans)).astype(np.float32) for _ in range(2))
    for window, length in zip(windows.starts[:-1], lengths, strict=True):
        for place in random.integers(0, length - 4, 5):  # an answer that is likely, and the tokens around it
            height = random.uniform(1, 8)
            start[window + place : window + place + 3] += height
            end[window + place + 1 : window + place + 4] += height
    return windows, start, end


def loop(windows, start, end, n_best_size: int = 20, max_answer_length: int = 30) -> list[tuple]:
    """The rules as utils_qa.py has them: (score, first character, last character, null score) of each question."""
    windows_of = {}
    for window, row in enumerate(windows.row.tolist()):
        windows_of.setdefault(row, []).append(window)
    found = []
    for chosen in windows_of.values():
        minimum_null, predictions = None, []
        for window in chosen:
            inside = slice(windows.starts[window], windows.starts[window + 1])
            start_logits, end_logits = start[inside], end[inside]
            offsets = [None if first < 0 else (first, last) for first, last in windows.spans[inside].tolist()]
            null = start_logits[0] + end_logits[0]
            if minimum_null is None or minimum_null > null:
                minimum_null = null
            start_indexes = np.argsort(start_logits)[-1 : -n_best_size - 1 : -1].tolist()
            end_indexes = np.argsort(end_logits)[-1 : -n_best_size - 1 : -1].tolist()
            for start_index in start_indexes:
                for end_index in end_indexes:
                    if (
                        start_index >= len(offsets)
                        or end_index >= len(offsets)
                        or offsets[start_index] is None
                        or offsets[end_index] is None
                    ):
                        continue
                    if end_index < start_index or end_index - start_index + 1 > max_answer_length:
                        continue
                    predictions.append(
                        {
                            "offsets": (offsets[start_index][0], offsets[end_index][1]),
                            "score": start_logits[start_index] + end_logits[end_index],
                        }
                    )
        predictions = sorted(predictions, key=lambda x: x["score"], reverse=True)[:n_best_size]
        best = predictions[0] if predictions else {"offsets": (0, 0), "score": -np.inf}
        found.append((best["score"], *best["offsets"], minimum_null))
    return found


def main() -> None:
    """Runs both three times in turn; the fastest of each counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=10_000, help="how many questions to answer")
    questions = parser.parse_args().questions
    from shared.inference.qa_windows import decode

    windows, start, end = make(questions)
    seconds = {"loop": [], "vectorised": []}
    for _ in range(3):
        began = time.perf_counter()
        expected = loop(windows, start, end)
        seconds["loop"].append(time.perf_counter() - began)
        began = time.perf_counter()
        found = decode(windows, start, end)
        seconds["vectorised"].append(time.perf_counter() - began)
    ours = zip(*(found[name].tolist() for name in ("score", "first", "last", "null")), strict=True)
    differing = sum(a != b for a, b in zip(ours, expected, strict=True))
    for name, runs in seconds.items():
        print(f"{name:11} {min(runs):7.3f} s")
    print(f"ratio {min(seconds['loop']) / min(seconds['vectorised']):.1f}")
    print(f"{questions:,} questions in {len(windows):,} windows, {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
