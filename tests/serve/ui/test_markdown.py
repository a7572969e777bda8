"""What a model writes, as HTML that does nothing."""

import pytest

from serve.ui.markdown import code_css, render_markdown


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "a <b onclick='x()'>b</b>",
        "<!-- comment -->",
        "- <iframe src='//x'></iframe>",
        "| a |\n|---|\n| <svg onload=x> |",
    ],
)
def test_markup_becomes_text(text: str) -> None:
    html = render_markdown(text)
    for tag in ("<script", "<img", "<b ", "<!--", "<iframe", "<svg"):
        assert tag not in html
    assert "&lt;" in html


@pytest.mark.parametrize("target", ["javascript:alert(1)", "data:text/html,x", "vbscript:x"])
def test_links_that_run_something_stay_text(target: str) -> None:
    assert "<a" not in render_markdown(f"[press]({target})")


def test_images_are_not_fetched() -> None:
    assert "<img" not in render_markdown("![alt](http://elsewhere.example/x.png)")


def test_code_is_highlighted_in_its_language() -> None:
    assert '<span class="k">def</span>' in render_markdown("```python\ndef f(): pass\n```")


@pytest.mark.parametrize("language", ["nonsense", "", "'><script>"])
def test_code_of_no_known_language_is_escaped(language: str) -> None:
    html = render_markdown(f"```{language}\n<script>\n```")
    assert "&lt;script&gt;" in html
    assert "<script" not in html


def test_unfinished_fence_is_code_already() -> None:
    assert "<pre>" in render_markdown("```python\nprint(")


def test_colours_differ_on_dark_pages() -> None:
    css = code_css()
    assert ".markdown pre .k" in css
    assert ".dark .markdown pre .k" in css
