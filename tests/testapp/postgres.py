"""Models of fields that PostgreSQL has. They have no tables: a test makes those for itself."""

from __future__ import annotations

from django.contrib.postgres import fields, search
from django.db import models

from parallel_orm import ParallelManager


class ByList(models.Model):
    """Its key is one that Python does not hash."""

    code = fields.ArrayField(models.IntegerField(), primary_key=True)

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"
        managed = False


class Lists(models.Model):
    numbers = fields.ArrayField(models.IntegerField())
    days = fields.ArrayField(fields.ArrayField(models.DateField()), null=True)
    keys = fields.ArrayField(models.UUIDField(), null=True)
    words = search.SearchVectorField(null=True)

    class Meta:
        app_label = "testapp"
        managed = False


class Spans(models.Model):
    integers = fields.IntegerRangeField()
    big = fields.BigIntegerRangeField(null=True)
    decimals = fields.DecimalRangeField(null=True)
    days = fields.DateRangeField(null=True)
    moments = fields.DateTimeRangeField(null=True)

    class Meta:
        app_label = "testapp"
        managed = False


class Pairs(models.Model):
    pairs = fields.HStoreField()

    class Meta:
        app_label = "testapp"
        managed = False
