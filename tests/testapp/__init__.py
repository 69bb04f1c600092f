"""Models of the tests."""
