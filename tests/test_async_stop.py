"""What async code leaves half-way: nothing runs on, no thread is held, no connection stays, no task hangs."""

from __future__ import annotations

import asyncio

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, connections
from django.http import HttpResponse, JsonResponse
from django.test import AsyncClient, override_settings
from django.urls import path

from parallel_orm import errors, events, start
from tests.asynchronous import run
from tests.test_stop import (
    WAIT,
    Site,
    _nothing_is_left,
    _taught,
    all_threads_free,
    answer_async_to,
    articles,
    drained,
    heard,
    long,
    wait_until_gone,
    wait_until_running,
)
from tests.testapp.models import Article, Tag

__all__ = ["_nothing_is_left", "_taught", "articles"]  # fixtures


@pytest.fixture
def many(articles, alias):
    Article.objects.using(alias).bulk_create(Article(name=f"name {number}") for number in range(50))
    return articles


# --- A view --------------------------------------------------------------------------------


async def page(request):
    """Starts three reads and awaits them, each in its way."""
    rows = Article.objects.using(Site.alias)
    articles, tags = start(rows.order_by("pk").prefetch_related("tags"), Tag.objects.using(Site.alias).all())
    first, count = rows.order_by("pk").start_first(), rows.all().start_count()
    names = [(article.name, [tag.name for tag in article.tags.all()]) async for article in articles]
    return JsonResponse(
        {
            "names": names,
            "tags": [tag.name async for tag in tags],
            "first": (await first).name,
            "count": await count.acount(),
        }
    )


async def leaving(request):
    """Starts two of a minute: one that it gives up to await, one that it never looks at."""
    given_up, Site.started = (long(Article.objects.using(Site.alias)).start_fetch() for _ in range(2))
    await asyncio.to_thread(wait_until_running, Site.alias, 2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await given_up.background["fetch"]
    Site.given_up = given_up
    return HttpResponse("here")


async def failing(request):
    Site.started = long(Article.objects.using(Site.alias)).start_fetch()
    await asyncio.to_thread(wait_until_running, Site.alias)
    raise ZeroDivisionError


urlpatterns = [path("page", page), path("leaving", leaving), path("failing", failing)]


@pytest.fixture
def site(articles, alias, monkeypatch):
    monkeypatch.setattr(Site, "alias", alias)
    monkeypatch.setattr(Site, "started", None)
    monkeypatch.setattr(Site, "given_up", None, raising=False)
    connections[alias].close()
    with override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"]):
        yield


async def visit(url):
    response = await AsyncClient().get(url)
    await sync_to_async(connections.close_all)()
    return response


def test_a_view_that_awaits_what_it_started(site):
    response = run(visit("/page"))
    assert response.json() == {"names": [["one", ["red"]]], "tags": ["red"], "first": "one", "count": 1}


def test_several_visits_at_once(site):
    async def visits():
        return await asyncio.gather(*[visit("/page") for _ in range(10)])

    assert {response.json()["count"] for response in run(visits())} == {1}


def test_a_view_that_leaves_some(site, alias):
    """Both are gone from the server with their request: that which was given up is its request's as well."""
    with heard(events.abandoned) as abandoned:
        assert answer_async_to("/leaving") == b"here"
        wait_until_gone(alias)
        all_threads_free()
        drained()
        assert [event.verb for event in abandoned] == ["fetch", "fetch"]
    assert Site.started.background["fetch"].was_left
    assert Site.given_up.background["fetch"].was_left


def test_a_view_that_fails(site, alias):
    assert b"Server Error" in answer_async_to("/failing")
    wait_until_gone(alias)
    assert Site.started.background["fetch"].was_left


def test_a_visitor_who_leaves(site, alias):
    """The task of the request is cancelled while it waits, as a server does when the visitor hangs up."""

    async def main():
        task = asyncio.ensure_future(visit("/waiting"))
        await asyncio.to_thread(wait_until_running, alias)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def waiting(request):
        return HttpResponse([row.name async for row in long(Article.objects.using(alias)).start_fetch()])

    with override_settings(ROOT_URLCONF=(path("waiting", waiting),)):
        run(main())
        wait_until_gone(alias)


# --- Loops that are left --------------------------------------------------------------------


def test_an_async_loop_that_is_left(many, alias):
    """What was fetched stays; the next loop has it all, by no other query."""

    async def main():
        rows = many.start_fetch()
        async for row in rows:
            assert row.name == "one"
            break
        return len([row async for row in rows])

    assert run(main()) == 51


def test_aiterator(many):
    """As Django's: it knows nothing of what was started. (One that is left half-way leaves Django's cursor open.)"""

    async def main():
        rows = many.start_count()
        return len([row.pk async for row in rows.aiterator(chunk_size=10)]), await rows.acount()

    assert run(main()) == (51, 51)


def test_a_generator_of_ones_own_that_is_closed(many, alias):
    """It is closed while its query runs: nobody waits for that any more, and it is cancelled when it is dropped."""

    async def names():
        async for row in long(many.all()).start_fetch():
            yield row.name

    async def main():
        generator = names()
        task = asyncio.ensure_future(anext(generator))
        await asyncio.to_thread(wait_until_running, alias)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await generator.aclose()

    run(main())
    wait_until_gone(alias)


# --- Awaits that end otherwise ----------------------------------------------------------------


def test_a_timeout_around_an_await(articles, alias):
    """Ends the await and not the query, which can be awaited again or cancelled."""

    async def main():
        pending = long(articles).start_first()
        await asyncio.to_thread(wait_until_running, alias)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await pending
        assert not pending.done()
        pending.cancel()
        with pytest.raises(errors.Cancelled):
            await pending

    run(main())
    wait_until_gone(alias)


@pytest.mark.parametrize("started", [True, False], ids=["started", "plain"])
def test_a_sibling_that_fails(articles, alias, started):
    """A TaskGroup cancels the others: those who awaited a read are free at once, and what nobody holds is cancelled."""

    async def slow():
        if started:
            return await long(articles.all()).start_first()
        return await long(articles.all()).afirst()

    async def fail():
        await asyncio.to_thread(wait_until_running, alias, 2)
        return await articles.extra(where=["no_such_column = 1"]).acount()

    async def main():
        async with asyncio.TaskGroup() as group:
            group.create_task(slow())
            group.create_task(slow())
            group.create_task(fail())

    with pytest.raises(ExceptionGroup) as raised:
        run(asyncio.wait_for(main(), WAIT))
    (error,) = raised.value.exceptions
    assert isinstance(error, DatabaseError)
    wait_until_gone(alias)


def test_two_who_await_one(articles, alias):
    """One of them is cancelled: the other one has the answer."""

    async def main():
        pending = articles.start_first()

        async def wait():
            return await pending

        one, other = asyncio.ensure_future(wait()), asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        one.cancel()
        return (await asyncio.gather(one, other, return_exceptions=True))[1].name

    assert run(main()) == "one"
