"""Django settings of the benchmarks, in the process that measures and in its workers.

``DATABASES`` comes from the environment, where ``benchmarks.databases`` put it, so that every worker finds the same.
"""

from __future__ import annotations

import json
import os
from typing import Any

from tests import servers

servers.stand_in_for_mysqlclient()

DATABASES: dict[str, Any] = json.loads(os.environ.get("PARALLEL_ORM_BENCHMARK_DATABASES", "{}"))
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["parallel_orm", "benchmarks"]
SECRET_KEY = "benchmarks"
TIME_ZONE = "UTC"
USE_TZ = True
