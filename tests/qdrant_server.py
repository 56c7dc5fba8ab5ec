"""A Qdrant server on this machine, as far as shared/retrieval asks one: Qdrant's own engine behind a little HTTP.

Points lie in qdrant-edge-py, the engine of the server as a library: words, vectors and their fusion are its own. What is noted of
a collection lies in the local mode of qdrant-client. Not here: shards, the graphs of large collections, TLS.
"""

import json
import re
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import qdrant_edge as edge
from qdrant_client import QdrantClient, models


class Server:
    """Answers at `url` while the `with` lasts; `asked` are the (method, path, body) of all requests."""

    def __init__(self, key: str | None = None):
        self.key, self.asked, self.shards = key, [], {}
        self.collections, self.lock = QdrantClient(":memory:"), threading.Lock()

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"server_": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        for shard in self.shards.values():
            shard.close()
        self.folder.cleanup()

    def points(self, name: str) -> dict[int, dict]:
        """Payloads of all points of a collection, by id."""
        found, _ = self.shards[name].scroll(edge.ScrollRequest(limit=100_000, with_payload=True))
        return {point.id: point.payload for point in found}

    def answer(self, method: str, path: str, body: dict):
        """What Qdrant's `result` is. Raises ValueError: the request is wrong; LookupError: no such collection."""
        name, action = re.fullmatch(r"/collections/([^/?]+)/?([^?]*)(?:\?.*)?", path).groups()
        there = self.collections.collection_exists(name)
        if action == "exists":
            return {"exists": there}
        if (method, action) == ("PUT", ""):
            made = models.CreateCollection.model_validate(body)
            given = {"vectors_config": made.vectors, "sparse_vectors_config": made.sparse_vectors}
            result = self.collections.create_collection(name, **given, metadata=made.metadata)
            (dense, vectors), (sparse, words) = *made.vectors.items(), *made.sparse_vectors.items()
            distance = {"Dot": edge.Distance.Dot, "Cosine": edge.Distance.Cosine}[vectors.distance.value]
            rarity = edge.Modifier.Idf if words.modifier == models.Modifier.IDF else None
            config = edge.EdgeConfig(
                vectors={dense: edge.EdgeVectorParams(size=vectors.size, distance=distance)},
                sparse_vectors={sparse: edge.EdgeSparseVectorParams(modifier=rarity)},
            )
            self.shards[name] = edge.EdgeShard.create(f"{self.folder.name}/{name}", config)
            return result
        if not there:
            raise LookupError(f"Not found: Collection `{name}` doesn't exist!")
        if (method, action) == ("GET", ""):
            return self.collections.get_collection(name).model_dump(mode="json")
        if (method, action) == ("PATCH", ""):
            return self.collections.update_collection(name, metadata=body["metadata"])
        shard, done = self.shards[name], {"operation_id": 0, "status": "completed"}
        if (method, action) == ("PUT", "points"):
            points = [edge.Point(point["id"], _vectors(point["vector"]), point["payload"]) for point in body["points"]]
            shard.update(edge.UpdateOperation.upsert_points(points))
            return done
        if action == "points/delete":
            shard.update(edge.UpdateOperation.delete_points(body["points"]))
            return done
        if action == "points/count":
            return {"count": shard.count(edge.CountRequest(exact=True))}
        if action == "points/scroll":
            asked = {key: body.get(key) for key in ("limit", "offset", "with_payload")}
            points, following = shard.scroll(edge.ScrollRequest(**asked))
            return {"points": [{"id": p.id, "payload": p.payload} for p in points], "next_page_offset": following}
        if action == "points/query":
            query, ways = _query(body), [edge.Prefetch(way["limit"], _query(way)) for way in body.get("prefetch") or []]
            given = {"query": query, "prefetches": ways, "with_payload": body["with_payload"]}
            points = shard.query(edge.QueryRequest(limit=body["limit"], **given))
            return {"points": [{"id": p.id, "version": 0, "score": p.score, "payload": p.payload} for p in points]}
        raise ValueError(f"{method} {path} is not known here")


def _vectors(given: dict) -> dict:
    return {name: edge.SparseVector(**value) if isinstance(value, dict) else value for name, value in given.items()}


def _query(body: dict):
    query = body["query"]
    if isinstance(query, dict) and "rrf" in query:
        return edge.Fusion.Rrf(k=query["rrf"]["k"])
    query = query.get("nearest", query) if isinstance(query, dict) else query
    return edge.Query.Nearest(*_vectors({"": query}).values(), body["using"])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, body = self.server_, json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        server.asked.append((self.command, self.path, body))
        with server.lock:
            if server.key and self.headers["api-key"] != server.key:
                return self.reply(401, f"Invalid API key or JWT: {self.headers['api-key']}".encode())
            try:
                found = {"result": server.answer(self.command, self.path, body), "status": "ok"}
                return self.reply(200, json.dumps(found | {"time": 0.0}).encode())
            except Exception as error:  # the engine raises no other class
                status = 404 if isinstance(error, LookupError) else 409 if "already exists" in str(error) else 400
                return self.reply(status, json.dumps({"status": {"error": str(error)}, "time": 0.0}).encode())

    do_GET = do_PUT = do_PATCH = do_POST

    def reply(self, status: int, body: bytes):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
