"""Ways to cut, without a database."""

from __future__ import annotations

from bisect import bisect_right

from hypothesis import given
from hypothesis import strategies as st

from parallel_orm import cutting
from parallel_orm.chunks import Chunk

# Keys with gaps, negative ones, and equal ones, as a join that repeats rows gives them.
sorted_keys = st.lists(st.integers(-50, 50), min_size=1, max_size=60).map(sorted)


def jumper(keys: list[int]):
    """What the database answers: the key of the row ``size`` rows behind ``after``."""

    def jump(after, last, size):
        place = (0 if after is None else bisect_right(keys, after[0])) + size - 1
        return (keys[place],) if place < len(keys) and keys[place] <= last[0] else None

    return jump


def holds(chunk: Chunk, key: int) -> bool:
    return (chunk.after is None or key > chunk.after[0]) and (chunk.until is None or key <= chunk.until[0])


@given(keys=sorted_keys, size=st.integers(1, 70), data=st.data())
def test_jumps_put_every_key_in_exactly_one_chunk(keys, size, data):
    """Chunks are disjoint and their union is the set, for any keys, any size and any ends between them."""
    ends = sorted({*data.draw(st.lists(st.sampled_from(keys), max_size=2)), keys[-1]})
    chunks = list(cutting.by_jumps("default", [(end,) for end in ends], size, jumper(keys)))
    for key in keys:
        assert sum(holds(chunk, key) for chunk in chunks) == 1
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))


@given(keys=st.lists(st.integers(), min_size=1, max_size=60, unique=True).map(sorted), size=st.integers(1, 70))
def test_jumps_cut_evenly(keys, size):
    """Where keys are unique every chunk but the last has exactly ``size`` rows, whatever the gaps between keys."""
    chunks = list(cutting.by_jumps("default", [(keys[-1],)], size, jumper(keys)))
    sizes = [sum(holds(chunk, key) for key in keys) for chunk in chunks]
    assert all(number == size for number in sizes[:-1])
    assert 0 < sizes[-1] <= size


def test_jumps_are_lazy():
    """A plan of a billion rows asks for one bound at a time."""
    asked = []

    def jump(after, last, size):
        asked.append(after)
        return ((0 if after is None else after[0]) + size,)

    chunks = cutting.by_jumps("default", [(10**9,)], 10, jump)
    assert next(chunks).until == (10,)
    assert next(chunks).until == (20,)
    assert asked == [None, (10,)]


def test_jumps_end_where_the_last_row_vanished():
    """When the rows of the end are deleted meanwhile, the last chunk still reaches the frozen bound."""
    chunks = list(cutting.by_jumps("default", [(100,)], 2, jumper([1, 2, 3])))
    assert [(chunk.after, chunk.until) for chunk in chunks] == [(None, (2,)), ((2,), (100,))]


@given(keys=st.lists(st.integers(), max_size=60, unique=True), size=st.integers(1, 70))
def test_a_list_of_keys_is_cut_in_its_order(keys, size):
    """Runs of ``size``, in the order of the list, none left out."""
    chunks = list(cutting.by_keys("default", keys, size))
    assert [key for chunk in chunks for key in chunk.keys] == keys
    assert all(len(chunk.keys) == size for chunk in chunks[:-1])


def test_the_rest_of_a_page_begins_behind_its_last_row():
    (page,) = cutting.by_pages("default", [(9,)], 3)
    rest = page.rest((4,))
    assert (rest.after, rest.until, rest.limit, rest.index) == ((4,), (9,), 3, 1)
    assert rest.rest((9,)) is None
