"""Models whose saving is heard: every signal, ``save()`` and ``on_commit()`` of theirs leaves a row behind."""

from __future__ import annotations

import json
import uuid
from typing import Any

from django.core.exceptions import ValidationError
from django.db import models, transaction
from django.db.models.signals import m2m_changed, post_delete, post_save, pre_delete, pre_save

from parallel_orm import ParallelManager


class Heard(models.Model):
    """What was heard, in the transaction in which it was said."""

    what = models.CharField(max_length=30)
    sender = models.CharField(max_length=50)
    name = models.CharField(max_length=100)
    told = models.TextField(default="")

    class Meta:
        app_label = "testapp"


class Crew(models.Model):
    name = models.CharField(max_length=50, unique=True)

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"


class Ship(models.Model):
    """Fields of the kinds that a save does something with."""

    name = models.CharField(max_length=50, unique=True)
    port = models.ForeignKey("testapp.Place", models.CASCADE, null=True, blank=True, related_name="ships")
    speed = models.IntegerField(default=1)
    built = models.DateTimeField(auto_now_add=True)
    changed = models.DateTimeField(auto_now=True)
    papers = models.JSONField(default=dict)
    log = models.FileField(upload_to="logs", null=True)
    double = models.GeneratedField(
        expression=models.F("speed") * 2, output_field=models.IntegerField(), db_persist=True
    )
    class_of = models.CharField(max_length=10, db_default="first")
    saves = models.IntegerField(default=0)
    crews = models.ManyToManyField(Crew, related_name="ships")

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.saves += 1
        super().save(*args, **kwargs)

    def clean(self) -> None:
        if self.speed < 0:
            raise ValidationError({"speed": "backwards"})


class Ferry(Ship):
    """In a table of its own, below that of another model."""

    decks = models.IntegerField(default=2)

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"


class CarFerry(Ferry):
    lanes = models.IntegerField(default=4)

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"


class Flagship(Ship):
    objects = ParallelManager()

    class Meta:
        app_label = "testapp"
        proxy = True


class Buoy(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    name = models.CharField(max_length=50)

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"


class Berth(models.Model):
    pk = models.CompositePrimaryKey("quay", "number")
    quay = models.CharField(max_length=10)
    number = models.IntegerField()
    name = models.CharField(max_length=50, default="")

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"


class Tug(models.Model):
    """Deleted with its ship."""

    name = models.CharField(max_length=50, default="")
    ship = models.ForeignKey(Ship, models.CASCADE, related_name="tugs")

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"
        order_with_respect_to = "ship"


class Hull(models.Model):
    hull = models.AutoField(primary_key=True)
    colour = models.CharField(max_length=10, default="white")

    class Meta:
        app_label = "testapp"


class Engine(models.Model):
    engine = models.AutoField(primary_key=True)
    fuel = models.CharField(max_length=10, default="diesel")

    class Meta:
        app_label = "testapp"


class Motorboat(Hull, Engine):
    """With two parents, in whose tables it has different keys."""

    length = models.IntegerField(unique=True)

    objects = ParallelManager()

    class Meta:
        app_label = "testapp"


HEARD = (Ship, Ferry, CarFerry, Flagship, Buoy, Berth, Tug)


def hear(what: str, sender: Any, instance: Any, using: str, **told: Any) -> None:
    told.pop("signal", None)
    told.pop("origin", None)
    if told.get("update_fields") is not None:
        told["update_fields"] = sorted(told["update_fields"])
    if "model" in told:
        told = {"action": told["action"], "number": len(told["pk_set"] or ())}
    name = str(instance.name)
    heard = Heard(what=what, sender=sender.__name__, name=name, told=json.dumps(told, sort_keys=True))
    with transaction.atomic(using=using):
        heard.save(using=using)
    if what == "post_save":
        transaction.on_commit(
            lambda: Heard(what="on_commit", sender=sender.__name__, name=name).save(using=using), using=using
        )
    if what == "pre_save" and name.startswith("poison"):
        raise ValueError(f"{name} is not to be saved")


def _listen() -> None:
    for signal, what in (
        (pre_save, "pre_save"),
        (post_save, "post_save"),
        (pre_delete, "pre_delete"),
        (post_delete, "post_delete"),
    ):
        for model in HEARD:

            def receive(sender: Any, instance: Any, using: str, *, what: str = what, **told: Any) -> None:
                hear(what, sender, instance, using, **told)

            signal.connect(receive, sender=model, weak=False)

    def related(sender: Any, instance: Any, using: str, **told: Any) -> None:
        hear("m2m_changed", sender, instance, using, **told)

    m2m_changed.connect(related, sender=Ship.crews.through, weak=False)


_listen()
