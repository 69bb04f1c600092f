"""How the project's Celery workers are reached: over a folder, or over a broker that runs.

As with the database there is one switch, the environment variable `NYC_BROKER`, which `demo --at URL` sets, and worker
processes inherit. Without one it is a folder: nothing has to be installed or started, and it is for one worker on one
machine. A site would have Redis or RabbitMQ here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nyc.databases import DATA

FOLDER = "filesystem://"
"""With what the URL of a folder begins."""


def configuration() -> dict[str, Any]:
    """Celery's settings, as Django's settings have them."""
    url = os.environ.get("NYC_BROKER") or f"{FOLDER}{DATA / 'celery'}"
    common = {"CELERY_TASK_DEFAULT_QUEUE": "nyc", "CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP": True}
    if not url.startswith(FOLDER):
        # RabbitMQ keeps no results: they come back as messages.
        results = "rpc://" if url.startswith(("amqp", "pyamqp")) else url
        return common | {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": results}
    messages, control, results = (Path(url.removeprefix(FOLDER), name) for name in ("messages", "control", "results"))
    return common | {
        "CELERY_BROKER_URL": FOLDER,
        "CELERY_BROKER_TRANSPORT": "nyc.files:Transport",
        "CELERY_BROKER_TRANSPORT_OPTIONS": {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(control),
            "polling_interval": 0.02,
        },
        "CELERY_RESULT_BACKEND": f"nyc.files.Results+file://{results}",
    }
