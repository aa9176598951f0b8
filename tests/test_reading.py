import json
from pathlib import Path

import pytest
from PIL import Image

from safeft.errors import PromptError
from safeft.forms import Prompt
from safeft.reading import read_columns, read_examples, read_prompts

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Good day"}
BOTH = ["first, with a comma", "second"]


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.txt", "first, with a comma\n\n  second \r\n", None),
        ("a.prompts", "first, with a comma\nsecond", None),
        ("a.csv", 'prompt,other\n"first, with a comma",x\nsecond,y\n,z\n', None),
        ("a.csv", 'other,goal\nx,"first, with a comma"\ny,second\n', None),
        ("a.csv", 'other,mine\nx,"first, with a comma"\ny,second\n', "mine"),
        ("a.csv", 'only\n"first, with a comma"\nsecond\n', None),
        ("a.CSV", 'text,prompt\nx,"first, with a comma"\nx,second\n', None),
        ("a.json", json.dumps(BOTH), None),
        ("a.json", json.dumps([{"instruction": text, "n": 1} for text in BOTH]), None),
        ("a.json", json.dumps([{"prompt": "x", "mine": text} for text in BOTH]), "mine"),
        ("a.json", json.dumps([{"prompt": text} for text in (*BOTH, None, "")]), None),
        ("a.jsonl", "\n".join(json.dumps({"question": text}) for text in BOTH) + "\n\n", None),
        ("a.jsonl", "\n".join(json.dumps(text) for text in BOTH), None),
        ("a.txt", "\ufefffirst, with a comma\nsecond", None),
    ],
)
def test_files_of_prompts(tmp_path: Path, name: str, content: str, column: str | None) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name, column) == BOTH


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_only_line_feeds_end_a_line(tmp_path: Path, suffix: str) -> None:
    odd = "one\u2028still one\u0085\x0bstill"
    rows = {
        ".txt": f"{odd}\ntwo\n",
        ".jsonl": "\n".join(json.dumps({"prompt": t}, ensure_ascii=False) for t in (odd, "two")),
        ".csv": f"prompt\n{odd}\ntwo\n",
    }
    (tmp_path / f"a{suffix}").write_text(rows[suffix], encoding="utf-8")
    assert read_prompts(tmp_path / f"a{suffix}") == [odd, "two"]


def test_a_quoted_cell_may_have_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,n\r\n"one\r\nstill one",1\r\ntwo,2\r\n')
    assert read_prompts(tmp_path / "a.csv") == ["one\nstill one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", b"", None, "holds no prompt"),
        ("a.txt", b"\n \n", None, "holds no prompt"),
        ("a.csv", b"", None, "holds no prompt"),
        ("a.csv", b"prompt\n", None, "holds no prompt"),
        ("a.json", b"[]", None, "holds no prompt"),
        ("a.jsonl", b"", None, "holds no prompt"),
        ("a.json", b"", None, "cannot be read as .json"),
        ("a.json", b'["Hi"', None, "cannot be read as .json"),
        ("a.jsonl", b'{"prompt": "Hi"}\n{"prompt"', None, "cannot be read as .jsonl"),
        ("a.txt", b"\xff\xfe\x00H", None, "cannot be read as .txt"),
        ("a.csv", b"a,b\nx,y\n", None, r"has the columns \['a', 'b'\]"),
        ("a.csv", b"prompt,b\nx,y\n", "goal", r"no column 'goal'; it has \['prompt', 'b'\]"),
        ("a.jsonl", b'{"prompt": "Hi"}\n{"text": "Hi"}', "prompt", "no column 'prompt'"),
        ("a.json", b"[1, 2]", None, "holds the row 1"),
        ("a.json", b"[null]", None, "holds the row None"),
        ("a.jsonl", b'{"prompt": [{"role": "user"}]}', None, "list values in 'prompt'"),
        ("a.json", b'{"prompt": {"a": 1}}', None, "dict values in 'prompt'"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: bytes, column: str | None, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(tmp_path / name, column)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(PromptError, match="There is no prompt file"):
            read_prompts(path)


def test_examples_have_answers(tmp_path: Path) -> None:
    rows = [{"question": "2 + 2?", "answer": "4"}, {"messages": [USER, ANSWER]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read_examples(tmp_path / "a.jsonl")
    assert [(e.text, e.response) for e in found] == [("2 + 2?", "4"), ("Hi", "Good day")]
    (tmp_path / "a.csv").write_text("q,a\n2 + 2?,4\n")
    (found,) = read_examples(tmp_path / "a.csv", "q", "a")
    assert (found.text, found.response) == ("2 + 2?", "4")


@pytest.mark.parametrize(
    "content", ['{"prompt": "Hi"}', '{"prompt": "Hi", "answer": ""}', '{"messages": ["x"]}', ""]
)
def test_examples_without_answers_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(PromptError):
        read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,en,zz\n1,steal,cdiet\n2, bake ,\n3,plant\n"),
        ("a.json", '[{"en": "steal", "zz": "cdiet"}, {"en": "bake", "zz": null}, '
                   '{"en": "plant", "zz": ""}]'),
        ("a.jsonl", '{"en": "steal", "zz": "cdiet"}\n{"en": "bake", "zz": " "}\n'
                    '{"en": "plant", "zz": ""}'),
    ],
)  # fmt: skip
def test_columns_stay_row_by_row(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = read_columns(tmp_path / name, ["zz", "en"])
    assert found == {"zz": ["cdiet", "", ""], "en": ["steal", "bake", "plant"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,en\n1,steal\n", r"no column 'zz'; it has \['id', 'en'\]"),
        ("a.jsonl", '{"en": "a", "zz": "b"}\n{"en": "a"}', r"no column 'zz'; it has \['en'\]"),
        ("a.csv", "en,zz\nsteal,\nbake, \n", r"no text in the column 'zz' \(2 rows\)"),
        ("a.csv", "en,zz\n", r"no text in the column 'en' \(0 rows\)"),
        ("a.txt", "steal\n", "a mapping with columns"),
    ],
)
def test_missing_and_empty_columns_are_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=message) as caught:
        read_columns(tmp_path / name, ["en", "zz"])
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.data
def test_languages_of_multijail(data_dir: Path) -> None:
    languages = ["en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv"]
    found = read_columns(data_dir / "multijail/MultiJail.csv", languages)
    assert {len(cells) for cells in found.values()} == {291}
    assert sum(cell == "" for cells in found.values() for cell in cells) == 0
    assert len(set(map(tuple, found.values()))) == 10


TABLES = {
    "a.csv": "prompt,image\nWhat is this?,red.png\nand this?,{}\n,sub/red.png\nNo picture,\n",
    "a.jsonl": "\n".join(
        json.dumps(row)
        for row in (
            {"prompt": "What is this?", "image": "red.png"},
            {"prompt": "and this?", "image": "{}"},
            {"prompt": "", "image": "sub/red.png"},
            {"prompt": "No picture", "image": None},
            {"prompt": None, "image": ""},
        )
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("column", ["image", "seen"])
def test_a_column_of_images(name: str, column: str, tmp_path: Path) -> None:
    red, away = tmp_path / "red.png", tmp_path / "away" / "red.png"
    for path in (red, away, tmp_path / "sub" / "red.png"):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(path)
    table = TABLES[name].replace("image", column).replace("{}", str(away))
    (tmp_path / name).write_text(table)
    found = read_prompts(tmp_path / name, "prompt", None if column == "image" else column)
    assert found[3] == "No picture"
    shown = [prompt for prompt in found if isinstance(prompt, Prompt)]
    assert [(prompt.text, prompt.images) for prompt in shown] == [
        ("What is this?", (red,)),
        ("and this?", (away,)),
        ("", (tmp_path / "sub" / "red.png",)),
    ]
    assert len(found) == 4


def test_examples_may_have_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "a.csv").write_text("prompt,image,answer\nColour?,red.png,Red\n2 + 2?,,4\n")
    seen, plain = read_examples(tmp_path / "a.csv")
    assert (seen.images, seen.response) == ((tmp_path / "red.png",), "Red")
    assert (plain.images, plain.response) == ((), "4")


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ("prompt,image\nHi,none.png\n", None, r"Prompt 0 names the image '.*none.png', and there"),
        ("prompt,image\nHi,\nHo,a.csv\n", None, r"a.csv' cannot be read .*Save it again as PNG"),
        ("prompt,image\nHi,http://a.b/c.png\n", None, "there is no such file.*not made here"),
        ("prompt,n\nHi,3\n", "image", r"no column 'image'; it has \['prompt', 'n'\]"),
        ("image\nred.png\n", None, r"has the columns \['image'\]; say which"),
    ],
)
def test_images_that_are_not_there_are_named(
    table: str, column: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(tmp_path / "a.csv", None, column)
    assert str(tmp_path / "a.csv") in str(caught.value)
