"""Benchmarks: ``make bench``. Never part of the test run; raw figures are printed, medians go to the summary."""
