"""For tools that still ask for a setup.py. Everything they want to know is in pyproject.toml."""

from setuptools import setup

setup()
