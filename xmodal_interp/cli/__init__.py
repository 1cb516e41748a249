"""The command line ``xmodal``: its commands, the analyses and figures they offer, its output."""
