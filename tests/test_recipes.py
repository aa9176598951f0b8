"""Each recipe runs end to end on its smoke configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safeft.locators import UnitGroups

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    run(folder, str(ROOT / "recipes/smoke_data.py"))
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("recipe", ["freeze_sft", "freeze_dpo"])
def test_recipe(recipe: str, workplace: Path) -> None:
    script, config = ROOT / f"recipes/{recipe}.py", ROOT / f"configs/{recipe}/smoke.yaml"
    assert len(script.read_text().splitlines()) <= 150
    shown = run(workplace, str(script), "--config", str(config))
    assert "EXACT" in shown
    certificate = json.loads(
        (workplace / f"runs/smoke/{recipe}/safeft_certificate.json").read_text()
    )
    assert certificate["exact"]
    assert certificate["neurons"]["count"] == round(0.4 * 5 * 512)
    if recipe == "freeze_sft":
        evaluation = json.loads((workplace / "runs/smoke/freeze_sft/evaluation.json").read_text())
        assert evaluation["before"]["refusal"]["value"] >= 0.8
        assert evaluation["after"]["refusal"]["total"] == 16


def test_keep_refusals(workplace: Path) -> None:
    script = ROOT / "recipes/keep_refusals.py"
    assert len(script.read_text().splitlines()) <= 150
    config = ROOT / "configs/keep_refusals/smoke.yaml"
    shown = run(workplace, str(script), "--config", str(config))
    assert shown.count("HELD: input directions of 36 layers") == 2
    out = workplace / "runs/smoke/keep_refusals"
    hashes = set()
    for label in ("protected", "random"):
        certificate = json.loads((out / label / "safeft_certificate.json").read_text())
        assert certificate["exact"]
        assert max(held["relative_change"] for held in certificate["directions"]) < 1e-6
        hashes.add(certificate["subspace"]["sha256"])
    assert len(hashes) == 2
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert set(evaluation) == {"before", "protected", "random"}
    assert evaluation["protected"]["refusal"]["total"] == 16


def test_ssah_study(workplace: Path) -> None:
    script, config = ROOT / "recipes/ssah_study.py", ROOT / "configs/ssah_study/smoke.yaml"
    assert len(script.read_text().splitlines()) <= 150
    run(workplace, str(script), "--config", str(config))
    place = workplace / "runs/smoke/ssah_study"
    study = json.loads((place / "study.json").read_text())
    main, swept = study["pruned"][:4], study["pruned"][4:]
    assert [row["group"] for row in main] == ["scu", "ucu", "ru", "cu"]
    assert sum(row["count"] for row in main) == sum(study["units"].values()) == 5 * 512
    assert [row["count"] for row in swept] == [128]
    for row in study["pruned"]:
        assert sum(row["layers"].values()) == row["count"]
        assert len(row["random"]["refusal"]) == 2
        assert row["located"]["refusal"]["total"] == 32
    for scu in (main[0], swept[0]):
        assert scu["located"]["refusal"]["value"] < min(scu["random"]["refusal"])
        assert scu["p_lower"]["refusal"] == pytest.approx(1 / 3)
    for kinds in study["stability"].values():
        assert set(kinds) == {"halves", "other harmful prompts", "other benign prompts"}
        assert len(kinds["halves"]["jaccard"]) == 2
    assert (place / "study.svg").read_text().startswith("<svg")
    groups = UnitGroups.from_pretrained(place / "groups")
    assert [len(getattr(groups, row["group"])) for row in main] == [row["count"] for row in main]


def test_precise_shield(workplace: Path) -> None:
    script = ROOT / "recipes/precise_shield.py"
    config = ("--config", str(ROOT / "configs/precise_shield/smoke.yaml"))
    assert len(script.read_text().splitlines()) <= 150
    shown = run(workplace, str(script), *config)
    assert "shared by all 2 languages" in shown
    assert "in the placebo" in shown
    assert "EXACT: everything but" in shown
    assert "polite/text: harmful refused" in shown
    out = workplace / "runs/smoke/precise_shield"
    found = json.loads((out / "transfer.json").read_text())
    assert found["plain/text"]["before"]["refusal"]["total"] == 16
    figures = json.loads((out / "grid/overlap.json").read_text())
    assert all(0 < count < round(0.1 * 512) * 5 for count in figures["cells"].values())
    certificate = json.loads((out / "safeft_certificate.json").read_text())
    assert certificate["neurons"]["count"] == figures["shared"]["shared"]
    run(workplace, str(script), *config, "--control", "true", "--output_dir", "runs/control")
    other = json.loads((workplace / "runs/control/safeft_certificate.json").read_text())
    assert other["neurons"]["count"] == certificate["neurons"]["count"]
    assert other["neurons"]["sha256"] != certificate["neurons"]["sha256"]


def test_detox(workplace: Path) -> None:
    script = ROOT / "recipes/detox.py"
    assert len(script.read_text().splitlines()) <= 150
    shown = run(workplace, str(script), "--config", str(ROOT / "configs/detox/smoke.yaml"))
    assert "EXACT" in shown
    out = workplace / "runs/smoke/detox"
    arms = {row["arm"]: row for row in json.loads((out / "detox.json").read_text())["arms"]}
    whole, weak, strong = (arms[n]["toxicity"]["value"] for n in ("as it is", "aura 1", "aura 2"))
    assert whole > 0.5
    assert strong <= weak < whole
    assert arms["random as aura 2"]["toxicity"]["value"] > strong
    assert arms["as it is"]["mentions"]["cooks"]["total"] == 2
    assert (out / "model/safeft_fold_certificate.json").is_file()


def test_harden(workplace: Path) -> None:
    script, config = ROOT / "recipes/harden.py", ROOT / "configs/harden/smoke.yaml"
    assert len(script.read_text().splitlines()) <= 150
    shown = run(workplace, str(script), "--config", str(config))
    assert "EXACT" in shown
    out = workplace / "runs/smoke/harden"
    found = json.loads((out / "harden.json").read_text())
    assert list(found) == ["before", "hardened", "tuned"]
    assert all(found[label]["verdict"] for label in ("before", "hardened"))
    assert all(0.8 <= found[label]["intact"] <= 1 for label in ("before", "hardened"))
    assert all(len(row["random_silenced"]) == 2 for row in found.values())
    certificate = json.loads((out / "tuned/safeft_certificate.json").read_text())
    assert certificate["exact"]
    assert certificate["neurons"]["count"] == round(0.4 * 5 * 512)
    weights = [(out / label / "model.safetensors").read_bytes() for label in ("hardened", "tuned")]
    assert weights[0] != weights[1]


def test_guard(workplace: Path) -> None:
    script, config = ROOT / "recipes/guard.py", ROOT / "configs/guard/smoke.yaml"
    assert len(script.read_text().splitlines()) <= 150
    shown = run(workplace, str(script), "--config", str(config))
    out = workplace / "runs/smoke/guard"
    assert "guard_test: macro-F1" in shown
    assert f"guard serve --guard {Path('runs/smoke/guard/guard')}" in shown
    found = json.loads((out / "guard.json").read_text())
    assert min(each["auroc"] for each in found["sets"]) > 0.9
    assert "<svg" in (out / "guard.html").read_text()
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 320
    blocked = {
        side: sum(row["action"] == "block" for row in answers if row["harmful"] is side)
        for side in (True, False)
    }
    assert blocked[True] > 2 * blocked[False]
    assert all((row["text"] == "I can't help with that.") == (row["action"] == "block")
               for row in answers)  # fmt: skip
    logged = (out / "audit.jsonl").read_text()
    assert len(logged.splitlines()) == len(answers)
    assert answers[0]["asked"] not in logged
