"""Text files from the templates in this package; jinja is imported when one is filled."""

from importlib.resources import files
from typing import Any


def render(template: str, **values: Any) -> str:
    """The file templates/TEMPLATE with `values` filled in; a name that is missing raises."""
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    source = (files(__package__) / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)
