"""Schedules from measured errors: measured on a model, scanned for a threshold, searched for a speedup."""

from fastcache.calibration.calibrated import Calibration
from fastcache.calibration.scan import ErrorCurves, greedy_schedule

__all__ = ["Calibration", "ErrorCurves", "greedy_schedule"]
