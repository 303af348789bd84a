"""Results on the screen, in files, in loggers and in report.html."""
