"""Hyperparameter search: search file → trials, run as the cells of a study → report, and a study that confirms it."""
