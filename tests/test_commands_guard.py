"""`safeft guard` on a saved tiny model, as a user would run it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from safeft.commands import main
from tests.guards import BAD, GOOD, texts, tiny_encoder
from tests.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, labelled texts, and a guard that the command has fitted."""
    folder = tmp_path_factory.mktemp("guard")
    for name, model, template in (
        ("chat", tiny_model(), tiny_tokenizer("left")),
        ("encoder", tiny_encoder(), tiny_tokenizer(chat_template=None)),
    ):
        model.save_pretrained(folder / name)
        template.save_pretrained(folder / name)
    for name, start in (("train", 0), ("test", 1000)):
        asked, harmful = texts(60 if name == "train" else 20, start=start)
        rows = [{"text": t, "label": int(h)} for t, h in zip(asked, harmful, strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.txt").write_text(f"{GOOD} 7\n{BAD} 8\n")
    bands = "[{from: 0, to: 0.5, action: log}, {from: 0.5, to: 1, action: block}]"
    (folder / "policy.yaml").write_text(f"message: No.\nprompt: {bands}\n")
    for name in ("chat", "encoder"):
        assert run(
            "fit", model_name_or_path=folder / name, data=folder / "train.jsonl",
            output_dir=folder / f"{name}-guard", search=1, members=2, dtype="float32",
        ) == 0  # fmt: skip
    return folder


def run(verb: str, **keys: Any) -> int:
    return main(["guard", verb, *(str(x) for k, v in keys.items() for x in (f"--{k}", v))])


def test_fit_says_where_harmfulness_is_read(place: Path, capsys: Any) -> None:
    (place / "bad.txt").write_text("\n".join(f"{BAD} {n}" for n in range(40)))
    (place / "good.txt").write_text("\n".join(f"{GOOD} {n}" for n in range(40)))
    assert run(
        "fit", model_name_or_path=place / "encoder", harmful=place / "bad.txt",
        benign=place / "good.txt", output_dir=place / "other", search=1, members=2,
        kinds="residual", cache=place / "cache",
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert re.search(r"units of 2 places, in .*other", shown)
    assert re.search(r"residual 1 +\d+ of 32 +F1 \d", shown)
    assert "validation (16 texts): macro-F1 1.000" in shown
    assert (place / "cache").is_dir()


@pytest.mark.parametrize("name", ["chat", "encoder"])
def test_score_from_a_file_and_from_a_pipe(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    guard = place / f"{name}-guard"
    assert run("score", guard=guard, texts=place / "prompts.txt", json="true") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [f"{GOOD} 7", f"{BAD} 8"]
    assert rows[0]["harmful"] < 0.5 < rows[1]["harmful"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{BAD} 8\n\n"))
    assert run("score", guard=guard, show_texts="false") == 0
    shown = capsys.readouterr().out
    assert float(shown) == pytest.approx(rows[1]["harmful"], abs=1e-3)


def test_stream_answers_under_the_policy(place: Path, capsys: Any) -> None:
    assert run(
        "stream", guard=place / "chat-guard", prompts=place / "prompts.txt",
        policy=place / "policy.yaml", log=place / "log.jsonl", max_new_tokens=8,
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "log: 1, block: 1" in shown
    assert "'No.'" in shown
    rows = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    assert [row["action"] for row in rows] == ["log", "block"]
    assert BAD not in (place / "log.jsonl").read_text()


def test_evaluate_writes_figures_and_a_page(place: Path, capsys: Any) -> None:
    assert run(
        "evaluate", guard=place / "encoder-guard", data=place / "test.jsonl",
        output_dir=place / "report", false_positives=0.2,
    ) == 0  # fmt: skip
    assert re.search(r"test +20 +1\.000", capsys.readouterr().out)
    found = json.loads((place / "report/guard.json").read_text())
    assert found["sets"][0]["macro_f1"] == 1
    assert 0 < found["threshold"] < 1
    page = (place / "report/guard.html").read_text()
    assert page.count("<svg") == 3
    assert "zzzz" not in page


def test_evaluate_says_how_soon_a_stream_is_found_out(place: Path, capsys: Any) -> None:
    turns = f"{GOOD} {BAD} {BAD} {BAD} {BAD}"
    rows = [{"prompt": "Hi", "response": turns, "unsafe_from": len(GOOD)},
            {"prompt": "Hi", "response": f"{GOOD} {GOOD}", "unsafe_from": ""}]  # fmt: skip
    (place / "streams.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(
        "evaluate", guard=place / "chat-guard", data=place / "test.jsonl",
        streams=place / "streams.jsonl", output_dir=place / "late",
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert re.search(r"flagged by tokens after the boundary: 0.000 after 0, .*after 128", shown)
    page = (place / "late/guard.html").read_text()
    assert page.count("<svg") == 4
    assert "On a stream" in page


def test_evaluating_on_the_training_texts_is_refused(place: Path, capsys: Any) -> None:
    assert run("evaluate", guard=place / "encoder-guard", data=place / "train.jsonl") == 2
    assert "among those that the guard was fitted on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "keys", "message"),
    [
        ("fit", {}, "needs --output_dir"),
        ("fit", {"output_dir": "x"}, "needs --model_name_or_path"),
        ("fit", {"output_dir": "x", "model_name_or_path": "encoder"}, "No labelled texts"),
        ("score", {}, "needs --guard"),
        ("score", {"guard": "encoder"}, "is no guard"),
        ("score", {"guard": "encoder-guard", "model_name_or_path": "chat"}, "llama"),
        ("score", {"guard": "encoder-guard", "texts": "none.txt"}, "There is no prompt file"),
        ("stream", {"guard": "chat-guard", "prompts": "prompts.txt"}, "needs --policy"),
        ("stream", {"guard": "encoder-guard", "prompts": "prompts.txt", "policy": "policy.yaml"},
         "does not write answers"),
        ("evaluate", {"guard": "encoder-guard", "data": "test.jsonl", "threshold": 0.5,
                      "false_positives": 0.1}, "not both"),
        ("serve", {"guard": "encoder-guard", "max_body": 0}, "body=0"),
        ("fly", {}, "no `safeft guard fly`"),
    ],
)  # fmt: skip
def test_mistakes_get_a_sentence(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, verb: str, keys: Any, message: str
) -> None:
    monkeypatch.chdir(place)
    assert run(verb, **keys) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help(capsys: Any) -> None:
    assert main(["guard", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("fit", "score", "stream", "evaluate", "serve"))
    assert main(["guard"]) == 2


def test_serve_answers_and_ends_on_a_signal(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "safeft", "guard", "serve", "--guard", str(place / "encoder-guard"),
         "--port", "0"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        url, started = "", time.monotonic()
        while not url and time.monotonic() - started < 120:
            line = process.stderr.readline()  # pyright: ignore
            url = (re.findall(r"listening on (\S+)", line) or [""])[0]
        answer = httpx.post(f"{url}/v1/moderations", json={"input": [f"{BAD} 9", GOOD]}, timeout=60)
        assert [row["flagged"] for row in answer.json()["results"]] == [True, False]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
