"""The demo: the whole story on the shipped model, from held-out scenes to one report."""

from xmodal_interp.demo.running import Findings, run_demo

__all__ = [
    "Findings",
    "run_demo",
]
