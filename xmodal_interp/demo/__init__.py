"""The demo: the whole story on the shipped model, from held-out scenes to one report."""

from xmodal_interp.demo.running import Findings as Findings
from xmodal_interp.demo.running import run_demo as run_demo
