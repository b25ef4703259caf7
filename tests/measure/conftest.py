"""The makers of records serve the tests of what is measured and of what is reported."""

from report.conftest import make

__all__ = ["make"]
