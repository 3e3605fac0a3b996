"""XML as libvirt gives it: looked at, changed in a few places, otherwise kept as it is.

minidom leaves prefixes, declarations of namespaces and white space alone, so that what
is not ours (metadata, qemu:commandline, secrets) comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.dom import minidom
from xml.dom.minidom import Document, Element
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

from qchain.errors import ImageError

__all__ = [
    "child",
    "children",
    "drop",
    "insert",
    "new_element",
    "parse",
    "same",
    "set_text",
    "text_at",
    "to_text",
]


def parse(text: str) -> Element:
    """The root element. Raises `ImageError` for anything but XML."""
    try:
        root = minidom.parseString(text.encode("utf-8", "surrogateescape")).documentElement
    except (ExpatError, ValueError) as error:
        raise ImageError("libvirt's XML", f"cannot be read: {error}", "look at it") from None
    assert isinstance(root, Element)
    return root


def to_text(root: Element) -> str:
    return str(root.toxml())


def children(node: Element | None, name: str) -> Iterator[Element]:
    """The elements of that name directly below `node`."""
    if node is not None:
        for each in list(node.childNodes):
            if isinstance(each, Element) and each.tagName == name:
                yield each


def child(node: Element | None, *names: str) -> Element | None:
    """The first element on the way `names` down from `node`; None where it ends early."""
    for name in names:
        node = next(children(node, name), None)
    return node


def text_at(node: Element | None, *names: str) -> str:
    """The text within that element, '' where there is none."""
    found = child(node, *names) if names else node
    if found is None:
        return ""
    return "".join(each.data for each in found.childNodes if isinstance(each, minidom.Text))


def new_element(near: Element, tag: str, /, **attributes: str) -> Element:
    document = near.ownerDocument
    assert isinstance(document, Document)
    made = document.createElement(tag)
    for key, value in attributes.items():
        made.setAttribute(key, value)
    return made


def set_text(node: Element, text: str) -> None:
    for each in list(node.childNodes):
        node.removeChild(each)
    document = node.ownerDocument
    assert isinstance(document, Document)
    node.appendChild(document.createTextNode(text))


def insert(node: Element, made: Element, after: tuple[str, ...]) -> None:
    """Put `made` below `node`, behind the last child that is named in `after`."""
    place: Any = None
    for each in node.childNodes:
        if isinstance(each, Element) and each.tagName in after:
            place = each.nextSibling
    node.insertBefore(made, place)


def drop(node: Element) -> None:
    """Remove an element from what it is in."""
    parent = node.parentNode
    assert parent is not None
    parent.removeChild(node)


def same(one: str, other: str) -> bool:
    """Whether two documents say the same: white space between elements does not matter."""
    return _canonical(one) == _canonical(other)


def _canonical(text: str) -> str:
    return ElementTree.canonicalize(text, strip_text=True)
