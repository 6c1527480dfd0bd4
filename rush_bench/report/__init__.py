"""Tables, figures and published numbers, made from records alone."""

from rush_bench.report.tables import table as table
