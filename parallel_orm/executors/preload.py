"""Imported once by multiprocessing's fork server: workers that it forks find Django set up already.

Nothing else may import this module: it acts when it is imported, and the whole package must be there by then. It only
saves time. A worker whose server could not do it (it was started before by somebody else, or the settings are not in a
module) sets Django up itself.
"""

from __future__ import annotations

import os
import sys

from parallel_orm import capsule
from parallel_orm.executors.processes import PATH_VARIABLE


def prepare() -> None:
    """Find modules where the caller finds them, and set Django up by the settings module of the environment."""
    import django
    from django.db import connections

    sys.path += [entry for entry in os.environ.pop(PATH_VARIABLE).split(os.pathsep) if entry not in sys.path]
    if "DJANGO_SETTINGS_MODULE" in os.environ:
        django.setup()
        for connection in connections.all(initialized_only=True):
            # What an AppConfig.ready() opened must not be shared by all workers; a pool's threads would not be there.
            connection.close()
            if hasattr(connection, "close_pool"):
                connection.close_pool()


if PATH_VARIABLE in os.environ:
    try:
        prepare()
    except Exception as error:
        # Django cannot be set up twice, so each worker can only repeat what went wrong here.
        capsule.failed_before = error
