"""Data sources: the competition's files, Hub data sets, tables, streams, synthetic pages."""
