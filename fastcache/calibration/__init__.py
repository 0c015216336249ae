"""Schedules from measured errors between steps: measured on a model, scanned for a threshold, searched for a
speedup.
"""

from fastcache.calibration.scan import Calibration, ErrorCurves, greedy_schedule

__all__ = ["Calibration", "ErrorCurves", "greedy_schedule"]
