"""The code of a page of the documentation, by the heading above it."""

import re
from pathlib import Path

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
SUGGESTED = "rlora.torch.suggest_lr(model)"


def sections(page):
    """From the headings of a how-to page that have Python code below them to that code.

    It has one learning rate wherever the page has the suggested one, which is tested by itself.
    """
    text = (HOW_TO / page).read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        if blocks := re.findall("```python\n(.*?)```", body, re.DOTALL):
            found[title] = "\n".join(blocks).replace(SUGGESTED, "4e-3")
    return found


def run(page, title, space, kind="ScaledAdamW"):
    """Execute the code below a heading in a namespace, with another of our classes if asked."""
    code = sections(page)[title].replace("ScaledAdamW", kind)
    exec(compile(code, f"{page}: {title}", "exec"), space)
    return space
