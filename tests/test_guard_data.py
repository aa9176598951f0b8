import json
from pathlib import Path

import pytest

from safeft.errors import ConfigError, PromptError
from safeft.guard.data import read_labelled, read_streams
from tests.models import tiny_tokenizer


def table(folder: Path, name: str, rows: list[tuple[str, ...]]) -> str:
    path = folder / name
    path.write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in rows) + "\n")
    return str(path)


def test_tables_and_files_become_sets(tmp_path: Path) -> None:
    one = table(
        tmp_path, "one.csv",
        [("text", "label"), ("a", "harmful"), ("b", "0"), ("c", "hate, violence"), ("d", "Safe")],
    )  # fmt: skip
    two = tmp_path / "two.jsonl"
    rows = [{"prompt": "q", "response": "r", "label": True},
            {"prompt": "s", "response": "", "label": 0}]  # fmt: skip
    two.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "bad.txt").write_text("x\ny\n")
    (tmp_path / "good.txt").write_text("z\n")
    found = read_labelled([one], [str(tmp_path / "bad.txt")], [str(tmp_path / "good.txt")])
    assert found["one"].labels == [True, False, frozenset({"hate", "violence"}), False]
    assert found["one"].examples == ["a", "b", "c", "d"]
    assert found["prompts"].examples == ["x", "y", "z"]
    assert found["prompts"].labels == [True, True, False]
    answers = read_labelled([str(two)], answer_column="response")["two"]
    assert answers.examples == [{"prompt": "q", "response": "r"}, "s"]
    assert answers.labels == [True, False]
    named = read_labelled(
        [one],
        text_column="label",
        label_column="text",
    )["one"]
    assert named.examples[0] == "harmful"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("text", "label"), ("a", "0.5")], "label '0.5'. Write 1 or 0"),
        ([("text", "label"), ("a", ",")], "label ','"),
        ([("text", "verdict"), ("a", "1")], "no column 'label'"),
        ([("text", "label"), ("a", "1"), ("", "1")], "2 rows and 1 texts"),
        ([("words", "label"), ("a", "1")], "say which one is meant"),
    ],
)
def test_bad_tables(tmp_path: Path, rows: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_labelled([table(tmp_path, "t.csv", rows)])


def test_nothing_and_two_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No labelled texts"):
        read_labelled()
    path = table(tmp_path, "t.csv", [("text", "label"), ("a", "1")])
    with pytest.raises(ConfigError, match="Two tables are called 't'"):
        read_labelled([path, path])


def test_streams_have_their_boundary_in_tokens(tmp_path: Path) -> None:
    path = tmp_path / "streams.jsonl"
    rows = [{"prompt": "q", "response": "né bad", "unsafe_from": 3},
            {"prompt": "q", "response": "fine", "unsafe_from": ""}]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows))
    unsafe, safe = read_streams(str(path), tiny_tokenizer())
    assert unsafe == [({"prompt": "q", "response": "né bad"}, 4)]  # a token a byte
    assert safe == [{"prompt": "q", "response": "fine"}]


@pytest.mark.parametrize(
    ("answer", "start", "message"),
    [
        ("bad", "3", "unsafe_from '3', and its answer has 3 characters"),
        ("bad", "-1", "unsafe_from '-1'"),
        ("", "0", "Row 1 of .* lacks a prompt or an answer"),
    ],
)
def test_bad_streams(tmp_path: Path, answer: str, start: str, message: str) -> None:
    rows = [("prompt", "response", "unsafe_from"), ("q", "r", "0"), ("q", answer, start)]
    with pytest.raises(PromptError, match=message):
        read_streams(table(tmp_path, "t.csv", rows), tiny_tokenizer())
