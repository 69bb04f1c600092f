"""Gives the background threads something to do, and waits for it."""

from concurrent.futures import Future

from parallel_orm.executors.threads import background_threads


def submit(function, *args):
    """Have a background thread call this; return its future."""
    future = Future()

    def call():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    background_threads().put(call)
    return future
