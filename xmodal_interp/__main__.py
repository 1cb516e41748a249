"""``python -m xmodal_interp`` is the command ``xmodal``."""

from xmodal_interp.cli.commands import app

if __name__ == "__main__":
    app(prog_name="python -m xmodal_interp")
