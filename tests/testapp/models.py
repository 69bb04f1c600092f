"""Models of every kind of key, and managers of every kind of door."""

from __future__ import annotations

import uuid
from typing import Any

from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.contenttypes.models import ContentType
from django.db import models

from parallel_orm import ParallelManager, ParallelQuerySet
from parallel_orm.compat import AsyncManager


class Author(models.Model):
    name = models.CharField(max_length=100)
    born = models.IntegerField(null=True)

    objects = ParallelManager()


class Tag(models.Model):
    name = models.CharField(max_length=50)

    objects = ParallelManager()


class Article(models.Model):
    name = models.CharField(max_length=100)
    score = models.IntegerField(null=True)
    rank = models.IntegerField(default=0)
    published = models.DateTimeField(null=True)
    author = models.ForeignKey(Author, models.CASCADE, null=True, related_name="articles")
    tags = models.ManyToManyField(Tag, related_name="articles")
    labels = GenericRelation("testapp.Label", "object_id", "content_type")

    objects = ParallelManager()


class Indexed(models.Model):
    """Has an index for some orders and not for others."""

    name = models.CharField(max_length=50)
    score = models.IntegerField(null=True, db_index=True)
    rank = models.IntegerField(db_index=True)
    other = models.CharField(max_length=50, default="")

    objects = ParallelManager()

    class Meta:
        indexes = (models.Index(fields=["name", "rank"], name="indexed_name_rank"),)


class Label(models.Model):
    """Belongs to a row of any model."""

    text = models.CharField(max_length=10)
    content_type = models.ForeignKey(ContentType, models.CASCADE)
    object_id = models.BigIntegerField()
    content = GenericForeignKey("content_type", "object_id")

    objects = ParallelManager()


class PlainArticle(Article):
    """The same table by Django's own manager."""

    objects = models.Manager()

    class Meta:
        proxy = True


class RankedArticle(Article):
    """The same table with an order of its own."""

    objects = ParallelManager()

    class Meta:
        proxy = True
        ordering = ("-rank", "name")


class AsyncArticle(Article):
    """The same table by AsynchrORMous' manager."""

    objects = AsyncManager()

    class Meta:
        proxy = True


class ByUuid(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    number = models.IntegerField(default=0)

    objects = ParallelManager()


class ByText(models.Model):
    code = models.CharField(max_length=40, primary_key=True)
    number = models.IntegerField(default=0)

    objects = ParallelManager()


class ByMoment(models.Model):
    at = models.DateTimeField(primary_key=True)

    objects = ParallelManager()


class ByDecimal(models.Model):
    amount = models.DecimalField(max_digits=12, decimal_places=3, primary_key=True)

    objects = ParallelManager()


class ByWideDecimal(models.Model):
    amount = models.DecimalField(max_digits=30, decimal_places=10, primary_key=True)

    objects = ParallelManager()


class ByBytes(models.Model):
    """Has no table: MySQL and MariaDB have no such keys."""

    code = models.BinaryField(primary_key=True)
    number = models.IntegerField()

    objects = ParallelManager()

    class Meta:
        managed = False


class Shelf(models.Model):
    """Has whatever table a test makes for it, in another schema."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    text = models.TextField(default="")

    objects = ParallelManager()

    class Meta:
        managed = False
        db_table = 'away"."shelf'


class Diary(models.Model):
    """Its key is a foreign key to a foreign key."""

    profile = models.OneToOneField("Profile", models.CASCADE, primary_key=True)

    objects = ParallelManager()


class Place(models.Model):
    name = models.CharField(max_length=50)

    objects = ParallelManager()

    class Meta:
        ordering = ("name",)


class Restaurant(Place):
    """Its key is the link to its parent."""

    stars = models.IntegerField(default=0)

    objects = ParallelManager()


class Pizzeria(Restaurant):
    """Its key is the link to a link."""

    ovens = models.IntegerField(default=1)

    objects = ParallelManager()


class Visit(models.Model):
    """Refers to a model that has an ordering of its own."""

    place = models.ForeignKey(Place, models.CASCADE)

    objects = ParallelManager()


class Profile(models.Model):
    """Its key is a foreign key."""

    author = models.OneToOneField(Author, models.CASCADE, primary_key=True)
    bio = models.TextField(default="")

    objects = ParallelManager()


class Seat(models.Model):
    """Its key has two columns."""

    pk = models.CompositePrimaryKey("row", "number")
    row = models.CharField(max_length=5)
    number = models.IntegerField()
    taken = models.BooleanField(default=False)

    objects = ParallelManager()


class MoodField(models.CharField):
    """Makes something of what the database gives."""

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        return value.upper() if value else None


class Everything(models.Model):
    """A field of every type that keeps plain values."""

    boolean = models.BooleanField()
    decimal = models.DecimalField(max_digits=8, decimal_places=2, null=True)
    date = models.DateField(null=True)
    time = models.TimeField(null=True)
    duration = models.DurationField(null=True)
    floating = models.FloatField(null=True)
    json = models.JSONField(null=True)
    binary = models.BinaryField(null=True)
    uuid = models.UUIDField(null=True)
    address = models.GenericIPAddressField(null=True)
    mood = MoodField(max_length=20)
    twice = models.GeneratedField(
        expression=models.F("floating") * 2, output_field=models.FloatField(null=True), db_persist=True
    )

    objects = ParallelManager()


class OwnNew(Tag):
    """Notices that it is made."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    class Meta:
        proxy = True


class WithFile(models.Model):
    """Its descriptor makes a file of the name."""

    file = models.FileField()

    objects = ParallelManager()


class ShoutingQuerySet(models.QuerySet[Any]):
    """A plain queryset class of a user's own."""

    def loud(self) -> Any:
        return self.filter(name__endswith="!")

    def count(self) -> int:
        return super().count() + 1000


class QuietQuerySet(ParallelQuerySet[Any, Any]):
    def quiet(self) -> Any:
        return self.exclude(name__endswith="!")


class MixedQuerySet(ParallelQuerySet[Any, Any], ShoutingQuerySet):
    pass


class OwnManager(ParallelManager.from_queryset(ShoutingQuerySet)):  # type: ignore[misc]
    use_in_migrations = True


class Note(models.Model):
    """Reached through every kind of door."""

    name = models.CharField(max_length=100)
    author = models.ForeignKey(Author, models.CASCADE, null=True, related_name="notes")

    objects = OwnManager()
    quiet = QuietQuerySet.as_manager()
    mixed = ParallelManager.from_queryset(MixedQuerySet)()
    plain = models.Manager()


class LockingManager(ParallelManager):
    """Whose rows are locked wherever they are read, unless all are asked for."""

    def get_queryset(self) -> Any:
        return super().get_queryset().select_for_update()


class Lease(models.Model):
    """Locked, and so read on the caller's connection, through whatever leads here."""

    author = models.ForeignKey(Author, models.CASCADE, related_name="leases")

    objects = LockingManager()


from tests.testapp import written  # noqa: E402, F401 - behind the models that these refer to


class SaleQuerySet(ParallelQuerySet[Any, Any]):
    def dear(self) -> Any:
        return self.filter(amount__gte=5)


class Shop(models.Model):
    """Is on several databases, each with its own."""

    name = models.CharField(max_length=40)
    objects: Any = ParallelManager()


class Sale(models.Model):
    """Rows of several databases, or of one that has them all."""

    number = models.IntegerField(default=0)
    amount = models.DecimalField(max_digits=9, decimal_places=2, null=True)
    weight = models.FloatField(null=True)
    name = models.CharField(max_length=40, null=True)
    at = models.DateTimeField(null=True)
    day = models.DateField(null=True)
    took = models.DurationField(null=True)
    code = models.UUIDField(null=True)
    notes = models.JSONField(null=True)
    shop = models.ForeignKey(Shop, models.CASCADE, null=True, related_name="sales")
    objects: Any = ParallelManager.from_queryset(SaleQuerySet)()
