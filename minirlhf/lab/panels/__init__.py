"""The live panels of the notebooks, a module each, with the still figures that belong to them.

In the order of the course: `first_look` (00), `labelers` (01), `next_word` (02), `ranking` (03),
`penalty` (04), `updates` (05), `goodhart` (06), `batch` with `batch_table` and `batch_plots`, and
`steered_run` (07), `remedy` with `remedy_plots`, and `explorer` (08).
"""
