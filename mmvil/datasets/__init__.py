"""Data sets and transforms for OpenMMLab pipelines."""
