"""Reporting: turns the results of runs into report.md, report.html, comparison tables and plots.

`report` renders report.md from the view models in `view`, `brief_view` and `attack_view` and the templates in
`templates/`. `html_report` converts the same sections to report.html, and adds the charts of `charts` and the answers
of `items`. `curves` has the points of all curves, `plots` draws the plots of one run, and `comparison_plots` those of a
comparison. `comparison` collects and judges the figures of several runs, `tables` renders them as Markdown, and
`markers` keeps tables in pages up to date. `names` has titles of models and kinds of question, and `markdown` escapes
text from data and paths. `terminal` shows a run in a few lines, `finished_run` reads one, `examples` selects the people
who are shown, `model_card`, `certificate_page` and `requests_page` write pages of their own, and `main_figures` has the
accuracies that stand for a run.

Contract: figures come from results.json and the answers; nothing here evaluates a model. Code asks for the roles of
evaluation sets and the metric registry, never for set names, but for those of `benchmarks.partial`, which divides the
questions about one person.

To add a section to both reports: write a function in `view` that returns the values of the section (None to leave it
out), list it in `view.SECTIONS`, and write `templates/NAME.md.j2`. To add a table for pages: write a function in
`tables` and list it in `tables.TABLES`.
"""
