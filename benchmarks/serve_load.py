"""How the server behaves under load: admission, throughput, memory. Starts it on 127.0.0.1 and stops it; nothing else is called.

    python benchmarks/serve_load.py                          # pypi:smollm2-135m-instruct
    python benchmarks/serve_load.py --model outputs/chat_sft --requests 200
    python benchmarks/serve_load.py --peer                   # beside llama.cpp's server (requirements-dev.txt)

1. Burst: 200 requests at once against a limit, twice; how many are admitted, how soon the others hear 503.
2. Throughput at 1, 4 and 16 clients: tokens a second in all, seconds to the first token. With --peer in turn with llama.cpp's
   server, on as many threads and with the same weights, as `python -m shared.export --to gguf` writes them (fp16).
3. Memory: resident size of the server along many short requests.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
import psutil

LIMIT = 16
# llama.cpp's own server with 16 places of 1,024 tokens, told how many threads and where the file is; it ends with its input
PEER = """
import sys, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel = sys.argv[1], 16 * 1024, 16
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = int(sys.argv[2])
options.port, options.verbosity = 0, 0
server = xllamacpp.Server(options)
print("listening at", server.listening_address, flush=True)
sys.stdin.read()
"""
CHAT = [{"role": "user", "content": "Tell me about the sea."}]
THINGS = (
    "the sea",
    "old trains and those who drove them",
    "bread",
    "how a bicycle stays upright",
    "rain in the mountains",
)


def start(model: str) -> tuple[subprocess.Popen, str]:
    """The server as a process of its own, ready, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "deploy.api", "--model", model, "--port", str(port)]
    environment = os.environ | {"TASKBOOK_LIMIT_ADMITTED": str(LIMIT), "TASKBOOK_LIMIT_TOTAL_SECONDS": "300"}
    environment |= {"TASKBOOK_LIMIT_QUEUE_SECONDS": "300", "TASKBOOK_LIMIT_FIRST_TOKEN_SECONDS": "300"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        if process.poll() is not None:
            sys.exit(
                f"the server ended with code {process.returncode}; start it by hand to see why: {' '.join(command)}"
            )
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return process, url
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    sys.exit("the server was not ready within 120 s")


def start_peer(model: str, folder: Path) -> tuple[subprocess.Popen, str]:
    """llama.cpp's server with the same weights as GGUF, ready, and its address."""
    import torch

    file = folder / "gguf" / "model.gguf"
    export = [sys.executable, "-m", "shared.export", model, "--to", "gguf", "--output", folder]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-c", PEER, file, str(torch.get_num_threads())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in process.stdout:
        if line.startswith("listening at "):
            return process, line.split()[-1]
    sys.exit(f"llama.cpp's server ended with code {process.wait()}.")


async def chat(client: httpx.AsyncClient, tokens: int, number: int = 0) -> tuple[int, float, float, int]:
    """One streamed reply: status, seconds to the first token (or the refusal), seconds in all, tokens. Each number asks
    another question."""
    began, first, count = time.perf_counter(), None, 0
    body = {
        "messages": [{"role": "user", "content": f"{number}. Tell me about {THINGS[number % len(THINGS)]}."}],
        "max_tokens": tokens,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - began
                count = (chunk.get("usage") or {}).get("completion_tokens", count)
    return response.status_code, first or time.perf_counter() - began, time.perf_counter() - began, count


async def burst(url: str, requests: int) -> None:
    """All at once against LIMIT, over connections that are open: bare sockets, since a client library takes longer than a 503."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"messages": CHAT, "max_tokens": 16}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    connections = [await asyncio.open_connection(host, int(port)) for _ in range(requests)]

    async def one(reader, writer):
        began = time.perf_counter()
        writer.write(request)
        status = int((await reader.readline()).split()[1])
        seconds = time.perf_counter() - began
        await reader.read()
        writer.close()
        return status, seconds

    answers = await asyncio.gather(*(one(*connection) for connection in connections))
    refused = sorted(seconds for status, seconds in answers if status == 503)
    admitted = sum(status == 200 for status, _ in answers)
    print(f"burst of {requests}, limit {LIMIT}: {admitted} admitted, {len(refused)} refused; 503 after")
    print(
        f"  median {statistics.median(refused) * 1000:.0f} ms, p99 {refused[int(len(refused) * 0.99) - 1] * 1000:.0f} ms"
    )
    counted = re.findall(r"^taskbook_(\w+_total\{.*?\}) (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    print("  counters:", ", ".join(f"{name} {float(value):.0f}" for name, value in counted if "route" in name))


async def throughput(client: httpx.AsyncClient, clients: int, tokens: int, name: str = "") -> float:
    """`clients` at once, each two replies one after the other; tokens a second in all."""

    async def one(number: int):
        return [await chat(client, tokens, clients * 100 + number * 2 + i) for i in range(2)]

    began = time.perf_counter()
    answers = [answer for each in await asyncio.gather(*(one(number) for number in range(clients))) for answer in each]
    seconds = time.perf_counter() - began
    assert all(status == 200 for status, *_ in answers)
    total, firsts = sum(answer[3] for answer in answers), sorted(answer[1] for answer in answers)
    first = statistics.median(firsts)
    print(f"{clients:3} clients{name}: {total / seconds:6.1f} tokens/s, first token: median {first:.2f} s", flush=True)
    return total / seconds


async def memory(client: httpx.AsyncClient, process: subprocess.Popen, requests: int) -> None:
    """Resident size along `requests` replies of one token, four at a time."""
    sizes, done = [], 0
    watched = psutil.Process(process.pid)
    while done < requests:
        await asyncio.gather(*(chat(client, 1) for _ in range(4)))
        done += 4
        if done % (requests // 10) < 4:
            sizes.append(watched.memory_info().rss / 1e6)
    print(f"memory over {done} requests, MB: {' '.join(f'{size:.0f}' for size in sizes)}")


async def measure(url: str, process: subprocess.Popen, peer: str | None, options) -> None:
    """The three parts."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await chat(client, 4)
        for _ in range(2):  # much is done for the first time in the first
            await burst(url, options.burst)
        for clients in (1, 4, 16):
            ours = await throughput(client, clients, options.tokens)
            if peer:
                async with httpx.AsyncClient(base_url=peer, timeout=300, limits=limits) as other:
                    await chat(other, 4)
                    theirs = await throughput(other, clients, options.tokens, ", llama.cpp")
                print(f"  {ours / theirs:.2f} x the tokens/s of llama.cpp", flush=True)
        await memory(client, process, options.requests)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:smollm2-135m-instruct", help="as python -m deploy.api takes it")
    parser.add_argument("--burst", type=int, default=200, help="requests at once in part 1")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of a reply in part 2")
    parser.add_argument("--requests", type=int, default=2000, help="requests in part 3")
    parser.add_argument("--peer", action="store_true", help="llama.cpp's server beside it in part 2")
    options = parser.parse_args()
    process, url = start(options.model)
    with tempfile.TemporaryDirectory() as folder:
        peer, address = start_peer(options.model, Path(folder)) if options.peer else (None, None)
        try:
            asyncio.run(measure(url, process, address, options))
        finally:
            if peer:
                peer.stdin.close()
                peer.wait(40)
            process.send_signal(signal.SIGTERM)
            print(f"SIGTERM: exit code {process.wait(40)}")


if __name__ == "__main__":
    main()
