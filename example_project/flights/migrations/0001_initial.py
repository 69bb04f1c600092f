"""The tables."""

# ruff: noqa: RUF012 (lists, as Django writes them)
from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Airline",
            fields=[
                ("carrier", models.CharField(max_length=2, primary_key=True, serialize=False)),
                ("name", models.CharField(max_length=40)),
            ],
        ),
        migrations.CreateModel(
            name="Airport",
            fields=[
                ("faa", models.CharField(max_length=3, primary_key=True, serialize=False)),
                ("name", models.CharField(max_length=60)),
                ("lat", models.FloatField()),
                ("lon", models.FloatField()),
                ("alt", models.IntegerField()),
                ("tz", models.SmallIntegerField(help_text="Hours from UTC in winter.")),
                (
                    "dst",
                    models.CharField(help_text="Summer time: A as in the US, N none, U unknown.", max_length=1),
                ),
                ("tzone", models.CharField(max_length=32, null=True)),
            ],
        ),
        migrations.CreateModel(
            name="Plane",
            fields=[
                ("tailnum", models.CharField(max_length=6, primary_key=True, serialize=False)),
                ("year", models.PositiveSmallIntegerField(help_text="Year of make.", null=True)),
                ("type", models.CharField(max_length=32)),
                ("manufacturer", models.CharField(max_length=32)),
                ("model", models.CharField(max_length=24)),
                ("engines", models.PositiveSmallIntegerField()),
                ("seats", models.PositiveSmallIntegerField()),
                ("speed", models.PositiveSmallIntegerField(null=True)),
                ("engine", models.CharField(max_length=16)),
            ],
        ),
        migrations.CreateModel(
            name="Weather",
            fields=[
                (
                    "id",
                    models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID"),
                ),
                ("time_hour", models.DateTimeField()),
                ("temp", models.FloatField(null=True)),
                ("dewp", models.FloatField(null=True)),
                ("humid", models.FloatField(null=True)),
                (
                    "wind_dir",
                    models.PositiveSmallIntegerField(help_text="Where it blows from, in degrees.", null=True),
                ),
                ("wind_speed", models.FloatField(null=True)),
                ("wind_gust", models.FloatField(null=True)),
                ("precip", models.FloatField()),
                ("pressure", models.FloatField(null=True)),
                ("visib", models.FloatField()),
                (
                    "origin",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        to="flights.airport",
                    ),
                ),
            ],
            options={
                "verbose_name_plural": "weather",
            },
        ),
        migrations.CreateModel(
            name="Flight",
            fields=[
                (
                    "id",
                    models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID"),
                ),
                ("date", models.DateField(help_text="Of the scheduled departure, in New York.")),
                ("hour", models.PositiveSmallIntegerField()),
                ("minute", models.PositiveSmallIntegerField()),
                ("time_hour", models.DateTimeField(db_index=True)),
                ("number", models.PositiveSmallIntegerField()),
                ("tailnum", models.CharField(max_length=6, null=True)),
                ("dest", models.CharField(max_length=3)),
                ("dep_time", models.PositiveSmallIntegerField(null=True)),
                ("dep_delay", models.SmallIntegerField(null=True)),
                ("sched_arr_time", models.PositiveSmallIntegerField()),
                ("arr_time", models.PositiveSmallIntegerField(null=True)),
                ("arr_delay", models.SmallIntegerField(null=True)),
                ("air_time", models.PositiveSmallIntegerField(null=True)),
                ("distance", models.PositiveSmallIntegerField()),
                (
                    "airline",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        to="flights.airline",
                    ),
                ),
                (
                    "dest_airport",
                    models.ForeignKey(
                        null=True,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="arrivals",
                        to="flights.airport",
                    ),
                ),
                (
                    "origin",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="departures",
                        to="flights.airport",
                    ),
                ),
                (
                    "plane",
                    models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, to="flights.plane"),
                ),
                (
                    "weather",
                    models.ForeignKey(null=True, on_delete=django.db.models.deletion.PROTECT, to="flights.weather"),
                ),
            ],
        ),
        migrations.AddConstraint(
            model_name="weather",
            constraint=models.UniqueConstraint(fields=("origin", "time_hour"), name="one_report_an_hour"),
        ),
    ]
