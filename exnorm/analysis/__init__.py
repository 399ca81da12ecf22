"""Measure the ratios of trained layers."""
