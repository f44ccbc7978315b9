"""Everything that draws: figures, the report, and the live panels of the notebooks.

`plots` makes figures from numbers, `picture` shows them (still, or redrawn under a slider),
`background` runs what takes long on a thread that can be stopped, `answers` reads an answer
sentence by sentence, `heatmap` colours it word by word, `report` writes a run's page, `marking`
holds an answer of one's own against a rubric, and `panels` has a module for each live panel.
Nothing in here measures or trains, and nothing below imports it.
"""
