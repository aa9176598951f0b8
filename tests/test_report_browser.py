"""The audit's page in a real browser: it shows, asks nothing of anybody, and reads everywhere."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safeft.report.audit_page import audit_page
from tests import audits
from tests.browser import NAMES, Browser, find_browser

PAGES = {
    "long": lambda: audit_page(
        audits.audit(
            refusal=audits.side(400, 2),
            model={**audits.MODEL, "name_or_path": "/home/some/" + "very-long-" * 30},
        ),
        before=audits.distributed(),
    ),
    "withheld": lambda: audit_page(audits.distributed().withheld()),
    "nothing": lambda: audit_page(audits.nothing()),
}

# Every element that shows text of its own, with its colour and what lies behind it; text of a
# picture is painted with `fill`. Opacity and gradients are not used, and not read.
TEXTS = """
[...document.querySelectorAll('body *')].filter(element => {
  const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const box = element.getBoundingClientRect();
  return own && box.width && box.height && !element.closest('title, desc, style');
}).map(element => {
  const style = getComputedStyle(element);
  let behind = 'rgba(0, 0, 0, 0)', at = element;
  while (at && /rgba\\(.*, 0\\)/.test(behind)) {
    behind = getComputedStyle(at).backgroundColor;
    at = at.parentElement;
  }
  return {
    text: element.textContent.trim().slice(0, 40),
    ink: element.closest('svg') ? style.fill : style.color,
    behind: behind,
    picture: !!element.closest('svg'),
    height: element.getBoundingClientRect().height,
  };
})
"""

PICTURES = """
[...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height,
          label: svg.querySelector('title').textContent};
})
"""

# What sticks out of the window, except in a box that scrolls by itself.
OUTSIDE = """
[...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect(), window = document.documentElement.clientWidth;
  return box.width && box.right > window + 1 && !element.closest('.scroll');
}).map(element => element.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        reason = f"no browser on this machine (none of {', '.join(NAMES)})"
        if os.environ.get("SAFEFT_BROWSER_REQUIRED") == "1":
            pytest.fail(f"SAFEFT_BROWSER_REQUIRED=1, and {reason}: apt-get install chromium")
        pytest.skip(f"{reason}; apt-get install chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for name, made in PAGES.items():
        (folder / f"{name}.html").write_text(made())
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", list(PAGES))
def test_the_page_reads(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    browser.open(pages[name], width, scheme)
    assert browser.requests() == []
    assert browser.errors() == []
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(OUTSIDE) == []
    texts = browser.value(TEXTS)
    assert len(texts) > 30
    assert any(each["picture"] for each in texts) == (name != "nothing")
    faint = [each for each in texts if contrast(each["ink"], each["behind"]) < 4.5]
    assert faint == []
    tiny = [each["text"] for each in texts if each["picture"] and each["height"] < 9]
    assert tiny == []
    dark = sum(channels(texts[0]["behind"])) < 3 * 128
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_picture_is_painted(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    browser.open(pages["long"], 360, scheme)
    found = browser.value(PICTURES)
    assert len(found) == 2 * 8 + 1
    shot = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    for box in found:
        assert box["width"] > 120, box
        assert box["height"] > 90, box
        x, y, right, bottom = (
            round(box["x"]),
            round(box["y"]),
            round(box["x"] + box["width"]),
            round(box["y"] + box["height"]),
        )
        colours = shot.crop((x, y, right, bottom)).getcolors(1 << 24)
        assert colours is not None
        shares = sorted((count for count, _ in colours), reverse=True)
        # Paper, ink and at least one line: a blank box has one colour.
        assert len(shares) > 20, box
        assert sum(shares[1:]) > 0.02 * sum(shares), box


PLANTED = {
    "an image": '<img src="http://example.invalid/pixel.png">',
    "a style sheet": '<link rel="stylesheet" href="http://example.invalid/style.css">',
    "a font": "<style>@font-face{font-family:x;src:url(http://example.invalid/f.woff2)}"
    "p{font-family:x}</style>",
}


@pytest.mark.parametrize("guarded", [True, False], ids=["under its policy", "without a policy"])
@pytest.mark.parametrize("planted", PLANTED.values(), ids=list(PLANTED))
def test_a_planted_request_would_be_seen(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, planted: str, guarded: bool
) -> None:
    text = pages["nothing"].read_text().replace("</main>", f"{planted}</main>")
    if not guarded:
        text = re.sub(r"<meta http-equiv=.*?>", "", text)
    page = tmp_path / "planted.html"
    page.write_text(text)
    browser.open(page, 360, "light")
    seen = [*browser.requests(), *browser.errors()]
    assert any("example.invalid" in each for each in seen)
    # The page's own policy keeps the browser from asking at all.
    failed = [e["params"] for e in browser.events if e["method"] == "Network.loadingFailed"]
    assert all((each.get("blockedReason") == "csp") == guarded for each in failed)


def test_other_faults_would_be_seen(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    faults = (
        '<p style="width: 900px">wide</p><p style="color: #8d8d8d">faint</p>'
        '<svg viewBox="0 0 9 9" width="300" height="300"><title>blank</title>'
        '<text y="5" style="font-size: .2px; fill: #eee">x</text></svg>'
    )
    page = tmp_path / "faulty.html"
    text = pages["nothing"].read_text().replace("</main>", f"{faults}</main>")
    page.write_text(re.sub(r"<meta http-equiv=.*?>", "<script>nonesuch()</script>", text))
    browser.open(page, 360, "light")
    assert any("nonesuch" in each for each in browser.errors())
    assert browser.value("document.scripts.length") == 1
    assert browser.value("document.documentElement.scrollWidth") > 360
    assert any("wide" in each for each in browser.value(OUTSIDE))
    texts: list[dict[str, Any]] = browser.value(TEXTS)
    faint = {each["text"] for each in texts if contrast(each["ink"], each["behind"]) < 4.5}
    assert faint == {"faint", "x"}
    assert [each["text"] for each in texts if each["picture"] and each["height"] < 9] == ["x"]


def channels(colour: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", colour)[:3]]


def contrast(one: str, other: str) -> float:
    """Contrast ratio, 1 to 21 (WCAG 2.2; 4.5 is asked of text)."""

    def luminance(colour: str) -> float:
        shares = [value / 255 for value in channels(colour)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
