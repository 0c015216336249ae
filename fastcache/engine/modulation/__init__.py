"""Shifts, scales and gates of a step: a table of all steps where they were announced, or all gates in one
product.
"""
