"""Everything that draws: figures, the report, and the live panels of the notebooks.

`plots` makes figures from numbers, `live` shows them (as a picture, or redrawn under a slider),
`answers` reads an answer sentence by sentence, `report` writes a run's page, and each panel has a
module of its own. Nothing in here measures or trains, and nothing below imports it.
"""
