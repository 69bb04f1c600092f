"""Models with the names and fields of Django's documentation, each with a manager of ours."""

from __future__ import annotations

from datetime import date
from typing import Any

from django.db import models

from parallel_orm import ParallelManager


class Blog(models.Model):
    name = models.CharField(max_length=100)
    tagline = models.TextField()

    objects = ParallelManager()


class Author(models.Model):
    name = models.CharField(max_length=200)
    email = models.EmailField()
    age = models.IntegerField(default=0)
    alias = models.CharField(max_length=50, null=True)
    goes_by = models.CharField(max_length=50, null=True)

    objects = ParallelManager()


class Entry(models.Model):
    blog = models.ForeignKey(Blog, models.CASCADE)
    headline = models.CharField(max_length=255)
    body_text = models.TextField()
    pub_date = models.DateField()
    mod_date = models.DateField(default=date.today)
    authors = models.ManyToManyField(Author)
    number_of_comments = models.IntegerField(default=0)
    number_of_pingbacks = models.IntegerField(default=0)
    rating = models.IntegerField(default=5)

    objects = ParallelManager()


class EntryDetail(models.Model):
    entry = models.OneToOneField(Entry, models.CASCADE)
    details = models.TextField()

    objects = ParallelManager()


class Dog(models.Model):
    name = models.CharField(max_length=200)
    data = models.JSONField(null=True)

    objects = ParallelManager()


class Publisher(models.Model):
    name = models.CharField(max_length=300)

    objects = ParallelManager()


class Book(models.Model):
    name = models.CharField(max_length=300)
    pages = models.IntegerField()
    price = models.DecimalField(max_digits=10, decimal_places=2)
    rating = models.FloatField()
    authors = models.ManyToManyField(Author)
    publisher = models.ForeignKey(Publisher, models.CASCADE)
    pubdate = models.DateField()

    objects = ParallelManager()


class Store(models.Model):
    name = models.CharField(max_length=300)
    books = models.ManyToManyField(Book)

    objects = ParallelManager()


class Company(models.Model):
    name = models.CharField(max_length=50)
    ticker = models.CharField(max_length=10, null=True)
    num_employees = models.IntegerField()
    num_chairs = models.IntegerField()

    objects = ParallelManager()


class Client(models.Model):
    name = models.CharField(max_length=50)
    account_registered_on = models.DateField()
    account_type = models.CharField(max_length=1, default="R")

    objects = ParallelManager()


class Experiment(models.Model):
    name = models.CharField(max_length=20)
    start_datetime = models.DateTimeField()
    start_date = models.DateField(null=True)
    start_time = models.TimeField(null=True)
    end_datetime = models.DateTimeField(null=True)

    objects = ParallelManager()


class Place(models.Model):
    name = models.CharField(max_length=50)
    address = models.CharField(max_length=80)

    objects = ParallelManager()


class Restaurant(Place):
    serves_hot_dogs = models.BooleanField(default=False)

    objects: Any = ParallelManager()
