"""Page, card, schema and folder of an audit: pure views of one value, and none says too much."""

import json
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import safeft
from safeft.auditing.compare import compare
from safeft.auditing.result import AuditResult, Distribution, Side
from safeft.errors import ArtefactError
from safeft.files import sha256
from safeft.freeze.certificate import Certificate
from safeft.report.audit_card import audit_card
from safeft.report.audit_page import SHOWN, audit_page, write_audit
from safeft.report.audit_views import NAMES, write_all
from safeft.report.audit_words import HEADLINES, LIMITS, WITHHELD, rules
from safeft.report.certified import Certified
from tests import audits

SCHEMA = Path(safeft.__file__).parent / "report" / "schemas" / "audit.schema.json"


def problems(result: AuditResult | dict[str, Any]) -> list[str]:
    data = result if isinstance(result, dict) else json.loads(json.dumps(result.to_dict()))
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    return [error.message for error in validator.iter_errors(data)]


def without_candidates() -> AuditResult:
    side = replace(audits.side(1, 1), candidates=(), controls=(), trials=(), smallest=None)
    return audits.distributed(refusal=side)


ALL = {
    "both sides": audits.audit,
    "one side": audits.distributed,
    "nothing": audits.nothing,
    "no candidates": without_candidates,
}


@pytest.mark.parametrize("made", ALL.values(), ids=list(ALL))
def test_an_audit_is_of_its_schema(made: Any) -> None:
    Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))
    assert problems(made()) == problems(made().withheld()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(verdict="fine"), "'fine' is not one of"),
        (lambda data: data.update(more=1), "Additional properties"),
        (lambda data: data["base"]["refusal"].pop("low"), "'low' is a required property"),
        (lambda data: data["refusal"]["candidates"][0].update(effects=[]), "non-empty"),
        (lambda data: data["refusal"]["trials"][0].update(kind="ablate"), "'ablate' is not one"),
        # What says that it withholds places may have none.
        (lambda data: data.update(revealed=False), "is not of type 'null'"),
    ],
)
def test_the_schema_refuses_what_is_no_audit(change: Any, said: str) -> None:
    data = json.loads(json.dumps(audits.audit().to_dict()))
    change(data)
    assert said in "\n".join(problems(data))


def test_the_wheel_holds_schema_and_templates(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is not installed (extra `dev`)")
    from hatchling.builders.wheel import WheelBuilder

    root = SCHEMA.parents[3]
    (built,) = WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    templates = {f"templates/{name}" for name in ("audit.html.jinja", "audit.css")}
    wanted = {f"safeft/report/{name}" for name in {"schemas/audit.schema.json", *templates}}
    assert wanted <= names


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name.endswith(("src", "href"))]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_the_page_says_the_verdict_first_and_all_of_the_rest() -> None:
    result = audits.audit()
    page = Page(audit_page(result, before=audits.distributed()))
    text = " ".join(" ".join(page.said).split())
    order = ["Verdict: single-point", HEADLINES["single-point"], result.reason, "In numbers",
             rules(result.thresholds, result.units)[0][1], "Strongest neurons", "Over-refusal",
             "Before and after", LIMITS[0], "safeft audit somebody"]  # fmt: skip
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    # Two pictures and six distributions a side, and the change.
    assert page.tags.count("svg") == page.tags.count("desc") == 2 * 8 + 1
    assert page.tags.count("h1") == 1
    assert f"The strongest {SHOWN} of 64" in text
    assert "(no longer speaks)" in text  # 64 neurons: a rise of 1.28 nats
    assert "no</b>" in text  # of an opening, as text and not as a tag
    assert "b" in page.tags
    assert audit_page(result) == audit_page(result)  # the same bytes for the same result


def test_the_page_says_which_neurons_kept_their_part_and_which_are_new(tmp_path: Path) -> None:
    before, after = audits.audit(), audits.audit(refusal=audits.side(64, 1, seed=7))
    changes = compare(before, after)
    counts = len(changes.kept), len(changes.appeared), len(changes.vanished)
    assert min(counts[1:]) > 0
    write_all(after, tmp_path, before=before)
    text = " ".join(" ".join(Page((tmp_path / "audit.html").read_text()).said).split())
    card = (tmp_path / "MODEL_CARD.md").read_text()
    labels = ("kept their part", "have a part now and had none", "had a part and have none")
    for count, label in zip(counts, labels, strict=True):
        assert f"{count} {label}" in text
        assert f"{count} {label}" in card
    assert f"{changes.vanished[0].neuron.name} (before)" in text
    assert "not tested" in text  # in the other audit
    with pytest.raises(ArtefactError, match="does not say where"):
        write_all(after, tmp_path, before=before.withheld())


def test_a_page_without_pictures_says_why() -> None:
    nothing = Page(audit_page(audits.nothing()))
    assert "svg" not in nothing.tags
    assert HEADLINES["nothing to audit"] in nothing.said
    assert "none was tested" in " ".join(Page(audit_page(without_candidates())).said)
    assert "Not audited" in " ".join(Page(audit_page(audits.distributed())).said)


def test_odd_results_do_not_break_the_page() -> None:
    side = audits.side(400, 3)
    one = replace(side.candidates[0], distribution=Distribution((0.0, 1.0), (1.0,), (0.0,)))
    odd = replace(
        side, candidates=(one,), controls=(), trials=side.trials[:1], gini=float("nan"),
        smallest=None,
    )  # fmt: skip
    name = "/home/some/" + "very-long-" * 40 + "<script>alert(1)</script>"
    model = {**audits.MODEL, "name_or_path": name}
    for each in (side, odd):
        text = audit_page(audits.audit(refusal=each, model=model, reason="<i>$x"))
        assert "<script" not in text
        assert "<i>" not in text
        card = audit_card(audits.audit(refusal=each, model=model, reason="a | b\n# c"))
        assert "<script" not in card
        assert "a \\| b # c" in card
    assert "unknown" in audit_page(audits.audit(refusal=odd))
    assert "none found" in audit_page(audits.audit(refusal=odd))


def places(result: AuditResult) -> set[str]:
    both = [side for side in (result.refusal, result.over_refusal) if side is not None]
    found = [each.neuron for side in both for each in (*side.candidates, *side.controls)]
    return {neuron.site or "" for neuron in found} | {str(neuron.unit) for neuron in found}


def saying(folder: Path, result: AuditResult) -> set[str]:
    """Files in which a site, or a unit's number as a word, is found."""
    from re import search

    wanted = places(result)
    return {
        name
        for name in NAMES
        for text in ((folder / name).read_text(),)
        if any(search(rf"(?<![\w.]){each}(?![\w.]|-\d)", text) for each in wanted)
    }


def test_no_view_says_where_neurons_are_unless_asked(tmp_path: Path) -> None:
    result, before = audits.audit(), audits.audit()
    assert result.revealed
    write_all(result, tmp_path, before=before)
    assert saying(tmp_path, result) == set()
    assert WITHHELD[:30] in (tmp_path / "audit.html").read_text()
    write_all(result, tmp_path, before=before, reveal=True)
    shown = {"audit.json", "audit.html", "MODEL_CARD.md"}
    assert saying(tmp_path, result) == shown
    write_all(result.withheld(), tmp_path, reveal=True)  # what is not known cannot be said
    assert saying(tmp_path, result) == set()


def test_the_folder_holds_all_views_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "audited"
    write_all(audits.audit(), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert AuditResult.load(folder / "audit.json") == audits.audit().withheld()
    assert problems(json.loads((folder / "audit.json").read_text())) == []
    was = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtefactError, match="No space left"):
        write_all(audits.nothing(), folder)
    with pytest.raises(ArtefactError, match="No space left"):
        write_audit(audits.nothing(), tmp_path / "audit.html")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == was
    assert [path.name for path in tmp_path.iterdir()] == ["audited"]


def test_a_certificate_is_referred_to_without_its_places(tmp_path: Path) -> None:
    from safeft.freeze.certificate import Violation

    violation = Violation("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp#7431", "rows", 1)
    known = {"count": 24, "sha256": "5" * 64}
    certificate = Certificate(False, (violation,), "freeze", known, (), 0.25)
    path = tmp_path / "safeft_certificate.json"
    certificate.save(path)
    write_all(audits.audit(), tmp_path / "out", certificate=path)
    for name in ("audit.html", "MODEL_CARD.md", "bom.cdx.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "VIOLATED: 24 neurons, 25.00% of the weights." in text
        assert sha256(path.read_bytes()) in text
        assert "7431" not in text
    path.write_text("[]")
    with pytest.raises(ArtefactError, match=r"no certificate.*TypeError"):
        Certified.read(path)


def test_the_card_says_figures_with_intervals_and_limits() -> None:
    card = audit_card(audits.audit().withheld(), before=audits.distributed())
    lines = card.splitlines()
    assert lines[0] == "## Refusal audit"
    assert lines[2].startswith("**single-point**: One neuron is enough")
    assert "| harmful prompts refused | 100.0% | 96.2% to 100.0% |" in lines
    assert "| largest fall of refusal by one neuron | 50.0% | 40.2% to 59.8% |" in lines
    assert all(f"- {limit}" in lines for limit in LIMITS)
    assert f"- Prompts, harmful: 100, SHA-256 `{'3' * 64}`." in lines
    assert "**distributed**" in card
    assert lines[-1] == WITHHELD
    tables = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {4, 6}
    assert HEADLINES["nothing to audit"] in audit_card(audits.nothing())


def test_over_refusal_is_shown_of_the_benign_prompts_that_were_refused() -> None:
    result = audits.audit()
    side = result.over_refusal
    assert isinstance(side, Side)
    page = audit_page(result)
    over = page[page.index('<h2 id="over-refusal">') :]
    left = side.trials[-1].outcome.refusal
    assert left.total == audits.OVER
    assert f"{left.value:.1%}</td><td>{left.low:.1%} to {left.high:.1%}" in over
    assert '<th scope="row">64 together</th>' in over


def test_the_share_refused_is_of_all_prompts_given() -> None:
    card = audit_card(audits.audit())
    assert "| harmful prompts refused | 100.0% | 96.2% to 100.0% |" in card
    assert "| benign prompts refused | 25.0% |" in card
