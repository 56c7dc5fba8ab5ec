"""Speed, memory, recall and precision of `python -m shared.corpora` on a corpus with planted near-duplicates.

    python benchmarks/corpora_scale.py --megabytes 500 --processes 1 2

The corpus is made of `docs:prose`: of each document as many variants as are needed, in which 30 % of the words are drawn anew, so
that two variants share next to no 5-grams. Of ten documents one has a planted copy with a few words replaced, whose Jaccard
similarity (of the sets of word 5-grams, by brute force) is 0.7 to 1, and one a decoy with similarity 0.3 to 0.6. Copies stand
anywhere behind their original. Recall is over planted copies of similarity 0.8 or more; precision is the share of what was
dropped as near-duplicate that is such a copy (strict), or any planted copy (0.7 or more).

The command runs as a child process; its memory is the sum over its processes, sampled ten times a second. `--index N` fills the
index of near-duplicates alone with N random signatures, the number of documents of a 10 GB corpus by default.

Measured on 2 cores, Python 3.11, alone on the machine (CPU seconds equal seconds), 511 MB in 102,712 documents, mostly ASCII:
  1 cleaning process   123 s, 4.1 MB/s, 126 MB of memory    2 of them   62 s, 8.2 MB/s, 224 MB of memory
  recall 0.9977 (6,574 of 6,589); precision 1.0000 at >= 0.7, 0.8402 at >= 0.8, since most copies between are dropped too
  none of 7,374 decoys and no other document was dropped
  index of 3,000,000: 780 MB, 260 bytes a document
Extrapolated from that, not run: 10 GB of such text are 2.0 M documents and take 0.34 h with 2 processes, 0.67 h with 1.
"""

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from shared.data import docs
from shared.data.cleaning import clean_text, repetitive
from shared.data.near_duplicates import NearDuplicates, shingles

MEGABYTE, TARGET = 10**6, 10**10


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the sets of word 5-grams, 0 to 1."""
    first, second = set(shingles(a)), set(shingles(b))
    return len(first & second) / len(first | second)


def replace_words(rng: random.Random, lines: list[list[str]], share: float, vocabulary: list[str]) -> list[list[str]]:
    """Lines of words in which a share of the words, at random places, are others."""
    return [[rng.choice(vocabulary) if rng.random() < share else word for word in words] for words in lines]


def join(lines: list[list[str]]) -> str:
    return "\n".join(" ".join(words) for words in lines)


def write_corpus(path: Path, megabytes: int) -> dict[str, float]:
    """Writes rows `text, source`; returns the similarity of each planted copy and decoy to its original, by source."""
    rng, planted, later, written, number = random.Random(1), {}, [], 0, 0
    originals = [[line.split() for line in row["text"].split("\n")] for row in docs.documents("docs:prose")]
    originals = [lines for lines in originals if 60 <= sum(map(len, lines)) <= 20_000]
    vocabulary = [word for lines in originals for words in lines for word in words]
    with open(path, "w", encoding="utf8") as file:

        def write(source: str, text: str) -> int:
            line = json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"
            file.write(line)
            return len(line.encode())

        while written < megabytes * MEGABYTE:
            lines = replace_words(rng, rng.choice(originals), 0.3, vocabulary)
            text = clean_text(join(lines))
            if repetitive(text):
                continue
            number += 1
            written += write(f"{number}", text)
            if number % 10 in (1, 6):
                # A word replaced breaks five 5-grams; 1.5 to 15 broken of 100 leave a similarity of 0.97 to 0.74.
                copy = number % 10 == 1
                share = rng.uniform(0.001, 0.033) if copy else rng.uniform(0.06, 0.12)
                other = clean_text(join(replace_words(rng, lines, share, vocabulary)))
                similar = similarity(text, other)
                if (similar >= 0.7 if copy else 0.3 <= similar <= 0.6) and not repetitive(other):
                    planted[f"{number}-{'copy' if copy else 'decoy'}"] = similar
                    later.append((f"{number}-{'copy' if copy else 'decoy'}", other))
            if len(later) > 2000:
                written += write(*later.pop(rng.randrange(len(later))))
        for row in later:
            write(*row)
    return planted


def cpu_of_children() -> float:
    """CPU seconds of all children that have ended. Much less than the time of one process says that it had to wait."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(source: Path, output: Path, processes: int) -> tuple[float, float, list[float], str]:
    """Seconds, CPU seconds, peak MB (all processes together, the main one, the largest other), what the command said."""
    command = [
        sys.executable,
        "-m",
        "shared.corpora",
        str(source),
        "--output",
        str(output),
        "--processes",
        str(processes),
    ]
    start, cpu = time.perf_counter(), cpu_of_children()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    main, peak = psutil.Process(child.pid), [0.0, 0.0, 0.0]
    while child.poll() is None:
        sizes = []
        for process in [main, *main.children(recursive=True)]:
            try:
                sizes.append(process.memory_info().rss / MEGABYTE)
            except psutil.NoSuchProcess:
                continue
        now = [sum(sizes), sizes[0] if sizes else 0, max(sizes[1:], default=0)]
        peak = [max(pair) for pair in zip(peak, now, strict=True)]
        time.sleep(0.1)
    said = child.stdout.read().strip()
    if child.returncode:
        sys.exit(f"the command failed with code {child.returncode}")
    return time.perf_counter() - start, cpu_of_children() - cpu, peak, said


def measure(megabytes: int, all_processes: list[int]) -> None:
    """Prints what was planted and a paragraph for each number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "corpus.jsonl", Path(folder) / "clean.jsonl.gz"
        planted = write_corpus(source, megabytes)
        size = source.stat().st_size / MEGABYTE
        with open(source, encoding="utf8") as lines:
            names = {json.loads(line)["source"] for line in lines}
        copies = {name for name in planted if name.endswith("copy")}
        near = {name for name in copies if planted[name] >= 0.8}
        print(f"{size:.0f} MB, {len(names):,} documents; planted: {len(near):,} copies of similarity >= 0.8, ", end="")
        print(f"{len(copies - near):,} of 0.7 to 0.8, {len(planted) - len(copies):,} decoys", flush=True)
        for processes in all_processes:
            seconds, cpu, peak, said = run(source, output, processes)
            with gzip.open(output, "rt", encoding="utf8") as lines:
                dropped = names - {json.loads(line)["source"] for line in lines}
            print(f"\n{processes} cleaning: {said.partition(': ')[2].partition(';')[0]}")
            print(
                f"  {seconds:.0f} s, {size / seconds:.1f} MB/s, {cpu:.0f} s of CPU; peak memory {peak[0]:.0f} MB in all, ",
                end="",
            )
            print(f"{peak[1]:.0f} main process, {peak[2]:.0f} largest other")
            print(f"  recall {len(near & dropped) / len(near):.4f} ({len(near & dropped):,} of {len(near):,})")
            print(f"  precision at >= 0.8 {len(near & dropped) / len(dropped):.4f}, ", end="")
            print(f"at >= 0.7 {len(copies & dropped) / len(dropped):.4f}; ", end="")
            print(f"decoys dropped {len(dropped & planted.keys() - copies):,}, ", end="")
            print(f"others dropped {len(dropped - planted.keys()):,}")
            hours, millions = TARGET / MEGABYTE / (size / seconds) / 3600, TARGET / MEGABYTE * len(names) / size / 1e6
            print(f"  extrapolated to 10 GB at this speed: {hours:.2f} h, {millions:.1f} M documents", flush=True)


def measure_index(count: int) -> None:
    """Prints time and memory of the index with `count` random signatures."""
    index, rng, process = NearDuplicates(), np.random.default_rng(1), psutil.Process()
    before, start = process.memory_info().rss / MEGABYTE, time.perf_counter()
    for first in range(0, count, 50_000):
        for signature in rng.integers(0, 256, (min(50_000, count - first), index.HASHES), dtype=np.uint8):
            index.add_signature(signature)
    seconds = time.perf_counter() - start
    used = process.memory_info().rss / MEGABYTE - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE - before
    print(
        f"index of {count:,}: {used:.0f} MB, {MEGABYTE * used / count:.0f} bytes a document, at most {peak:.0f} MB ",
        end="",
    )
    print(f"while it grew; {1e6 * seconds / count:.0f} us to look up and add one\n", flush=True)


def main() -> None:
    """Makes the corpus, runs the command, fills the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the corpus")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of cleaning processes to try")
    parser.add_argument("--index", type=int, default=3_000_000, help="documents of the index alone; 0 for none")
    args = parser.parse_args()
    if args.index:  # first, while the peak of this process is the index's
        measure_index(args.index)
    measure(args.megabytes, args.processes)


if __name__ == "__main__":
    main()
