"""Helpers for tests of code that embeds idcore; shipped with the package."""
