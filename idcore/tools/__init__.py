"""Conversion tools: run as ``python -m idcore.tools.NAME``. Nothing here is imported by the engine itself."""
