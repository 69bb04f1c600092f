"""The reference of across() has a row for every method, and what it says is refused is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from django.db.models import QuerySet

from parallel_orm import ParallelQuerySet, errors
from parallel_orm.fanout import AcrossMixin
from tests.testapp.models import Sale

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "across.md"
ROWS = [
    [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.read_text().partition("## Every method")[2].partition("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| method")
]
NAMED = {name for methods, _ in ROWS for name in re.findall(r"`(\w+)(?:\(\))?`", methods)}


@pytest.mark.parametrize("kind", [QuerySet, ParallelQuerySet, AcrossMixin])
def test_every_public_name_has_a_row(kind):
    names = {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}
    # What is no method of a queryset, but of classes that are made of it.
    assert names - NAMED <= {"mro", "plain_class", "refuse_unwritable"}


def test_every_row_is_of_something():
    """A method of some version of Django that we know, or one of ours."""
    known = set(dir(QuerySet)) | set(dir(ParallelQuerySet)) | set(dir(AcrossMixin)) | {"len", "bool", "repr", "in"}
    later = {"fetch_mode", "totally_ordered", "model", "query", "ordered"}
    assert known | later >= NAMED


CALLS = {
    "bulk_update": lambda rows: rows.bulk_update([], ["number"]),
    "abulk_update": lambda rows: rows.abulk_update([], ["number"]),
    "parallel_update_or_create": lambda rows: rows.parallel_update_or_create([], ["number"]),
    "aparallel_update_or_create": lambda rows: rows.aparallel_update_or_create([], ["number"]),
    "raw": lambda rows: rows.raw("SELECT 1"),
    "db": lambda rows: rows.db,
}
OF_LISTS = ("bulk_create", "abulk_create", "parallel_create", "aparallel_create")
REFUSED = sorted(
    name for methods, what in ROWS if what.startswith("Refused") for name in re.findall(r"`(\w+)(?:\(\))?`", methods)
)


def test_there_are_refusals():
    assert {"create", "bulk_create", "raw", "db"} <= set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_so(name, default, other):
    rows = Sale.objects.across("default", "other", writable=True)
    with pytest.raises(errors.UnsupportedQuerySet, match=r"'default', 'other'.*using\(alias\)"):
        CALLS.get(name, lambda rows: getattr(rows, name)(*([[]] if name in OF_LISTS else [])))(rows)
    assert rows.count() == 0


@pytest.mark.parametrize(
    "name",
    [name for methods, what in ROWS if "`writable=True`" in what for name in re.findall(r"`(\w+)\(\)`", methods)],
)
def test_what_needs_to_be_writable(name, default, other):
    rows = Sale.objects.across("default", "other")
    with pytest.raises(errors.UnsupportedQuerySet, match="writable=True"):
        call(rows, name)


def call(rows, name):
    from tests.asynchronous import run

    arguments = [lambda row: None] if "parallel_update" in name else []
    named = {"number": 1} if name in ("update", "aupdate") else {}
    answer = getattr(rows, name)(*arguments, **named)
    return run(answer) if inspect.isawaitable(answer) else answer
