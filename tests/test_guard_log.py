import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from safeft.files import sha256
from safeft.guard.log import AuditLog


def test_lines_without_texts_unless_asked(tmp_path: Path) -> None:
    AuditLog(tmp_path / "a.jsonl").write({"action": "warn"}, answer="Secret\nwords")
    (row,) = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert row["answer_sha256"] == sha256(b"Secret\nwords")
    assert row["answer_characters"] == 12
    assert "Secret" not in (tmp_path / "a.jsonl").read_text()
    assert datetime.fromisoformat(row["time"]).tzinfo is not None
    AuditLog(tmp_path / "a.jsonl", texts=True).write({}, answer="Secret \ud800")
    last = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])
    assert last["answer"] == "Secret \ud800"


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "b.jsonl", texts=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.write({"n": n}, answer="x" * 5000), range(200)))
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert sorted(row["n"] for row in rows) == list(range(200))
