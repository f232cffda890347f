"""Distillation of graph models into models of rows: one method a file."""
