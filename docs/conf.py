"""Sphinx, which makes a site of this folder: `make docs`, without a network, and a warning is an error."""

project = "potstill"
copyright = "2026, the potstill authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "potstill"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
myst_heading_anchors = 3  # links to headings as GitHub writes them
highlight_language = "text"  # of blocks that name none: formulas
