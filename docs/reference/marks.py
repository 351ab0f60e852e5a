"""Blocks that scripts write into pages, between marks."""


def between(page: str, begin: str, end: str, block: str) -> str:
    """A page with a block between its two marks; ValueError for a page without them."""
    head, first, rest = page.partition(begin)
    _, last, tail = rest.partition(end)
    if not (first and last):
        msg = f"expected {begin} and then {end} on the page, found no {end if first else begin}"
        raise ValueError(msg)
    return f"{head}{begin}\n\n{block.strip()}\n\n{end}{tail}"
