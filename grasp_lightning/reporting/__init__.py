"""Numbers, terminal table, plots, page and model card of a finished run.

``metrics`` and ``tables`` import no torch, matplotlib or jinja2, so that the table prints quickly.
"""
