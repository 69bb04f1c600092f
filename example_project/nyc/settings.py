"""Settings for development: never run a site in public with these."""

from __future__ import annotations

import os
from pathlib import Path

from nyc import broker, databases

BASE_DIR = Path(__file__).resolve().parent.parent

# `manage.py runserver` sets this. Elsewhere it is off: with it Django keeps the SQL of every query,
# which a load of 336,776 rows pays for, and which would spoil what the demo measures.
DEBUG = os.environ.get("DJANGO_DEBUG") == "1"
SECRET_KEY = "for-development-only"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]
INTERNAL_IPS = ["127.0.0.1", "::1"]

INSTALLED_APPS = [
    "parallel_orm",
    "flights",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "nyc.urls"
WSGI_APPLICATION = "nyc.wsgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.debug",
                "django.template.context_processors.request",
            ],
        },
    },
]

DATABASES = databases.configuration()
if len(DATABASES) > 1:
    DATABASE_ROUTERS = ["nyc.routers.Shards"]
    PARALLEL_ORM = {"GROUPS": {"shards": [alias for alias in DATABASES if alias != "default"]}}
globals().update(broker.configuration())
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

LANGUAGE_CODE = "en-us"
USE_TZ = True
TIME_ZONE = "America/New_York"
USE_THOUSAND_SEPARATOR = True
