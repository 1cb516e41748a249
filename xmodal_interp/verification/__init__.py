"""Check on the user's own model and input that recordings can be trusted."""

from xmodal_interp.verification.doctor import Checkup, doctor

__all__ = ["Checkup", "doctor"]
