"""What a person does on the page."""

from __future__ import annotations


def pick(page, prefix: str, name: str) -> None:
    page.get_by_label("Add an adapter").fill(prefix)
    page.get_by_role("option", name=name, exact=True).click()


def answer(page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Answer").click()


def column(page, name: str):
    return page.get_by_role("article", name=name, exact=True)


def wait_for(page, selector: str, pattern: str) -> str:
    """The text of an element as soon as it matches."""
    page.wait_for_function(
        "([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector).textContent)",
        arg=[selector, pattern],
    )
    return page.text_content(selector)


def finished(page, count: int) -> None:
    wait_for(page, "#playground-status", f"of {count} answered")
