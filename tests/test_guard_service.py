"""The service over real sockets: right answers under load, and no trouble from bad clients."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from safeft.errors import ConfigError, PromptError
from safeft.guard.guards import Score
from safeft.guard.service import Limits, Refused, create_app, texts_of

LIMITS = Limits(body=20_000, texts=8, characters=2000, waiting=4000, batch=32, receive=0.5)


class Echo:
    """A guard whose score says which text it saw; slow, so that requests share passes."""

    labels: tuple[str, ...] = ("harmful", "odd")

    def __init__(self, seconds: float = 0.002) -> None:
        self.seconds, self.sizes = seconds, []
        self.gate = threading.Event()
        self.gate.set()

    def score(self, texts: Any, *, batch_size: int = 16) -> list[Score]:
        assert len(texts) <= batch_size
        self.gate.wait(10)
        self.sizes.append(len(texts))
        time.sleep(self.seconds)
        if "unreadable" in texts:
            raise PromptError("'unreadable' has no token.")
        if "broken" in texts:
            raise ZeroDivisionError
        return [Score(int(text) / 10_000, {"odd": float(int(text) % 2)}) for text in texts]


class Running:
    """A server in a thread, on a free port of loopback."""

    def __init__(self, guard: Any, limits: Limits = LIMITS) -> None:
        app = create_app(guard, name="echo", limits=limits)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning",
                                access_log=False)  # fmt: skip
        self._socket = config.bind_socket()
        self.server = uvicorn.Server(config)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],))

    def __enter__(self) -> "Running":
        self._thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Running, Echo]]:
    guard = Echo()
    with Running(guard) as server:
        yield server, guard


def post(server: Running, content: Any, **more: Any) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(f"{server.url}/v1/moderations", content=body, timeout=20, **more)


def test_an_answer_has_the_form_that_clients_know(running: Any) -> None:
    answer = post(running[0], {"input": ["7000", "12"], "model": "omni-moderation-latest"})
    assert answer.status_code == 200
    found = answer.json()
    assert found["id"].startswith("modr-")
    assert found["model"] == "echo"
    assert found["results"] == [
        {
            "flagged": True,
            "categories": {"harmful": True, "odd": False},
            "category_scores": {"harmful": 0.7, "odd": 0.0},
        },
        {
            "flagged": False,
            "categories": {"harmful": False, "odd": False},
            "category_scores": {"harmful": 0.0012, "odd": 0.0},
        },
    ]
    assert post(running[0], {"input": "5"}).json()["results"][0]["category_scores"]["odd"] == 1


def test_thousands_of_requests_are_neither_lost_nor_mixed_up(running: Any) -> None:
    server, guard = running
    guard.sizes.clear()

    async def all_of_them() -> list[tuple[list[int], httpx.Response]]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(limits=limits, timeout=None) as client:

            async def one(number: int) -> tuple[list[int], httpx.Response]:
                asked = [(number * 7 + k) % 10_000 for k in range(1 + number % 4)]
                body = {"input": [str(n) for n in asked]}
                return asked, await client.post(f"{server.url}/v1/moderations", json=body)

            return await asyncio.gather(*(one(number) for number in range(2000)))

    answers = asyncio.run(all_of_them())
    assert len(answers) == 2000
    for asked, answer in answers:
        assert answer.status_code == 200, answer.text
        scores = [row["category_scores"]["harmful"] for row in answer.json()["results"]]
        assert scores == [n / 10_000 for n in asked]
    assert len({answer.json()["id"] for _, answer in answers}) == 2000
    assert sum(guard.sizes) == sum(len(asked) for asked, _ in answers)
    assert len(guard.sizes) < 1500  # requests shared passes


BAD: dict[str, tuple[bytes, int, str]] = {
    "not UTF-8": (b'{"input": "\xff\xfe"}', 400, "not UTF-8"),
    "not JSON": (b'{"input": ', 400, "not JSON"),
    "empty": (b"", 400, "not JSON"),
    "deep": (b"[" * 9000, 400, "not JSON"),
    "a list": (b"[1]", 400, "no texts"),
    "no input": (b"{}", 400, "no texts"),
    "numbers": (b'{"input": [1]}', 400, "no texts"),
    "none": (b'{"input": []}', 400, "no texts"),
    "a blank text": (b'{"input": ["1", " "]}', 400, "Text 1 is empty"),
    "half a character": (b'{"input": "\\ud800"}', 400, "lone surrogate"),
    "too many": (json.dumps({"input": ["1"] * 9}).encode(), 413, "9 texts are above the 8"),
    "too long": (json.dumps({"input": "1" * 2001}).encode(), 413, "above 2000 characters"),
    "too large": (b" " * 20_001, 413, "above 20000 bytes"),
    "one that cannot be read": (b'{"input": "unreadable"}', 400, "has no token"),
    "one that breaks the guard": (b'{"input": "broken"}', 500, "its operator can see why"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_body_gets_one_sentence(running: Any, name: str) -> None:
    body, status, message = BAD[name]
    answer = post(running[0], body)
    assert answer.status_code == status
    said = answer.json()["error"]["message"]
    assert message in said
    assert "\n" not in said
    assert "Traceback" not in answer.text
    assert post(running[0], {"input": "1"}).status_code == 200


def test_a_body_of_unsaid_length_is_cut_off(running: Any) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = httpx.post(f"{running[0].url}/v1/moderations", content=endless(), timeout=20)
    assert answer.status_code == 413


def test_slow_and_broken_clients_do_not_hold_up_others(running: Any) -> None:
    server, _ = running
    head = b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    slow, gone = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(2))
    for client in (slow, gone):
        client.sendall(head + b'{"inp')
    gone.close()
    started = time.perf_counter()
    assert post(server, {"input": "1"}).status_code == 200
    assert time.perf_counter() - started < 5
    slow.settimeout(20)
    assert b"408" in slow.recv(4096)
    slow.close()
    junk = socket.create_connection(("127.0.0.1", server.port))
    junk.sendall(b"\x00\xff rubbish \r\n\r\n")
    junk.settimeout(20)
    assert b"400" in junk.recv(4096)
    junk.close()
    assert post(server, {"input": "1"}).status_code == 200


def test_a_text_that_fails_harms_no_other_in_its_pass() -> None:
    guard = Echo()
    with Running(guard) as server:
        guard.gate.clear()
        first = threading.Thread(target=post, args=(server, {"input": "1"}))
        first.start()
        time.sleep(0.3)  # its pass has begun, so that the next two share one
        found: dict[str, httpx.Response] = {}

        def ask(text: str) -> None:
            found[text] = post(server, {"input": text})

        both = [threading.Thread(target=ask, args=(text,)) for text in ("broken", "4")]
        for each in both:
            each.start()
        time.sleep(0.3)
        guard.gate.set()
        for each in [first, *both]:
            each.join(20)
    assert found["broken"].status_code == 500
    assert found["4"].status_code == 200


def test_a_full_queue_turns_away_and_recovers() -> None:
    guard = Echo()
    limits = Limits(body=20_000, texts=8, waiting=8, batch=1)
    with Running(guard, limits) as server:
        guard.gate.clear()
        waiting = [
            threading.Thread(target=post, args=(server, {"input": ["1"] * 4})) for _ in range(2)
        ]
        for each in waiting:
            each.start()
        time.sleep(0.5)
        turned_away = post(server, {"input": ["1"] * 8})
        assert turned_away.status_code == 503
        assert turned_away.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/health").json()["waiting"] > 0
        guard.gate.set()
        for each in waiting:
            each.join(20)
        assert post(server, {"input": "1"}).status_code == 200


def test_what_was_taken_on_is_finished_before_the_end() -> None:
    guard = Echo(seconds=0.3)
    before = set(threading.enumerate())
    found: list[int] = []
    server = Running(guard, Limits(batch=1)).__enter__()
    clients = [
        threading.Thread(target=lambda: found.append(post(server, {"input": "3"}).status_code))
        for _ in range(10)
    ]
    for client in clients:
        client.start()
    while sum(guard.sizes) + httpx.get(f"{server.url}/health").json()["waiting"] < 9:
        time.sleep(0.01)  # the tenth is in a pass
    server.stop()
    for client in clients:
        client.join(20)
    assert found == [200] * 10
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)
    assert not set(threading.enumerate()) - before


def test_health_and_metrics(running: Any) -> None:
    server, _ = running
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    post(server, {"input": ["9000", "1"]})
    text = httpx.get(f"{server.url}/metrics").text
    counts = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) ([\d.]+)$", text, re.MULTILINE))
    assert float(counts['safeft_guard_requests_total{status="200"}']) >= 1
    assert float(counts["safeft_guard_flagged_total"]) >= 1
    assert counts['safeft_guard_seconds_bucket{le="+Inf"}'] == counts["safeft_guard_seconds_count"]
    assert httpx.get(f"{server.url}/docs").status_code == 404
    assert httpx.get(f"{server.url}/v1/moderations").status_code == 405


def test_no_text_is_logged(running: Any, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG):
        post(running[0], {"input": "broken"})
        post(running[0], {"input": "unreadable"})
    own = [record.getMessage() for record in caplog.records if record.name.startswith("safeft")]
    assert own == ["a pass failed: ZeroDivisionError"]


GROWTH = """
import asyncio, re
from pathlib import Path
import httpx
from safeft.guard.service import Limits, create_app
from tests.test_guard_service import Echo
app = create_app(Echo(0), limits=Limits(waiting=4000))
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
async def main():
    sizes = []
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for _ in range(8):
                for _ in range(5):
                    body = {"input": ["0" * 20_000 + "1"] * 2}
                    answers = await asyncio.gather(*(
                        client.post("/v1/moderations", json=body) for _ in range(50)))
                    assert all(a.status_code == 200 for a in answers)
                sizes.append(held())
    print(max(sizes[5:]) - sizes[4])
asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_bounded() -> None:
    import os
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONINTMAXSTRDIGITS": "0"}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    # MiB, after the allocator has settled; the bodies of the last three rounds are 30 MB.
    assert float(run.stdout) < 10


@pytest.mark.parametrize("setting", [{"body": 0}, {"batch": -1}, {"waiting": 4}])
def test_limits_that_serve_nothing(setting: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}="):
        Limits(**setting)


def test_without_fastapi_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match=r"pip install 'safeft\[serve\]'"):
        create_app(Echo())


def test_texts_of_reads_what_it_should() -> None:
    assert texts_of('{"input": "é"}'.encode(), LIMITS) == ["é"]
    with pytest.raises(Refused) as caught:
        texts_of(b"\xff", LIMITS)
    assert caught.value.status == 400
