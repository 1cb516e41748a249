from .rows import shown_values
from .views import View, view

__all__ = ["View", "shown_values", "view"]
