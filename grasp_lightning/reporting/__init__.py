"""What a finished run tells: numbers, a terminal table, plots, a page, and the model card.

``metrics`` and ``tables`` import neither torch nor matplotlib nor jinja2, so that the table of a
finished run prints quickly; import from the modules, this package re-exports nothing.
"""
