"""Measures of likeness and of quality. Import the module that you need."""
