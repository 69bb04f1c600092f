"""``manage.py parallel_map app.Model path.to.function``: a function over every row, on all cores, from the shell."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from django.apps import apps
from django.core.exceptions import FieldError, ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.core.serializers.json import DjangoJSONEncoder
from django.db.models import Model, Q, QuerySet
from django.utils.module_loading import import_string

from parallel_orm.errors import ParallelORMError
from parallel_orm.failures import Failure, message_of
from parallel_orm.family import EachKnobs, MapCall, options_of
from parallel_orm.keeping import Nothing
from parallel_orm.options import Progress
from parallel_orm.report import Report

Rows = QuerySet[Any, Any]

#: A line of progress is written each time that so many percent more are done.
PERCENT = 5
#: The arguments of ``parallel_each()`` that are options of the same name.
KNOBS = ("threads", "executor", "chunk_size", "batched", "consistent", "on_error", "max_failures", "retries", "timeout")
#: The exit status of a program that Ctrl-C has ended.
INTERRUPTED = 130
#: What the shell calls True and False.
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Command(BaseCommand):
    """Calls a function with every row of a model, as ``parallel_each()`` does; ends with 1 where something failed."""

    help = (
        "Calls a function with every row of a model, on all cores, for what the function does, and reports what "
        "happened. Ends with status 0 where all rows succeeded, else with 1."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("model", help="The model, as app_label.Model; its rows are those of its default manager.")
        add("function", help="The dotted path of a function of one row, as shop.tasks.resize.")

        rows = parser.add_argument_group("which rows")
        add = rows.add_argument
        add_condition = partial(add, action="append", default=[], metavar="LOOKUP=VALUE")
        add_condition(
            "--filter",
            help="Only rows that meet this, as in filter(): rating__gte=3, name__in=a,b, author__isnull=true. May be "
            "given several times; rows meet all.",
        )
        add_condition("--exclude", help="No rows that meet this, as in exclude(). May be given several times.")
        add(
            "--order-by",
            action="append",
            default=[],
            metavar="FIELD",
            help="Which rows come first, for --limit: rating, or backwards =-rating. May be given several times. "
            "Without --limit rows are done in no order.",
        )
        add("--limit", type=int, metavar="N", help="Only the first N rows: to try it.")
        add("--using", metavar="ALIAS", help="The database. By default that which the router says.")

        work = parser.add_argument_group("who works")
        add = work.add_argument
        add("--processes", type=int, metavar="N", help="How many processes. By default as many as there are cores.")
        add("--threads", type=int, metavar="N", help="Instead of processes so many threads, for functions that wait.")
        add(
            "--executor",
            metavar="NAME",
            help='"inline", "threads", "processes", a name of the setting EXECUTORS, or a dotted path.',
        )
        add("--chunk-size", type=int, metavar="N", help="Rows a chunk. By default as many as take their time.")
        add("--batched", action="store_true", help="Call the function with lists of at most --chunk-size rows.")
        add("--consistent", action="store_true", help="Read all rows as of one moment (PostgreSQL).")

        fails = parser.add_argument_group("what becomes of rows that fail")
        add = fails.add_argument
        add(
            "--on-error",
            choices=("raise", "skip", "collect"),
            default="raise",
            help='"raise" (the default): the first one ends it. "skip", or "collect": the others go on.',
        )
        add("--max-failures", type=int, metavar="N", help="End it when more have failed than so many.")
        add("--retries", type=int, default=0, metavar="N", help="How often rows and lost chunks are tried again.")
        add("--timeout", type=float, metavar="SECONDS", help="How long a chunk may take, before it is ended.")

        told = parser.add_argument_group("what is told")
        add = told.add_argument
        add("--dry-run", action="store_true", help="Tell how the rows would be cut into chunks; call nothing.")
        add("--no-progress", action="store_true", help="No bar, and no lines of progress; saves a COUNT.")
        add("--report-html", type=Path, metavar="PATH", help="Write the report to this HTML file, with a timeline.")
        add("--failures", type=Path, metavar="PATH", help="Write key and error of each failure to this file, as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Do it."""
        queryset = queryset_of(options)
        knobs = {name: options[name] for name in KNOBS}
        progress = self._progress(silent=options["no_progress"] or options["verbosity"] == 0)
        with refusals():
            asked = options_of("parallel_map", EachKnobs, options["processes"], knobs, ordered=False, progress=progress)
            call = MapCall("parallel_each", [queryset], function_of(options["function"]), asked, Nothing)
        if options["dry_run"]:
            self.stdout.write(f"{call.plans[0]}\n  workers:  {call.choice.number} ({call.choice.kind})")
            return
        with written(options["report_html"], options["failures"], call.report):
            try:
                report = call.seen_through()
            except (Exception, KeyboardInterrupt) as error:
                self._tell(call.report, options)
                if not isinstance(error, KeyboardInterrupt):
                    raise CommandError(told_of(error)) from error
                if not self._called_from_command_line:  # type: ignore[attr-defined]
                    raise
                raise CommandError("interrupted; what was under way is lost.", returncode=INTERRUPTED) from error
            self._tell(report, options)
        if report.failed:
            raise CommandError(f"{report.failed:,} failed{what_they_are(report)}")

    def _tell(self, report: Report, options: dict[str, Any]) -> None:
        if options["verbosity"]:
            self.stdout.write(str(report))
            for sentence in report.advice():
                self.stdout.write(f"advice: {sentence}")

    def _progress(self, *, silent: bool) -> Progress:
        if silent:
            return None
        if self.stderr.isatty() and find_spec("tqdm"):
            return True
        return in_lines(lambda line: self.stderr.write(line, lambda text: text))  # which is no error


def queryset_of(options: dict[str, Any]) -> Rows:
    """Return the rows that are asked for; refuse what there is not."""
    rows: Rows = model_of(options["model"])._default_manager.all()
    if options["using"] is not None:
        rows = rows.using(options["using"])
    conditions = [condition_of(rows, "--filter", text) for text in options["filter"]]
    if conditions:
        rows = rows.filter(*conditions)
    for text in options["exclude"]:
        rows = rows.exclude(condition_of(rows, "--exclude", text))
    if options["order_by"]:
        try:
            rows = rows.order_by(*options["order_by"])
        except FieldError as error:
            raise CommandError(f"--order-by: {error}") from error
    limit = options["limit"]
    if limit is not None and limit < 1:
        raise CommandError(f"--limit must be at least 1, not {limit}.")
    return rows if limit is None else rows[:limit]


def model_of(label: str) -> type[Model]:
    """Return the model of this label; refuse what is none, and say which there are."""
    try:
        return apps.get_model(label)
    except (LookupError, ValueError) as error:
        app, _, _ = label.partition(".")
        known = sorted(model._meta.label for model in apps.get_models())
        near = [each for each in known if each.startswith(f"{app}.")] or known
        raise CommandError(f"{label!r} is no app_label.Model: {error} There are {', '.join(near)}.") from error


def function_of(path: str) -> Callable[[Any], object]:
    """Return the function of this dotted path; refuse what is none."""
    try:
        function: Callable[[Any], object] = import_string(path)
    except ImportError as error:
        raise CommandError(
            f"{path!r} cannot be imported: {error}. Give the dotted path of a function of a module, as "
            "shop.tasks.resize, and run this where manage.py is."
        ) from error
    return function


def condition_of(rows: Rows, option: str, text: str) -> Q:
    """Return a condition from ``lookup=value``; refuse what the model does not have, and values that are none."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise CommandError(f"{option} {text!r} is not lookup=value, as rating__gte=3.")
    try:
        lookups, *_ = rows.query.solve_lookup_type(name)
        condition = Q((name, value_of(lookups[-1] if lookups else "exact", value)))
        rows.filter(condition)
    except (FieldError, ValidationError, ValueError, TypeError) as error:
        problem = " ".join(error.messages) if isinstance(error, ValidationError) else str(error)
        raise CommandError(f"{option} {text!r}: {problem}") from error
    return condition


def value_of(lookup: str, text: str) -> Any:
    """Return what a lookup takes, as far as it is no text that the field itself reads."""
    if lookup in ("in", "range"):
        return text.split(",")
    if lookup == "isnull":
        if text.lower() not in WORDS:
            raise ValueError(f"isnull takes true or false, not {text!r}.")
        return WORDS[text.lower()]
    return text


@contextmanager
def refusals() -> Iterator[None]:
    """Within: what the library refuses is an error of the command."""
    try:
        yield
    except ParallelORMError as error:
        raise CommandError(str(error)) from error


@contextmanager
def written(page: Path | None, failures: Path | None, report: Report) -> Iterator[None]:
    """Afterwards the report is in these files, however it ended. They are opened before anything is done."""
    with ExitStack() as stack:
        if page is not None:
            opened(page).close()
            stack.callback(report.to_html, page)
        if failures is not None:
            file = stack.enter_context(opened(failures))
            stack.callback(lambda: file.writelines(map(as_json, report.errors)))
        yield


def opened(path: Path) -> IO[str]:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}.") from error


def as_json(failure: Failure) -> str:
    """Return a failure as a line."""
    told = {"key": failure.key, "error": message_of(failure.error), "chunk": str(failure.chunk)}
    try:
        line = json.dumps(told, cls=DjangoJSONEncoder)
    except TypeError:  # a key of a kind of the user's own
        line = json.dumps(told | {"key": str(failure.key)})
    return f"{line}\n"


def in_lines(write: Callable[[str], object]) -> Callable[[int, int | None], None]:
    """Return what writes a line each time that a few percent more are done."""
    last = -1

    def tell(done: int, total: int | None) -> None:
        nonlocal last
        percent = 100 * done // total if total else 100
        if percent // PERCENT > last:
            last = percent // PERCENT
            write(f"{done:,} of {total or 0:,} rows ({percent}%)")

    return tell


def told_of(error: BaseException) -> str:
    """Return an exception with its notes and the worker's traceback."""
    notes = getattr(error, "__notes__", ())
    return "\n".join([message_of(error), *notes, *([str(error.__cause__)] if error.__cause__ else [])])


def what_they_are(report: Report) -> str:
    """Return the first failures, for a message."""
    shown = [f"\n{failure}" for failure in report.errors[:5]]
    return f":{''.join(shown)}" + ("\n..." if len(report.errors) > len(shown) else "")
