"""Jinja2 as all our pages use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.core.errors import OutputError

if TYPE_CHECKING:
    import jinja2


def page_environment(what: str) -> jinja2.Environment:
    """Return an environment in which everything is escaped, and a name that is not given is an error.

    Args:
        what: What is to be shown, for the message, such as ``the report``.

    Raises:
        OutputError: If Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as exc:
        raise OutputError(
            f"cannot render {what} as 'html': Jinja2 is not installed",
            hint="pip install jinja2, or pip install 'torchferry[export]'; other kinds of output do not need it",
        ) from exc
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
