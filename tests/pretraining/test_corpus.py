from email.message import Message
from pathlib import Path

import pytest

from pretraining import corpus
from pretraining.markdown_pages import html_to_markdown


def _metadata(**fields):
    message = Message()
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("fields", "permissive"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "Apache-2.0 OR BSD-2-Clause"}, True),
        ({"License_Expression": "(MIT OR Apache-2.0) AND BSD-3-Clause"}, True),
        ({"License_Expression": "MPL-2.0 AND MIT"}, False),
        ({"License_Expression": "Apache-2.0 WITH LLVM-exception"}, False),
        ({"License": "MIT"}, True),
        ({"License": "GPLv3"}, False),
        (
            {"License": "MIT", "Classifier": ["License :: OSI Approved :: GNU General Public License (GPL)"]},
            False,
        ),
        ({"Classifier": ["License :: OSI Approved :: ISC License (ISCL)", "Topic :: Software"]}, True),
        (
            {
                "Classifier": [
                    "License :: OSI Approved :: BSD License",
                    "License :: OSI Approved :: MIT License",
                ]
            },
            True,
        ),
        ({}, False),
    ],
)
def test_only_permissive_licences_are_read(fields, permissive):
    assert (corpus.permissive_licence(_metadata(**fields)) is not None) == permissive


def test_paragraphs_of_the_held_out_readmes_are_left_out():
    readme = "# demo\n\nThis library reads every file in a folder and prints how many lines it has."
    cleaner = corpus._Cleaner([readme])
    page = (
        "A page of another package.\n\n"
        "As said elsewhere, THIS library reads  every file in a *folder* and prints nothing.\n\n"
        "This library reads every file, once."
    )
    assert cleaner.clean(page) == "A page of another package.\n\nThis library reads every file, once."


def test_a_paragraph_is_read_once():
    cleaner = corpus._Cleaner([])
    text = "Return the name of the file.\n\nReturn the size of the file."
    assert cleaner.clean(text) == text
    assert cleaner.clean("Return the NAME of the file.\n\nRaise an error if it is absent.") == (
        "Raise an error if it is absent."
    )


def test_a_code_block_with_blank_lines_is_one_paragraph():
    block = "```python\nimport os\n\nprint(os.name)\n```"
    assert list(corpus._paragraphs(f"Before.\n\n{block}\n\nAfter.")) == ["Before.", block, "After."]


def test_docstrings_that_begin_alike_are_thinned():
    cleaner = corpus._Cleaner([])
    text = "\n\n".join(f"The shape of the tensor is given by number {n} of the list." for n in range(20))
    assert len(cleaner.clean_docstrings(text).split("\n\n")) == corpus.SAME_START


def test_docstrings_stand_under_their_signature(tmp_path: Path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "left_out.py").write_text('"""A module of tests that is not to be read at all."""')
    (tmp_path / "module.py").write_text(
        '"""A module with one function that is documented."""\n'
        "def size(path, *, follow=True):\n"
        '    """Return the size of the file in bytes.\n\n    Links are followed."""\n'
        "def short():\n"
        '    """Too short."""\n'
    )
    assert list(corpus._docstrings(tmp_path)) == [
        "A module with one function that is documented.\n\n"
        'def size(path, follow):\n    """Return the size of the file in bytes.\n'
        '    \n    Links are followed.\n    """'
    ]


def test_the_main_part_of_a_page_becomes_markdown():
    page = """<html><head><title>no</title></head><body><nav><p>no</p></nav>
    <h1>Site</h1><section id="a"><h1>Reading files<a class="headerlink" href="#a">¶</a></h1>
    <p>Use <code><span>open()</span></code> from\n the <a href="https://python.org">site</a>
    &amp; <em>close</em> it.</p>
    <div class="highlight-python3"><div>
    <pre><span></span>with open("a") as f:\n\n    f.read()\n</pre></div></div>
    <ul><li><p>“One”</p></li><li>Two</li></ul><table><tr><td>no</td></tr></table>
    <dl><dt> <span>read</span>(<em>n</em>)</dt><dd><p>Read it.</p></dd></dl>
    </section><footer>no</footer></body></html>"""
    assert html_to_markdown(page) == (
        "# Reading files\n\nUse `open()` from the [site](https://python.org) & *close* it.\n\n"
        '```python\nwith open("a") as f:\n\n    f.read()\n```\n\n'
        '- "One"\n\n- Two\n\n**read(n)**\n\nRead it.'
    )
