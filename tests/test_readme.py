"""What the README and the docs show runs as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.readme import Block, blocks_of, run_page

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path) -> None:
    """A reader who types a page's blocks gets no error, nor a warning."""
    if page != README and not blocks_of(page.read_text()):
        pytest.skip("no Python on this page")
    assert blocks_of(page.read_text()), "the README shows no Python"
    run_page(page, tmp_path)


@pytest.mark.parametrize("ending", [r"-m pytest", r"example_project/manage\.py demo"])
def test_readme_has_the_lines_that_ci_runs(ending: str) -> None:
    """Each is one line, so that it can be copied, by a person or by .ci/run."""
    found = re.findall(rf"^python3 -m venv .*{ending}$", README.read_text(), re.MULTILINE)
    assert len(found) == 1


PAGE = """\
# Title

```python
# shop/models.py
from django.db import models

class Thing(models.Model):
    name = models.CharField(max_length=9)
```

<!-- python
Thing.objects.create(name="seen")
-->

```console
$ not python
```

<!-- not run: it needs a cluster -->

```python
no_such_thing()
```

1. In a list:

   ```python
   for thing in Thing.objects.all():
       print(thing.name)
   ```

```python
print(await Thing.objects.acount(), sorted(settings.DATABASES))
```

```python
# settings.py
TIME_ZONE = "Europe/Berlin"
```

```python
from django.conf import settings
print(settings.TIME_ZONE)
```
"""


def test_blocks_are_told_apart() -> None:
    """Files, hidden blocks, blocks in lists and blocks only shown are each known as such."""
    blocks = blocks_of(PAGE)
    assert [block.file for block in blocks] == ["models.py", None, None, None, "settings.py", None]
    assert blocks[0].app == "shop"
    assert blocks[2] == Block("for thing in Thing.objects.all():\n    print(thing.name)\n", 28)


@pytest.mark.once
def test_blocks_run_in_their_project(tmp_path: Path) -> None:
    """Models, settings, rows and names carry from block to block."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("sorted(settings.DATABASES)", "'rows'"))
    (tmp_path / "project").mkdir()
    assert run_page(page, tmp_path / "project") == "seen\n1 rows\nEurope/Berlin\n"


@pytest.mark.once
def test_failing_block_is_named(tmp_path: Path) -> None:
    """A block that breaks is found by page and line."""
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    (tmp_path / "project").mkdir()
    with pytest.raises(AssertionError, match=r"(?s)page.md.*line 33.*NameError.*settings") as caught:
        run_page(page, tmp_path / "project")
    assert "page.md does not run" in str(caught.value)
