"""Documents in one SQLite file, found by BM25, by the vectors of an encoder, or both fused. Used by __main__.py and tasks.

Words and texts of a document are written in one transaction, so a process that is killed leaves each document whole or
absent; what was indexed before is kept, and the next update goes on. Vectors take nearly all of the time and come last:
until a passage has its own, it is found by its words. BM25 is SQLite's own FTS5 (k1 1.2, b 0.75): bm25s would be a
second store beside the file, which no transaction covers. Vectors are compared exactly, one matrix product a question:
sqlite-vec does no less work, and needs loadable extensions, without which many builds of Python come.
"""

import hashlib
import json
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from shared import UserError, one_spelling
from shared.retrieval.passages import WORD, cut

FORMAT = "lm-taskbook retrieval 2"  # raise it when tables, passages or words change
LONGEST_QUESTION = 10_000  # characters
DEPTH = 100  # places of each ranking that are fused
AT_ONCE = 200  # passages encoded and written in one transaction
# Words in more passages, and in a larger share of them, tell little, and reading their lists is what takes time
COMMON, FEW = 0.05, 1000
TITLE = 4  # times that BM25 counts the words of a title
TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE documents (source TEXT PRIMARY KEY, digest TEXT);
CREATE TABLE passages (id INTEGER PRIMARY KEY, source TEXT, title TEXT, heading TEXT, line INTEGER, start INTEGER, text TEXT,
    vector BLOB);
CREATE INDEX passages_of ON passages (source);
CREATE VIRTUAL TABLE words USING fts5(terms, content='',
    tokenize="unicode61 remove_diacritics 0 categories 'L* N* M* Co' tokenchars '_.'");
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(words, row);
"""
SHOWN = "id, source, title, heading, line, start, text"


@dataclass(frozen=True)
class Found:
    """A passage of the index; `line` is that of the file, 0 where its text is not the file's own (HTML, PDF, tables); `score` is
    that of the ranking, larger is better.
    """

    id: int
    source: str
    title: str
    heading: str
    line: int
    start: int
    text: str
    score: float = 0.0


def terms(text: str) -> list[str]:
    """What BM25 counts: words in one spelling (NFC, `hòa` for `hoà`), names of code whole and in their parts.

    `torch.nn.max_pool2d` and `BertModel` are also found by `max`, `pool2d` and `bert`; Vietnamese is counted by syllables.
    """
    found = [_folded(dotted) for dotted in re.findall(r"\w+(?:\.\w+)+", text)]
    for word in WORD.findall(one_spelling(text)):
        found.append(_folded(word))
        if word.isascii():
            parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W_A-Z]+", word)
            found += [_folded(part) for part in parts] if len(parts) > 1 else []
    return found


def _folded(word: str) -> str:
    """A word in small letters that FTS5 leaves as they are, so that a term asked for is the one stored: `lower` would give ς and
    µ, which it stores as σ and μ. The dot of Turkish İ goes: whoever asks for istanbul means İSTANBUL too.
    """
    return unicodedata.normalize("NFC", word.casefold().replace("i\u0307", "i"))


def passage_text(title: str, text: str) -> str:
    """What is indexed of a passage, for both rankings: its document's title stands before it."""
    return f"{title}\n{text}" if title else text


def counted(title: str, text: str) -> list[str]:
    """The terms that BM25 counts of a passage."""
    return terms(title) * TITLE + terms(text)


def _words(title: str, text: str) -> str:
    return " ".join(counted(title, text))


def trimmed(question: str) -> str:
    """A question as it is looked up. Raises UserError: it is empty, or has more than LONGEST_QUESTION characters."""
    question = unicodedata.normalize("NFC", question).strip()
    if not question:
        raise UserError("The question is empty.")
    if len(question) > LONGEST_QUESTION:
        raise UserError(f"The question has {len(question):,} characters; {LONGEST_QUESTION:,} are read at most.")
    return question


def asked_terms(question: str) -> list[str]:
    """The terms of a question that are looked up, each once."""
    return list(dict.fromkeys(terms(question)))[:200]


def fuse(rankings: Iterable[Iterable[int]], most: int) -> list[tuple[int, float]]:
    """(item, score) by reciprocal rank fusion, the best first: the sum of 1 / (60 + rank) over rankings (Cormack et al. 2009)."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (60 + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:most]


def bring(
    name: str, documents: Iterable[dict], known: Mapping[str, str], write: Callable[[list[tuple]], None]
) -> tuple[dict[str, int], list[str]]:
    """Has written what an index lacks of documents, for any store.

    Args:
        name: of the index.
        documents: as `Index.update` takes them.
        known: digests of the documents that it has, by source.
        write: gets (source, digest, title, passages) of each, documents of some AT_ONCE passages together.

    Returns:
        How many documents are `added`, `changed`, `kept` and `removed`, and the sources of those that are to be removed.

    Raises:
        UserError: no document.
    """
    counts = dict.fromkeys(("added", "changed", "kept", "removed"), 0)
    seen: set[str] = set()
    # Number of the last one of a name: counting anew for each would take hours for a large table
    last: dict[str, int] = {}
    waiting: list[tuple] = []
    for document in documents:
        # Halves of characters cannot be stored; in their place stands one character each, so that places stay
        given = (str(document.get(key) or "") for key in ("text", "title", "source"))
        text, title, called = (value.encode("utf8", "replace").decode() for value in given)
        source = called
        while source in seen:
            last[called] = last.get(called, 1) + 1
            source = f"{called}#{last[called]}"
        seen.add(source)
        line = document.get("line", 1)
        digest = hashlib.sha256(json.dumps([title, text, line]).encode()).hexdigest()
        if known.get(source) == digest:
            counts["kept"] += 1
            continue
        counts["changed" if source in known else "added"] += 1
        passages = [replace(part, line=line and line + part.line - 1) for part in cut(text)]
        waiting.append((source, digest, title, passages))
        if sum(len(passages) for *_, passages in waiting) >= AT_ONCE:
            write(waiting)
            waiting = []
    write(waiting)
    if not seen:
        raise UserError(f"{name}: no document to index, so it is left as it was.")
    gone = [source for source in known if source not in seen]
    return counts | {"removed": len(gone)}, gone


class Index:
    """Documents to be found by questions. Several processes may search while one updates."""

    def __init__(self, path: str | Path, encoder=None, read_only: bool = False):
        """Opens the file, or makes it.

        Args:
            path: ":memory:" keeps it in memory.
            encoder: `shared.retrieval.encoder.Encoder`; None searches by words alone.
            read_only: nothing is made or written.

        Raises:
            UserError: the file is something else, was made by another version or with another encoder, or cannot be written.
        """
        self.path, self.encoder, self._vectors, self._asked = str(path), encoder, None, None
        try:
            address = f"{Path(path).resolve().as_uri()}?mode=ro&immutable=1" if read_only else self.path
            self.connection = sqlite3.connect(address, timeout=30, check_same_thread=False, uri=read_only)
            self.connection.execute("PRAGMA trusted_schema = OFF")  # of functions in it: the file may be a stranger's
            if self._is_empty() and not read_only:
                self._make_tables()
            facts = dict(self.connection.execute("SELECT name, value FROM facts"))
        except sqlite3.Error as error:
            raise UserError(f"{path}: no index, or it cannot be written ({error}). Name another file.") from error
        if facts.get("format") != FORMAT:
            raise UserError(f"{path}: an index of another version. Remove it, and index again.")
        if encoder and facts.get("encoder") != encoder.digest:
            made = "with another encoder" if facts.get("encoder") else "without an encoder"
            raise UserError(f"{path}: was made {made}. Name the one it was made with, or another file.")

    def _is_empty(self) -> bool:
        return not self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    def _make_tables(self) -> None:
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            if self._is_empty():  # another process may have made them while this one waited
                for statement in TABLES.strip().split(";\n"):
                    self.connection.execute(statement.removesuffix(";"))
                facts = [("format", FORMAT), ("encoder", self.encoder.digest if self.encoder else None)]
                self.connection.executemany("INSERT INTO facts VALUES (?, ?)", facts)

    def note(self, name: str, value: str) -> None:
        """Writes a fact: `model`, the name of its encoder; `whole`, whether all documents are in it. Raises UserError."""
        try:
            with self.connection:
                self.connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be written ({error}).") from error

    def fact(self, name: str) -> str | None:
        """What `note` wrote."""
        row = self.connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def __len__(self) -> int:
        """Passages."""
        return self.connection.execute("SELECT count(*) FROM passages").fetchone()[0]

    def update(self, documents: Iterable[dict]) -> dict[str, int]:
        """Makes the index hold exactly these documents; those that it has already are neither cut nor encoded again.

        Args:
            documents: `text` and `source`, which names it; `title` where known; `line` of its file where it begins, 1 where it
                is not told, 0 where the text is not that of a file. One after the other, never all in memory.

        Returns:
            How many documents were `added`, `changed`, `kept` and `removed`.

        Raises:
            UserError: another process is updating it; no document; the disk is full.
        """
        lock = FileLock(f"{self.path}.lock") if self.path != ":memory:" else None
        try:
            if lock:
                lock.acquire(blocking=False)
            return self._update(documents)
        except Timeout:
            raise UserError(f"{self.path}: another process is updating this index. Wait for its end.") from None
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be written ({error}). What was indexed before is intact.") from error
        finally:
            if lock:
                lock.release()

    def _update(self, documents: Iterable[dict]) -> dict[str, int]:
        known = dict(self.connection.execute("SELECT source, digest FROM documents"))
        counts, gone = bring(self.path, documents, known, self._write)
        with self.connection:
            self._remove(gone)
        if self.encoder:
            self._encode()
        return counts

    def _write(self, documents: list[tuple]) -> None:
        """All of these documents or none, in the place of what the index had of them."""
        with self.connection:
            self._remove([source for source, *_ in documents])
            for source, digest, title, passages in documents:
                self.connection.execute("INSERT INTO documents VALUES (?, ?)", (source, digest))
                for part in passages:
                    row = (source, title, part.heading, part.line, part.start, part.text)
                    names = "source, title, heading, line, start, text"
                    added = self.connection.execute(f"INSERT INTO passages ({names}) VALUES (?, ?, ?, ?, ?, ?)", row)
                    words = _words(title, part.text)
                    self.connection.execute("INSERT INTO words (rowid, terms) VALUES (?, ?)", (added.lastrowid, words))

    def _encode(self) -> None:
        """Gives each passage without a vector its own; like lengths together, little is padded."""
        rows = self.connection.execute("SELECT id FROM passages WHERE vector IS NULL ORDER BY length(text)").fetchall()
        numbers = [row[0] for row in rows]
        with tqdm(total=len(numbers), desc="vectors", unit=" passages", disable=None) as bar:
            for start in range(0, len(numbers), AT_ONCE):
                some = numbers[start : start + AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = self.connection.execute(f"SELECT id, title, text FROM passages WHERE id IN ({marks})", some)
                ids, texts = zip(*((number, passage_text(title, text)) for number, title, text in rows), strict=True)
                vectors = self.encoder.encode(texts, "passage").astype(np.float16)
                blobs = [(vector.tobytes(), number) for number, vector in zip(ids, vectors, strict=True)]
                with self.connection:
                    self.connection.executemany("UPDATE passages SET vector = ? WHERE id = ?", blobs)
                bar.update(len(some))
        self._vectors = None

    def _remove(self, sources: list[str]) -> None:
        for source in sources:
            rows = self.connection.execute(
                "SELECT id, title, text FROM passages WHERE source = ?", (source,)
            ).fetchall()
            # The table of words keeps lists of passages alone, and must be told which words to take this one from
            words = [(identity, _words(title, text)) for identity, title, text in rows]
            self.connection.executemany("INSERT INTO words (words, rowid, terms) VALUES ('delete', ?, ?)", words)
            self.connection.execute("DELETE FROM passages WHERE source = ?", (source,))
            self.connection.execute("DELETE FROM documents WHERE source = ?", (source,))
        self._vectors = None if sources else self._vectors

    def passages(self) -> Iterator[Found]:
        """All of them, in the order in which they were indexed."""
        for row in self.connection.execute(f"SELECT {SHOWN} FROM passages ORDER BY id"):
            yield Found(*row)

    def by_words(self, question: str, most: int = DEPTH) -> list[int]:
        """Ids of passages by BM25, the best first; those without a word of the question are left out."""
        asked = asked_terms(question)
        marks = ", ".join("?" * len(asked))
        counts = dict(self.connection.execute(f"SELECT term, doc FROM vocabulary WHERE term IN ({marks})", asked))
        limit = max(FEW, COMMON * len(self), min(counts.values(), default=0))
        query = " OR ".join(f'"{term}"' for term, count in counts.items() if count <= limit)
        if not query:
            return []
        found = self.connection.execute(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank, rowid LIMIT ?", (query, most)
        )
        return [row[0] for row in found]

    def by_meaning(self, question: str, most: int = DEPTH) -> list[int]:
        """Ids of passages by the likeness of their vectors to that of the question, the best first."""
        _, ids, scores = self._likenesses(question)
        best = np.argpartition(-scores, most)[:most] if most < len(ids) else np.arange(len(ids))
        return ids[best[np.lexsort((ids[best], -scores[best]))]].tolist()

    def likeness(self, question: str, found: list[Found]) -> float:
        """How like the question the likest of all passages is, from -1 to 1; of those without a vector yet only `found` count."""
        marks = ", ".join("?" * len(found))
        query = f"SELECT title, text FROM passages WHERE vector IS NULL AND id IN ({marks})"
        rows = self.connection.execute(query, [passage.id for passage in found]).fetchall()
        texts = [passage_text(*row) for row in rows]
        asked, _, scores = self._likenesses(trimmed(question))
        if texts:
            scores = np.append(scores, self.encoder.encode(texts, "passage") @ asked)
        return float(scores.max(initial=-1.0))

    def _likenesses(self, question: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The vector of a question, the ids of all passages, and how like it each is; kept for whoever asks the same next."""
        ids, matrix = self._matrix()
        if self._asked is None or self._asked[0] != question or self._asked[2] is not ids:
            vector = self.encoder.encode([question], "question")[0]
            self._asked = question, vector, ids, matrix @ vector
        return self._asked[1:]

    def _matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and vectors of all passages, read again when another process has written."""
        version = self.connection.execute("PRAGMA data_version").fetchone()[0]
        if self._vectors is None or self._vectors[0] != version:
            query = "SELECT id, vector FROM passages WHERE vector IS NOT NULL ORDER BY id"
            rows = self.connection.execute(query).fetchall()
            matrix = np.frombuffer(b"".join(row[1] for row in rows), dtype=np.float16).reshape(-1, self.encoder.width)
            self._vectors = version, np.array([row[0] for row in rows], dtype=np.int64), matrix.astype(np.float32)
        return self._vectors[1:]

    def search(self, question: str, most: int = 5, how: str = "fused") -> list[Found]:
        """The passages that answer best, the best first.

        Args:
            how: `words` (BM25), `meaning` (vectors) or `fused`; without an encoder always by words.

        Raises:
            UserError: an empty question, or one of more than LONGEST_QUESTION characters.
        """
        question = trimmed(question)
        ways = {"words": [self.by_words], "meaning": [self.by_meaning], "fused": [self.by_words, self.by_meaning]}[how]
        if not self.encoder:
            ways = [self.by_words]
        ranked = fuse([way(question) for way in ways], most)
        rows = {}
        for identity, _ in ranked:
            rows[identity] = self.connection.execute(
                f"SELECT {SHOWN} FROM passages WHERE id = ?", (identity,)
            ).fetchone()
        return [Found(*rows[identity], score) for identity, score in ranked if rows[identity]]
