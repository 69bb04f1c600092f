#!/usr/bin/env python
"""Django's command line for the example project."""

import os
import sys


def main() -> None:
    """Settle which database is meant, then hand over to Django."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "nyc.settings")
    try:
        from django.core.management import execute_from_command_line
    except ImportError as exc:
        raise SystemExit("Django is not installed. In the folder above: python -m pip install -e '.[demo]'") from exc
    from nyc import databases

    if sys.argv[1:2] == ["runserver"]:
        os.environ.setdefault("DJANGO_DEBUG", "1")
    databases.settle(sys.argv, os.environ)
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
