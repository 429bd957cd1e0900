"""L7: what runs teach: their log, cost tables corrected by them, calibration and trial runs."""
