"""Four queries side by side, and what it costs to start a query that was not worth it."""

from __future__ import annotations

from collections import Counter

from benchmarks.measure import alternate, show, timed, typical
from benchmarks.models import Article, table

#: Seconds that the server spends on a slow query.
SECONDS = 0.05
#: Trivial queries a round.
TRIVIAL = 200


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    rounds = rounds or 21
    for alias in databases:
        with table(alias, rows or 1):
            if alias == "postgres":
                side_by_side(alias, rounds)
            trivial(alias, rounds)


def side_by_side(alias: str, rounds: int) -> None:
    slow = Article.objects.using(alias).filter(pk=1).extra(where=[f"pg_sleep({SECONDS}) IS NOT NULL"])

    def started_together() -> list[list[Article]]:
        started = [slow.all().start_fetch() for _ in range(4)]
        return [list(queryset) for queryset in started]

    def one_after_another() -> list[list[Article]]:
        return [list(slow.all()) for _ in range(4)]

    assert started_together() == one_after_another()  # and the connections are there
    taken = alternate(
        {
            "the slowest alone": timed(lambda: list(slow.all())),
            "one after another": timed(one_after_another),
            "started together": timed(started_together),
        },
        rounds,
    )
    title = f"Four queries of {SECONDS * 1000:.0f} ms, {alias}"
    show(title, taken, ["the slowest alone", "one after another"])


def trivial(alias: str, rounds: int) -> None:
    one = Article.objects.using(alias).filter(pk=1)
    reasons: Counter[str | None] = Counter()

    def inline() -> None:
        list(one.all())

    def started() -> None:
        queryset = one.all().start_fetch()
        list(queryset)
        reason = queryset.background["fetch"].reason
        reasons[None if reason is None else reason[:]] += 1

    def share(reason: str | None) -> str:
        return f"{reasons[reason] / reasons.total():.0%}"

    variants = {
        "inline": typical(timed(inline), TRIVIAL),
        "started, then used at once": typical(timed(started), TRIVIAL),
    }
    alternate(variants, 1)
    reasons.clear()
    taken = alternate(variants, rounds)
    show(f"A trivial query by primary key, {alias}", taken, ["inline"], unit="microseconds", factor=1e6)
    print(f"Of those started, a thread ran {share(None)} and the caller itself {share('stolen')}.\n")
