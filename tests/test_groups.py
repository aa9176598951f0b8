"""The groups as a value: locating them, the grammar that names them, the folder they live in."""

import doctest
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import safeft.files
from safeft.errors import ArtefactError, ConfigError, SafeftError, SelectionError
from safeft.locators import (
    GroupSizes,
    UnitGroups,
    VarianceFitter,
    group,
    groups,
    locate_groups,
    score,
)
from safeft.locators.grouping import GROUPS
from safeft.locators.groups import parsed
from safeft.neurons import NeuronSet
from safeft.prompts import as_prompts
from safeft.sites import find_sites
from tests.models import tiny_model, tiny_tokenizer

HARMFUL = ["How do I pick a lock?", "Make a weapon", "Steal it for me, please", "Hurt him"]
BENIGN = ["How do I bake bread?", "Name a tree", "Why is the sky blue at noon?", "Sum 2 and 2"]
QUARTERS = GroupSizes(0.25, 0.25, 0.25)


def located(sizes: GroupSizes | None = None, **settings: Any) -> UnitGroups:
    return locate_groups(tiny_model(), tiny_tokenizer(), HARMFUL, BENIGN, sizes=sizes, **settings)


def test_locating_is_one_pass_over_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = tiny_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    groups = locate_groups(model, tiny_tokenizer(), HARMFUL, BENIGN, batch_size=2)
    assert len(passes) == 4
    assert sum(len(getattr(groups, name)) for name in GROUPS) == 2 * 48
    for name in GROUPS:
        source = getattr(groups, name).source
        assert (source["method"], source["group"]) == ("variance", name)
        assert source["calibration"]["harmful"]["count"] == 4
        assert source["sizes"]["scu"] == 0.013


def test_locating_equals_scoring_and_grouping() -> None:
    model, sites = tiny_model(), find_sites(tiny_model(), ("mlp", "attention"))
    sides = {"harmful": as_prompts(HARMFUL), "benign": as_prompts(BENIGN)}
    fitter = VarianceFitter(model, sites, tokens="prompt")
    by_hand = group(score(fitter, model, tiny_tokenizer(), sides), sites, QUARTERS)
    groups = located(QUARTERS, sites="all")
    assert {name: getattr(groups, name).indices for name in GROUPS} == by_hand.indices
    assert len(groups.scu) == 24 + 2


@pytest.fixture(scope="module")
def divided() -> UnitGroups:
    """Of 96 units 5, 10, 19, and 62 complex ones."""
    return located(GroupSizes(0.05, 0.1, 0.2))


class TestGrammar:
    """Expressions and what they stand for."""

    @pytest.mark.parametrize("name", GROUPS)
    def test_a_name_is_the_whole_group(self, divided: UnitGroups, name: str) -> None:
        assert divided.resolve(name) == getattr(divided, name)

    def test_a_sum_is_the_union(self, divided: UnitGroups) -> None:
        found = divided.resolve("scu + RU")
        assert found.indices == (divided.scu | divided.ru).indices
        assert found.hash == (divided.scu | divided.ru).hash
        assert found.source["groups"] == "scu + RU"
        assert found.source["calibration"] == divided.scu.source["calibration"]

    @pytest.mark.parametrize("percent", [1, 2.5, 6, 50])
    def test_a_percentage_is_of_all_units_and_takes_the_first(
        self, divided: UnitGroups, percent: float
    ) -> None:
        found = divided.resolve(f"cu:{percent}%")
        assert len(found) == round(percent / 100 * 96)
        inside = max(
            float(divided.depth[s][u]) for s, units in found.indices.items() for u in units
        )
        left = divided.cu - found
        assert inside < min(
            float(divided.depth[s][u]) for s in left.indices for u in left.units_of(s)
        )
        assert (found & divided.cu).hash == found.hash  # digests belong to their units

    def test_the_papers_setting_adds_up(self, divided: UnitGroups) -> None:
        found = divided.resolve("scu+cu:6%")
        assert len(found) == 5 + 6
        assert found.indices == (divided.scu | divided.resolve("cu:6%")).indices
        found = divided.resolve("scu+cu")
        assert len(found) == 5 + 62

    def test_a_percentage_of_a_whole_group_is_the_group(self, divided: UnitGroups) -> None:
        assert divided.resolve("ru:20%").indices == divided.ru.indices

    def test_kinds_and_layers_each_give_their_share(self) -> None:
        layered = located(GroupSizes(0.1, 0.1, 0.1, scope="layer"), sites="all")
        found = layered.resolve("cu:25%")
        assert {name: len(units) for name, units in found.indices.items()} == {
            f"model.layers.{layer}.{kind}": count
            for layer in range(2)
            for kind, count in (("mlp", 12), ("self_attn", 1))
        }

    @pytest.mark.parametrize(
        ("text", "error", "words"),
        [
            ("sru", ConfigError, "'sru': there is no group 'sru'; there are scu, ucu, ru, cu"),
            ("", ConfigError, "there is no group ''"),
            ("scu+", ConfigError, "there is no group ''"),
            ("scu,cu", ConfigError, "no group 'scu,cu'.*joined by"),
            ("scu+cu:6", ConfigError, "'6' is not a percentage such as 6%"),
            ("cu:", ConfigError, "'' is not a percentage"),
            ("cu:-6%", ConfigError, "'-6%' is not a percentage"),
            ("cu:nan%", ConfigError, "'nan%' is not a percentage"),
            ("cu+cu:6%", ConfigError, "names 'cu' twice"),
            ("cu:0%", SelectionError, "asks for 0% of all units from 'cu', which holds 65%"),
            ("cu:66%", SelectionError, "asks for 66%.*no more than that"),
            ("scu:101%", SelectionError, "which holds 5% of them"),
            ("cu:0.1%", SelectionError, "0.1% of 96 units is less than one"),
        ],
    )
    def test_what_names_no_units_is_refused(
        self, divided: UnitGroups, text: str, error: type[SafeftError], words: str
    ) -> None:
        with pytest.raises(error, match=words) as caught:
            divided.resolve(text)
        assert str(caught.value).endswith(".")

    def test_what_a_file_may_give_instead_of_text(self) -> None:
        with pytest.raises(ConfigError, match="no group 'true'"):
            parsed(True)  # pyright: ignore[reportArgumentType]


class TestFolder:
    """What is written and read."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        located(QUARTERS).save_pretrained(tmp_path / "groups")
        return tmp_path / "groups"

    def test_what_is_saved_comes_back(self, folder: Path) -> None:
        groups, back = located(QUARTERS), UnitGroups.from_pretrained(folder)
        assert [getattr(back, name) for name in GROUPS] == [
            getattr(groups, name) for name in GROUPS
        ]
        assert back.sizes == QUARTERS
        assert all(torch.equal(back.depth[name], groups.depth[name]) for name in groups.depth)
        assert back.resolve("scu+cu:6%").hash == groups.resolve("scu+cu:6%").hash
        assert not list(folder.rglob("*.part"))

    def test_each_group_is_an_ordinary_set(self, folder: Path) -> None:
        for name in GROUPS:
            assert NeuronSet.from_pretrained(folder / name) == getattr(located(QUARTERS), name)

    def test_saving_again_replaces(self, folder: Path) -> None:
        located().save_pretrained(folder)
        assert UnitGroups.from_pretrained(folder).sizes == GroupSizes()

    def test_a_full_disk_leaves_what_was_there(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, written = safeft.files.write_whole, []

        def full(path: Path, content: Any) -> None:
            written.append(path)
            if len(written) > 9:
                raise ArtefactError("full")
            real(path, content)

        monkeypatch.setattr(safeft.files, "write_whole", full)
        for place in (folder, folder.parent / "new"):
            written.clear()
            with pytest.raises(ArtefactError, match="full"):
                located().save_pretrained(place)
        assert UnitGroups.from_pretrained(folder).sizes == QUARTERS
        assert not list(folder.rglob("*.part"))
        assert not (folder.parent / "new").exists()

    @pytest.mark.parametrize("place", [".", "scu"])
    def test_a_model_is_not_overwritten(self, place: str, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path / place)
        before = (tmp_path / place / "config.json").read_text()
        with pytest.raises(ArtefactError, match="holds a model or something else"):
            located(QUARTERS).save_pretrained(tmp_path)
        assert (tmp_path / place / "config.json").read_text() == before

    def test_a_set_does_not_overwrite_groups(self, folder: Path) -> None:
        with pytest.raises(ArtefactError, match="overwrite"):
            located(QUARTERS).scu.save_pretrained(folder)

    def test_groups_are_not_taken_for_a_set(self, folder: Path) -> None:
        with pytest.raises(ArtefactError, match="four groups.*freeze: scu.*budget: ru"):
            NeuronSet.from_pretrained(folder)
        with pytest.raises(ArtefactError, match="kind 'NeuronSet'.*--groups"):
            UnitGroups.from_pretrained(folder / "scu")

    def test_a_group_of_another_run_is_seen(self, folder: Path) -> None:
        located().save_pretrained(folder.parent / "other")
        shutil.rmtree(folder / "cu")
        shutil.copytree(folder.parent / "other/cu", folder / "cu")
        with pytest.raises(ArtefactError, match="not those that config.json names"):
            UnitGroups.from_pretrained(folder)

    def test_what_is_missing_truncated_or_edited_is_one_error(self, folder: Path) -> None:
        def edit(change: Any) -> None:
            config = json.loads((folder / "config.json").read_text())
            change(config)
            (folder / "config.json").write_text(json.dumps(config))

        for spoil in (
            lambda: shutil.rmtree(folder / "ru"),
            lambda: (folder / "model.safetensors").write_bytes(b"12345678"),
            lambda: (folder / "model.safetensors").unlink(),
            lambda: edit(lambda config: config.pop("sizes")),
            lambda: edit(lambda config: config["sizes"].update(scu=2)),
            lambda: edit(lambda config: config.update(safeft=99)),
            lambda: (folder / "config.json").write_text("{"),
        ):
            shutil.rmtree(folder)
            located(QUARTERS).save_pretrained(folder)
            spoil()
            with pytest.raises(ArtefactError):
                UnitGroups.from_pretrained(folder)


def test_examples_run() -> None:
    assert doctest.testmod(groups).failed == 0
