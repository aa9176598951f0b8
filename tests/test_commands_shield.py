"""``safeft shield``, run as a person runs it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import safeft
from safeft.commands import main
from safeft.demo.pictures import written
from safeft.grid import Grid, locate_grid
from safeft.shield import trained_share
from tests.models import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.vlm import tiny_llava, tiny_qwen2_vl

WORDS = {"en": ("steal", "bake"), "it": ("rubo", "cuocio"), "zz": ("cdiet", "kesi")}


def table(path: Path, side: int, languages: Any = WORDS, rows: int = 12) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", *languages])
        for row in range(rows):
            writer.writerow([row, *(f"{WORDS[each][side]} {'x' * row}?" for each in languages)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shield")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    table(folder / "harmful.csv", 0)
    table(folder / "benign.csv", 1)
    pairs = [{"prompt": f"steal a {n}", "response": "I'm sorry, no."} for n in range(8)]
    pairs += [{"prompt": f"bake a {n}", "response": "Well, do."} for n in range(8)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "benign.txt").write_text("bake\ncook\n")
    return folder


def shield(place: Path, out: Path, *more: str, **changed: str) -> int:
    given = {
        "model_name_or_path": str(place / "base"),
        "harmful": str(place / "harmful.csv"),
        "benign": str(place / "benign.csv"),
        "output_dir": str(out),
        "fraction": "0.25",
        "fill": "true",
        **changed,
    }
    pairs = [text for name, value in given.items() for text in (f"--{name}", value)]
    languages = [] if "--languages" in more else ["--languages", "en", "it", "zz"]
    return main(["shield", *pairs, *languages, *more])


def test_sets_figures_picture_and_table(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert shield(place, tmp_path) == 0
    shown = capsys.readouterr().out
    grid = Grid.from_pretrained(tmp_path)
    sides = {
        f"{language}/text": tuple([f"{word} {'x' * n}?" for n in range(12)] for word in words)
        for language, words in WORDS.items()
    }
    expected: Any = locate_grid(tiny_model(), tiny_tokenizer(), sides, fraction=0.25, fill=True)  # type: ignore
    assert grid.to_dict() == expected.to_dict()
    assert (tmp_path / "overlap.svg").is_file()
    assert "en/text and it/text" in shown
    assert "3 of 3 cells" in shown
    assert "placebo, benign only" in shown
    share = trained_share(tiny_model(), grid.shared)
    assert f"train_only of the {len(grid.shared)} shared neurons trains {share:.4%}" in shown
    assert not (tmp_path / "tuned").exists()


def test_the_shared_set_is_an_ordinary_one(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert shield(place, tmp_path / "grid") == 0
    given = [
        "--model_name_or_path",
        str(place / "base"),
        "--dataset_name",
        str(place / "pairs.jsonl"),
    ]
    columns = ["--prompt_column", "prompt", "--completion_column", "response"]
    quick = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none"]
    protect = ["--protected", str(tmp_path / "grid/shared"), "--protect_mode", "train_only"]
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["sft", *given, *columns, *quick, *protect, *out]) == 0
    assert "EXACT" in capsys.readouterr().out


TUNE = ("--tune_on", "en", "--learning_rate", "0.01", "--max_new_tokens", "4", "--epochs", "2")


def test_tuning_in_one_language_is_measured_in_all(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    data = ("--safety_data", str(place / "pairs.jsonl"))
    assert shield(place, tmp_path, *TUNE, *data) == 0
    shown = capsys.readouterr().out
    assert "EXACT" in shown
    assert "tuned on this" in shown
    found = json.loads((tmp_path / "transfer.json").read_text())
    assert found["tuned_on"] == "en/text"
    assert list(found["cells"]) == ["en/text", "it/text", "zz/text"]
    for cell in found["cells"].values():
        assert cell["after"]["refusal"]["total"] == 3  # a quarter of 12 rows
    assert found["trained_share"] > 0
    certificate = json.loads((tmp_path / "tuned/safeft_certificate.json").read_text())
    assert certificate["exact"]
    assert certificate["mode"] == "train_only"
    check = ["verify", "--base", str(place / "base"), "--tuned", str(tmp_path / "tuned")]
    check += ["--protected", str(tmp_path / "shared")]
    assert main([*check, "--mode", "train_only"]) == 0
    assert main(check) == 1  # the neurons themselves were trained
    source = safeft.NeuronSet.from_pretrained(tmp_path / "cells/it/text").source
    assert source["calibration"]["harmful"]["count"] == 9


def test_a_training_that_holds_nothing_is_not_saved(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("safeft.freeze.pin.Pin.install", lambda *_: 0)
    monkeypatch.setattr("safeft.freeze.pin.Pin.check_fired", lambda _: None)
    monkeypatch.setattr("safeft.freeze.pin.Pin.check_pinned", lambda _: None)
    data = ("--safety_data", str(place / "pairs.jsonl"))
    assert shield(place, tmp_path, *TUNE, *data) == 2
    assert "VIOLATED" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()
    assert not (tmp_path / "transfer.json").exists()


def test_one_benign_column_for_all(place: Path, tmp_path: Path) -> None:
    assert shield(place, tmp_path, benign_column="en") == 0
    sources = [each.source["calibration"] for each in Grid.from_pretrained(tmp_path).sets.values()]
    assert len({source["benign"]["sha256"] for source in sources}) == 1
    assert len({source["harmful"]["sha256"] for source in sources}) == 3


def test_empty_cells_are_left_out_and_held_out_rows_are_the_same_in_all(
    place: Path, tmp_path: Path
) -> None:
    lines = (place / "harmful.csv").read_text().splitlines()
    lines[2] = lines[2].rpartition(",")[0] + ","
    harmful = tmp_path / "harmful.csv"
    harmful.write_text("\n".join(lines))
    data = ("--safety_data", str(place / "pairs.jsonl"))
    assert shield(place, tmp_path / "out", *TUNE, *data, harmful=str(harmful)) == 0
    grid = Grid.from_pretrained(tmp_path / "out")
    counts = [each.source["calibration"]["harmful"]["count"] for each in grid.sets.values()]
    assert counts == [9, 9, 8]
    found = json.loads((tmp_path / "out/transfer.json").read_text())["cells"]
    asked = {
        name: {sample["prompt"].count("x") for sample in cell["after"]["samples"]}
        for name, cell in found.items()
    }
    assert asked["en/text"] == asked["zz/text"] == {3, 7, 11}


@pytest.mark.parametrize(
    ("more", "changed", "words"),
    [
        (("--languages", "en", "sw"), {}, ["no column 'sw'", "['id', 'en', 'it', 'zz']"]),
        (("--languages", "en"), {}, ["1 cell (en/text)", "safeft locate"]),
        (("--languages", "en", "en"), {}, ["1 cell"]),
        ((), {"benign_column": "sw"}, ["benign.csv", "no column 'sw'"]),
        ((), {"benign": "{place}/benign.txt"}, ["benign.txt", "mapping with columns"]),
        ((), {"benign": "{place}/harmful.csv"}, ["harmful and benign at once"]),
        ((), {"harmful": "/nowhere.csv"}, ["no prompt file", "/nowhere.csv"]),
        ((), {"fraction": "0"}, ["fraction=0"]),
        ((), {"at_least": "4"}, ["at_least=4", "3 cells"]),
        ((), {"judge": "/nowhere/judge", "tune_on": "en", "safety_data": "{place}/pairs.jsonl"},
         ["/nowhere/judge"]),
        ((), {"tune_on": "en"}, ["safety_data=None", "give both"]),
        ((), {"safety_data": "{place}/pairs.jsonl"}, ["tune_on=None", "give both"]),
        ((), {"tune_on": "sw", "safety_data": "{place}/pairs.jsonl"}, ["tune_on='sw'", "en"]),
        ((), {"tune_on": "en", "safety_data": "/nowhere.jsonl"}, ["/nowhere.jsonl"]),
        ((), {"tune_on": "en", "safety_data": "{place}/pairs.jsonl", "held_out": "1"},
         ["held_out=1.0", "0.25"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(
    more: tuple[str, ...],
    changed: dict[str, str],
    words: list[str],
    place: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    changed = {name: value.format(place=place) for name, value in changed.items()}
    assert shield(place, tmp_path / "never", *more, **changed) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said
    assert not (tmp_path / "never").exists()


def test_safety_data_among_the_held_out_is_refused(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [{"prompt": "rubo xxx?", "response": "No."}]
    (tmp_path / "leak.json").write_text(json.dumps(rows))
    data = ("--safety_data", str(tmp_path / "leak.json"))
    assert shield(place, tmp_path / "never", *TUNE, *data) == 2
    assert "held-out prompts of 'it/text'" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_a_template_from_a_file_serves_locating_tuning_and_the_result(
    place: Path, tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path / "bare")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "bare")
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    changed = {
        "model_name_or_path": str(tmp_path / "bare"),
        "chat_template_path": str(tmp_path / "chat.jinja"),
        "safety_data": str(place / "pairs.jsonl"),
    }
    assert shield(place, tmp_path / "out", *TUNE, **changed) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "out/tuned")
    assert saved.chat_template == CHAT_TEMPLATE


def test_several_processes_are_refused(
    place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("safeft.commands._end", lambda code: code)  # would end this process
    assert shield(place, tmp_path / "never") == 2
    assert "2 processes were launched" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.data
def test_multijail(data_dir: Path, place: Path, tmp_path: Path, capsys: Any) -> None:
    """Ten languages of real prompts, on a model that knows none of them: only that it runs."""
    table = str(data_dir / "multijail/MultiJail.csv")
    languages = ("--languages", "en", "zh", "it", "sw", "--limit", "6", "--max_length", "128")
    given = {"harmful": table, "benign_column": "ask"}
    (tmp_path / "benign.csv").write_text("ask\nHow do I bake bread?\nHow do I plant a tree?\n")
    benign = str(tmp_path / "benign.csv")
    assert shield(place, tmp_path / "out", *languages, **given, benign=benign) == 0
    assert len(Grid.from_pretrained(tmp_path / "out").pairs) == 6
    wrong = ("--languages", "en", "tlh")
    assert shield(place, tmp_path / "no", *wrong, **given, benign=benign) == 2
    said = capsys.readouterr().err
    assert "no column 'tlh'" in said
    assert "'sw', 'jv'" in said


SEEING = {"llava": tiny_llava, "qwen2_vl": tiny_qwen2_vl}


@pytest.mark.parametrize("name", SEEING)
def test_languages_and_modalities_of_a_model_that_sees(
    name: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    model, processor = SEEING[name]()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    more = ("--languages", "en", "it", "--modalities", "text", "image", "--picture_size", "64")
    data = ("--safety_data", str(place / "pairs.jsonl"))
    out = tmp_path / "out"
    changed = {"model_name_or_path": str(tmp_path / "base"), "fraction": "0.4"}
    assert shield(place, out, *more, *TUNE, *data, **changed) == 0
    shown = capsys.readouterr().out
    grid = Grid.from_pretrained(out)
    assert list(grid.sets) == ["en/text", "en/image", "it/text", "it/image"]
    assert (out / "overlap.svg").is_file()
    assert {site.split(".")[1] for site in grid.shared.indices} == {"language_model"}
    assert grid.sets["en/text"].indices != grid.sets["en/image"].indices
    found = json.loads((out / "transfer.json").read_text())
    assert found["tuned_on"] == "en/text"
    assert list(found["cells"]) == list(grid.sets)
    certificate = json.loads((out / "tuned/safeft_certificate.json").read_text())
    assert certificate["exact"]
    assert certificate["mode"] == "train_only"
    assert certificate["frozen_share"] == pytest.approx(1 - found["trained_share"])
    assert "EXACT: everything but" in shown
    check = ["verify", "--base", str(tmp_path / "base"), "--tuned", str(out / "tuned")]
    check += ["--protected", str(out / "shared")]
    assert main([*check, "--mode", "train_only"]) == 0
    assert main(check) == 1


def drawn(folder: Path, cell: str, side: int) -> None:
    """A table of pictures, or of words, for one cell."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{cell.replace('/', '_')}_{('harmful', 'benign')[side]}.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "image"])
        for row in range(8):
            asked = f"{WORDS[cell[:2]][side]} {'x' * row}?"
            name = f"{cell.replace('/', '_')}_{side}_{row}.png"
            if cell.endswith("image"):
                written(asked, (64, 64)).save(folder / name)
            writer.writerow(["What?" if cell.endswith("image") else asked,
                             name if cell.endswith("image") else ""])  # fmt: skip


def test_a_pair_of_tables_for_each_cell_and_tuning_on_pictures(tmp_path: Path) -> None:
    model, processor = tiny_qwen2_vl()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    cells = ("en/text", "en/image", "zz/image")
    for cell in cells:
        drawn(tmp_path / "tables", cell, 0)
        drawn(tmp_path / "tables", cell, 1)
    rows = ["prompt,image,response"]
    for number, answer in enumerate(("I'm sorry, no.", "Well, do.") * 4):
        written(f"other {number}", (64, 64)).save(tmp_path / f"other{number}.png")
        rows.append(f'What?,other{number}.png,"{answer}"')
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    arguments = [
        "--model_name_or_path", str(tmp_path / "base"), "--fraction", "0.4",
        "--harmful", str(tmp_path / "tables/{cell}_harmful.csv"),
        "--benign", str(tmp_path / "tables/{cell}_benign.csv"),
        "--output_dir", str(tmp_path / "out"), "--safety_data", str(tmp_path / "pairs.csv"),
        "--learning_rate", "0.01", "--max_new_tokens", "4", "--fill",
    ]  # fmt: skip
    assert main(["shield", *arguments, "--tune_on", "en/image", "--cells", *cells]) == 0
    found = json.loads((tmp_path / "out/transfer.json").read_text())
    assert found["tuned_on"] == "en/image"
    assert list(found["cells"]) == list(cells)
    certificate = json.loads((tmp_path / "out/tuned/safeft_certificate.json").read_text())
    assert certificate["exact"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--languages", "en", "it", "--modalities", "text", "sound"), "neither text nor image"),
        (("--languages", "en", "it", "--cells", "en/text"), "Give the one or the other"),
        (("--languages", "en", "--modalities", "text", "image"), "reads text only"),
    ],
)
def test_bad_cells_are_refused(
    more: Any, words: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    assert shield(place, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cells_need_tables_of_their_own(place: Path, tmp_path: Path, capsys: Any) -> None:
    pairs = [f"--{side}={place / side}.csv" for side in ("harmful", "benign")]
    base = [f"--model_name_or_path={place / 'base'}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["shield", *base, *pairs]) == 2
    assert "Neither `languages` nor `cells` is given" in capsys.readouterr().err
    assert main(["shield", *base, *pairs, "--cells", "en/text", "zz/text"]) == 2
    assert "Write {cell} where their names differ" in capsys.readouterr().err
