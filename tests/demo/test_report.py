import dataclasses
from html.parser import HTMLParser

from fastalign.demo.language import split_sentences
from fastalign.demo.report import SHOWN_QUESTIONS, write_report
from fastalign.demo.summary import COLUMNS

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Checks that elements nest, and keeps what was seen."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(result):
    reader = Reader()
    reader.feed(result.report.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_is_one_well_formed_file_that_needs_no_other(tiny_demo):
    reader = read(tiny_demo[0])
    assert not {tag for tag, _ in reader.elements} & {"script", "link", "iframe", "img"}
    for _, attributes in reader.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert "@import" not in reader.text


def test_shows_the_table_and_the_first_answers(tiny_demo):
    result, _ = tiny_demo
    text = " ".join(read(result).text.split())
    for column in COLUMNS:
        assert column.title in text
    for name, score in result.scores.items():
        assert f"{score.gold.mean:.3f} ± {score.gold.stderr:.3f}" in text
        for answer in result.answers[name].texts[:SHOWN_QUESTIONS]:
            assert " ".join(split_sentences(answer)) in text
    assert "fastalign dpo" in text
    assert f"length_alpha: {result.settings.alpha}" in text


def test_what_a_model_wrote_is_escaped(tiny_demo, tmp_path):
    result, _ = tiny_demo
    attack = '<script>alert("1")</script><img src=x onerror=alert(2)> & {{ 7 * 7 }}'
    answers = {name: dataclasses.replace(found) for name, found in result.answers.items()}
    answers["DPO"] = dataclasses.replace(answers["DPO"], texts=[attack] * len(answers["DPO"].texts))
    changed = dataclasses.replace(result, answers=answers, report=tmp_path / "report.html")
    write_report(changed, None)
    reader = read(changed)
    assert not {tag for tag, _ in reader.elements} & {"script", "img"}
    assert attack in reader.text


def test_without_matplotlib_it_says_so(tiny_demo, tmp_path):
    result = dataclasses.replace(tiny_demo[0], plot=None, report=tmp_path / "report.html")
    write_report(result, None)
    assert "matplotlib is not installed" in read(result).text
