"""VTAB-1K: check and preparation of the data, the protocol, campaigns of many workers, summaries.

`tools/vtab.py` is its command line, `docs/vtab.md` its manual. Import what you need from the modules:
`run.run_campaign` does everything, `summary.summarize` reads the results.
"""
