"""Ways to cut, without a database."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_orm import cutting
from parallel_orm.chunks import Chunk
from parallel_orm.errors import UnsupportedQuerySet

# Keys with gaps, negative ones, and equal ones, as a join that repeats rows gives them.
sorted_keys = st.lists(st.integers(-50, 50), min_size=1, max_size=60).map(sorted)


def jumper(keys: list[int]):
    """What the database answers: the key of the row ``size`` rows behind ``after``."""

    def jump(after, last, size):
        place = (0 if after is None else bisect_right(keys, after[0])) + size - 1
        return (keys[place],) if place < len(keys) and keys[place] <= last[0] else None

    return jump


def looker(keys: list[int]):
    """What the database answers: the keys behind ``after``, so many of them."""

    def look(after, last, number):
        start = 0 if after is None else bisect_right(keys, after[0])
        return [(key,) for key in keys[start : start + number] if key <= last[0]]

    return look


def cut_in_sizes(ends, sizes, jump):
    asked = cycle(sizes)
    return list(cutting.by_jumps("default", ends, lambda: next(asked), jump))


def holds(chunk: Chunk, key: int) -> bool:
    return (chunk.after is None or key > chunk.after[0]) and (chunk.until is None or key <= chunk.until[0])


@given(keys=sorted_keys, size=st.integers(1, 70), data=st.data())
def test_jumps_put_every_key_in_exactly_one_chunk(keys, size, data):
    """Chunks are disjoint and their union is the set, for any keys, any size and any ends between them."""
    ends = sorted({*data.draw(st.lists(st.sampled_from(keys), max_size=2)), keys[-1]})
    chunks = list(cutting.by_jumps("default", [(end,) for end in ends], lambda: size, jumper(keys)))
    for key in keys:
        assert sum(holds(chunk, key) for chunk in chunks) == 1
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))


@given(keys=st.lists(st.integers(), min_size=1, max_size=60, unique=True).map(sorted), size=st.integers(1, 70))
def test_jumps_cut_evenly(keys, size):
    """Where keys are unique every chunk but the last has exactly ``size`` rows, whatever the gaps between keys."""
    chunks = list(cutting.by_jumps("default", [(keys[-1],)], lambda: size, jumper(keys)))
    sizes = [sum(holds(chunk, key) for key in keys) for chunk in chunks]
    assert all(number == size for number in sizes[:-1])
    assert 0 < sizes[-1] <= size


@given(keys=sorted_keys, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9), data=st.data())
def test_keys_that_are_looked_up_at_once_cut_as_jumps_do(keys, sizes, data):
    """However the size changes from chunk to chunk, and where keys are equal."""
    ends = [(end,) for end in sorted({*data.draw(st.lists(st.sampled_from(keys), max_size=2)), keys[-1]})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "FEW_ROWS", 8)
        patch.setattr(cutting, "KEYS_AT_ONCE", 10)
        chunks = cut_in_sizes(ends, sizes, cutting.Lookout(jumper(keys), looker(keys)))
    assert chunks == cut_in_sizes(ends, sizes, jumper(keys))


def test_one_look_is_for_many_small_chunks():
    keys = list(range(5_000))
    looked = []

    def look(after, last, number):
        looked.append(after)
        return looker(keys)(after, last, number)

    jump = cutting.Lookout(jumper(keys), look)
    chunks = list(cutting.by_jumps("default", [(keys[-1],)], lambda: 20, jump))
    assert [sum(holds(chunk, key) for key in keys) for chunk in chunks] == [20] * 250
    assert looked == [None, (999,), (1999,), (2999,), (3999,)]
    looked.clear()
    list(cutting.by_jumps("default", [(keys[-1],)], lambda: 250, jump))
    assert looked == [], "a jump over many rows is cheaper than all keys between"


def test_jumps_are_lazy():
    """A plan of a billion rows asks for one bound at a time."""
    asked = []

    def jump(after, last, size):
        asked.append(after)
        return ((0 if after is None else after[0]) + size,)

    chunks = cutting.by_jumps("default", [(10**9,)], lambda: 10, jump)
    assert next(chunks).until == (10,)
    assert next(chunks).until == (20,)
    assert asked == [None, (10,)]


def test_jumps_end_where_the_last_row_vanished():
    """When the rows of the end are deleted meanwhile, the last chunk still reaches the frozen bound."""
    chunks = list(cutting.by_jumps("default", [(100,)], lambda: 2, jumper([1, 2, 3])))
    assert [(chunk.after, chunk.until) for chunk in chunks] == [(None, (2,)), ((2,), (100,))]


@given(keys=st.lists(st.integers(), max_size=60, unique=True), size=st.integers(1, 70))
def test_a_list_of_keys_is_cut_in_its_order(keys, size):
    """Runs of ``size``, in the order of the list, none left out."""
    chunks = list(cutting.by_keys("default", keys, lambda: size))
    assert [key for chunk in chunks for key in chunk.keys] == keys
    assert all(len(chunk.keys) == size for chunk in chunks[:-1])


def test_the_rest_of_a_page_begins_behind_its_last_row():
    (page,) = cutting.by_pages("default", [(9,)], 3)
    rest = page.rest((4,))
    assert (rest.after, rest.until, rest.limit, rest.index) == ((4,), (9,), 3, 1)
    assert rest.rest((9,)) is None


@given(
    keys=st.lists(st.integers(), min_size=1, max_size=40, unique=True).map(sorted),
    as_list=st.booleans(),
    data=st.data(),
)
def test_however_a_chunk_comes_apart_its_parts_stand_in_order(keys, as_list, data):
    """Each row is in one of them, whether they were cut in two or left behind rows that were done."""
    chunk = Chunk(3, "default", keys=tuple(keys)) if as_list else Chunk(3, "default", after=None, until=(keys[-1],))
    waiting, done = [replace(chunk, rows=len(keys))], {}
    while waiting:
        part = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        held = list(part.keys) if as_list else [key for key in keys if holds(part, key)]
        assert part.rows == len(held)
        number = data.draw(st.integers(1, len(held)))
        if data.draw(st.booleans()) and len(held) > number:
            waiting += cutting.in_two(part, number, jumper(keys))
            continue
        done[part.place] = held[:number]
        if left := held[number:]:
            waiting.append(part.left(left, (held[number - 1],), lambda key: (key,)))
    assert [key for place in sorted(done) for key in done[place]] == keys
    assert {place[:2] for place in done} == {(0, 3)}


@pytest.mark.parametrize("chunk", [Chunk(0, "default", keys=(1, 2, 3)), Chunk(0, "default", until=(3,))], ids=str)
def test_a_chunk_of_no_more_rows_is_not_cut_in_two(chunk):
    for rows in (3, 4):
        assert cutting.in_two(chunk, rows, jumper([1, 2, 3])) == (chunk, None)


def test_a_key_that_the_database_gives_otherwise_is_no_end():
    """What is left would never become less."""
    with pytest.raises(UnsupportedQuerySet, match="does not come back"):
        Chunk(0, "default", after=(1,), until=(3,)).left([2, 3], (1,), lambda key: (key,))
