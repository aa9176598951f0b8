"""`safeft guard serve` under load on loopback: right answers, bad clients, memory, the end."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

from safeft.demo import world
from safeft.guard import GuardFitter

BAD_BODIES = {
    "not UTF-8": b'{"input": "\xff\xfe"}',
    "not JSON": b'{"input": ',
    "no texts": b'{"input": []}',
    "too large": b" " * 40_000,
}


class Service:
    """The command in a process of its own."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "safeft", "guard", "serve", "--guard", str(folder),
                 "--port", "0", "--max_body", "32768", "--dtype", "float32"],
                stderr=stream,
            )  # fmt: skip
        self.url = ""
        while not self.url:
            if self.process.poll() is not None:
                raise RuntimeError(log.read_text())
            self.url = (re.findall(r"listening on (\S+)", log.read_text()) or [""])[0]
            time.sleep(0.1)
        self.port = int(self.url.rsplit(":", 1)[1])

    def memory(self) -> float:
        """MiB that are its own."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+)", status)
        assert found is not None
        return int(found[1]) / 1024

    @property
    def said(self) -> str:
        """All that it wrote."""
        return self._log.read_text()


def fitted(model: Any, tokenizer: Any, folder: Path) -> tuple[list[str], list[float]]:
    """A guard in a folder; texts, and what it says of each alone."""
    sides = world.harmful("calibration"), world.benign("calibration")
    fitter = GuardFitter(model, tokenizer)
    for side, label in zip(sides, (True, False), strict=True):
        fitter.update(side, [label] * len(side))
    guard = fitter.fit(search=1, members=2)
    guard.save_pretrained(folder)
    texts = [*world.harmful("test"), *world.benign("test")]
    return texts, [score.harmful for score in guard.score(texts, batch_size=1)]


async def load(
    service: Service, texts: list[str], truth: list[float], requests: int, clients: int
) -> dict[str, Any]:
    """Many requests at once; each answer is compared with what the guard says of the text alone."""
    statuses: Counter[str] = Counter()
    seconds: list[float] = []
    worst = 0.0
    gate = asyncio.Semaphore(clients)
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=clients)) as web:

        async def one(number: int) -> None:
            nonlocal worst
            asked = [(number * 7 + k * 13) % len(texts) for k in range(1 + number % 4)]
            async with gate:
                begun = time.perf_counter()
                answer = await web.post(
                    f"{service.url}/v1/moderations", json={"input": [texts[n] for n in asked]}
                )
                seconds.append(time.perf_counter() - begun)
            statuses[str(answer.status_code)] += 1
            if answer.status_code == 200:
                rows = [row["category_scores"]["harmful"] for row in answer.json()["results"]]
                pairs = zip(rows, asked, strict=True)
                worst = max(worst, *(abs(row - truth[n]) for row, n in pairs))

        begun = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(requests)))
    cuts = quantiles(seconds, n=100)
    return {
        "requests": requests,
        "clients": clients,
        "statuses": dict(statuses),
        "largest_difference_from_alone": worst,
        "requests_a_second": requests / (time.perf_counter() - begun),
        "seconds": {"median": cuts[49], "99%": cuts[98]},
    }


async def trouble(service: Service, count: int) -> dict[str, Any]:
    """Clients that hang, go away, or send rubbish; what these are told."""
    head = b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    told: dict[str, Counter[str]] = {}

    async def send(name: str, data: bytes, read: bool) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(data)
        await writer.drain()
        if read:
            line = await asyncio.wait_for(reader.readline(), 60)
            told.setdefault(name, Counter())[line.decode().split(" ")[1]] += 1
        writer.close()

    jobs = []
    for _ in range(count):
        jobs += [send(name, head % len(body) + body, True) for name, body in BAD_BODIES.items()]
        jobs += [
            send("hangs", head % 100 + b'{"inp', True),
            send("goes away", head % 100 + b'{"inp', False),
            send("rubbish", b"\x00\xff rubbish\r\n\r\n", True),
        ]
    await asyncio.gather(*jobs)
    return {name: dict(statuses) for name, statuses in told.items()}


async def ending(service: Service, texts: list[str], clients: int) -> dict[str, Any]:
    """Requests that are there when the service is told to end: answered, every one taken on."""
    found: Counter[str] = Counter()
    async with httpx.AsyncClient(timeout=60) as web:

        async def one() -> None:
            try:
                answer = await web.post(f"{service.url}/v1/moderations", json={"input": texts[:48]})
                found[str(answer.status_code)] += 1
            except httpx.ConnectError:
                found["not let in"] += 1
            except httpx.HTTPError as error:
                found[f"lost ({type(error).__name__})"] += 1

        wave = [asyncio.create_task(one()) for _ in range(clients)]
        while not any(task.done() for task in wave):
            await asyncio.sleep(0.01)
        service.process.send_signal(signal.SIGINT)
        begun = time.perf_counter()
        await asyncio.gather(*wave)
    return {
        "exit_code": await asyncio.to_thread(service.process.wait, 60),
        "seconds": time.perf_counter() - begun,
        "in_flight": dict(found),
    }


def serve(
    small: tuple[Any, Any], work: Path, *, requests: int = 3000, clients: int = 64, bad: int = 25
) -> dict[str, Any]:
    """Start, load, trouble and load together, end."""
    texts, truth = fitted(*small, work / "guard")
    service = Service(work / "guard", work / "serve.log")
    try:
        asyncio.run(load(service, texts, truth, max(200, requests // 10), clients))
        before = service.memory()
        first = asyncio.run(load(service, texts, truth, requests, clients))
        between = service.memory()

        async def both() -> tuple[dict[str, Any], dict[str, Any]]:
            busy = load(service, texts, truth, requests, clients)
            return await asyncio.gather(busy, trouble(service, bad))

        second, told = asyncio.run(both())
        after = service.memory()
        end = asyncio.run(ending(service, texts, min(16, clients)))
    finally:
        service.process.kill()
    return {
        "distinct_scores": len({round(value, 4) for value in truth}),
        "load": first,
        "load_beside_bad_clients": second,
        "bad_clients": told,
        "memory_mib": {"warm": before, "after_load": between, "after_bad_clients": after},
        "end": end,
        "lines_logged": len(service.said.splitlines()),
    }
