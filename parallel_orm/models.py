"""The tables of runs that may be begun again: what ``run_id=`` writes down. Nothing else needs them."""

from __future__ import annotations

from django.db import models


class Run(models.Model):
    """A call that writes, by the name that its caller gave it."""

    run_id = models.CharField(max_length=200, primary_key=True)
    #: The method, and the model.
    verb = models.CharField(max_length=100)
    model = models.CharField(max_length=200)
    #: Of a call that goes through a table: the last key at its beginning, as JSON; "" where there were no rows.
    until = models.TextField(default="")
    began = models.DateTimeField(auto_now_add=True)

    class Meta:  # noqa: D106
        app_label = "parallel_orm"

    def __str__(self) -> str:
        return f"{self.run_id}: {self.verb} {self.model}"


class RunChunk(models.Model):
    """A chunk of a run: written down when it is cut, and marked in the transaction that writes its rows."""

    run = models.ForeignKey(Run, models.CASCADE, related_name="chunks")
    number = models.PositiveBigIntegerField()
    #: Which rows these are, as JSON.
    bounds = models.TextField()
    #: What is left to be done: NULL all of it; else a list of the items or keys that failed, as JSON.
    left = models.TextField(null=True)
    rows = models.PositiveBigIntegerField(default=0)

    class Meta:  # noqa: D106
        app_label = "parallel_orm"
        constraints = [  # noqa: RUF012
            models.UniqueConstraint(fields=["run", "number"], name="parallel_orm_chunk_of_run")
        ]

    def __str__(self) -> str:
        return f"chunk {self.number} of {self.run_id}"
