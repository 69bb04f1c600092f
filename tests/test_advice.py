"""What a report advises: a sentence where its numbers prove one, and nothing of a call that went well."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import pytest

from parallel_orm import errors, parallel_each
from parallel_orm.advice import RULES, in_words
from parallel_orm.chunks import Chunk
from parallel_orm.executors.processes import end_pools
from parallel_orm.failures import Failure
from parallel_orm.outcomes import Failed, Outcome
from parallel_orm.report import Call, Report, Span
from tests import functions
from tests.testapp.models import Article

MAP = Call("parallel_map", number=2)


def span(worker, began, ended, chunk=0, rows=100):
    return Span(worker, chunk, 1, rows, 0, began, ended, 0.0, ended - began, 0.0)


def report(**numbers):
    """A call of ten seconds, in which two processes computed all the time; with other numbers."""
    well = {
        "rows": 10_000,
        "chunks": 20,
        "succeeded": 10_000,
        "seconds": 10.0,
        "database_seconds": 1.0,
        "database_cpu_seconds": 0.5,
        "function_seconds": 18.0,
        "function_cpu_seconds": 18.0,
        "shipping_seconds": 0.1,
        "workers": {"1/MainThread": 5_000, "2/MainThread": 5_000},
        "timeline": [span("1", 0.1, 9.9), span("2", 0.1, 9.8, chunk=1)],
        "call": MAP,
    }
    return Report(**(well | numbers))


def failure(error, chunk=0, attempt=0):
    return Failure.of(Failed(None, 7, error), Chunk(chunk, "default", attempt=attempt))


def test_nothing_is_said_of_a_call_that_went_well():
    assert report().advice() == []
    assert Report().advice() == []


QUICK = {"database_seconds": 0.02, "database_cpu_seconds": 0.01, "function_seconds": 0.1, "function_cpu_seconds": 0.1}
IDLE = {"function_seconds": 1.0, "function_cpu_seconds": 1.0}
UNEVEN = {
    "timeline": [span("1", 0.1, 9.9, chunk=4, rows=3), span("2", 0.1, 1.0)],
    "function_seconds": 10.0,
    "function_cpu_seconds": 10.0,
}

#: The numbers that prove it, beside those of a call that went well, and what is said then.
SAID = {
    "a loop": (QUICK | {"seconds": 0.5}, "12 us a row: a loop over chunked_iterator() is faster, 120 ms or less"),
    "a loop, of lists": (
        QUICK | {"seconds": 0.5, "call": replace(MAP, batched=True)},
        "a loop over chunks() is faster",
    ),
    "a loop, as workers start slowly": (
        QUICK | {"seconds": 0.5, "timeline": [span("1", 0.45, 0.5)]},
        "instead of 500 ms, 450 ms of it before the first worker began",
    ),
    "the database": (
        {"database_seconds": 18.0, "function_seconds": 1.0},
        "the workers waited for it for 92% of their time, and more of them will not help",
    ),
    "instances": (
        {
            "database_seconds": 18.0,
            "database_cpu_seconds": 15.0,
            "function_seconds": 1.0,
            "call": replace(MAP, instances=True),
        },
        "map values_list() of these",
    ),
    "results to pack": (
        {"function_seconds": 9.5, "shipping_seconds": 9.5, "shipped_bytes": 312_000_000},
        "The results are 312.0 MB, and packing them took 48% of the workers' time: return less",
    ),
    "results to unpack": (
        {"caller_seconds": 8.0, "shipped_bytes": 5_000_000},
        "unpacking them took 80% of the caller's: return less of each row, plain numbers and text instead of objects,",
    ),
    "results, and what to do instead": (
        {"caller_seconds": 8.0, "shipped_bytes": 5_000_000},
        "instead of objects, combine them with parallel_reduce(), or use parallel_each() where none are needed.",
    ),
    "a reduction's results": (
        {"function_seconds": 9.5, "shipping_seconds": 9.5, "call": replace(MAP, verb="parallel_reduce")},
        "instead of objects.",
    ),
    "the caller's loop": (
        {"caller_seconds": 8.0, "shipped_bytes": 5_000_000, "call": replace(MAP, verb="parallel_imap")},
        "The loop over the results took 80% of the time",
    ),
    "threads that compute": (
        {"function_cpu_seconds": 9.5, "call": replace(MAP, kind="threads")},
        "2 threads computed for 10 s in 10 s: as they compute one at a time, one of them would do. Use processes=.",
    ),
    "an uneven share": (
        UNEVEN,
        "One worker worked 1.8 times as long as all should have, and chunk 4 alone took 9.8 s for 3 rows: map the rows",
    ),
    "uneven lists": (UNEVEN | {"call": replace(MAP, batched=True)}, "make lists shorter, by a smaller chunk_size=."),
    "uneven chunks that stay whole": (UNEVEN | {"call": replace(MAP, parts=False)}, "add the primary key"),
    "small chunks": (
        IDLE | {"chunks": 1_000, "call": replace(MAP, chunk_size=10), "function_seconds": 10.0},
        "Chunks of 10 rows are too small: each was 11 ms of work, and its worker waited 8.7 ms for the next one.",
    ),
    "large chunks": (
        {"chunks": 3, "call": replace(MAP, number=8, chunk_size=4_000)},
        "3 chunks are work for 3 of 8 workers: use chunk_size=312.",
    ),
    "large lists": (
        {"chunks": 3, "call": replace(MAP, number=8, batched=True)},
        "3 lists are work for 3 of 8 workers: use chunk_size=312.",
    ),
    "connections": (
        {"chunks": 200, "call": replace(MAP, kind="threads", number=32), "function_cpu_seconds": 0.0},
        "Raise the setting CONNECTIONS to 32",
    ),
    "retries in vain": (
        {
            "retries": 6,
            "failed": 2,
            "call": replace(MAP, retries=3),
        },
        "retries=3 helped nothing: what failed was tried again 6 times",
    ),
    "retries": ({"retries": 500, "call": replace(MAP, retries=3)}, "500 times something was tried again"),
    "lost workers": (
        {"errors": [failure(errors.WorkerDied(1, -9))] * 3 + [failure(errors.WorkerDied(2, -9), 1)], "failed": 4},
        "2 chunks were lost with their workers: if these were out of memory",
    ),
    "slow chunks": (
        {"errors": [failure(errors.ChunkTimedOut(2.0))], "failed": 1},
        "1 chunks took longer than timeout=: use a smaller chunk_size=, or a longer timeout=.",
    ),
    "failures": (
        {
            "errors": [failure(ValueError()), failure(KeyError()), failure(ValueError())],
            "failed": 3,
            "call": replace(MAP, on_error="skip"),
        },
        "3 failed (2 ValueError, 1 KeyError): report.errors has",
    ),
    "a long snapshot": (
        {
            "seconds": 1200.0,
            "function_seconds": 2300.0,
            "function_cpu_seconds": 2300.0,
            "call": replace(MAP, consistent=True),
        },
        "consistent=True kept one snapshot for 20 min",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_proven_is_said(case):
    """And nothing else."""
    numbers, expected = SAID[case]
    [sentence] = report(**numbers).advice()
    assert expected in sentence
    assert sentence.endswith(".")


def test_each_rule_has_a_case():
    said = {rule for numbers, _ in SAID.values() for rule in RULES if rule(report(**numbers))}
    assert said == {*RULES}


#: Beside the numbers of a case that is said: what makes it unproven.
UNPROVEN = {
    "a loop, of a stream": ("a loop", {"call": replace(MAP, verb="parallel_imap")}),
    "a loop, where larger chunks would do": (
        "a loop",
        {"seconds": 3.0, "chunks": 100, "call": replace(MAP, chunk_size=10)},
    ),
    "a loop, as some failed": ("a loop", {"failed": 1}),
    "a loop, as some were tried again": ("a loop", {"retries": 1}),
    "a loop that would take about as long": ("a loop", {"function_seconds": 0.45}),
    "a core that others had": ("the database", {"function_cpu_seconds": 0.4}),
    "threads that waited for each other": (
        "the database",
        {
            "database_cpu_seconds": 4.5,
            "function_cpu_seconds": 4.0,
            "function_seconds": 4.0,
            "call": replace(MAP, kind="threads"),
        },
    ),
    "the database, that is quick": ("the database", {"database_seconds": 0.19, "seconds": 0.1, "function_seconds": 0}),
    "instances, that are none": ("instances", {"call": MAP}),
    "instances, of a slow function": ("instances", {"function_seconds": 15.0}),
    "instances, made soon": (
        "instances",
        {"database_cpu_seconds": 0.1, "database_seconds": 0.1, "function_seconds": 0.0, "shipping_seconds": 0.0},
    ),
    "a loop that is soon over": ("the caller's loop", {"caller_seconds": 0.1, "seconds": 0.1, "function_seconds": 0.1}),
    "threads that computed for a moment": (
        "threads that compute",
        {"seconds": 0.1, "database_cpu_seconds": 0.05, "function_cpu_seconds": 0.05},
    ),
    "a share that is nearly even": ("an uneven share", {"timeline": [span("1", 0.1, 9.9), span("2", 0.1, 4.0)]}),
    "small chunks, of one uneven share": ("small chunks", {"timeline": UNEVEN["timeline"]}),
    "small chunks, that are busy": ("small chunks", {"function_seconds": 18.0}),
    "small chunks, that are few": ("small chunks", {"chunks": 19, "function_seconds": 0.2, "database_seconds": 0.0}),
    "small lists": ("small chunks", {"call": replace(MAP, chunk_size=10, batched=True)}),
    "processes that nothing keeps busy": ("connections", {"call": replace(MAP, number=32)}),
    "few chunks for many threads": ("connections", {"chunks": 63}),
    "threads of a moment": ("connections", {"seconds": 0.05, "database_seconds": 0.0, "function_seconds": 0.1}),
    "results, where there are none": ("results to pack", {"call": replace(MAP, verb="parallel_each")}),
    "unpacking, of what was never packed": ("results to unpack", {"shipped_bytes": 0}),
    "threads that use several cores": ("threads that compute", {"function_cpu_seconds": 15.0}),
    "threads that wait": ("threads that compute", {"function_cpu_seconds": 2.0}),
    "a thread": ("threads that compute", {"workers": {"1/a": 10_000}, "function_seconds": 9.5}),
    "a worker that came late": ("an uneven share", {"timeline": [span("1", 0.1, 9.9), span("2", 9.0, 9.9)]}),
    "small chunks, of nobody's wish": ("small chunks", {"call": MAP}),
    "small chunks, that have work": ("small chunks", {"chunks": 200}),
    "large chunks, of no work": ("large chunks", {"function_seconds": 0.1, "seconds": 0.1, "database_seconds": 0.1}),
    "large chunks, of nobody's wish": ("large chunks", {"call": replace(MAP, number=8)}),
    "chunks of a row": ("large chunks", {"rows": 3}),
    "connections, of threads that were idle": ("connections", {"function_seconds": 11.0, "database_seconds": 0.0}),
    "retries of which some helped": ("retries in vain", {"retries": 7}),
    "retries of a whole chunk": ("retries in vain", {"errors": [failure(ValueError(), attempt=3)]}),
    "few retries": ("retries", {"retries": 99}),
    "a failure that was raised": ("failures", {"call": MAP}),
    "a long call": ("a long snapshot", {"call": MAP}),
    "a short snapshot": ("a long snapshot", {"seconds": 590.0, "function_seconds": 1100.0}),
}


@pytest.mark.parametrize("case", UNPROVEN)
def test_what_is_not_proven_is_not_said(case):
    said, numbers = UNPROVEN[case]
    proven, _ = SAID[said]
    [rule] = [rule for rule in RULES if rule(report(**proven))]
    assert rule(report(**(proven | numbers))) is None


#: What is true of any process.
ANYWHERE = {"instances", "retries in vain", "retries", "lost workers", "slow chunks", "failures"}


@pytest.mark.parametrize("case", sorted(SAID.keys() - ANYWHERE))
def test_of_a_call_in_the_callers_process(case):
    assert report(**SAID[case][0], reason="inline").advice() == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.0000004, "0.4 us"),
        (0.000012, "12 us"),
        (0.0034, "3.4 ms"),
        (1.25, "1.2 s"),
        (99, "99 s"),
        (150, "2 min"),
    ],
)
def test_times_are_for_people(seconds, words):
    assert in_words(seconds) == words


def test_skew_is_the_busiest_by_the_mean():
    assert Report().skew == 1.0
    assert report().skew == pytest.approx(1.0, abs=0.01)
    assert report(timeline=[span("1", 0, 9), span("2", 0, 1), span("2", 2, 4)]).skew == pytest.approx(9 / 6)
    assert "2 workers (skew 1.5);" in str(report(timeline=[span("1", 0, 9), span("2", 0, 3)]))
    assert "skew" not in str(report())


def test_who_took_the_time(monkeypatch):
    """By a clock that ticks whenever it is asked: what is between two outcomes is the workers', else the caller's."""
    monkeypatch.setattr("parallel_orm.report.perf_counter", count().__next__)
    monkeypatch.setattr("parallel_orm.report.time", count(100).__next__)
    report, chunk = Report(), Chunk(0, "default")
    outcomes = [Outcome(chunk, rows=1, began=100.5), Outcome(chunk, error=errors.WorkerDied(1, -9), stage="lost")]
    assert len([*report.watch(outcomes)]) == 2
    assert (report.seconds, report.caller_seconds) == (4, 2)
    assert [span.began for span in report.timeline] == [0.5, 1], "what was lost is drawn when that was known"


# --- Of real calls -----------------------------------------------------------------


@pytest.fixture
def articles(default):
    Article.objects.bulk_create(Article(name=f"name {n}", rank=n) for n in range(3_000))
    yield Article.objects.all()
    end_pools()


def test_it_travels_with_the_report(articles):
    results = articles.parallel_map(functions.rank, 2)
    assert pickle.loads(pickle.dumps(results)).report.advice() == results.report.advice()


def test_of_results_that_are_large(articles):
    report = articles.filter(rank__lt=100).parallel_map(functions.large, 2).report
    assert report.shipped_bytes > 100_000_000
    assert report.shipping_seconds > 0
    assert articles.filter(rank__lt=100).parallel_each(functions.large, 2).shipped_bytes < 10_000


def test_of_a_loop_that_takes_its_time(articles):
    """What the caller does between two results is its own time."""
    begun, clock = threading.Event(), []
    with articles.parallel_imap(functions.rank, threads=2, chunk_size=100) as stream:
        for _ in stream:
            if not clock:
                clock.append(begun.wait(0.01))
    assert stream.report.caller_seconds >= 0.01
    assert stream.report.caller_seconds <= stream.report.seconds


def test_of_threads_that_compute(articles):
    report = articles.filter(rank__lt=100).parallel_each(functions.compute, threads=2, chunk_size=10)
    assert 0 < report.function_cpu_seconds <= report.function_seconds * 1.1, "as far as two clocks agree"
    assert report.call.kind == "threads"


def test_of_functions_that_wait(articles):
    """What they wait for is no computing."""
    gate = threading.Barrier(2)
    report = articles.filter(rank__lt=10).parallel_each(
        lambda row: gate.wait(60) and threading.Event().wait(0.02), threads=2, chunk_size=1
    )
    assert report.function_cpu_seconds < report.function_seconds / 2


def test_what_was_asked_for(articles):
    def asked(queryset=articles, **knobs):
        return parallel_each([queryset], functions.nothing, **knobs).call

    def call(kind, number, **others):
        return Call("parallel_each", "nothing", "testapp.Article", kind, number, **others)

    assert asked(processes=2) == call("processes", 2, instances=True)
    assert asked(threads=3, chunk_size=7, retries=2) == call("threads", 3, chunk_size=7, retries=2, instances=True)
    with ThreadPoolExecutor(3) as given:
        assert asked(executor=given) == call("threads", 3, instances=True)
    assert asked(executor="inline", batched=True) == call("inline", 1, batched=True, instances=True, parts=False)
    assert asked(articles.values_list("name"), threads=1) == call("threads", 1, parts=False)
    failing = articles.parallel_each(functions.fail_on_three, threads=2, on_error="skip")
    assert failing.retry().call == failing.call
