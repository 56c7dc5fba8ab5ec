"""Documents in a collection of a Qdrant server (1.16 or newer), for those who outgrow one machine. Called by answers.py.

What differs from index.py. A document is found when all of it is written, its vectors too. BM25: how much a word counts in a
passage is computed here, with AVERAGE as the mean length; its rarity by the server, ln(1 + (N - n + 0.5) / (n + 0.5)), which is
never 0, counts removed passages until the server tidies up, and each shard for itself; no word is left out as common. Words are
known by 32 bits of a checksum: of a million, one in 4,300 is taken for another one, too. Vectors: in a large collection the
server goes by a graph (HNSW), which may miss some. It fuses both rankings as `fuse` does; ties come in any order.
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit
from zlib import crc32

from shared import UserError
from shared.publish.hub import first_line
from shared.retrieval import index
from shared.retrieval.index import AT_ONCE, DEPTH, Found, asked_terms, bring, counted, passage_text, trimmed

FORMAT = f"{index.FORMAT}, qdrant 1"  # raise it when ids, payloads or weights change
AVERAGE = 76  # terms of a passage: the mean of docs:prose
SECONDS = 30  # for one answer of the server
MOST = 5000  # points that one request reads or removes
KEY = "QDRANT_API_KEY"
SHOWN = ("source", "title", "heading", "line", "start", "text")


def on_qdrant(name) -> bool:
    """Whether that names a collection of a server, and no file."""
    return str(name).startswith(("http://", "https://"))


def parts(address: str) -> tuple[str, str]:
    """Server and collection of an address. Raises UserError, which does not repeat it: somebody may have put a key there."""
    try:
        found = urlsplit(address.rstrip("/"))
        path, _, name = found.path.rpartition("/")
        right = found.hostname and found.port != 0 and re.fullmatch(r"[\w-][\w.-]*", name)
    except ValueError:  # its port is no number
        right = False
    if not right or "@" in found.netloc or found.query or found.fragment:
        raise UserError(f"No address of a collection. Write http://localhost:6333/my_docs, and a key into {KEY}.")
    return f"{found.scheme}://{found.netloc}{path}", name


def weights(terms: Iterable[str]) -> dict[int, float]:
    """By the numbers of words how much each counts in a passage: BM25 (k1 1.2, b 0.75) without their rarity."""
    counts = Counter(terms)
    saturation = 1.2 * (0.25 + 0.75 * counts.total() / AVERAGE)
    return {crc32(term.encode()): 2.2 * count / (count + saturation) for term, count in counts.items()}


def point_id(source: str, digest: str, number: int) -> int:
    """Of a passage of a document, by the document's digest: one that changes gets other points."""
    return int.from_bytes(hashlib.sha256(json.dumps([source, digest, number]).encode()).digest()[:8])


class Qdrant:
    """As `shared.retrieval.index.Index`. Its messages name the collection, no server: visitors of a page read them."""

    def __init__(self, address: str, encoder=None):
        """Opens a collection, or makes it where there is none; without an encoder it only tells facts.

        Raises:
            UserError: no such address, no client, no server, no right; another collection, or of another version or encoder.
        """
        server, self.name = parts(address)
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise UserError(f"{self.name}: Qdrant needs its client: pip install qdrant-client") from error
        self.models, self.encoder, self.key = models, encoder, os.environ.get(KEY, "").strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise UserError(f"{KEY} holds characters that no key has. Set it again.")
        self._client = QdrantClient(server, api_key=self.key or None, timeout=SECONDS, check_compatibility=False)
        if not encoder:
            return
        self._meaning = lru_cache(1)(lambda question: encoder.encode([question], "question")[0].tolist())
        if not self.exists():
            vectors = {"meaning": models.VectorParams(size=encoder.width, distance=models.Distance.DOT)}
            words = {"words": models.SparseVectorParams(modifier=models.Modifier.IDF)}
            facts = {"format": FORMAT, "encoder": encoder.digest}
            self._call("create_collection", vectors_config=vectors, sparse_vectors_config=words, metadata=facts)
        if self.fact("format") != FORMAT:
            raise UserError(f"{self.name}: no index of this version, or a server before 1.16. Name another collection.")
        if self.fact("encoder") != encoder.digest:
            raise UserError(f"{self.name}: was made with another encoder. Name that one, or another collection.")

    def _call(self, method: str, **arguments):
        """What the server answers to a method of QdrantClient. Raises UserError: nothing, no, or what Qdrant does not say."""
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        try:
            return getattr(self._client, method)(self.name, **arguments)
        except (ApiException, QdrantException, AssertionError, json.JSONDecodeError) as error:
            busy, source = isinstance(error, QdrantException), getattr(error, "source", error)
            status, content = getattr(error, "status_code", 429 if busy else None), getattr(error, "content", b"")
            said = f"no Qdrant answers there ({type(source).__name__}: {first_line(source)}). Start it, or mend the address."
            if status in (401, 403):
                said = f"the server refuses the key. Set {KEY} to one that may do this."
            elif status:
                why = re.search(r'"error":\s*"([^"\\]{,200})', content.decode("utf8", "replace"))
                said = f"the server answers {status} ({why[1] if why else 'not as Qdrant does'})."
            raise UserError(f"{self.name}: {said.replace(self.key or '***', '***')}") from error

    def exists(self) -> bool:
        """Whether there is such a collection."""
        return self._call("collection_exists")

    def note(self, name: str, value: str) -> None:
        """As `Index.note`."""
        self._call("update_collection", metadata={name: value})

    def fact(self, name: str) -> str | None:
        """What `note` wrote."""
        return (self._call("get_collection").config.metadata or {}).get(name)

    def __len__(self) -> int:
        """Passages."""
        return self._call("count").count

    def update(self, documents: Iterable[dict]) -> dict[str, int]:
        """As `Index.update`; a document without a passage is `added` each time, for it leaves nothing there.

        There are no transactions and no locks. New passages of a document are written before its old ones are removed: a question
        finds one of the two at any time. Whoever is killed leaves both, or a part: the next update counts the passages of each
        document, writes again what is not whole, and removes the rest. Nor is there more harm where two processes update at once.
        """
        # By source how many passages of each (digest, passages in all) are there
        stored, known, offset, more = defaultdict(Counter), {}, None, True
        while more:
            points, offset = self._call("scroll", limit=MOST, offset=offset, with_payload=["source", "digest", "of"])
            for payload in (point.payload for point in points):
                stored[payload["source"]][payload["digest"], payload["of"]] += 1
            more = offset is not None
        for source, found in stored.items():
            (digest, of), count = found.most_common(1)[0]
            known[source] = digest if len(found) == 1 and count == of else "not whole"

        def write(waiting: list[tuple]) -> None:
            rows = [(document, number) for document in waiting for number in range(len(document[-1]))]
            for start in range(0, len(rows), AT_ONCE):
                self._call("upsert", points=self._points(rows[start : start + AT_ONCE]))
            remove({source: digest for source, digest, *_ in waiting})

        def remove(kept: dict[str, str | None]) -> None:
            old = [(s, *found) for s in kept for found in stored.get(s, ()) if found[0] != kept[s]]
            numbers = [point_id(source, digest, i) for source, digest, of in old for i in range(of)]
            for start in range(0, len(numbers), MOST):
                self._call("delete", points_selector=numbers[start : start + MOST])

        counts, gone = bring(self.name, documents, known, write)
        remove(dict.fromkeys(gone))
        return counts

    def _points(self, rows: list[tuple]) -> list:
        """Of (document as `bring` gives it, number of its passage)."""
        texts = [passage_text(title, passages[number].text) for (_, _, title, passages), number in rows]
        points = []
        for row, vector in zip(rows, self.encoder.encode(texts, "passage").tolist(), strict=True):
            (source, digest, title, passages), number = row
            payload = vars(passages[number]) | {"source": source, "title": title, "digest": digest, "of": len(passages)}
            vectors = {"meaning": vector, "words": self._sparse(weights(counted(title, payload["text"])))}
            points.append(self.models.PointStruct(id=point_id(source, digest, number), vector=vectors, payload=payload))
        return points

    def _sparse(self, values: dict[int, float]):
        return self.models.SparseVector(indices=list(values), values=list(values.values()))

    def search(self, question: str, most: int = 5) -> list[Found]:
        """As `Index.search`, always fused."""
        question, models = trimmed(question), self.models
        words = self._sparse({crc32(term.encode()): 1.0 for term in asked_terms(question)})
        asked = {"words": words, "meaning": self._meaning(question)}
        ways = [models.Prefetch(query=query, using=name, limit=DEPTH) for name, query in asked.items()]
        fusion = models.RrfQuery(rrf=models.Rrf(k=61))  # the server counts ranks from 0, `fuse` from 1
        points = self._call("query_points", prefetch=ways, query=fusion, limit=most).points
        return [Found(point.id, *(point.payload[name] for name in SHOWN), point.score) for point in points]

    def likeness(self, question: str, found: list[Found]) -> float:
        """As `Index.likeness`; no passage is without a vector."""
        asked = {"query": self._meaning(trimmed(question)), "using": "meaning", "limit": 1, "with_payload": False}
        return max((point.score for point in self._call("query_points", **asked).points), default=-1.0)
