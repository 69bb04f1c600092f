"""Models of fields that no other test needs. They have no tables: a test makes those for itself."""

from __future__ import annotations

from django.db import models


class Columns(models.Model):
    """A field of each type of Django's that no other model here has."""

    id = models.SmallAutoField(primary_key=True)
    small = models.SmallIntegerField(default=-1)
    big = models.BigIntegerField(default=2**40)
    positive = models.PositiveIntegerField(default=2)
    positive_small = models.PositiveSmallIntegerField(default=3)
    positive_big = models.PositiveBigIntegerField(default=4)
    slug = models.SlugField(default="a-b")
    email = models.EmailField(default="ada@example.com")
    url = models.URLField(default="https://example.com/")
    path = models.FilePathField(path="/", default="/etc")
    image = models.ImageField(default="a.png")
    empty = models.ImageField(null=True)
    by_database = models.IntegerField(db_default=7)
    moment = models.DateTimeField(auto_now_add=True)
    one = models.OneToOneField("self", models.CASCADE, null=True)

    class Meta:
        app_label = "testapp"
        managed = False
        order_with_respect_to = "one"


class Measured(models.Model):
    """Listens to itself, for what its image measures."""

    id = models.AutoField(primary_key=True)
    image = models.ImageField(width_field="width", default="")
    width = models.IntegerField(null=True)

    class Meta:
        app_label = "testapp"
        managed = False
