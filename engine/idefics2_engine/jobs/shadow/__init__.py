"""Some rows of a job on the reference path as well: choice, comparison, and what it shows."""
