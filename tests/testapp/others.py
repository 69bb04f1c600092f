"""Models of fields that others have written. They have no tables: a test makes those for itself."""

from __future__ import annotations

from django.db import models
from django_countries.fields import CountryField
from model_utils import Choices, FieldTracker
from model_utils import fields as utils


class Country(models.Model):
    """Descriptors of a class of their own, for one country and for several."""

    name = models.CharField(max_length=20)
    country = CountryField()
    maybe = CountryField(null=True)
    several = CountryField(multiple=True)

    class Meta:
        app_label = "testapp"
        managed = False


class Post(models.Model):
    """A descriptor that makes one value of two columns, and fields that fill themselves."""

    STATUS = Choices("draft", "published")

    status = utils.StatusField()
    text = utils.SplitField()
    key = utils.UUIDField(primary_key=False)
    token = utils.UrlsafeTokenField(max_length=20)
    created = utils.AutoCreatedField()
    modified = utils.AutoLastModifiedField()
    after = models.ForeignKey("self", models.CASCADE, null=True)

    class Meta:
        app_label = "testapp"
        managed = False


class Monitored(models.Model):
    """Listens to its instances as they are made."""

    name = models.CharField(max_length=20)
    changed = utils.MonitorField(monitor="name")

    class Meta:
        app_label = "testapp"
        managed = False


class Tracked(models.Model):
    """Has an ``__init__`` that is Django's by name, and descriptors around Django's."""

    name = models.CharField(max_length=20)
    country = CountryField()
    after = models.ForeignKey("self", models.CASCADE, null=True)

    tracker = FieldTracker()

    class Meta:
        app_label = "testapp"
        managed = False
