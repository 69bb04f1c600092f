"""How fast it is, and where it is not: ``python -m benchmarks``. See README.md beside this file."""
