"""`safeft report` on folders as trainings, `safeft evaluate` and a crash leave them."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safeft.commands import main
from safeft.freeze.certificate import CERTIFICATE_NAME
from safeft.monitor.record import MONITOR_NAME
from safeft.report.runs import Finished, read_run, read_runs, rows_of
from safeft.report.runs_page import picture
from tests.freezing import freeze
from tests.models import tiny_tokenizer
from tests.monitoring import PROMPTS, monitor, refusing, trained


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trainings: watched and frozen, watched and rolled back, and plain with checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    evals: Any = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    model = refusing()
    slow = {"learning_rate": 1e-3, "max_steps": 6}
    trained(model, folder / "frozen", [monitor(every=1), freeze(model)], **evals, **slow)
    back = monitor(every=1, stop_below=0.9, roll_back=True)
    trained(refusing(), folder / "back", [back], **evals, learning_rate=3e-3, max_steps=20)
    trained(refusing(), folder / "plain", [], save_strategy="steps", save_steps=2)
    return folder


def rate(count: int, total: int = 10) -> dict[str, Any]:
    return {"value": count / total, "count": count, "total": total, "low": 0.1, "high": 0.95}


def evaluation(**changed: Any) -> str:
    """As `safeft evaluate --output` writes it."""
    found = {"model": "tuned", "refusal": rate(8), "over_refusal": rate(2), "domain_loss": 1.5,
             "domain_accuracy": rate(7), "drift": None, "judge": "prefix", "settings": {},
             "samples": []}  # fmt: skip
    return json.dumps({**found, **changed})


def report(*words: Any) -> int:
    return main(["report", *map(str, words)])


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page_json_and_table_of_runs_of_all_kinds(place: Path, tmp_path: Path, capsys) -> None:
    (place / "frozen" / "evaluation.json").write_text(evaluation())
    out = tmp_path / "out" / "report.html"
    assert report(place / "frozen", place / "back", place / "plain", "--output", out) == 0
    page = Page(out)
    assert page.tags.count("svg") == 1
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in out.read_text()
    rows = {row["run"]: row for row in json.loads(out.with_suffix(".json").read_text())["runs"]}
    assert list(rows) == ["frozen", "back", "plain"]
    said = json.loads((place / "frozen" / MONITOR_NAME).read_text())
    assert rows["frozen"]["kept"] == said["history"][-1]["kept"]
    assert rows["frozen"]["exact"] is True
    assert rows["frozen"]["frozen_share"] > 0
    assert rows["frozen"]["steps"] == 6
    assert rows["plain"]["start"] is rows["plain"]["kept"] is rows["plain"]["exact"] is None
    assert rows["plain"]["loss"] > 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["frozen", "back", "plain"]
    assert lines[1].endswith("exact")
    stopped = rows["back"]["stopped_at"]
    words = f"back fell below its limit at step {stopped}; rolled back to step {stopped - 1}."
    assert words in shown
    assert words in out.read_text()
    assert "0.80 [0.10, 0.95]" in out.read_text()


def test_curves_are_looks_against_the_loss_of_their_step(place: Path) -> None:
    frozen, back, plain = read_runs([place / name for name in ("frozen", "back", "plain")])
    said = json.loads((place / "frozen" / MONITOR_NAME).read_text())
    losses = {row["step"]: row["eval_loss"] for row in said["losses"] if "eval_loss" in row}
    kept = {row["step"]: row["kept"] for row in said["history"]}
    rows = rows_of([frozen, back, plain])
    curve = [(p["step"], p["domain_loss"], p["refusal"]) for p in rows[0]["curve"]]
    assert curve == [(step, losses[step], kept[step]) for step in range(7)]
    assert plain.curve("eval_loss") == ()
    # What was rolled back is that look's, not the last one's.
    step = rows[1]["rolled_back_to"]
    assert rows[1]["end"]["step"] == step
    assert rows[1]["kept"] == pytest.approx(back.kept(back.looks[step]))
    assert rows[1]["eval_loss"] == back.loss_at(step, "eval_loss")


def test_runs_are_compared_where_the_slower_one_came_to() -> None:
    def run(name: str, losses: list[float], shares: list[float]) -> Finished:
        from safeft.monitor.look import Look

        looks = tuple(Look(10 * n, share, 0.0) for n, share in enumerate(shares))
        rows = tuple({"step": 10.0 * n, "eval_loss": loss} for n, loss in enumerate(losses))
        return Finished(name, looks, looks[-1], losses=rows)

    quick, slow = run("quick", [4, 2, 1], [1, 0.6, 0.2]), run("slow", [4, 3, 1.5], [0.8, 0.8, 0.8])
    first, second = rows_of([quick, slow])
    assert first["equal_loss"] == second["equal_loss"] == 1.5
    assert first["kept_at_equal_loss"] == pytest.approx(0.4)
    assert second["kept_at_equal_loss"] == pytest.approx(1.0)
    assert rows_of([quick])[0]["kept_at_equal_loss"] is None


def test_losses_lie_on_straight_lines_within_what_was_logged() -> None:
    rows = ({"step": 2.0, "loss": 4.0}, {"step": 3.0, "eval_loss": 9.0}, {"step": 6.0, "loss": 2.0})
    run = Finished("x", losses=rows)
    found = [run.loss_at(step, "loss") for step in (0, 2, 4, 6, 7)]
    assert found == [None, 4.0, 3.0, 2.0, None]
    assert [run.loss_at(step, "eval_loss") for step in (2, 3)] == [None, 9.0]


def test_a_trainers_log_in_the_newest_checkpoint_is_enough(place: Path, tmp_path: Path) -> None:
    run = read_run(place / "plain", "plain")
    assert [row["step"] for row in run.losses] == [1, 2, 3, 4]
    shutil.copytree(place / "plain" / "checkpoint-2", tmp_path / "one")
    assert read_run(tmp_path / "one", "one").steps == 2
    assert picture([run]) == ""
    assert report(place / "plain", "--output", tmp_path / "r.html") == 0
    assert "Nothing was measured that could be drawn" in (tmp_path / "r.html").read_text()


def test_the_picture_shows_what_there_is(place: Path, tmp_path: Path) -> None:
    def titles(*folders: Path) -> list[str]:
        text = picture(read_runs(folders))
        names = ("at the end of training", "on the way", "over the steps")
        return [name for name in names if name in text]

    watched = shutil.copytree(place / "back", tmp_path / "back")
    judged = tmp_path / "judged"
    judged.mkdir()
    (judged / "any name.json").write_text(evaluation(domain_accuracy=None))
    assert titles(watched) == ["on the way", "over the steps"]
    assert titles(judged) == ["at the end of training"]
    assert "domain loss" in picture(read_runs([judged]))
    (watched / "e.json").write_text(evaluation())
    (judged / "e.json").write_text(evaluation())
    assert titles(watched, judged) == ["at the end of training", "on the way", "over the steps"]
    assert "domain loss" in picture(read_runs([watched, judged]))  # What all of them have.
    (judged / "any name.json").unlink()
    assert "domain accuracy" in picture(read_runs([watched, judged]))
    assert picture(read_runs([watched, judged])) == picture(read_runs([watched, judged]))


def test_its_own_pages_beside_the_runs_are_no_runs(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "back", tmp_path / "run")
    (run / "evaluation.json").write_text(evaluation())
    for _ in range(2):
        assert report(run, "--output", run / "report.html") == 0
    assert len(json.loads((run / "report.json").read_text())["runs"][0]["evaluations"]) == 1


def test_curves_on_unlike_prompts_are_said_to_be_so(place: Path, tmp_path: Path) -> None:
    other = monitor()
    other._prompts = other._prompts[:3]
    trained(refusing(), tmp_path / "other", [other])
    assert report(place / "back", tmp_path / "other", "--output", tmp_path / "r.html") == 0
    words = "watched on unlike prompts"
    assert words in (tmp_path / "r.html").read_text()
    assert report(place / "back", place / "frozen", "--output", tmp_path / "r.html") == 0
    assert words not in (tmp_path / "r.html").read_text()


def test_like_named_folders_are_told_apart(place: Path, tmp_path: Path) -> None:
    for seed in ("a", "b"):
        shutil.copytree(place / "back", tmp_path / seed / "run")
    assert [run.name for run in read_runs([tmp_path / "a/run", tmp_path / "b/run"])] == [
        "a/run",
        "b/run",
    ]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (None, "", ["holds none of what a run leaves", "monitor", "safeft evaluate --output"]),
        ("", "", ["There is no folder", "output_dir"]),
        (MONITOR_NAME, '{"safeft_monitor": 1', ["no monitor's file", MONITOR_NAME]),
        (MONITOR_NAME, '{"safeft_monitor": 9}', ["schema 9, not 1"]),
        (MONITOR_NAME, '{"safeft_monitor": 1, "history": []}', ["KeyError"]),
        (CERTIFICATE_NAME, '{"exact": true', [CERTIFICATE_NAME, "cannot be read", "Restore it"]),
        (CERTIFICATE_NAME, "[]", [CERTIFICATE_NAME, "cannot be read"]),
        ("trainer_state.json", '{"log_history": [{"loss": "x"}]}', ["trainer_state.json"]),
        ("e.json", evaluation()[:-9], ["e.json", "truncated"]),
        ("e.json", evaluation(refusal={"value": 1}), ["e.json", "KeyError"]),
        ("config.json", "{}", ["holds none"]),
    ],
)
def test_folders_without_results_are_one_clear_error(
    file: str | None, content: str, words: list[str], tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    if file != "":
        run.mkdir()
    if file:
        (run / file).write_text(content)
    assert report(run, "--output", tmp_path / "report.html") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in [*words, "run"]), said
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "report.json").exists()


def test_words_that_are_no_runs_or_pages(place: Path, tmp_path: Path, capsys) -> None:
    assert report(place / "back", "--output", tmp_path / "x.pdf") == 2
    assert "x.pdf': the page is HTML" in capsys.readouterr().err
    assert report(place / "back", "--outptu", "x") == 2
    assert "did you mean 'output'" in capsys.readouterr().err
    assert report(place / "back", place / "back" / ".." / "back", "--output", tmp_path / "x.html")
    assert "name the same folder twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report()


def test_a_command_that_evaluates_writes_what_the_report_reads(
    place: Path, tmp_path: Path, capsys
) -> None:
    """The real `safeft evaluate`, so that the two cannot drift apart."""
    model, run = refusing(), tmp_path / "run"
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "harmful.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "domain.json").write_text(json.dumps([{"prompt": "a", "response": "b"}]))
    given = ["--model_name_or_path", tmp_path / "model", "--harmful", tmp_path / "harmful.txt"]
    more = ["--domain", tmp_path / "domain.json", "--max_new_tokens", 4, "--output", run / "e.json"]
    assert main(["evaluate", *map(str, [*given, *more])]) == 0
    (found,) = read_run(run, "run").evaluations
    assert found.refusal is not None
    assert found.refusal.total == len(PROMPTS)
    assert found.domain_loss is not None
    assert picture([read_run(run, "run")])
