"""What receivers set, and what the demo writes."""

# ruff: noqa: RUF012 (lists, as Django writes them)
from __future__ import annotations

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("flights", "0001_initial")]

    operations = [
        migrations.AddField("airline", "slug", models.SlugField(default="", editable=False)),
        migrations.AddField("flight", "ident", models.CharField(default="", editable=False, max_length=7)),
        migrations.AddField("flight", "lost", models.FloatField(editable=False, null=True)),
        migrations.CreateModel(
            name="Notice",
            fields=[
                (
                    "id",
                    models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID"),
                ),
                ("minutes", models.SmallIntegerField()),
                ("text", models.CharField(max_length=100)),
                ("reference", models.CharField(default="", editable=False, max_length=12)),
                (
                    "flight",
                    models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, to="flights.flight"),
                ),
            ],
        ),
    ]
