"""Scripts of the workshop, run from the root of a checkout: python -m benches.scripts.NAME.

gpu            `make gpu`: what needs a GPU, by a plan of plans.py; its steps are rates, profile_step, recipes, layouts, nsight,
               time_to_quality, scaling, and pytest
readme         writes the results into README.md
others         skipping_evidence, ladder_quality: results of a CPU
"""
