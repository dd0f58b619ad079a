"""The running text of a Wikipedia article, without its markup."""

import re
from contextlib import suppress

from mlinterf_ds.errors import UserError

# A link "Name:Target" without a space after the colon leads to a picture, a category or another wiki, whatever the
# namespace is called in the dump's language. It is not part of the text.
_NAMESPACE_LINK = re.compile(r"^\s*[^\s:]+:\S")
_TAGS_WITHOUT_TEXT = ("ref", "table", "gallery", "math")
_HEADING_OR_LIST = re.compile(r"^[=*#:;|!{}\s]+|[=\s]+$")


def plain_text(markup: str) -> str:
    """Returns the paragraphs of an article, one a line, without tables, templates, references, pictures and categories.

    Raises UserError if mwparserfromhell, which does the parsing, is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError(
            "a Wikipedia XML dump needs the library mwparserfromhell: pip install mwparserfromhell"
        ) from None
    code = mwparserfromhell.parse(markup, skip_style_tags=True)
    links = [link for link in code.filter_wikilinks(recursive=True) if _NAMESPACE_LINK.match(str(link.title))]
    tags = code.filter_tags(recursive=True, matches=lambda tag: str(tag.tag).lower() in _TAGS_WITHOUT_TEXT)
    for node in [*links, *tags]:
        with suppress(ValueError):  # the node around it may have been removed before
            code.remove(node)
    text = code.strip_code(normalize=True, collapse=True, keep_template_params=False)
    lines = (_HEADING_OR_LIST.sub("", line.replace("'''", "").replace("''", "")) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
