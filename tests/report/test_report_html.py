from __future__ import annotations

import base64
import math
import sys
from html.parser import HTMLParser

import pytest

from corank.errors import CorankError
from corank.report import Report, numbers, render_html, write_html

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Collects text, addresses and tables, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if "style" not in self.open and "script" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def report(make_report):
    return make_report(layers=8)


@pytest.fixture(scope="module")
def text(report):
    return render_html(report)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_it_fetches_nothing(text, page):
    assert page.addresses and all(a.startswith("data:image/svg+xml;base64,") for a in page.addresses)
    assert "link" not in page.tags and "iframe" not in page.tags
    outside = [word for word in ("@import", "url(", "fetch(", "XMLHttpRequest") if word in text]
    assert outside == []
    assert "prefers-color-scheme: dark" in text and "charset='utf-8'" in text


def test_every_plot_is_there_twice_and_is_an_svg(page):
    assert page.tags.count("img") == page.tags.count("source") == 3
    for address in page.addresses:
        assert b"<svg" in base64.b64decode(address.partition(",")[2], validate=True)[:1000]


def test_it_says_what_the_report_says(report, page):
    moved = " → ".join(numbers.count(report.accounting["sites"][which]) for which in ("dense", "compressed"))
    shown = (numbers.number(report.perplexity("wikitext2")), numbers.percent(report.kept()), moved)
    for words in (report.model, *shown, "1.615 GiB", "q, o: 288", *report.warnings):
        assert words in page.text
    by_name = {row[0]: row for row in page.rows if row}
    site = next(s for s in report.sites if s["kind"] != "dense")
    assert by_name[site["name"]][1:5] == ["low_rank", "576×576", str(site["rank"]), "576"]
    assert sum(row[0].startswith("model.layers.") for row in page.rows if row) == 56
    assert "9f9f9f" in page.text and "2.13.0" in page.text


def test_nothing_in_the_report_is_markup(make_report, page):
    assert "<b>art</b>" in page.text  # the sample, as text
    evil = "<script>alert('x')</script>"
    sites = [dict(s, name=evil, role=evil) for s in make_report(layers=1).sites[:1]]
    hostile = make_report(
        model=evil, method=evil, warnings=[evil], sites=sites, generation={evil: evil}, budget={"keep": evil}
    )
    assert Page(render_html(hostile)).tags.count("script") == 1


def test_several_reports_are_compared_first(reports):
    text = render_html(reports)
    page = Page(text)
    assert page.rows[0][0] == "Method" and page.rows[1][0] == "dense"
    assert [row[0] for row in page.rows[2:11]] == ["svd"] * 3 + ["asvd"] * 3 + ["svd-llm"] * 3
    assert page.tags.count("img") == 1 and len(text) < 2_000_000
    assert page.text.count("What was done") == 9


def test_a_report_with_next_to_nothing(tmp_path):
    report = Report("m", "svd", evaluation={"dense": {"w": 3.0}, "compressed": {"w": math.inf}})
    path = write_html(report, tmp_path / "page.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "inf" in page.text and "img" not in page.tags
    with pytest.raises(CorankError, match="no report"):
        render_html([])


def test_without_matplotlib_there_is_a_page_that_says_so(report, reports, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for shown in (report, reports):
        page = Page(render_html(shown))
        assert "img" not in page.tags and "pip install corank[plot]" in page.text and "q, o: 288" in page.text
