"""Django settings of the tests, in the process that runs pytest and in its workers.

Nothing is looked for or started here: ``DATABASES`` comes from the environment,
where ``tests.conftest`` put it. Its names are those of databases that do not
exist, as in a project whose tests must not touch the real ones; what reaches a
test database was told so by the caller.
"""

from __future__ import annotations

import json
import os
from typing import Any

from tests import servers

servers.stand_in_for_mysqlclient()

# Without the environment (a type checker, a script) there is only what needs no server.
_WITHOUT_SERVERS: dict[str, Any] = {
    alias: {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"} for alias in ("default", "other", "memory")
}

DATABASES: dict[str, Any] = (
    json.loads(os.environ["PARALLEL_ORM_TEST_DATABASES"])
    if "PARALLEL_ORM_TEST_DATABASES" in os.environ
    else _WITHOUT_SERVERS
)

SECRET_KEY = "tests"
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "parallel_orm",
    "tests.testapp",
    "tests.manual",
]
# Of a worker that a test starts.
if "PARALLEL_ORM_TEST_OPTIONS" in os.environ:
    PARALLEL_ORM = json.loads(os.environ["PARALLEL_ORM_TEST_OPTIONS"])
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
