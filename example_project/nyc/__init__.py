"""The project. Its Celery app is Celery's current one wherever the project is imported, if Celery is there."""

from importlib.util import find_spec

if find_spec("celery"):
    from nyc.celery import app as celery

    __all__ = ["celery"]
