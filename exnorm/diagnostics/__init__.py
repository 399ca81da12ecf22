"""Checks of an installation and of data sets, benchmarks, and measurements of trained models."""
