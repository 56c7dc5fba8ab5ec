"""Speed, recall and precision of `shared.corpora.cluster` beside the stream and beside datatrove's own pipeline, in turns.

    python benchmarks/corpora_cluster.py --megabytes 100 --rounds 3 --workers 1

The corpus with its planted near-duplicates is that of corpora_scale.py, in eight files. Three programs take turns, the first one
another in each round, so that a busy machine is busy for all of them; ratios are within a round, to the stream. CPU seconds are
those of all processes of a program. datatrove's own pipeline: JsonlReader, FTFYFormatter, its Gopher filter for repetition with
the rules that ours has, 50 to 100,000 words, MinHash as its defaults are (14 buckets of 8 hashes of 64 bits, words between
blanks), JsonlWriter.

Measured with --megabytes 12 --rounds 2 on one of 2 busy cores, 14 MB in 2,852 documents, one process each; speed to the stream's:
  cluster    0.81 (0.72 to 0.91), per CPU second 0.84; recall 1.0000 of 193 copies as the stream's, nothing else dropped
  datatrove  0.34 (0.34 to 0.35), per CPU second 0.34; recall 0.9948, 27 others dropped, 11 of them decoys
stream and cluster keep the same 2,628 documents. So small a corpus counts the start of tasks; larger ones: not yet measured.
"""

import argparse
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corpora_scale import MEGABYTE, cpu_of_children, write_corpus

FILES = 8


def own_pipeline(source: str, output: Path, workers: int) -> None:
    """datatrove's own steps on its own executor."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import GopherRepetitionFilter, LambdaFilter
    from datatrove.pipeline.formatters import FTFYFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Blanks(WordTokenizer):
        """Words between blanks: the quickest there is, and datatrove's own would need spaCy."""

        word_tokenize, sent_tokenize, span_tokenize = staticmethod(str.split), None, None

    words, work = Blanks(), str(output.with_name(f"{output.name}.work"))
    config = MinhashConfig(hash_config=HashConfig(64, "sha1"))  # its default asks xxhash for what xxhash 4 refuses
    rules = {"dup_para_frac": None, "dup_line_char_frac": None, "dup_para_char_frac": None, "dup_n_grams": ()}
    clean = [
        JsonlReader(source),
        FTFYFormatter(),
        LambdaFilter(lambda document: 50 <= len(document.text.split()) <= 100_000),
        GopherRepetitionFilter(language=words, **rules),
        JsonlWriter(f"{work}/cleaned"),
        MinhashDedupSignature(f"{work}/signatures", config, words),
    ]
    stages = [
        (FILES, clean),
        (14, [MinhashDedupBuckets(f"{work}/signatures", f"{work}/pairs", config=config)]),
        (1, [MinhashDedupCluster(f"{work}/pairs", f"{work}/removed", config)]),
        (FILES, [JsonlReader(f"{work}/cleaned"), MinhashDedupFilter(f"{work}/removed"), JsonlWriter(str(output))]),
    ]
    for number, (tasks, steps) in enumerate(stages):
        LocalPipelineExecutor(steps, tasks, workers, logging_dir=f"{work}/logs/{number}").run()


def run(program: str, source: Path, output: Path, workers: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a program."""
    commands = {
        "stream": ["-m", "shared.corpora", source, "--output", output / "corpus.jsonl.gz", "--processes", workers],
        "cluster": ["-m", "shared.corpora.cluster", source, "--output", output / "corpus", "--workers", workers],
        "datatrove": [__file__, "--own", source, output / "corpus", "--workers", workers],
    }
    shutil.rmtree(output, ignore_errors=True)
    start, cpu = time.perf_counter(), cpu_of_children()
    done = subprocess.run([sys.executable, *map(str, commands[program])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - start, cpu_of_children() - cpu


def kept(output: Path) -> set[str]:
    """The sources of the documents that a program left."""
    found = set()
    for file in [*output.glob("corpus.jsonl.gz"), *output.glob("corpus/*.jsonl.gz")]:
        with gzip.open(file, "rt", encoding="utf8") as lines:
            found |= {row.get("source") or row["metadata"]["source"] for row in map(json.loads, lines)}
    return found


def main() -> None:
    """Makes the corpus, runs the programs in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=3, help="times that each program runs")
    parser.add_argument("--workers", type=int, default=1, help="processes that clean")
    parser.add_argument("--own", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own:
        own_pipeline(args.own[0], Path(args.own[1]), args.workers)
        return
    programs, seconds = ["stream", "cluster", "datatrove"], {}
    with tempfile.TemporaryDirectory() as folder:
        source, outputs = Path(folder) / "in", {program: Path(folder) / program for program in programs}
        source.mkdir()
        planted = write_corpus(Path(folder) / "corpus.jsonl", args.megabytes)
        with open(Path(folder) / "corpus.jsonl", encoding="utf8") as file:
            lines = file.readlines()
        for number in range(FILES):
            part = lines[number * len(lines) // FILES : (number + 1) * len(lines) // FILES]
            (source / f"{number}.jsonl").write_text("".join(part), "utf8")
        size, names = (
            sum(len(line.encode()) for line in lines) / MEGABYTE,
            {json.loads(line)["source"] for line in lines},
        )
        print(f"{size:.0f} MB, {len(lines):,} documents in {FILES} files, {args.workers} cleaning", flush=True)
        for number in range(args.rounds):
            for program in programs[number % 3 :] + programs[: number % 3]:
                seconds[program, number] = run(program, source, outputs[program], args.workers)
                wall, cpu = seconds[program, number]
                print(f"  round {number + 1}: {program:9} {wall:6.1f} s, {cpu:6.1f} s of CPU", flush=True)
        near = {name for name in planted if name.endswith("copy") and planted[name] >= 0.8}
        copies, found = {name for name in planted if name.endswith("copy")}, {p: kept(outputs[p]) for p in programs}
        for program in programs:
            wall, cpu = ([seconds["stream", n][i] / seconds[program, n][i] for n in range(args.rounds)] for i in (0, 1))
            speed = statistics.median(size / seconds[program, n][0] for n in range(args.rounds))
            dropped = names - found[program]
            print(f"{program:9} {speed:.1f} MB/s; speed to the stream's {statistics.median(wall):.2f}", end="")
            print(f" ({min(wall):.2f} to {max(wall):.2f}), per CPU second {statistics.median(cpu):.2f}; ", end="")
            print(
                f"recall {len(near & dropped) / len(near):.4f} of {len(near):,} copies of similarity >= 0.8, ", end=""
            )
            print(
                f"dropped besides copies {len(dropped - copies):,} ({len(dropped & planted.keys() - copies):,} decoys)"
            )
        same = found["stream"] == found["cluster"]
        print(f"stream and cluster keep {'the same' if same else 'DIFFERENT'} documents: {len(found['stream']):,}")


if __name__ == "__main__":
    main()
