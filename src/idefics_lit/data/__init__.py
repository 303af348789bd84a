"""Where questions and pages come from."""
