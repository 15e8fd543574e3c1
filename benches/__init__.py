"""How fast it is: benches (bench_*.py, run by pytest), what they share, their results, and in scripts/ what writes results and plans."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
RESULTS = ROOT / "benches/results"
