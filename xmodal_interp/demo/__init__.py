"""Demo of the toolkit on the shipped model, from held-out scenes to a report."""

from xmodal_interp.demo.pipeline import Findings, run_demo

__all__ = [
    "Findings",
    "run_demo",
]
