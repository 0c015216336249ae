"""Schedules from measured errors: measured on a model, scanned for a threshold, searched for a speedup."""

from fastcache.calibration.scan import ErrorCurves, greedy_schedule
from fastcache.calibration.scan.calibrated import Calibration

__all__ = ["Calibration", "ErrorCurves", "greedy_schedule"]
