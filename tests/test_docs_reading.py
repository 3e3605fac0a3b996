"""Documents name tests as evidence: they exist, and figures are those of the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_peers
import test_product
import test_reading_changes_nothing

from fixtures.product import covering, every

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "reading.md").read_text()


@pytest.mark.parametrize(("document", "least"), [("reading.md", 60), ("planning.md", 8)])
def test_every_test_that_is_named_exists(document: str, least: int) -> None:
    text = (ROOT / "docs" / document).read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > least
    for file, test in sorted(named):
        source = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"
    # And none is named in another way, which would not be looked at.
    assert len(re.findall(r"`test_\w+\.py::", text)) == len(re.findall(r"::test_\w+`", text))


def test_figures() -> None:
    assert f"file are {len(list(every()))} images" in TEXT
    assert f"CI makes {len(covering(3))}, in" in TEXT
    assert f"{len(test_product.ENCRYPTED)} with LUKS" in TEXT
    assert f"runs {len(test_reading_changes_nothing.COMMANDS)} command lines" in TEXT
    pins = (ROOT / "pyproject.toml").read_text()
    for name in ("dissect.hypervisor", "libqcow"):
        (version,) = re.findall(rf"{name}(?:-python)?(?:\[full\])?==([0-9.]+)", pins)
        assert (
            f"{name} {version}" in TEXT
            and version in (test_peers.__doc__ or "") + Path(test_peers.__file__).read_text()
        )
