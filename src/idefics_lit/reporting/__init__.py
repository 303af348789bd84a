"""Callbacks that report results: on the screen, in files, in loggers and in report.html."""
