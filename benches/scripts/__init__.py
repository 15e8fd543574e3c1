"""Scripts of the workshop, run from the root of a checkout: python -m benches.scripts.NAME.

gpu                what needs a GPU (`make gpu`), by a plan of plans.py; its steps are pytest and rates, profile_step, recipes,
                   layouts, nsight, time_to_quality, scaling
readme             results into README.md: sections.py and gpu_section.py write each section
skipping_evidence  what skipping layers saves and costs, on a CPU
ladder_quality     whether what makes a step faster costs quality, on a CPU
"""
