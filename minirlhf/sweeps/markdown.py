"""A table as Markdown, for the pages in docs/ that a command writes."""

from collections.abc import Sequence

import pandas as pd


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    r"""The heads and a line of text per row; a bar within a cell is written `\|`, or it would open
    a column."""
    cells = [[text.replace("|", r"\|") for text in line] for line in lines]
    table = pd.DataFrame(cells, columns=list(heads))
    return table.to_markdown(index=False, disable_numparse=True)
