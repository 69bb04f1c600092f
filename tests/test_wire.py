"""Values as JSON text: what comes back is what was written, and what has no name is refused."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import pickle
import re
import threading
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from django.db.models import Count, F, Prefetch, Q
from django.db.models.functions import Lower
from hypothesis import given
from hypothesis import strategies as st

from parallel_orm import wire
from parallel_orm.outcomes import pack_error, packing
from tests import functions
from tests.testapp.models import Article, Author, Tag


def through(value):
    """Write a value down, as a message would have it, and read it."""
    text = wire.written(value)
    json.loads(text.encode("ascii"), parse_constant=pytest.fail)  # NaN and its kin are no JSON
    return wire.read(text)


@pytest.mark.parametrize("kind", [dict, OrderedDict, partial(defaultdict, list), Counter], ids=str)
def test_keys_that_are_objects_and_values_that_come_again(kind):
    """Each is told by its number, so all must be numbered as they were written: a key before its value."""
    price, days, day = decimal.Decimal("0.1"), [1, 2], datetime.date(2021, 1, 1)
    made = kind()
    made[price] = days
    made[day] = day
    made[Frozen(1, (price,))] = price
    assert through({"made": made, "days": days, "day": day, "price": price}) == {
        "made": made,
        "days": days,
        "day": day,
        "price": price,
    }


class Colour(enum.Enum):
    RED = "red"


class Flags(enum.IntFlag):
    ONE = 1
    TWO = 2


Pair = namedtuple("Pair", "one other")


@dataclass
class Node:
    name: str
    children: list[Node] = field(default_factory=list)
    parent: Node | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    one: int
    other: tuple[int, ...] = ()


class WithState:
    """Says what it is made of, as pickle asks."""

    def __init__(self, number):
        self.number, self.lock = number, threading.Lock()

    def __getstate__(self):
        return {"number": self.number}

    def __setstate__(self, state):
        self.__init__(state["number"])

    def __eq__(self, other):
        return self.number == other.number

    __hash__ = None


class Registered(list):
    """Has a list, and attributes beside."""


VALUES = [
    None,
    True,
    0,
    -(10**30),
    10**100,
    1.5,
    float("inf"),
    -0.0,
    "",
    "ß ☃ \ud800 \0 \u2028",
    b"",
    bytes(range(256)),
    bytearray(b"ab"),
    [],
    [1, [2, []]],
    (),
    (1, (2,)),
    {},
    {"a": {"b": None}},
    {"make": ["os:system", ["true"]]},
    {1: "a", (2, 3): "b", None: "c"},
    {1, 2},
    set(),
    frozenset([1, frozenset([2])]),
    range(3),
    slice(1, None, 2),
    1 + 2j,
    datetime.datetime(2026, 3, 29, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    datetime.date(2026, 1, 1),
    datetime.time(1, 2, 3, 4),
    datetime.timedelta(days=-1, microseconds=1),
    decimal.Decimal("1.10"),
    uuid.UUID(int=7),
    Colour.RED,
    Flags.ONE | Flags.TWO,
    Pair(1, [2]),
    Frozen(1, (2, 3)),
    Node("a", [Node("b")]),
    WithState(3),
    OrderedDict([("b", 1), ("a", 2)]),
    Counter("aab"),
    deque([1, 2], maxlen=3),
    Path("/a/b"),
    Ellipsis,
    NotImplemented,
    str,
    Author,
    Node,
    type(None),
    type(...),
    type(functions.rank),
    functions.rank,
    len,
    wire.written,
    functions.Methods.method,
    str.upper,
    OrderedDict.fromkeys,
    datetime.datetime.now,
    list[int],
    int | None,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__} {str(value)[:20]!a}")
def test_what_comes_back_is_what_was_written(value):
    found = through(value)
    assert found == value
    assert type(found) is type(value)
    assert repr(found) == repr(value) or "object at" in repr(value)


def test_numbers_of_very_many_decimals():
    """Python refuses to read them: so long does that take."""
    assert through([10**5000, -(10**5000)]) == [10**5000, -(10**5000)]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers() | st.tuples(st.text(), st.integers())
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@given(nested)
def test_plain_values(value):
    assert through(value) == value


def test_what_is_one_is_one_behind_it():
    shared = [1]
    found = through({"a": shared, "b": (shared, {"c": shared})})
    assert found["a"] is found["b"][0] is found["b"][1]["c"]
    node = Node("one")
    first, second = through([node, node])
    assert first is second
    mapping = {}
    found = through([mapping, mapping, {1: mapping}])
    assert found[0] is found[1] is found[2][1]
    assert through([{1}, {1}])[0] == {1}


def test_what_refers_to_itself():
    rows: list[object] = [1]
    rows.append(rows)
    found = through(rows)
    assert found[1] is found
    parent = Node("parent")
    parent.children.append(Node("child", parent=parent))
    found = through(parent)
    assert found.children[0].parent is found
    mapping: dict[object, object] = {}
    mapping["self"] = mapping[1] = mapping
    found = through(mapping)
    assert found["self"] is found[1] is found
    registered = Registered()
    registered.append(registered)
    registered.name = "r"
    found = through(registered)
    assert (found[0] is found, found.name) == (True, "r")


def test_what_is_made_of_itself_is_refused():
    part = partial(functions.first)
    part.__setstate__((functions.first, (part,), {}, None))
    with pytest.raises(wire.NotByName, match="is made of itself"):
        through(Made([part]))


class Made:
    def __init__(self, parts):
        self.parts = parts

    def __reduce__(self):
        return Made, ([self],)


def test_defaults_and_partials():
    found = through(defaultdict(list, {"a": [1]}))
    assert (found, found["b"]) == ({"a": [1], "b": []}, [])
    found = through(partial(functions.first, 1, other=2))
    assert found() == 1
    assert through(functions.Methods(3).method)(Article(rank=2)) == 6
    assert through(attrgetter("rank"))(Article(rank=2)) == 2
    assert through("abc".upper)() == "ABC"


class Parts:
    """Says that it is made of whatever an object may be made of; notes what it is given."""

    def __init__(self, *args, state=None, items=(), pairs=(), setter=None):
        self.args, self.said, self.given = args, (state, items, pairs, setter), []

    def __reduce__(self):
        state, items, pairs, setter = self.said
        return Parts, self.args, state, iter(items), iter(pairs), setter

    def append(self, item):
        self.given.append(("item", item))

    def __setitem__(self, key, value):
        self.given.append((key, value))

    def __setstate__(self, state):
        self.given.append(("state", state))


def set_on(parts, state):
    parts.given.append(("set", state))


class Listed(list):
    """Has a state of its own beside its items."""

    state: object = None

    def __getstate__(self):
        return self.state

    def __setstate__(self, state):
        self.state = ("set", state)


class Mapped(dict):
    state: object = None
    __getstate__, __setstate__ = Listed.__getstate__, Listed.__setstate__


def shape(value, numbers=None, kept=None):
    """Return what a value is made of, with a number for each object, so that those that are one are seen to be."""
    numbers, kept = ({}, []) if numbers is None else (numbers, kept)
    parts = [shape(each, numbers, kept) for each in value] if type(value) is tuple else None
    if parts is not None or value is None or isinstance(value, str | int | types.FunctionType):
        return type(value).__name__, parts or repr(value)
    if id(value) in numbers:
        return numbers[id(value)]
    numbers[id(value)] = len(numbers)
    kept.append(value)  # so that its id stays its own
    within = [*value.items()] if isinstance(value, dict) else [*value] if isinstance(value, list) else []
    of_it = [within, *getattr(value, "__dict__", {}).items()]
    return numbers[id(value)], type(value).__name__, [shape(each, numbers, kept) for each in map(tuple, of_it)]


@st.composite
def objects(draw):
    """Objects whose parts are few, and so often the same one, or nothing in each way there is."""
    several = [[], {}, (), None, False, 0, "", [1], {"n": 1}, {1: 2}]

    def parts(most):
        return [draw(st.sampled_from(several)) for _ in range(draw(st.integers(0, most)))]

    for _ in range(draw(st.integers(1, 6))):
        items, pairs = parts(2), [*enumerate(parts(2))]
        made = draw(st.sampled_from([Parts(*items), Listed(items), Mapped(pairs), Node("node", items)]))
        several += [made, [made]]
        (state,) = parts(1) or [None]  # its own, perhaps
        if type(made) is Parts:
            made.said = state, items, pairs, draw(st.sampled_from([None, set_on]))
        elif type(made) is not Node:
            made.state = state
    return [*several, *reversed(several)]


@given(objects())
def test_objects_of_every_kind_are_as_pickle_has_them(value):
    """Both sides number what comes again: a part that one skips would make it another object."""
    assert shape(through(value)) == shape(pickle.loads(pickle.dumps(value)))


@pytest.mark.parametrize("state", [[], {}, (), None, False, 0, ""], ids=repr)
@pytest.mark.parametrize("setter", [None, set_on])
def test_a_state_of_nothing(state, setter):
    """It is one too, and what comes again behind it is itself."""
    node, other = Node("node"), Node("other")
    found, *rest = through([Parts(state=state, setter=setter), node, other, node])
    assert found.given == ([] if state is None else [("set" if setter else "state", state)])
    assert rest == [node, other, node]
    assert rest[0] is rest[2]


# --- Django's ---------------------------------------------------------------------------


def test_models(default):
    author = Author.objects.using(default).create(name="Ada")
    found = through([author, author, Article(name="new", author=author)])
    assert found[0] == author
    assert found[0]._state.db == default
    assert not found[0]._state.adding
    assert found[0] is found[1] is found[2].author
    assert found[2]._state.adding
    deferred = Author.objects.using(default).defer("name").get()
    assert through(deferred).get_deferred_fields() == {"name"}


def test_queries(default):
    """What the parts of a queryset are, the whole is not: pickled it would be run."""
    author = Author.objects.using(default).create(name="Ada")
    for n in range(5):
        Article.objects.using(default).create(name=f"Name {n}", rank=n, author=author)
    articles = Article.objects.using(default)
    for queryset in (
        articles.filter(Q(rank__gt=1) | ~Q(name="x"), author__name="Ada").order_by("-rank"),
        articles.annotate(lower=Lower("name"), more=F("rank") + 1).filter(more__in=[2, 3]),
        articles.values("author").annotate(number=Count("pk")).order_by(),
        articles.filter(pk__in=articles.filter(rank__lt=2)),
        articles.select_related("author").only("name", "author__name"),
        articles.extra(select={"twice": "rank * 2"}),
    ):
        copy = queryset.all()
        copy.query = through(queryset.query)
        assert str(copy.query) == str(queryset.query)
        assert list(copy) == list(queryset)
    lookups = through((Prefetch("tags", Tag.objects.using(default).order_by("name")),))
    assert lookups[0].prefetch_to == "tags"


def test_exceptions(default):
    for error in (
        ValueError("a", 1),
        functions.Slotted("slotted", 404),
        Article.DoesNotExist("none"),
        KeyError(("a", 1)),
        OSError(2, "no"),
        ExceptionGroup("several", [ValueError(1)]),
    ):
        error.add_note("noted")
        found = through(error)
        assert (type(found), repr(found.args), found.__notes__) == (type(error), repr(error.args), ["noted"])
    with packing(as_json=True):
        doubled = pack_error(functions.Doubled(3)).open()
        strange = pack_error(functions.Strange("this", "that")).open()
    assert (str(doubled), doubled.code) == ("code 3", 3)
    assert "tests.functions.Strange: this and that" in str(strange)


# --- What is refused --------------------------------------------------------------------


def outer():
    def inner():
        pass

    return inner


class Within:
    class Deeper:
        pass


def test_classes_in_classes_have_names():
    assert through(Within.Deeper) is Within.Deeper


renamed = functions.rank


def shadowed():
    pass


first_shadowed = shadowed


def shadowed():
    pass


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda row: row, "not what is found under"),
        (outer(), "not what is found under"),
        (first_shadowed, "not what is found under"),
        (threading.Lock(), "lock"),
        ((number for number in ()), "generator"),
        (json, "module"),
    ],
    ids=["lambda", "closure", "shadowed", "lock", "generator", "module"],
)
def test_what_has_no_name(value, says):
    for each in (value, [value], {"a": (value,)}, partial(functions.first, value)):
        with pytest.raises(TypeError, match=says):
            wire.written(each)


def test_what_a_script_defines(monkeypatch):
    monkeypatch.setattr(functions.rank, "__module__", "__main__")
    with pytest.raises(wire.NotByName, match="not found under a name in a module"):
        wire.written(functions.rank)


def test_open_files(tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(TypeError, match="TextIOWrapper"):
        wire.written({"file": file})


class Posing:
    """Says that it is found where something else is."""

    def __reduce__(self):
        return "VALUES"


def test_what_poses_as_another():
    with pytest.raises(wire.NotByName, match="not what is found under"):
        wire.written(Posing())


def test_what_is_not_there_is_named():
    text = wire.written(functions.rank).replace("rank", "no_such_function")
    with pytest.raises(AttributeError, match="no_such_function"):
        wire.read(text)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        wire.read(re.sub(r"tests\.functions", "no_such_module", wire.written(functions.rank)))


def test_it_is_as_pickle_has_it():
    """Where both can, both come to the same."""
    for value in VALUES:
        try:
            pickled = pickle.dumps(value)
        except pickle.PicklingError:  # a type that is not where it says
            continue
        assert through(value) == pickle.loads(pickled)
