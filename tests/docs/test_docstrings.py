"""Docstrings as this house writes them come out as they are meant: nothing lost, nothing misread as markup."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest

docutils_core = pytest.importorskip("docutils.core", reason="the docs' tools are not here: pip install '.[docs]'")
from docutils import nodes  # noqa: E402

PATH = Path(__file__).parents[2] / "docs/_ext/docstrings.py"
spec = importlib.util.spec_from_file_location("house_docstrings", PATH)
assert spec is not None
assert spec.loader is not None
docstrings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docstrings)


def rendered(text: str, *names: str) -> nodes.document:
    """The document; whatever docutils would warn of is an error."""
    docstring = docstrings.Docstring(inspect.cleandoc(text).split("\n"), set(names))
    source = "\n".join(docstring.rst())
    assert not docstring.problems
    settings = {"halt_level": 1, "report_level": 1, "warning_stream": False}
    return docutils_core.publish_doctree(source, settings_overrides=settings)


def described(document: nodes.document) -> dict[str, str]:
    items = document.findall(nodes.definition_list_item)
    return {item[0].astext(): item[1].astext().replace("\n\n", " ¶ ") for item in items}


def blocks(document: nodes.document) -> list[str]:
    return [block.astext() for block in document.findall(nodes.literal_block)]


def paragraphs(document: nodes.document) -> list[str]:
    return [paragraph.astext() for paragraph in document.findall(nodes.paragraph)]


def test_parameters_that_share_a_description_and_several_on_a_line():
    document = rendered(
        """Sum.

        Args:
            hidden: (B, T, H); targets: (B, T) int64,
                shifted.
            weight: (V, H) the head. bias: (V,) or None.
            beta, loss_type,
                reduction: as in `dpo_loss`.
            The others as there.
        Returns:
            (B,) float32.
        Raises:
            ValueError: shapes that do not fit.
        """,
        *("hidden", "targets", "weight", "bias", "beta", "loss_type", "reduction"),
    )
    assert described(document) == {
        "hidden": "(B, T, H).",
        "targets": "(B, T) int64, shifted.",
        "weight": "(V, H) the head.",
        "bias": "(V,) or None.",
        "beta, loss_type, reduction": "as in dpo_loss.",
        "ValueError": "shapes that do not fit.",
    }
    assert "The others as there." in paragraphs(document)
    fields = [field[0].astext() for field in document.findall(nodes.field)]
    assert fields == ["Parameters", "Returns", "Raises"]


def test_parameters_without_a_heading():
    document = rendered(
        """Open a cache.

        path: a folder; or a file. name, other: what it is
            called.
        Damaged ones are repaired.

        dataset       a file, a folder,
                      or a name.
        split         one of them
        """,
        *("path", "name", "other", "dataset", "split"),
    )
    assert described(document) == {
        "path": "a folder; or a file.",
        "name, other": "what it is called.",
        "dataset": "a file, a folder, or a name.",
        "split": "one of them",
    }
    assert "Damaged ones are repaired." in paragraphs(document)


def test_a_sentence_that_runs_on_below_its_name_stays_whole():
    document = rendered(
        "Open.\n\nreference: the model, or None if the\nfolder holds one. Raises CacheError.", "reference"
    )
    assert described(document) == {"reference": "the model, or None if the folder holds one. Raises CacheError."}


def test_a_paragraph_may_hang():
    document = rendered("Raises ValueError: a model\n    whose head cannot be fused.\nFor example:\n    this one")
    assert paragraphs(document) == ["Raises ValueError: a model whose head cannot be fused. For example:"]
    assert blocks(document) == ["this one"]


def test_formulas_and_tables_keep_their_columns():
    document = rendered(
        """Loss.

            z = softcap·tanh(u / softcap)          (no softcap: u)
              and more

        Args:
            alpha: units per token:

                    −log σ(βΔ + α(|y_w| − |y_l|))

                *Plus.* See above.

        auto    one thing, with
                a second line
        text    another
        """,
        "alpha",
    )
    assert blocks(document) == [
        "z = softcap·tanh(u / softcap)          (no softcap: u)\n  and more",
        "−log σ(βΔ + α(|y_w| − |y_l|))",
        "auto    one thing, with\n        a second line\ntext    another",
    ]
    assert described(document)["alpha"].endswith("¶ Plus. See above.")
    assert [node.astext() for node in document.findall(nodes.emphasis)] == ["Plus."]


@pytest.mark.parametrize(
    "text",
    [
        "r = β·log(π*/π_ref) + α|y| and |x|; ref_ and _private names, 2*x*y, **kwargs, a\\b, <T>, [v=y], z_.",
        "A. no list, (a) none either.",
        "1) no list.",
        ":param x: no field.",
        ".. note:: no directive",
        "-x no option, --name neither.",
        "| no line block",
        ">>> no doctest",
        "=====",
        "'quoted' \"text\" and a lone ` mark",
    ],
)
def test_prose_is_prose(text):
    document = rendered(text)
    assert [type(node).__name__ for node in document.children] == ["paragraph"]
    assert document.astext() == text
    assert not list(document.findall(nodes.emphasis))


def test_code_and_papers():
    document = rendered("`a*b_|c|`'s and (arXiv 2305.18290 eq. 7), `x`: **bold** and *so*.")
    assert document.astext() == "a*b_|c|'s and (arXiv 2305.18290 eq. 7), x: bold and so."
    assert [node.astext() for node in document.findall(nodes.literal)] == ["a*b_|c|", "x"]
    assert [node["refuri"] for node in document.findall(nodes.reference)] == ["https://arxiv.org/abs/2305.18290"]


def test_lists():
    document = rendered("Either\n\n- this, which\n  runs on, or\n- that.\n\n1. one\n2. two")
    assert [item.astext() for item in document.findall(nodes.list_item)] == [
        "this, which runs on, or",
        "that.",
        "one",
        "two",
    ]


def test_links_are_made_where_the_name_is_known_and_is_no_parameter():
    link = {"dpo_loss": "fastalign.losses.dpo_loss", "score": "fastalign.reference.score"}.get
    docstring = docstrings.Docstring(["See `dpo_loss` and `score` and `other`."], {"score"}, link)
    assert docstring.rst()[0] == "See :py:obj:`dpo_loss <fastalign.losses.dpo_loss>` and ``score`` and ``other``\\ ."


def test_what_is_described_and_is_no_parameter_is_a_problem():
    docstring = docstrings.Docstring(["Sum.", "", "Args:", "    beta: one.", "    gone, beta: two."], {"beta"})
    docstring.rst()
    assert docstring.problems == ["describes 'gone', which is no parameter"]
