"""Run directories: record, metrics, provenance, figures, report, tracking, verification."""
