"""Hooks of the documentation site: docstrings are written for Python's ``help``, pages are HTML."""

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page without the roles of reStructuredText that docstrings contain."""
    return _ROLE.sub(r"<code>\1</code>", html).replace("::</p>", ":</p>")
