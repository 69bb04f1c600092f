"""The WSGI application, for `runserver` and for servers."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "nyc.settings")
application = get_wsgi_application()
