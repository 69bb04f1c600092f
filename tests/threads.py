"""Gives the background threads something to do, and waits for it."""

import threading
import time
from concurrent.futures import Future

from asgiref.sync import SyncToAsync
from django.db import connections

from parallel_orm.executors import threads


def submit(function, *args):
    """Have a background thread call this; return its future."""
    future = Future()

    def call(_):
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threads.background_threads().put(call)
    return future


def all_done():
    """Return when the background threads have done all that was asked of them.

    An answer is there a moment before its thread is free. Who starts a read in that moment finds the thread busy: it
    is taken by whoever needs it then, on their own connection, and is bound by no deadline.
    """
    pool, end = threads._pool, time.monotonic() + 30
    while pool is not None and pool._asked:
        assert time.monotonic() < end, "a background thread is held"
        threading.Event().wait(0.001)


def async_thread_closed():
    """Close what a test left open in the thread that Django's async methods share, in all tests of this process.

    Its server may be gone by the next test, or count who is connected.
    """
    thread = SyncToAsync.single_thread_executor
    if thread._threads:
        thread.submit(connections.close_all).result(30)
