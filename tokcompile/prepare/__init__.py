"""Calibration: run the dense model, watch regions, make state of what was seen."""
