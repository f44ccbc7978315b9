"""Markdown tables read back: what stands in which cell, however wide the columns are."""

import re

BAR = re.compile(r"(?<!\\)\|")  # an escaped bar is text


def rows(page: str) -> list[list[str]]:
    """The cells of every line of a table of the page, heads included, rules left out."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in BAR.split(line)[1:-1]] for line in lines]
    return [row for row in found if not all(re.fullmatch(":?-+:?", cell) for cell in row)]
