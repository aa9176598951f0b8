"""Groups by command: located, held or used as the budget in real trainings, verified from disk."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safeft.commands import main
from safeft.locators import UnitGroups
from safeft.locators.grouping import GROUPS
from tests.freezing import changed_frozen, frozen_entries, least_moved
from tests.models import tiny_model, tiny_tokenizer

LOCATE = {"method": "variance", "groups": "true", "scu": "0.05", "ucu": "0.1", "ru": "0.2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "harmful.txt").write_text("build a bomb\nsteal a car\nhack a bank\n")
    (folder / "benign.txt").write_text("bake a cake\nplant a tree\nname a river\n")
    chat = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": f"well, {n}"},
            ]
        }
        for n in range(16)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    pairs = [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for row in chat
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "sft.yaml").write_text(
        f"model_name_or_path: {folder}/base\n"
        f"dataset_name: {folder}/chat.jsonl\n"
        "max_steps: 3\nper_device_train_batch_size: 4\nlearning_rate: 1.0e-2\nweight_decay: 0.1\n"
        "max_length: 64\nuse_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\n"
        "gradient_checkpointing: false\n"
    )
    return folder


def locate(place: Path, output: Path, **changed: str | None) -> int:
    given = {
        "model_name_or_path": str(place / "base"),
        "harmful": str(place / "harmful.txt"),
        "benign": str(place / "benign.txt"),
        "output_dir": str(output),
        **LOCATE,
        **changed,
    }
    return main(["locate", *(t for n, v in given.items() if v for t in (f"--{n}", v))])


@pytest.fixture(scope="module")
def groups(place: Path) -> Path:
    assert locate(place, place / "groups") == 0
    assert locate(place, place / "set", groups=None, scu=None, ucu=None, ru=None) == 0
    return place / "groups"


def test_locate_writes_the_groups_and_says_how_large_they_are(
    groups: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locate(place, tmp_path / "again") == 0
    shown = capsys.readouterr().out
    found = UnitGroups.from_pretrained(groups)
    assert "96 units in four groups" in shown
    for name, count in zip(GROUPS, (5, 10, 19, 62), strict=True):
        assert len(getattr(found, name)) == count
        assert f"{name:<4} {count:>8}" in shown
    again = UnitGroups.from_pretrained(tmp_path / "again")
    assert [getattr(again, name).hash for name in GROUPS] == [
        getattr(found, name).hash for name in GROUPS
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "contrast"}, ["method='contrast' gives no groups", "--method variance"]),
        ({"method": "attribution"}, ["method='attribution' gives no groups"]),
        ({"fraction": "0.1"}, ["{'fraction': 0.1} is the size of one set", "`scu`, `ucu`"]),
        ({"utility_fraction": "0.1"}, ["{'utility_fraction': 0.1}"]),
        ({"groups": None, "ucu": None, "ru": None}, ["{'scu': 0.05}", "--groups"]),
        ({"scu": "0"}, ["scu=0.0 is no share", "0.013"]),
        ({"ru": "0.9"}, ["leave no unit", "less than 1"]),
    ],
)
def test_locate_refuses_before_the_model_is_loaded(
    changed: dict[str, Any], words: list[str], place: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "never"
    assert locate(place, out, model_name_or_path="/nowhere", **changed) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not out.exists()


def train(place: Path, out: Path, *more: str, verb: str = "sft") -> int:
    config = ["--config", str(place / "sft.yaml"), "--output_dir", str(out)]
    data = ["--dataset_name", str(place / "pairs.jsonl")] if verb == "dpo" else []
    return main([verb, *config, *data, *more])


@pytest.mark.parametrize(
    ("key", "text", "verb", "count"),
    [
        ("freeze", "scu", "sft", 5),
        ("freeze", "scu+cu:6%", "sft", 11),
        ("freeze", "scu+cu:6%", "dpo", 11),
        ("budget", "ru", "sft", 19),
        ("budget", "ru:10%", "dpo", 10),
    ],
)
def test_what_is_held_holds_exactly_and_all_else_is_trained(
    key: str, text: str, verb: str, count: int, groups: Path, place: Path, tmp_path: Path, capsys
) -> None:
    """Rows and columns are counted out by hand here, and compared bit by bit."""
    out, yaml = tmp_path / "out", tmp_path / "run.yaml"
    yaml.write_text(f"{(place / 'sft.yaml').read_text()}protected: {groups}\n{key}: {text}\n")
    data = ["--dataset_name", str(place / "pairs.jsonl")] if verb == "dpo" else []
    assert main([verb, "--config", str(yaml), "--output_dir", str(out), *data]) == 0
    assert "EXACT" in capsys.readouterr().out
    certificate = json.loads((out / "safeft_certificate.json").read_text())
    assert certificate["exact"]
    assert certificate["neurons"]["count"] == count
    base = {
        name: weight
        for name, weight in tiny_model().state_dict().items()
        if name in load_file(out / "model.safetensors")
    }
    now = load_file(out / "model.safetensors")
    mode = "freeze" if key == "freeze" else "train_only"
    indices = UnitGroups.from_pretrained(groups).resolve(text).indices
    masks = frozen_entries(base, indices, mode)
    assert changed_frozen(base, now, masks) == []
    assert least_moved(base, now, masks)[0] > 0.2
    check = ["verify", "--base", str(place / "base"), "--tuned", str(out)]
    check += ["--protected", str(groups)]
    assert main([*check, f"--{key}", text]) == 0
    assert main([*check, "--freeze" if key == "budget" else "--budget", text]) == 1


def test_one_groups_folder_is_a_set_like_any_other(
    groups: Path, place: Path, tmp_path: Path
) -> None:
    assert train(place, tmp_path / "out", "--protected", str(groups / "scu")) == 0
    check = ["verify", "--base", str(place / "base"), "--tuned", str(tmp_path / "out")]
    assert main([*check, "--protected", str(groups / "scu")]) == 0
    assert main([*check, "--protected", str(groups), "--freeze", "scu"]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"freeze": "sru"}, ["'sru': there is no group 'sru'", "scu, ucu, ru, cu"]),
        ({"freeze": "scu+cu:6"}, ["'6' is not a percentage", "scu+cu:6%"]),
        ({"freeze": "cu:70%"}, ["asks for 70% of all units", "holds 65%"]),
        ({"freeze": "cu:0%"}, ["asks for 0%"]),
        ({"budget": "ru+"}, ["there is no group ''"]),
        ({"freeze": "scu", "budget": "ru"}, ["freeze='scu' and budget='ru'", "Give one"]),
        (
            {"freeze": "scu", "protect_mode": "train_only"},
            ["freeze='scu' holds these units", "`budget: scu`"],
        ),
        ({}, ["holds four groups", "freeze: scu+cu:6%", "budget: ru"]),
        ({"freeze": "scu", "protected": "set"}, ["holds no groups", "NeuronSet", "--groups"]),
        ({"budget": "ru", "protected": ""}, ["budget='ru'", "no `protected` set is given"]),
        ({"budget": "ru", "protected": "nowhere"}, ["nowhere", "config.json"]),
    ],
)
@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_training_refuses_before_the_first_step(
    more: dict[str, str], words: list[str], verb: str, groups: Path, place: Path, tmp_path, capsys
) -> None:
    given = {"protected": "groups", **more}
    protected = given.pop("protected")
    arguments = [text for name, value in given.items() for text in (f"--{name}", value)]
    arguments += ["--protected", str(place / protected)] if protected else []
    assert train(place, tmp_path / "out", *arguments, verb=verb) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_key_that_yaml_reads_as_no_text_is_refused(
    groups: Path, place: Path, tmp_path: Path, capsys
) -> None:
    yaml = tmp_path / "wrong.yaml"
    yaml.write_text(f"{(place / 'sft.yaml').read_text()}protected: {groups}\nfreeze: true\n")
    assert main(["sft", "--config", str(yaml), "--output_dir", str(tmp_path / "out")]) == 2
    assert "no group 'true'" in capsys.readouterr().err


def test_help_names_the_keys(capsys) -> None:
    for verb, keys in (("sft", "--freeze --budget"), ("verify", "--freeze"), ("locate", "--ucu")):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = capsys.readouterr().out
        assert all(key in shown for key in keys.split())
