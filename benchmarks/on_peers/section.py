"""A part of a document that a program writes, between two marks that stay."""

from __future__ import annotations

from ingot.plugins.errors import IngotError

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"


def replaced(text: str, written: str) -> str:
    """A document with what is between the marks replaced.

    Args:
        text: of the document, with each mark once.
        written: Markdown.

    Raises:
        IngotError: no marks, or several.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise IngotError(
            f"The document has not one part between {BEGIN} and {END}; put both where the tables "
            "are to be."
        )
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{written.strip()}\n\n{END}{after}"
